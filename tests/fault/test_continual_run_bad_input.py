"""Bad files, options and folders are refused before anything is trained, naming the file, row, layer or option."""

import json
import shutil

import pytest
from support.continual_worlds import SMALL, TASKS, task_rows, write_byte_decoder, write_rows, write_stream

from recollect.continual.run import continual
from recollect.errors import ConfigError, DataError, InputError, ResumeRefused, UnknownName


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    write_stream(folder / "trace")
    write_byte_decoder(folder / "bytes")
    return folder


def run(world, out, data="trace", **more):
    named = {"tasks": TASKS, "backbone": str(world / "bytes"), "out": out}
    return continual(world / data, **{**SMALL, **named, **more})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "sequential"}, UnknownName, r"unknown method 'sequential'; known: .*seq-lora"),
        ({"method": "ewc,ewc"}, ConfigError, "method 'ewc' is given twice"),
        ({"method": ""}, ConfigError, "no method given"),
        ({"tasks": "FOMC,C-Stance"}, UnknownName, "unknown TRACE task 'C-Stance'"),
        ({"tasks": "FOMC,FOMC"}, ConfigError, "'FOMC' is given twice"),
        ({"benchmark": "glue"}, ConfigError, "must be one of trace"),
        ({"epochs": 0}, ConfigError, "epochs must be at least 1 or none, got 0"),
        ({"learning_rate": -1.0}, ConfigError, "learning_rate must be a number not below 0, got -1.0"),
        ({"learning_rate": float("inf")}, ConfigError, "learning_rate must be a number not below 0, got inf"),
        ({"clip_norm": 0.0}, ConfigError, "clip_norm must be positive or none"),
        ({"test_examples": -1}, ConfigError, "test_examples must not be negative, got -1"),
        ({"resume": True, "overwrite": True}, ConfigError, "exclude each other"),
        ({"max_prompt": 600}, ConfigError, r"600 \+ max_answer 16 = 616 tokens do not fit the model's context of 512"),
        ({"max_prompt": 60}, DataError, r"FOMC/train.json, row 1: instruction and cue of FOMC alone need \d+ tokens"),
        ({"set": "mh-moe.rank=2"}, ConfigError, "not METHOD.NAME=VALUE with a method of this run: seq-lora"),
        ({"set": "seq-lora.ranks=2"}, ConfigError, "seq-lora has no option 'ranks'; known: .*rank"),
        ({"set": "seq-lora.rank=two"}, ConfigError, "must be a whole number, got 'two'"),
        ({"set": "seq-lora.seed=2"}, ConfigError, "seq-lora has no option 'seed'"),
        ({"method_options": {"ewc": {"strength": 1.0}}}, ConfigError, "'ewc', which is not among the methods seq-lora"),
        ({"backbone": "minilm"}, ConfigError, "only embeds texts"),
        ({"backbone": "path:nowhere"}, InputError, "'nowhere' does not exist"),
        ({"template": "chat"}, InputError, "no chat template"),
    ],
)
def test_an_illegal_option_is_refused_and_leaves_no_folder(world, tmp_path, changes, error, message):
    out = tmp_path / "run"
    with pytest.raises(error, match=message):
        run(world, out, **changes)
    assert not (out / "methods").exists()


def test_heads_that_do_not_divide_a_width_are_refused_with_the_layer(world, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.\w+_proj.*5"):
        run(world, tmp_path, method="seq-lora,mh-moe", set="mh-moe.heads=5")
    assert not (tmp_path / "methods").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"FOMC/test\.json does not exist"),
        ("[{", r"FOMC/test\.json is not valid JSON"),
        ("{}", r"FOMC/test\.json holds an object, not a list"),
        ("[]", r"FOMC/test\.json holds no rows"),
        (json.dumps([*task_rows("FOMC", 1, 0), {"prompt": "p"}]), r"test\.json, row 2 has no field 'answer'"),
        (json.dumps([{**task_rows("FOMC", 1, 0)[0], "answer": " "}]), r"test\.json, row 1: field 'answer' is empty"),
    ],
)
def test_a_missing_or_malformed_file_is_named_with_its_row(world, tmp_path, text, message):
    shutil.copytree(world / "trace", tmp_path / "trace")
    path = tmp_path / "trace" / "FOMC" / "test.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        continual(tmp_path / "trace", **SMALL, tasks=TASKS, backbone=str(world / "bytes"), out=tmp_path / "run")


def test_a_stream_without_a_folder_is_refused(world, tmp_path):
    with pytest.raises(DataError, match="is not a folder; give the one that holds the task folders"):
        run(world, tmp_path / "run", data="nothing")


@pytest.fixture(scope="module")
def finished(world):
    out = world / "finished"
    run(world, out, tasks="FOMC", evaluation="cheap")
    return out


def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_a_folder_that_holds_something_is_refused(world, finished):
    with pytest.raises(InputError, match="is not empty; add --resume to continue it or --overwrite"):
        run(world, finished, tasks="FOMC")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, r"has learning_rate 0.02, not 0.5"),
        ({"tasks": "FOMC,NumGLUE-cm"}, "has tasks|has data_fingerprint"),
        ({"set": "seq-lora.rank=2"}, "method.json was made with adapter.rank 8, not 2"),
    ],
)
def test_a_run_of_other_options_is_not_continued(world, finished, tmp_path, changes, message):
    out = copied(finished, tmp_path)
    with pytest.raises(ResumeRefused, match=message):
        run(world, out, **{"tasks": "FOMC", "evaluation": "cheap", "resume": True, **changes})


def test_a_run_of_other_data_or_another_decoder_is_not_continued(world, finished, tmp_path):
    out = copied(finished, tmp_path)
    shutil.copytree(world / "trace", tmp_path / "trace")
    rows = task_rows("FOMC", 12, 0)
    rows[3]["answer"] = "C" if rows[3]["answer"] == "A" else "A"
    write_rows(tmp_path / "trace" / "FOMC" / "train.json", rows)
    same = {**SMALL, "tasks": "FOMC", "evaluation": "cheap", "resume": True, "out": out}
    with pytest.raises(ResumeRefused, match="data_fingerprint"):
        continual(tmp_path / "trace", **same, backbone=str(world / "bytes"))
    write_byte_decoder(tmp_path / "other", context=400)
    with pytest.raises(ResumeRefused, match=r"backbone|model"):
        continual(world / "trace", **same, backbone=str(tmp_path / "other"))


def test_a_run_is_not_continued_with_other_weights_in_the_same_files(world, tmp_path):
    shutil.copytree(world / "bytes", tmp_path / "decoder")
    same = {**SMALL, "tasks": "FOMC", "evaluation": "cheap", "backbone": str(tmp_path / "decoder")}
    continual(world / "trace", **same, out=tmp_path / "run")
    sizes = [file.stat().st_size for file in sorted((tmp_path / "decoder").iterdir())]
    write_byte_decoder(tmp_path / "decoder", seed=1)
    assert [file.stat().st_size for file in sorted((tmp_path / "decoder").iterdir())] == sizes
    with pytest.raises(ResumeRefused, match="model"):
        continual(world / "trace", **same, out=tmp_path / "run", resume=True)


def test_a_test_prompt_that_cannot_be_asked_is_met_before_anything_is_trained(world, tmp_path):
    shutil.copytree(world / "trace", tmp_path / "trace")
    path = tmp_path / "trace" / "NumGLUE-ds" / "test.json"
    write_rows(path, [*task_rows("NumGLUE-ds", 2, 2), {"prompt": "x" * 400, "answer": "3"}])
    with pytest.raises(DataError, match=r"NumGLUE-ds/test\.json, row 3"):
        run(tmp_path, tmp_path / "run", backbone=str(world / "bytes"))
    assert not (tmp_path / "run" / "methods").exists()


def test_a_replay_says_how_many_instructions_it_has(world, tmp_path):
    shutil.copytree(world / "trace", tmp_path / "trace")
    options = {"tasks": "FOMC", "method": "replay", "backbone": str(world / "bytes")}
    few = run(tmp_path, tmp_path / "few", train_examples=1, **options)
    assert few.protocol["general_rows"] == 1
    (tmp_path / "trace" / "Lima" / "train.json").unlink()
    none = run(tmp_path, tmp_path / "none", **options)
    assert none.protocol["general_rows"] == 0
    assert any("no Lima/train.json" in warning for warning in none.warnings)
    with pytest.raises(DataError, match=r"Lima/train\.json does not exist"):
        run(tmp_path, tmp_path / "asked", general_examples=2, **options)


def test_answers_that_were_changed_after_their_evaluation_are_not_reported(world, finished, tmp_path):
    out = copied(finished, tmp_path)
    path = out / "methods" / "seq-lora" / "seed-0" / "cells" / "1-FOMC.jsonl"
    path.write_text(path.read_text().replace('"accuracy": 0.0', '"accuracy": 1.0'))
    with pytest.raises(InputError, match=r"1-FOMC\.jsonl is not the answers of a finished evaluation .*resume"):
        run(world, out, tasks="FOMC", evaluation="cheap", resume=True)


def test_a_torn_state_is_refused_by_name(world, finished, tmp_path):
    out = copied(finished, tmp_path)
    seed = out / "methods" / "seq-lora" / "seed-0"
    (seed / "cells" / "1-FOMC.json").unlink()
    state = seed / "round-1" / "method_state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(InputError, match=r"method_state\.safetensors is not the state of a method"):
        run(world, out, tasks="FOMC", evaluation="cheap", resume=True)


def test_hostile_answers_and_prompts_do_not_reach_the_page(world, tmp_path):
    shutil.copytree(world / "trace", tmp_path / "trace")
    for split in ("train", "test"):
        rows = task_rows("FOMC", 4, 7)
        rows[0]["prompt"] = rows[0]["prompt"].replace("q7", "<script>alert(1)</script></s>\u202e{{ 7 * 7 }}")
        rows[0]["answer"] = "<b>A\x1b[31m"
        write_rows(tmp_path / "trace" / "FOMC" / f"{split}.json", rows)
    out = tmp_path / "run"
    continual(tmp_path / "trace", **{**SMALL, "tasks": "FOMC", "backbone": str(world / "bytes"), "out": out})
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
