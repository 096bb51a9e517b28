"""Metrics, shortening, subsets and aggregates keep their promises for any input."""

import itertools
import json
import random
from difflib import SequenceMatcher

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.continual.aggregates import summarize
from recollect.continual.evaluation_plan import Cell, evaluation_plan
from recollect.continual.metric_accuracy import letter_match, number_match
from recollect.continual.metric_bleu import bleu
from recollect.continual.metric_edit import common_subsequence_length, edit_similarity
from recollect.continual.metric_rouge import common_words, rouge_l
from recollect.continual.metric_sari import sari
from recollect.continual.trace_data import load_trace
from recollect.continual.trace_intervals import RunScores, aggregate_intervals, per_seed
from recollect.continual.trace_prompts import fit_prompt, split_prompt
from recollect.continual.trace_tasks import STANDARD_ORDER, trace_task

texts = st.text(alphabet="ab. c\n<>_:1", max_size=30)
words = st.lists(st.sampled_from("abcd"), max_size=7)


def longest_by_search(first, second):
    best = 0
    for chosen in range(1 << len(first)):
        part = [first[at] for at in range(len(first)) if chosen >> at & 1]
        rest = iter(second)
        if all(word in rest for word in part):
            best = max(best, len(part))
    return best


@settings(max_examples=150, deadline=None)
@given(texts, texts)
def test_metrics_stay_in_their_range(prediction, reference):
    assert 0.0 <= rouge_l(prediction, reference) <= 1.0
    assert 0.0 <= bleu(prediction, reference, 4) <= bleu(prediction, reference, 1) + 1e-12 <= 1.0 + 1e-9
    assert 0 <= edit_similarity(prediction, reference) <= 100
    assert 0.0 <= sari(reference, prediction, [reference]) <= 100.0 + 1e-9
    assert letter_match(prediction, reference) in (0.0, 1.0)
    assert number_match(prediction, reference) in (0.0, 1.0)


@settings(max_examples=100, deadline=None)
@given(words, words)
def test_the_common_subsequence_is_a_longest_one(first, second):
    expected = longest_by_search(first, second)
    assert common_subsequence_length("".join(first), "".join(second)) == expected
    found = common_words(first, second)
    assert found <= set(first) & set(second)
    assert len(found) <= expected
    assert bool(found) == bool(expected)


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet="abc ", min_size=1, max_size=40), st.text(alphabet="abc ", min_size=1, max_size=40))
def test_the_indel_ratio_is_at_least_the_matching_blocks(first, second):
    # Matching blocks are one common subsequence; the longest has no fewer characters.
    blocks = round(100 * SequenceMatcher(None, first, second).ratio())
    assert edit_similarity(first, second, "levenshtein") >= (100 if first == second else blocks)


TASK_NAMES = st.sampled_from([name for name in STANDARD_ORDER if name != "C-STANCE"])


@settings(max_examples=120, deadline=None)
@given(TASK_NAMES, st.text(alphabet="ab \n.", min_size=1, max_size=300), st.integers(5, 200), st.integers(1, 7))
def test_a_shortened_prompt_fits_and_keeps_its_ends(name, body, budget, per_token):
    task = trace_task(name)
    ending = task.cue_from + "A. x\n\nAnswer:" if name == "ScienceQA" else task.cue_from
    prompt = task.prefix + body + ending
    assert "".join(split_prompt(task, prompt)) == prompt

    def n_tokens(text):  # a token of `per_token` letters, and one for every end of line
        return -(-len(text) // per_token) + text.count("\n")

    parts = split_prompt(task, prompt)
    budget += n_tokens(parts.prefix + parts.cue)
    fitted = fit_prompt(task, prompt, n_tokens, budget)
    assert n_tokens(fitted.text) <= budget
    assert len(fitted.text) + fitted.n_dropped == len(prompt)
    assert fitted.text.startswith(parts.prefix)
    assert fitted.text.endswith(parts.cue)
    if fitted.n_dropped:
        assert n_tokens(fitted.text) >= budget - 2  # one more character is one or two tokens more
        kept = len(parts.body) - fitted.n_dropped
        expected = parts.body[fitted.n_dropped :] if task.keep == "tail" else parts.body[:kept]
        assert fitted.text == parts.prefix + expected + parts.cue


def test_code_keeps_its_tail_and_prose_its_head():
    code = fit_prompt(trace_task("Py150"), "0123456789", len, 4)
    assert code.text == "6789"
    task = trace_task("NumGLUE-cm")
    prose = fit_prompt(task, task.prefix + "0123456789" + task.cue_from, len, len(task.prefix + task.cue_from) + 4)
    assert prose.text == task.prefix + "0123" + task.cue_from


def test_the_target_of_a_stance_and_the_options_of_a_question_are_never_cut():
    stance = trace_task("C-STANCE")
    parts = split_prompt(stance, stance.prefix + "文本" * 50 + "\n对象：\n饭圈文化\n态度：")
    assert parts.cue == "\n对象：\n饭圈文化\n态度："
    science = trace_task("ScienceQA")
    parts = split_prompt(science, science.prefix + "Why?\n\nHint:\nx\n\nChoices:\nA. a\nB. b\n\nAnswer:")
    assert parts.body == "Why?\n\nHint:\nx"


@pytest.fixture
def folder(tmp_path):
    task = trace_task("FOMC")
    for split, start in (("train", 0), ("eval", 40), ("test", 60)):
        rows = [
            {"prompt": f"{task.prefix}Text {start + at}.\nStance:", "answer": "ABC"[at % 3]}
            for at in range({"train": 40, "eval": 20, "test": 30}[split])
        ]
        path = tmp_path / "FOMC" / f"{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path


def test_smaller_draws_are_part_of_larger_ones_and_seeds_differ(folder):
    def drawn(size, seed=0):
        return load_trace(folder, ["FOMC"], train_examples=size, seed=seed)["FOMC"].train

    whole = drawn(0)
    sizes = [drawn(size) for size in (5, 12, 39, 100)]
    for smaller, larger in itertools.pairwise(sizes):
        assert set(smaller) <= set(larger)
        assert list(smaller) == [record for record in whole if record in smaller]  # file order
    assert [len(rows) for rows in sizes] == [5, 12, 39, 40]
    assert drawn(12) == drawn(12)
    assert drawn(12, seed=1) != drawn(12)


def test_leaks_are_counted_and_dropped_from_what_comes_before(folder):
    path = folder / "FOMC" / "train.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    test = json.loads((folder / "FOMC" / "test.json").read_text(encoding="utf-8"))
    held = json.loads((folder / "FOMC" / "eval.json").read_text(encoding="utf-8"))
    leaked = {**test[3], "prompt": test[3]["prompt"].replace("Text 63.", "Text  63. ")}
    path.write_text(json.dumps([*rows, leaked, held[0], {**rows[0], "answer": "C"}]), encoding="utf-8")
    official = load_trace(folder, ["FOMC"])["FOMC"]
    assert (official.facts.test_in_train, official.facts.eval_in_train, official.facts.test_in_eval) == (1, 1, 0)
    assert official.facts.train.n_conflicting_prompts == 1
    assert len(official.train) == 43
    dropped = load_trace(folder, ["FOMC"], drop_leaks=True)["FOMC"]
    assert len(dropped.train) == 41
    assert dropped.test == official.test
    clean = load_trace(folder, ["FOMC"], clean=True)["FOMC"]
    assert len(clean.train) == 40
    assert clean.train[0].answer == rows[0]["answer"]
    assert len(load_trace(folder, ["FOMC"], clean=True, dedup=False)["FOMC"].train) == 41


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10**6))
def test_relations_between_the_variants(n_tasks, seed):
    matrix = np.random.Generator(np.random.Philox(seed)).random((n_tasks, n_tasks))
    result = summarize(matrix, untouched=matrix[0], floors=np.zeros(n_tasks))
    assert result.bwt_T * n_tasks == pytest.approx(result.bwt * (n_tasks - 1))
    assert result.bwt_clipped_T <= min(result.bwt_T, 0.0) + 1e-12
    assert result.forgetting >= -result.bwt - 1e-12
    assert result.forgetting_nonnegative >= max(result.forgetting, 0.0) - 1e-12
    assert result.op_norm == pytest.approx(result.op)
    above = matrix.copy()
    above[np.triu_indices(n_tasks, 1)] = np.nan
    lower = summarize(above)
    assert (lower.bwt, lower.forgetting) == (result.bwt, result.forgetting)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6))
def test_aggregates_of_examples_are_those_of_the_means(n_tasks, n_runs, seed):
    shuffle = random.Random(seed)
    names = tuple(f"t{at}" for at in range(n_tasks))
    runs = []
    for _ in range(n_runs):
        cells = [*evaluation_plan(n_tasks, "square", untouched=True)]
        shuffle.shuffle(cells)  # the order in which cells were scored says nothing
        runs.append(RunScores(names, {cell: np.linspace(0, shuffle.random(), 3 + cell.task) for cell in cells}))
    intervals = aggregate_intervals(runs, floors=np.full(n_tasks, 0.1), n=50, seed=seed)
    for name, values in per_seed(runs, floors=np.full(n_tasks, 0.1)).items():
        single = [summarize(run.matrix, run.rounds[0], floors=np.full(n_tasks, 0.1)).to_json()[name] for run in runs]
        if n_tasks > 1 or name in ("op", "average_incremental", "op_norm"):
            assert values == pytest.approx(single)
            assert intervals[name].value == pytest.approx(np.mean(single))
    again = aggregate_intervals(runs, floors=np.full(n_tasks, 0.1), n=50, seed=seed)
    assert again["op"] == intervals["op"]
    assert set(runs[0].cells) >= {Cell(0, 0)}
