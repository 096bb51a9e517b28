"""A frozen dataclass as flags and as a YAML file."""

import argparse
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.cli.options import Parser, add_options
from recollect.cli.runs import resolve
from recollect.config import dump_yaml, options_of, parse_yaml, read_options, run_manifest
from recollect.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """A recipe."""

    flour: int = 500
    """Grams of flour, 100 % of the baker's sum."""

    salt: float = 9.5
    """Grams of salt."""

    shape: Literal["loaf", "rolls"] = "loaf"
    """What to bake."""

    rounds: Literal[1, 2] = 1

    seeds: tuple[str, ...] = ("sesame",)
    """Seeds on top."""

    oven: str | None = None
    """Which oven; default: the nearest."""

    steam: bool = True
    """Let steam in."""

    fan: bool | None = None
    """Use the fan."""

    def __post_init__(self):
        if self.flour < 1:
            raise ConfigError(f"flour must be at least 1, got {self.flour!r}")


OPTIONS = options_of(Recipe)


def parse(*words):
    parser = Parser(prog="bake")
    add_options(parser, OPTIONS, skip=())
    return vars(parser.parse_args(words))


def resolved(tmp_path, yaml, *words):
    namespace = argparse.Namespace(**parse(*words), config=None)
    if yaml is not None:
        (tmp_path / "recipe.yaml").write_text(yaml)
        namespace.config = str(tmp_path / "recipe.yaml")
    return resolve(namespace, Recipe)


def test_flags_that_are_not_given_leave_no_value():
    assert parse() == {}


def test_flags_are_read_with_their_types():
    words = ["--flour", "750", "--salt", "1e1", "--shape", "rolls", "--rounds", "2", "--seeds", "poppy, flax"]
    assert parse(*words, "--oven", "brick", "--no-steam", "--fan", "yes") == {
        "flour": 750,
        "salt": 10.0,
        "shape": "rolls",
        "rounds": 2,
        "seeds": ("poppy", "flax"),
        "oven": "brick",
        "steam": False,
        "fan": True,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--flour", "much"], "--flour must be a whole number, got 'much'"),
        (["--flour", "1.5"], "--flour must be a whole number, got '1.5'"),
        (["--salt", "nan"], "--salt must be a number, got 'nan'"),
        (["--shape", "ring"], "--shape must be one of loaf, rolls, got 'ring'"),
        (["--rounds", "3"], "--rounds must be one of 1, 2, got '3'"),
        (["--flou", "3"], "unrecognized arguments: --flou 3"),
        (["--seeds", "poppy", "--seeds", "flax"], "--seeds is given twice; give all values at once"),
        (["--fan", "maybe"], "--fan must be true, false or none, got 'maybe'"),
    ],
)
def test_bad_flags_are_refused_by_name(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(*words)


def test_help_holds_every_attribute_docstring_and_default(capsys):
    parser = Parser(prog="bake")
    add_options(parser, OPTIONS, skip=())
    text = " ".join(parser.format_help().split())
    assert "Grams of flour, 100 % of the baker's sum. (default: 500)" in text
    assert "Which oven; default: the nearest." in text
    assert "(default: none)" in text  # --fan
    assert "loaf|rolls" in text


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    values = resolved(tmp_path, "flour: 300\nsalt: 7\nshape: rolls\n", "--flour", "900")
    assert (values["flour"], values["salt"], values["shape"], values["oven"]) == (900, 7.0, "rolls", None)


def test_the_dataclass_has_the_last_word(tmp_path):
    with pytest.raises(ConfigError, match="flour must be at least 1, got 0"):
        resolved(tmp_path, "flour: 0\n")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("yeast: 3\n", "unknown key 'yeast' in .*recipe.yaml; known: fan, flour"),
        ("flour: lots\n", "'flour' in .* must be a whole number, got 'lots'"),
        ("flour: true\n", "must be a whole number, got True"),
        ("flour: 2.5\n", "must be a whole number, got 2.5"),
        ("flour:\n", "must be a whole number, got nothing"),
        ("steam: 1\n", "must be true or false, got 1"),
        ("oven: 3\n", "must be text, got 3"),
        ("seeds: {a: 1}\n", "must be a list of text"),
        ("shape: [loaf]\n", r"must be one of loaf, rolls, got \['loaf'\]"),
        ("- flour\n", "must hold 'option: value' lines, got list"),
        ("flour: 1\nflour: 2\n", "the key 'flour' stands twice"),
        ("1: 2\n", "must hold 'option: value' lines"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, yaml, message):
    with pytest.raises(ConfigError, match=message):
        resolved(tmp_path, yaml)


def test_a_field_the_command_line_cannot_express_is_the_developers_mistake():
    @dataclass(frozen=True)
    class Wrong:
        table: dict[str, int] | None = None

    with pytest.raises(TypeError, match="option 'table'"):
        options_of(Wrong)


@given(
    flour=st.integers(1, 10**12),
    salt=st.floats(allow_nan=False, allow_infinity=False),
    seeds=st.lists(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1)),
    oven=st.none() | st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])),
    fan=st.none() | st.booleans(),
)
def test_dumped_options_read_back_equal(flour, salt, seeds, oven, fan):
    values = {"flour": flour, "salt": salt, "seeds": tuple(seeds), "oven": oven, "fan": fan}
    assert read_options(OPTIONS, parse_yaml(dump_yaml(values).encode(), "text"), "text") == values


def test_run_manifest_is_json_and_names_the_versions():
    manifest = run_manifest("bake", {"seeds": ("a", "b")}, "abc", {"oven": "brick"}, 7)
    assert manifest["options"] == {"seeds": ["a", "b"]}
    assert manifest["seed"] == 7
    assert manifest["versions"]["recollect"] == __import__("recollect").__version__
    assert {"python", "numpy", "torch"} <= set(manifest["versions"])
