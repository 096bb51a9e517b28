"""`recollect tokenize-bench` as a user types it: one table, the same items, seeds and clicks for every method."""

import json

import numpy as np
import pytest
from support.token_worlds import HOSTILE, themed_log, themed_vectors, write_shop

import recollect as package
from recollect.cli.main import main

OPTIONS = (
    *("--vectors", "vectors.npy", "--item-ids", "ids.txt", "--core", "0", "--levels", "2", "--codebook-size", "4"),
    *("--seeds", "2", "--resamples", "200", "--probe-epochs", "2"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a raw csv data set `shop`, vectors of its items, and a file of rows."""
    folder = tmp_path_factory.mktemp("bench")
    write_shop(
        folder / "shop", themed_log(n_users=200, length=8), [HOSTILE, *[f"thing {item}" for item in range(1, 60)]]
    )
    np.save(folder / "vectors.npy", themed_vectors())
    (folder / "ids.txt").write_text("".join(f"i{item}\n" for item in range(60)))
    (folder / "rows.yaml").write_text(
        "methods: [random, rq-kmeans, tied]\ntied: {method: rq-gmm, covariance: tied_spherical, max_iterations: 5}\n"
    )
    return folder


@pytest.fixture(scope="module")
def finished(world):
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(world)
        assert main(["tokenize-bench", "shop", "--config", "rows.yaml", *OPTIONS, "--out", "run"]) == 0
    return world / "run", json.loads((world / "run" / "report.json").read_text())


def test_every_method_has_every_metric_with_an_interval_over_seeds(finished):
    _, report = finished
    assert set(report["models"]) == {"random", "rq-kmeans", "tied"}
    wanted = {
        "reconstruction/relative_mse",
        "reconstruction/rmse",
        "reconstruction/cosine",
        "unique_rate",
        "collision_rate",
        "items_in_collision",
        "icr",
        "max_group",
        "utilization/level_0",
        "perplexity/level_1",
        "prefix_utilization/level_1",
        "prefix_gini",
        "knn_overlap@10",
        "alignment/same_first_code",
        "encode_items_per_s",
        "fit_seconds",
        "downstream/auc",
    }
    for label, table in report["models"].items():
        assert wanted <= set(table), label
        for metric in wanted:
            entry = table[metric]
            assert len(entry["per_seed"]) == 2
            assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]
            assert entry["value"] == pytest.approx(np.mean(entry["per_seed"]), abs=1e-9)
    assert set(report["floors"]) == {"item-id", "no-item", "popularity"}
    assert report["floors"]["no-item"]["downstream/auc"]["value"] == 0.5
    assert {row["bits"] for row in report["rows"].values()} == {4.0}


def test_the_interval_over_two_seeds_is_students(finished):
    from scipy.stats import t

    _, report = finished
    entry = report["models"]["tied"]["reconstruction/relative_mse"]
    one, two = entry["per_seed"]
    half = t.ppf(0.975, 1) * abs(one - two) / 2
    assert entry["ci95"] == pytest.approx([entry["value"] - half, entry["value"] + half])


def test_differences_are_paired_with_the_row_compared_with(finished):
    _, report = finished
    found = {(row["model"], row["metric"]): row for row in report["differences"]}
    assert not any(model == "rq-kmeans" for model, _ in found)
    row = found["random", "reconstruction/relative_mse"]
    tables = report["models"]
    pairs = zip(
        *(tables[name]["reconstruction/relative_mse"]["per_seed"] for name in ("random", "rq-kmeans")), strict=True
    )
    assert row["per_seed"] == pytest.approx([mine - theirs for mine, theirs in pairs])
    assert row["value"] > 0
    auc = found["no-item", "downstream/auc"]
    gap = 0.5 - tables["rq-kmeans"]["downstream/auc"]["value"]
    assert auc["value"] == pytest.approx(gap, abs=1e-6)
    assert auc["ci95"][1] < 0
    assert auc["p_holm"] < 0.05


def test_codes_that_know_the_themes_beat_random_ones_in_the_click_model(finished):
    _, report = finished
    value = {label: table["downstream/auc"]["value"] for label, table in report["models"].items()}
    assert value["rq-kmeans"] > 0.7
    assert value["rq-kmeans"] > value["random"]


def test_the_page_has_tables_plots_map_and_collisions_and_no_title_is_markup(finished):
    out, _ = finished
    page = (out / "report.html").read_text()
    for title in (
        "Item tokenizers on one catalogue",
        "Reconstruction and neighbours",
        "Codes as features of a click model",
        "Paired differences from rq-kmeans",
        "How many items share a code",
        "Codes used, share of K",
        "Successive items with the same prefix",
        "two events",
        "AUC on validation",
        "AUC, interval over users and seeds",
        "relative squared error of the fitted items",
        "starts",
        "Cost",
        "Map of the first level, rq-kmeans",
        "Items that share a code, rq-kmeans",
        "generative retrieval",
    ):
        assert title in page, title
    assert page.count("<svg") >= 7
    assert "<img src" not in page
    assert "<script" not in page
    assert "rq-kmeans,downstream/auc," in (out / "tables.csv").read_text()


def test_the_page_can_be_drawn_again_from_the_stored_results(finished):
    out, _ = finished
    page, table = (out / "report.html").read_bytes(), (out / "tables.csv").read_bytes()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_bytes() == page
    assert (out / "tables.csv").read_bytes() == table


def test_resume_keeps_finished_rows_and_adds_new_ones(finished, world, monkeypatch, capsys):
    out, before = finished
    monkeypatch.chdir(world)
    rows = {path: path.read_bytes() for path in out.glob("*/*/*/result.json")}
    assert len(rows) == 10
    words = ["tokenize-bench", "shop", "--config", "rows.yaml", *OPTIONS, "--out", "run"]
    assert main([*words, "--methods", "random,rq-kmeans,tied,opq", "--resume"]) == 0
    assert all(path.read_bytes() == content for path, content in rows.items())
    after = json.loads((out / "report.json").read_text())
    assert set(after["models"]) == {*before["models"], "opq"}
    assert all(after["models"][name] == before["models"][name] for name in before["models"])
    capsys.readouterr()
    assert main([*words, "--resume", "--fields", "levels"]) == 2
    assert "has fields 'both', not 'levels'" in capsys.readouterr().err
    (world / "other.yaml").write_text((world / "rows.yaml").read_text().replace("tied_spherical", "diag"))
    assert main([*words[:2], "--config", "other.yaml", *OPTIONS, "--out", "run", "--resume"]) == 2
    assert "was made with" in capsys.readouterr().err
    np.save(world / "moved.npy", themed_vectors(seed=5))
    moved = [word.replace("vectors.npy", "moved.npy") for word in words]
    assert main([*moved, "--resume"]) == 2
    assert "has vectors 'vectors.npy', not 'moved.npy'" in capsys.readouterr().err


def test_preprocessing_is_done_once_for_every_method(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    report = package.tokenize_bench(
        "vectors.npy",
        methods=("rq-kmeans", "random"),
        levels=2,
        codebook_size=4,
        seeds=1,
        preprocess=("pca",),
        pca_dimension=3,
        out=tmp_path / "run",
    )
    assert report.protocol["dimension"] == 3
    assert report.protocol["preprocess"] == "pca"
    assert "downstream/auc" not in report.sections["models"]["rq-kmeans"]
    assert any("no log behind an .npy file" in warning for warning in report.warnings)
    assert any("1 seed(s) only" in warning for warning in report.warnings)


def test_variants_of_one_method_are_rows_of_one_table_under_their_own_names(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    rows = "rq-kmeans,rq-gmm:covariance=tied-spherical,max-iterations=5,rq-gmm:preprocess=centre+pca,pca_dimension=3"
    labels = {
        "rq-kmeans": {"restarts": 3},
        "rq-gmm:covariance=tied-spherical,max_iterations=5": {"covariance": "tied_spherical", "max_iterations": 5},
        "rq-gmm:preprocess=centre+pca,pca_dimension=3": {"preprocess": ["centre", "pca"], "pca_dimension": 3},
    }
    out = tmp_path / "run"
    words = ["--levels", "2", "--codebook-size", "4", "--seeds", "1", "--out", str(out)]
    assert main(["tokenize-bench", "vectors.npy", "--methods", rows, *words]) == 0
    report = json.loads((out / "report.json").read_text())
    assert set(report["models"]) == set(labels)
    manifest = json.loads((out / "run.json").read_text())
    for label, options in labels.items():
        assert manifest["models"][label]["options"].items() >= options.items()
        assert report["rows"][label]["options"].items() >= options.items()
        assert label in (out / "report.html").read_text()
    kept = {json.loads(path.read_text())["row"]: path for path in out.glob("rows/*/seed-0/result.json")}
    assert set(kept) == set(labels)
    before = {path: path.read_bytes() for path in kept.values()}
    added = f"{rows},rq-gmm:shrinkage=0"
    against = ["--against", "rq-gmm:covariance=tied-spherical,max-iterations=5"]
    assert main(["tokenize-bench", "vectors.npy", "--methods", added, *words, *against, "--resume"]) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    report = json.loads((out / "report.json").read_text())
    assert report["against"] == "rq-gmm:covariance=tied-spherical,max_iterations=5"
    assert {row["model"] for row in report["differences"]} == {*labels, "rq-gmm:shrinkage=0"} - {report["against"]}


def test_dry_run_prints_the_plan_and_writes_nothing(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["tokenize-bench", str(world / "shop"), "--core", "0", "--methods", "random,vq", "--seeds", "3"]
    words += ["--codebook-size", "60"]
    assert main([*words, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["kind"], plan["ledger"]["rows_to_run"], plan["ledger"]["items"]) == ("tokenize-bench-plan", 12, 60)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "rq-kmeans,nonsense"), "unknown method 'nonsense'"),
        (("--methods", "random,random"), "methods names 'random' more than once"),
        (("--methods", "rq-kmeans,shrinkage=1"), "'shrinkage=1' is an option of no row; write rq-kmeans:shrinkage=1"),
        (("--methods", "rq-gmm:covariance=full"), "--covariance must be one of diag, spherical"),
        (("--seeds", "0"), "seeds must be at least 1, got 0"),
        (("--codebook-size", "61"), "60 items cannot fill a codebook of 61 codes"),
        (("--resume",), "--resume needs --out DIR"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(world, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    methods = () if "--methods" in words else ("--methods", "rq-kmeans")
    assert main(["tokenize-bench", str(world / "vectors.npy"), *methods, *words]) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if message in line]) == 1


def test_a_section_for_no_row_is_refused(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.yaml").write_text("methods: [random]\nrq-gmm: {shrinkage: 1}\n")
    assert main(["tokenize-bench", str(world / "vectors.npy"), "--config", "rows.yaml"]) == 2
    assert "options are given for 'rq-gmm', which no row of this run has" in capsys.readouterr().err
