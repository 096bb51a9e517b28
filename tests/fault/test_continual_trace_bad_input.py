"""Bad task folders, prompts, predictions and options are refused by name: file, row, field, value."""

import json

import numpy as np
import pytest

from recollect.continual.aggregates import summarize
from recollect.continual.evaluation_plan import Cell, evaluation_plan
from recollect.continual.examples import Lengths, TaskTokenizer, encode_example, encode_prompt, pad_left
from recollect.continual.general_ability import general_ability_delta, score_general
from recollect.continual.general_items import GENERAL_ITEMS
from recollect.continual.trace_data import TraceRecord, load_replay_buffer, load_trace
from recollect.continual.trace_intervals import RunScores, aggregate_intervals, difference_intervals
from recollect.continual.trace_prompts import fit_prompt, split_prompt
from recollect.continual.trace_scores import score_task
from recollect.continual.trace_tasks import trace_task, trace_tasks
from recollect.errors import ConfigError, DataError, InputError, ModelFileError, UnknownName

FOMC = trace_task("FOMC")


def row(text="Rates rise.", answer="B"):
    return {"prompt": f"{FOMC.prefix}{text}\nStance:", "answer": answer}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "FOMC").mkdir()
    for split in ("train", "eval", "test"):
        (tmp_path / "FOMC" / f"{split}.json").write_text(json.dumps([row(f"{split} text")]), encoding="utf-8")
    assert len(load_trace(tmp_path, ["FOMC"])["FOMC"].train) == 1
    return tmp_path


def write(folder, value, split="train"):
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    (folder / "FOMC" / f"{split}.json").write_bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"train\.json is not valid JSON"),
        (b"[" * 100_000, r"train\.json is not valid JSON"),
        (b'["\xff"]', r"train\.json is not UTF-8 text: .* at byte 2"),
        ({"prompt": "p", "answer": "a"}, r"train\.json holds an object, not a list"),
        ([], r"train\.json holds no rows"),
        ([row(), "text"], r"train\.json, row 2 is text, not an object"),
        ([row(), row(), {"prompt": "p"}], r"train\.json, row 3 has no field 'answer'; fields: 'prompt'"),
        ([{**row(), "answer": 5}], r"train\.json, row 1: field 'answer' is a number, not text"),
        ([{**row(), "prompt": None}], r"train\.json, row 1: field 'prompt' is null, not text"),
        ([row(), row(answer="")], r"train\.json, row 2: field 'answer' is empty, got ''"),
        ([row(answer=" \n")], r"train\.json, row 1: field 'answer' is empty"),
        ([{**row(), "prompt": ""}], r"train\.json, row 1: field 'prompt' is empty"),
        ([{**row(), "id": 3}], r"train\.json, row 1 has the unknown field 'id'"),
        ([row(answer="\ud83d")], r"train\.json, row 1: field 'answer' holds half of a surrogate pair"),
    ],
)
def test_malformed_files_are_refused_with_file_row_and_field(folder, content, message):
    write(folder, content)
    with pytest.raises(DataError, match=message) as caught:
        load_trace(folder, ["FOMC"])
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_missing_folders_and_files_are_named(folder):
    with pytest.raises(DataError, match=r"nowhere is not a folder"):
        load_trace(folder / "nowhere", ["FOMC"])
    with pytest.raises(DataError, match=r"ScienceQA/train\.json does not exist"):
        load_trace(folder, ["FOMC", "ScienceQA"])
    (folder / "FOMC" / "test.json").unlink()
    with pytest.raises(DataError, match=r"FOMC/test\.json does not exist"):
        load_trace(folder, ["FOMC"])
    with pytest.raises(DataError, match=r"Lima/train\.json does not exist"):
        load_replay_buffer(folder)


def test_a_file_behind_a_link_is_not_read(folder, tmp_path_factory):
    secret = tmp_path_factory.mktemp("elsewhere") / "train.json"
    secret.write_text(json.dumps([row()]), encoding="utf-8")
    (folder / "FOMC" / "train.json").unlink()
    (folder / "FOMC" / "train.json").symlink_to(secret)
    with pytest.raises(InputError, match=r"without '\.\.' or links"):
        load_trace(folder, ["FOMC"])


def test_unknown_and_doubled_tasks_are_named(folder):
    with pytest.raises(UnknownName, match=r"unknown TRACE task 'FOMCC'; known: 20Minuten, C-STANCE"):
        load_trace(folder, ["FOMCC"])
    with pytest.raises(UnknownName, match=r"Lima is a replay buffer"):
        trace_task("Lima")
    with pytest.raises(UnknownName):
        load_trace(folder, ["../FOMC"])
    with pytest.raises(ConfigError, match=r"task 'FOMC' is given twice"):
        trace_tasks(["FOMC", "Py150", "FOMC"])
    with pytest.raises(ConfigError, match="no tasks given"):
        trace_tasks([])


def test_bad_options_of_the_loader_are_refused(folder):
    with pytest.raises(ConfigError, match=r"train_examples must be 0 \(all\) or more, got -1"):
        load_trace(folder, ["FOMC"], train_examples=-1)


def test_a_training_file_that_is_all_leaks_is_refused(folder):
    write(folder, [row("test text")])
    assert load_trace(folder, ["FOMC"])["FOMC"].facts.test_in_train == 1
    with pytest.raises(DataError, match=r"train\.json: every prompt also occurs in eval or test"):
        load_trace(folder, ["FOMC"], clean=True)


def test_a_prompt_whose_instruction_does_not_fit_is_refused_with_its_row():
    record = TraceRecord(row("long " * 50)["prompt"], "B", "FOMC/train.json, row 7")
    with pytest.raises(DataError, match=r"FOMC/train\.json, row 7: instruction and cue of FOMC alone need \d+ tokens"):
        fit_prompt(FOMC, record.prompt, len, 20, record.where)


def test_a_foreign_prompt_is_refused_only_where_it_must_be_cut():
    foreign = "Rate this: " + "x" * 100
    assert fit_prompt(FOMC, foreign, len, 200).text == foreign
    with pytest.raises(DataError, match=r"row 3: not a prompt of FOMC: it must begin with .* got 'Rate this"):
        fit_prompt(FOMC, foreign, len, 50, "row 3")
    with pytest.raises(DataError, match="not a prompt of MeetingBank"):
        split_prompt(trace_task("MeetingBank"), row()["prompt"])


def test_an_empty_body_is_no_error():
    task = trace_task("MeetingBank")
    assert split_prompt(task, task.prefix + task.cue).body == ""
    assert split_prompt(task, task.prefix + "\nSummary:").body == ""


def test_lengths_are_checked_against_each_other_and_the_context():
    with pytest.raises(ConfigError, match="max_prompt must be at least 1, got 0"):
        Lengths(max_prompt=0)
    with pytest.raises(ConfigError, match="truncation must be 'body' or 'official_left', got 'right'"):
        Lengths(truncation="right")
    with pytest.raises(
        ConfigError, match=r"1024 \+ max_answer 512 = 1536 tokens do not fit the model's context of 1000"
    ):
        Lengths().check_context(1000)
    Lengths().check_context(1536)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", eos_token="</s>")


def test_rows_that_cannot_be_made_are_refused_with_their_row(tokenizer):
    tokens = TaskTokenizer(tokenizer)
    with pytest.raises(DataError, match=r"row 9: the answer is empty"):
        encode_example(FOMC, row()["prompt"], "", tokens, Lengths(), where="row 9")
    with pytest.raises(
        DataError, match=r"row 9: instruction and cue of FOMC alone need 2\d tokens where 8 are allowed"
    ):
        encode_prompt(FOMC, row("a b c d e f g h")["prompt"], tokens, Lengths(8, 8), "row 9")
    with pytest.raises(DataError, match=r"row 9: instruction and cue of FOMC alone"):
        encode_example(FOMC, row("a b c d e f g h")["prompt"], "w " * 40, tokens, Lengths(8, 8), where="row 9")
    with pytest.raises(ConfigError, match="at least one row"):
        pad_left([], 0)


def test_models_without_an_end_token_or_a_template_are_refused(tokenizer):
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(ModelFileError, match="no chat template"):
        TaskTokenizer(tokenizer, "chat")
    with pytest.raises(ConfigError, match="template must be 'none' or 'chat', got 'alpaca'"):
        TaskTokenizer(tokenizer, "alpaca")
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="[UNK]")
    with pytest.raises(ModelFileError, match="no end token"):
        TaskTokenizer(endless)


def test_predictions_that_are_missing_are_an_error_and_never_a_score():
    records = [TraceRecord("p", "A", "")] * 3
    with pytest.raises(InputError, match=r"FOMC: 0 predictions for 3 test examples"):
        score_task(FOMC, records, [])
    with pytest.raises(InputError, match=r"FOMC: 2 predictions for 3 test examples"):
        score_task(FOMC, records, ["A", "B"])
    with pytest.raises(InputError, match="0 predictions for 0"):
        score_task(FOMC, [], [])
    with pytest.raises(ConfigError, match="similarity_backend must be"):
        score_task(FOMC, records, ["A"] * 3, similarity_backend="c")
    with pytest.raises(ConfigError, match="sari_source must be"):
        score_task(FOMC, records, ["A"] * 3, sari_source="all")


def test_malformed_matrices_and_floors_are_refused():
    with pytest.raises(InputError, match=r"got shape \(2, 3\)"):
        summarize(np.zeros((2, 3)))
    with pytest.raises(InputError, match=r"scores are between 0 and 1, got 48\.7"):
        summarize(np.array([[48.7]]))
    with pytest.raises(InputError, match=r"untouched has shape \(3,\) where there are 2 tasks"):
        summarize(np.zeros((2, 2)), untouched=np.zeros(3))
    with pytest.raises(InputError, match="floors must be at least 0 and below 1"):
        summarize(np.zeros((2, 2)), floors={"a": 0.5, "b": 1.0}, tasks=("a", "b"))
    with pytest.raises(InputError, match="floors are of a, b, the tasks given are none; give the same names"):
        summarize(np.zeros((2, 2)), floors={"a": 0.5, "b": 0.1})
    with pytest.raises(InputError, match="floors are of a, b, the tasks given are b, c"):
        summarize(np.zeros((2, 2)), floors={"a": 0.5, "b": 0.1}, tasks=("b", "c"))
    with pytest.raises(ConfigError, match="plan must be 'cheap', 'triangle' or 'square', got 'all'"):
        evaluation_plan(3, "all")
    with pytest.raises(ConfigError, match="at least one task, got 0"):
        evaluation_plan(0)


def test_scores_that_cannot_be_compared_are_refused():
    def run(sizes, names=("a", "b")):
        return RunScores(names, {Cell(2, task): np.ones(size) for task, size in enumerate(sizes)})

    with pytest.raises(InputError, match="runs differ in tasks or test examples"):
        aggregate_intervals([run((3, 4)), run((3, 5))], seed=0)
    with pytest.raises(InputError, match="runs differ in tasks or test examples"):
        difference_intervals([run((3, 4))], [run((3, 4), ("b", "a"))], seed=0)
    with pytest.raises(InputError, match="2 runs against 1; pair the methods seed by seed"):
        difference_intervals([run((3, 4))] * 2, [run((3, 4))], seed=0)
    with pytest.raises(InputError, match="a: 2 cluster labels for 3 test examples"):
        aggregate_intervals([run((3, 4))], clusters={"a": np.zeros(2)}, seed=0)
    with pytest.raises(InputError, match="no runs given"):
        aggregate_intervals([], seed=0)
    with pytest.raises(InputError, match=r"b: 4 scores after round 2, 3 elsewhere"):
        RunScores(("a", "b"), {Cell(1, 1): np.ones(3), Cell(2, 1): np.ones(4)})
    with pytest.raises(InputError, match="scores of round 3, task 0 do not belong to 2 tasks"):
        RunScores(("a", "b"), {Cell(3, 0): np.ones(3)})


def test_bad_general_scores_are_refused():
    with pytest.raises(InputError, match="must be the same, and some"):
        general_ability_delta({"MMLU": 0.4}, {"BBH": 0.4})
    with pytest.raises(InputError, match="must be the same, and some"):
        general_ability_delta({}, {})
    with pytest.raises(InputError, match="for 4 answers"):
        score_general(lambda prompt, options: [0.0], GENERAL_ITEMS[:1])
    with pytest.raises(InputError, match="for 4 answers"):
        score_general(lambda prompt, options: [float("nan")] * 4, GENERAL_ITEMS[:1])
    with pytest.raises(InputError, match="no items given"):
        score_general(lambda prompt, options: [0.0] * 4, [])
