"""`--overwrite` replaces runs of the same command alone, whose files it knows."""

import json

import pytest
from support.run_folders import contents

from recollect.cli.main import main
from recollect.config import check_replaceable
from recollect.errors import InputError


@pytest.mark.parametrize("command", ["simulate", "evaluate", "distill", "prompt-rank", "tokenize", "tokenize-bench"])
def test_a_run_of_another_command_is_not_replaced(tmp_path, capsys, command):
    held = "continual"
    (tmp_path / "run.json").write_text(json.dumps({"command": held}))
    (tmp_path / "report.json").write_text("{}")
    before = contents(tmp_path)
    more = ["--users", "5"] if command in ("simulate", "prompt-rank") else []
    assert main([command, "harbor", *more, "--overwrite", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert f"holds a run of {held!r}, and --overwrite replaces runs of {command} only" in message
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ['{"command": "evaluate"}', "{}", "{", "[]", "\xff"])
def test_a_run_of_the_command_and_a_torn_one_are_replaced(tmp_path, text):
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    check_replaceable(tmp_path, "evaluate")
    check_replaceable(tmp_path / "absent", "evaluate")
    if text == '{"command": "evaluate"}':
        with pytest.raises(InputError, match="holds a run of 'evaluate'"):
            check_replaceable(tmp_path, "distill")
