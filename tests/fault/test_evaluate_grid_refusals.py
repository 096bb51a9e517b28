"""What a tuning grid refuses before anything is fitted, each in one line."""

import pytest
from support.recommender_worlds import random_log, small_log

import recollect
from recollect.cli.main import main
from recollect.errors import ConfigError, InputError


@pytest.fixture(scope="module")
def log():
    return random_log()


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (
            {"ease": {"regularization": [1.0, 2.0]}},
            "unequal tuning budgets: ease 2, itemknn 1 points; .* or add --unequal-budgets",
        ),
        (
            {"ease": {"regularization": [1.0, 2.0]}, "itemknn": {"neighbours": [1, 2, 3]}},
            "unequal tuning budgets: ease 2, itemknn 3 points",
        ),
        ({"ease": {"lambda": [1, 2]}}, "unknown key 'lambda' in the grid of 'ease' in the grid; known: precision"),
        ({"ease": {"regularization": [0.0, 1.0]}}, "regularization must be a positive number"),
        ({"ease": {"regularization": ["much"]}}, "'regularization' in the grid of 'ease' .* a number, got 'much'"),
        ({"ease": {"regularization": []}}, "the grid of 'ease' in the grid gives no value for 'regularization'"),
        ({"ease": []}, "the grid of 'ease' in the grid is empty"),
        ({"ease": {}}, r"must hold 'option: \[values\]', got {}"),
        ({"ease": [3.0]}, r"must hold 'option: \[values\]', got 3.0"),
        ({"ease": {"regularization": [5.0, 5]}}, "names the point regularization=5 twice"),
        (
            {"ease": [{"regularization": 5.0}, {"regularization": [5.0, 6.0]}]},
            "names the point regularization=5.0 twice",
        ),
        ({"bpr": {"hidden": [8]}}, "the grid has values for 'bpr', which --models does not name"),
        ({"pop": {"hidden": [8]}}, "'pop' has no options; leave it out"),
        ({"ease": {"regularization": list(range(1, 1002))}}, r"has more than 1000 points \(1001\)"),
        (
            {"ease": [{"regularization": [i + 0.5 * j for i in range(1, 600)]} for j in (0, 1)]},
            "has more than 1000 points; list",
        ),
        ({"ease": {"model": ["pop"]}}, "unknown key 'model'"),
    ],
)
def test_illegal_grids(log, grid, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as refused:
        recollect.evaluate(log, models=("pop", "ease", "itemknn"), grid=grid, out=tmp_path / "run")
    assert refused.value.exit_code == 2
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_size_no_memory_holds_is_refused_before_it_is_expanded(log, tmp_path):
    values = list(range(10_000))
    grid = {"sasrec": dict.fromkeys(("hidden", "blocks", "heads", "epochs", "batch_size", "max_length"), values)}
    with pytest.raises(ConfigError, match=rf"has more than 1000 points \({10_000**6}\)"):
        recollect.evaluate(log, models=("sasrec",), grid=grid, out=tmp_path / "run")


def test_options_set_twice_seeds_and_saved_models_are_not_tuned(log, tmp_path):
    grid = {"ease": {"regularization": [1.0, 2.0]}}
    with pytest.raises(ConfigError, match="varies 'regularization', which the options of 'ease' also set"):
        recollect.evaluate(log, models=("ease",), model_options={"ease": {"regularization": 3.0}}, grid=grid)
    with pytest.raises(ConfigError, match="use --seed and --seeds"):
        recollect.evaluate(log, models=("sasrec",), grid={"sasrec": {"seed": [1, 2]}})
    recollect.evaluate(log, models=("ease",), out=tmp_path / "run")
    label = f"path:{tmp_path / 'run/rows/ease/once/model'}"
    with pytest.raises(ConfigError, match="a saved model is fitted already"):
        recollect.evaluate(log, models=(label,), grid={label: {"regularization": [1.0]}})


def test_a_split_without_validation_has_nothing_to_choose_by(tmp_path):
    times = [[1, 2, 3, 4, 5, 90, 91], [1, 2, 3, 4, 5, 6, 6], [40, 41]]
    log = small_log([[0, 1, 2, 3, 0, 1, 2], [1, 2, 3, 0, 1, 2, 3], [3, 2]], 4, times=times)
    options = {"protocol": "gts", "core": 0, "quantile": 0.85, "out": tmp_path / "run"}
    with pytest.raises(InputError, match="chosen from on validation, and this split has no validation case"):
        recollect.evaluate(log, models=("ease",), grid={"ease": {"regularization": [1.0, 2.0]}}, **options)
    assert not (tmp_path / "run").exists()


def test_several_processes_do_not_share_a_grid(log, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a grid is run by one process"):
        recollect.evaluate(log, models=("ease",), grid={"ease": {"regularization": [1.0]}}, out=tmp_path / "run")


def test_the_command_reads_the_grid_from_a_file_and_names_a_bad_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "harbor", "--models", "pop,ease,itemknn", "--dry-run", "--json", "--grid"]
    (tmp_path / "grid.yaml").write_text("ease: {regularization: [1, 10]}\nitemknn: {neighbours: [5, 20]}\n")
    assert main([*words, "grid.yaml"]) == 0
    assert '"rows_to_run": 5' in capsys.readouterr().out
    (tmp_path / "odd.yaml").write_text("ease: {regularization: [1, 10]}\nitemknn: {neighbours: [5]}\n")
    assert main([*words, "odd.yaml"]) == 2
    assert "odd.yaml gives rows unequal tuning budgets: ease 2, itemknn 1" in capsys.readouterr().err
    assert main([*words, "odd.yaml", "--unequal-budgets"]) == 0
    capsys.readouterr()
    assert main([*words, "nowhere.yaml"]) == 2
    assert "--grid nowhere.yaml is not a file" in capsys.readouterr().err
