"""Metrics of TRACE equal the values of the original libraries; ceilings, empty texts and floors are as published."""

import json

import numpy as np
import pytest

from recollect.continual.metric_accuracy import exact_match, letter_match, number_match
from recollect.continual.metric_bleu import bleu
from recollect.continual.metric_edit import edit_similarity, restore_literals
from recollect.continual.metric_rouge import rouge_l
from recollect.continual.metric_sari import sari, tokenize_13a
from recollect.continual.trace_data import TraceRecord, load_trace
from recollect.continual.trace_floors import last_code_line, trace_floors
from recollect.continual.trace_prompts import paragraph
from recollect.continual.trace_scores import score_task
from recollect.continual.trace_tasks import MINUTEN, SCIENCE_QA, STANDARD_ORDER, trace_task


@pytest.fixture(scope="module")
def trace(shared_data):
    return load_trace(shared_data / "trace")


@pytest.fixture(scope="module")
def golden(shared_data):
    return json.loads((shared_data / "trace" / "published" / "metric_golden.json").read_text(encoding="utf-8"))


def test_rouge_l_equals_the_library_in_both_orders_of_arguments(golden):
    cases = golden["rouge_l"]
    assert len(cases) == 18
    for case in cases:
        text, answer = case["prediction"], case["reference"]
        assert rouge_l(answer, text) == pytest.approx(case["rouge_l_f"], abs=1e-9)
        assert rouge_l(text, answer) == pytest.approx(case["rouge_l_f_swapped_arguments"], abs=1e-9)
    # The orders differ, so the benchmark's one is part of the metric.
    assert max(abs(case["rouge_l_f"] - case["rouge_l_f_swapped_arguments"]) for case in cases) > 0.01


def test_bleu_equals_the_library(golden):
    for case in golden["rouge_l"]:
        assert bleu(case["prediction"], case["reference"], 1) == pytest.approx(case["bleu1"], abs=1e-9)
        assert bleu(case["prediction"], case["reference"], 4) == pytest.approx(case["bleu4"], abs=1e-9)


def test_edit_similarity_equals_both_backends_of_the_library(golden):
    cases = golden["edit_similarity"]
    assert len(cases) == 18
    for case in cases:
        text, answer = case["prediction"], case["reference"]
        assert restore_literals(text) == case["prediction_post"]
        assert restore_literals(answer) == case["reference_post"]
        assert edit_similarity(text, answer) == case["similarity_difflib"]
        assert edit_similarity(text, answer, "levenshtein") == case["similarity_levenshtein"]
    assert any(case["similarity_difflib"] != case["similarity_levenshtein"] for case in cases)


def test_sari_equals_the_library_for_both_sources(golden):
    cases = golden["sari"]
    assert len(cases) == 18
    for case in cases:
        answers = [case["reference"]]
        whole, body = case["source_full_prompt"], case["source_paragraph"]
        assert sari(whole, case["prediction"], answers) == pytest.approx(case["sari_full_prompt_source"], abs=1e-9)
        assert sari(body, case["prediction"], answers) == pytest.approx(case["sari_paragraph_source"], abs=1e-9)
        assert paragraph(MINUTEN, whole) == body


def test_the_well_known_sari_example():
    value = sari(
        "About 95 species are currently accepted .",
        "About 95 you now get in .",
        [
            "About 95 species are currently known .",
            "About 95 species are now accepted .",
            "95 species are now accepted .",
        ],
    )
    assert value == pytest.approx(26.953601953601954, abs=1e-9)


def test_13a_words():
    assert tokenize_13a("A &quot;B&quot; 1,000.5 (3-4) x-\ny.") == [
        "a",
        '"',
        "b",
        '"',
        "1,000.5",
        "(",
        "3",
        "-",
        "4",
        ")",
        "xy",
        ".",
    ]
    assert tokenize_13a("  ") == [""]


def test_predictions_equal_to_the_answers_reach_the_ceiling(trace):
    for name, data in trace.items():
        rows = data.test[:25]
        scores = score_task(data.task, rows, [record.answer for record in rows])
        if data.task.metric in ("accuracy", "edit_similarity"):
            assert (scores.items[scores.primary] == 1.0).all(), name
        else:
            assert scores.value >= 0.99, name
    rows = trace["ScienceQA"].test[:25]
    scores = score_task(SCIENCE_QA, rows, [record.answer for record in rows])
    assert scores.means["accuracy_normalized"] == 1.0


def test_empty_predictions_score_zero_and_do_not_raise(trace):
    for data in trace.values():
        rows = data.test[:20]
        scores = score_task(data.task, rows, [""] * len(rows))
        assert all((values == 0.0).all() for values in scores.items.values())


def test_trivial_predictors_reach_the_published_floors(trace):
    floors = trace_floors(trace)
    percent = {name: 100 * floor.value for name, floor in floors.items()}
    expected = {
        "C-STANCE": 30.0,
        "FOMC": 52.1,
        "MeetingBank": 29.4,
        "Py150": 38.5,
        "ScienceQA": 44.0,
        "NumGLUE-cm": 2.5,
        "NumGLUE-ds": 12.0,
        "20Minuten": 37.1,
    }
    assert tuple(percent) == STANDARD_ORDER
    for name, value in expected.items():
        assert percent[name] == pytest.approx(value, abs=0.1), name
    assert np.mean(list(percent.values())) == pytest.approx(30.7, abs=0.05)
    others = floors["20Minuten"].others
    assert 100 * others["first 3 sentences"] == pytest.approx(36.7, abs=0.1)
    assert 100 * others["copy"] == pytest.approx(34.4, abs=0.1)


def test_scores_follow_their_examples_when_the_order_changes(trace):
    for name in ("FOMC", "Py150", "NumGLUE-cm"):
        data = trace[name]
        rows = data.test[:30]
        texts = [other.answer for other in data.test[5:35]]
        forward = score_task(data.task, rows, texts)
        backward = score_task(data.task, rows[::-1], texts[::-1])
        assert (forward.items[forward.primary] == backward.items[forward.primary][::-1]).all()


def test_the_official_accuracy_is_exact_and_the_lenient_one_is_not():
    assert exact_match("A", "A") == 1.0
    assert exact_match(" A", "A") == exact_match("A\n", "A") == exact_match("a", "A") == 0.0
    assert letter_match(" A\n", "A") == letter_match("The answer is B.", "B") == letter_match("(C)", "C") == 1.0
    assert letter_match("Answer: D", "D") == 1.0  # the A of "Answer" is no option
    assert letter_match("支持A", "A") == 1.0
    assert letter_match("neutral", "C") == letter_match("b", "B") == 0.0
    assert number_match("5.0", "5") == number_match(" 5 moles", "5") == number_match("1,200", "1200") == 1.0
    assert number_match("-5", "5") == number_match("no number", "5") == number_match("15", "5") == 0.0
    assert number_match("\u22123.50", "-3.5") == number_match(".5", "0.5") == 1.0
    assert number_match(" Friday", "Friday") == 1.0
    assert number_match("friday", "Friday") == 0.0


def test_scienceqa_reads_the_letter_and_the_explanation():
    rows = [TraceRecord("p", "B\nBecause water boils.", "")] * 5
    scores = score_task(SCIENCE_QA, rows, ["B", "B\nBecause water boils.", "B)", "", "A\nBecause water boils."])
    assert scores.items["accuracy"].tolist() == [1, 1, 1, 0, 0]
    assert scores.items["explanation_bleu_1"].tolist() == [0, 1, 0, 0, 1]
    assert not scores.items["explanation_bleu_4"].any()  # three words hold no four in a row
    assert scores.items["explanation_rouge_l"][0] == 0.0  # no explanation at all
    assert scores.items["explanation_rouge_l"][4] == pytest.approx(1.0, abs=1e-6)


def test_both_sari_sources_and_the_backend_are_named(trace):
    data = trace["20Minuten"]
    rows, texts = data.test[:5], ["Ein kurzer Satz."] * 5
    whole = score_task(data.task, rows, texts)
    body = score_task(data.task, rows, texts, sari_source="paragraph")
    assert (whole.items["sari"] == body.items["sari_prompt"]).all()
    assert (whole.items["sari_paragraph"] == body.items["sari"]).all()
    assert (whole.items["sari"] != body.items["sari"]).any()
    assert (whole.settings, body.settings) == ({"sari_source": "prompt"}, {"sari_source": "paragraph"})
    code = trace["Py150"]
    scores = score_task(code.task, code.test[:3], ["pass"] * 3, similarity_backend="levenshtein")
    assert scores.to_json()["settings"] == {"similarity_backend": "levenshtein"}
    assert trace_task("Py150").metric == scores.primary


def test_floors_are_scored_as_the_answers_are(trace):
    some = {name: trace[name] for name in ("Py150", "20Minuten")}
    usual = trace_floors(some)
    other = trace_floors(some, similarity_backend="levenshtein", sari_source="paragraph")
    for name, one in some.items():
        assert abs(other[name].value - usual[name].value) > 1e-4
        predictions = [last_code_line(row.prompt) if name == "Py150" else "-" for row in one.test]
        how = {"similarity_backend": "levenshtein", "sari_source": "paragraph"}
        assert other[name].value == score_task(one.task, one.test, predictions, **how).value


def test_the_last_line_of_code():
    assert last_code_line("<s> a = <NUM_LIT:1> <EOL> b ( ) <EOL>") == "b ( )"
    assert last_code_line("<s>") == ""


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # Distinct words alone count: two of two.
        ("a a a b", "a b", 1.0),
        # A full stop ends a sentence, in a number too; the words of every piece are united.
        ("1.5", "5.1", 1.0),
        (".", "a", 0.0),
        ("a b", "c d", 0.0),
        # Blanks after the last stop are a piece with one empty word, which is a word like any other.
        ("a. ", "a", 2 * (1 / 1) * (1 / 2) / (1 / 1 + 1 / 2)),
    ],
)
def test_rouge_l_by_hand(first, second, expected):
    assert rouge_l(first, second) == pytest.approx(expected, abs=1e-7)


def test_bleu_by_hand():
    # Two of three words; precision 2/3, shorter than the reference of four: exp(1 - 4/3).
    assert bleu("the cat. ran", "the cat sat down", 1) == pytest.approx(2 / 3 * np.exp(1 - 4 / 3))
    assert bleu("the cat", "the cat sat down", 4) == 0.0


def test_long_lines_are_matched_as_the_library_matches_them():
    # From 200 characters on, difflib anchors no match at a character that is common in the reference.
    prediction, reference = "foo ( a , b ) ; " * 14, "bar ( b , a ) ; " * 15
    assert edit_similarity(prediction, reference) == 0
    assert edit_similarity(prediction, reference, "levenshtein") == 67
