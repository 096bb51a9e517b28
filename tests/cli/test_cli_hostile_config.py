"""Configuration files that try to run code, to exhaust memory or to confuse are refused in one line."""

import subprocess
import sys

import pytest

from recollect.config import MAX_CONFIG_BYTES, load_yaml
from recollect.errors import ConfigError

BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(12)
)

HOSTILE = {
    "python object": "users: !!python/object/apply:os.system ['touch OWNED']",
    "python name": "users: !!python/name:os.system",
    "python module": "users: !!python/module:os",
    "unknown tag": "users: !mine 3",
    "alias bomb": BOMB,
    "merge key": "base: &base {users: 3}\n<<: *base",
    "deep flow": "users: " + "[" * 5000 + "]" * 5000,
    "deep block": "\n".join("  " * depth + "a:" for depth in range(40)),
    "too large": "# " + "x" * MAX_CONFIG_BYTES,
    "unfinished": "users: [1, 2",
    "tab": "users:\n\t- 1",
    "two documents": "users: 1\n---\nusers: 2",
    "not utf-8": b"users: \xff\xfe\xfa",
    "control character": b"users: \x00",
    "huge number": "users: " + "9" * 20000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = HOSTILE[name]
    path = tmp_path / "hostile.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as refusal:
        load_yaml(path)
    assert "hostile.yaml" in str(refusal.value)
    assert not (tmp_path / "OWNED").exists()


@pytest.mark.parametrize("place", ["missing.yaml", "."])
def test_what_is_not_a_file_is_refused(tmp_path, place):
    with pytest.raises(ConfigError, match="is not a file"):
        load_yaml(tmp_path / place)


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert load_yaml(tmp_path / "empty.yaml") == {}


def test_the_command_refuses_a_hostile_file_in_one_line(tmp_path):
    (tmp_path / "bomb.yaml").write_text(BOMB)
    done = subprocess.run(
        [sys.executable, "-m", "recollect", "simulate", "--config", "bomb.yaml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("recollect: bomb.yaml uses the alias *a")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "bomb.yaml"]
