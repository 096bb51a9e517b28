"""`recollect tokenize` as a user types it: files, report, resume, plan, errors."""

import json
import subprocess
import sys

import numpy as np
import pytest
from support.run_folders import contents
from support.token_worlds import HOSTILE, themed_log, themed_vectors, write_shop

import recollect as package
from recollect.cli.main import main
from recollect.tokenize.artefact import TokenizedItems
from recollect.tokenize.run import TokenizeConfig, chosen_entry

TITLES = [HOSTILE, *[f"thing {item}" for item in range(1, 60)]]
VECTORS = ("--vectors", "vectors.npy", "--item-ids", "ids.txt")
SMALL = ("--levels", "2", "--codebook-size", "4")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a raw csv data set `shop`, its item vectors `vectors.npy` and two equal rows among them."""
    folder = tmp_path_factory.mktemp("tokenize")
    write_shop(folder / "shop", themed_log(), TITLES)
    vectors = themed_vectors()
    vectors[7] = vectors[1]
    np.save(folder / "vectors.npy", vectors)
    (folder / "ids.txt").write_text("".join(f"i{item}\n" for item in range(60)))
    return folder


@pytest.fixture(scope="module")
def finished(world):
    words = ["tokenize", "shop", *VECTORS, "--method", "rq-kmeans", *SMALL]
    done = subprocess.run(
        [sys.executable, "-m", "recollect", *words], capture_output=True, text=True, cwd=world, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return world / "runs" / "tokenize-shop-1", done


def tokenize(*words):
    return main(["tokenize", *map(str, words)])


def test_a_run_leaves_the_promised_files_and_metrics(finished):
    out, done = finished
    assert "recollect: writing to runs/tokenize-shop-1" in done.stderr
    names = {file.name for file in out.iterdir()}
    promised = {"run.json", "report.json", "report.html", "codes.npy", "codebooks.safetensors", "item_ids.txt"}
    assert promised | {"manifest.json"} <= names
    codes = np.load(out / "codes.npy", allow_pickle=False)
    assert (codes.dtype, codes.shape) == (np.int32, (60, 2))
    names = (out / "item_ids.txt").read_text().split()
    assert sorted(names) == sorted(f"i{item}" for item in range(60))
    report = json.loads((out / "report.json").read_text())
    wanted = {"reconstruction/relative_mse", "utilization/level_0", "perplexity/level_1", "collision_rate"}
    assert wanted | {"tokens_per_item", "alignment/same_first_code"} <= set(report["metrics"])
    assert set(report["baselines"]) == {"random"}
    run = json.loads((out / "run.json").read_text())
    assert (run["command"], run["models"]["tokenizer"]["method"]) == ("tokenize", "rq-kmeans")
    assert run["models"]["tokenizer"]["options"]["codebook_size"] == 4
    assert "Relative squared error" in done.stdout


def test_what_was_saved_encodes_as_before_and_equal_rows_share_a_code(finished, world):
    out, _ = finished
    held = TokenizedItems.load(out)
    rows = [int(name[1:]) for name in held.ids.item_ids]
    vectors = np.load(world / "vectors.npy")[rows]
    np.testing.assert_array_equal(np.load(out / "embeddings.npy"), vectors)
    np.testing.assert_array_equal(held.tokenizer.encode(vectors).codes, held.ids.codes)
    assert {"i1", "i7"} <= set(held.items_of(held.texts[rows.index(7)]))


def test_the_page_shows_map_clusters_and_collisions_and_no_title_is_markup(finished):
    out, _ = finished
    page = (out / "report.html").read_text()
    for title in (
        "Semantic IDs of a catalogue",
        "Levels",
        "How evenly codes are used",
        "Map of the first level",
        "Clusters of the first level",
        "Items by the size of the group",
        "Items that share a code",
    ):
        assert title in page, title
    assert page.count("<svg") >= 3
    assert "<img src" not in page
    assert "&lt;img src" in page
    assert "<script" not in page


def test_resume_reads_the_artefact_back_and_other_options_are_refused(finished, world, capsys, monkeypatch):
    out, _ = finished
    monkeypatch.chdir(world)
    before = {name: (out / name).read_bytes() for name in ("codes.npy", "codebooks.safetensors", "manifest.json")}
    report = json.loads((out / "report.json").read_text())
    words = ("shop", *VECTORS, "--method", "rq-kmeans", "--levels", 2, "--out", out, "--resume")
    assert tokenize(*words, "--codebook-size", 4, "--json") == 0
    captured = capsys.readouterr()
    assert "fitting" not in captured.err
    assert json.loads(captured.out)["metrics"] == report["metrics"]
    assert {name: (out / name).read_bytes() for name in before} == before
    assert tokenize(*words, "--codebook-size", 5) == 2
    assert "has codebook_size 4, not 5" in capsys.readouterr().err
    assert tokenize(*words[:-1], "--codebook-size", 4) == 2
    assert "--resume" in capsys.readouterr().err


def test_an_interrupted_fit_continues_to_the_same_codes(finished, world, monkeypatch, tmp_path):
    from recollect.tokenize.rq_kmeans import RQKMeans

    out, _ = finished
    monkeypatch.chdir(world)
    words = ("shop", *VECTORS, "--method", "rq-kmeans", *SMALL, "--out", tmp_path / "run")
    whole = RQKMeans.fit_level

    def breaks(self, level, *rest):
        if level == 1:
            raise KeyboardInterrupt
        return whole(self, level, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(RQKMeans, "fit_level", breaks)
        assert tokenize(*words) == 130
    assert (tmp_path / "run" / "fit").is_dir()
    fitted = []
    monkeypatch.setattr(
        RQKMeans, "fit_level", lambda self, level, *rest: fitted.append(level) or whole(self, level, *rest)
    )
    assert tokenize(*words, "--resume") == 0
    assert fitted == [1]
    for name in ("codes.npy", "codebooks.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (out / name).read_bytes()


def test_the_python_call_gives_what_the_command_gives(finished, world, tmp_path):
    out, _ = finished
    report = package.tokenize(
        world / "shop",
        vectors=world / "vectors.npy",
        item_ids=world / "ids.txt",
        method="rq-kmeans",
        levels=2,
        codebook_size=4,
        out=tmp_path / "run",
    )
    assert report.kind == "tokenize"
    np.testing.assert_array_equal(np.load(tmp_path / "run" / "codes.npy"), np.load(out / "codes.npy"))
    assert report.metrics == json.loads((out / "report.json").read_text())["metrics"]


def test_a_file_of_vectors_with_ids_and_collisions_resolved(world, tmp_path, capsys):
    (tmp_path / "ids.txt").write_text("".join(f"sku-{item}\n" for item in range(60)))
    words = (world / "vectors.npy", "--item-ids", tmp_path / "ids.txt", "--method", "rq-kmeans", "--levels", 2)
    assert tokenize(*words, "--codebook-size", 16, "--collisions", "zcr", "--json", "--out", tmp_path / "run") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["metrics"]["collision_rate"]["value"] == 0
    assert report["collisions"]["unresolved"] == 0
    assert "alignment/same_first_code" not in report["metrics"]
    held = TokenizedItems.load(tmp_path / "run")
    assert held.ids.item_ids[3] == "sku-3"
    assert "zcr changed" in (tmp_path / "run" / "report.html").read_text()


def test_method_options_come_from_flags_and_from_a_section(world, tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("method: rq-gmm\nrq-gmm: {shrinkage: 3, annealing: alternate}\n")
    words = (world / "vectors.npy", *SMALL, "--config", tmp_path / "options.yaml", "--dry-run", "--json")
    assert tokenize(*words, "--set", "covariance=tied_spherical,max_iterations=7", "--preprocess", "l2,centre") == 0
    table = dict(json.loads(capsys.readouterr().out)["panels"][0]["rows"])
    shown = [table[name] for name in ("covariance", "max_iterations", "shrinkage", "annealing", "preprocess")]
    assert shown == ["tied_spherical", "7", "3.0", "alternate", "['l2', 'centre']"]


def test_the_device_reaches_methods_that_have_one_and_an_option_of_the_method_wins():
    assert chosen_entry(TokenizeConfig(method="rq-gmm", device="auto"), {}).options.device == "auto"
    assert chosen_entry(TokenizeConfig(method="rq-gmm"), {}).options.device == "cpu"
    assert chosen_entry(TokenizeConfig(method="rq-gmm", device="auto", set=("device=cpu",)), {}).options.device == "cpu"
    assert chosen_entry(TokenizeConfig(method="rq-gmm", device="auto"), {"device": "cpu"}).options.device == "cpu"
    assert not hasattr(chosen_entry(TokenizeConfig(method="fsq", device="auto"), {}).options, "device")


def test_cold_items_are_encoded_but_not_fitted_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = themed_log(n_items=60)
    dataset = write_shop(tmp_path / "shop", log, [f"thing {item}" for item in range(60)])
    with (dataset / "items.csv").open("a") as handle:
        handle.write("i60,new\n")
    vectors = themed_vectors()
    np.save(tmp_path / "all.npy", np.concatenate([vectors, np.full((1, vectors.shape[1]), 9.0, np.float32)]))
    words = ("shop", "--vectors", "all.npy", "--method", "rq-kmeans", *SMALL, "--json")
    assert tokenize(*words, "--hold-out-cold", "--out", "held") == 0
    held = json.loads(capsys.readouterr().out)
    assert tokenize(*words, "--out", "every") == 0
    every = json.loads(capsys.readouterr().out)
    assert held["protocol"]["fitted_on"] == "the 60 items with a training event"
    assert (
        held["metrics"]["reconstruction/relative_mse"]["value"]
        > every["metrics"]["reconstruction/relative_mse"]["value"]
    )
    assert len(np.load("held/codes.npy")) == 61


def test_letter_takes_behaviour_from_the_log_and_weights_may_follow_popularity(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    options = "hidden=16+8,steps=5,batch_size=32,code_dim=4,diversity_clusters=2"
    words = ("shop", *VECTORS, "--method", "letter", *SMALL, "--set", options, "--weight", "popularity", "--json")
    assert tokenize(*words, "--out", tmp_path / "run") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["protocol"]["weight"] == "popularity"
    assert report["run"]["models"]["tokenizer"]["options"]["hidden"] == [16, 8]
    np.save(tmp_path / "behaviour.npy", np.eye(60, 4, dtype=np.float32))
    assert tokenize(*words, "--collaborative", tmp_path / "behaviour.npy", "--out", tmp_path / "own") == 0
    books = [(tmp_path / name / "codebooks.safetensors").read_bytes() for name in ("run", "own")]
    assert books[0] != books[1]


def test_dry_run_prints_the_plan_and_writes_nothing(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        tokenize(world / "shop", "--method", "fsq", "--levels", 2, "--codebook-size", 128, "--dry-run", "--json") == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert (plan["kind"], plan["ledger"]["items"], plan["ledger"]["bits_per_item"]) == ("tokenize-plan", 60, 14.0)
    assert list(tmp_path.iterdir()) == []


def test_print_config_gives_a_file_that_says_the_same(world, capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("method: rq-gmm\nlevels: 2\nrq-gmm: {shrinkage: 3.0}\n")
    assert tokenize("--config", tmp_path / "a.yaml", "--preprocess", "l2", "--print-config") == 0
    printed = capsys.readouterr().out
    (tmp_path / "b.yaml").write_text(printed)
    assert tokenize("--config", tmp_path / "b.yaml", "--print-config") == 0
    assert capsys.readouterr().out == printed


def constant(folder):
    np.save(folder / "bad.npy", np.ones((30, 4), np.float32))


def not_finite(folder):
    rows = themed_vectors(30)
    rows[11, 2] = np.nan
    np.save(folder / "bad.npy", rows)


def pickled(folder):
    np.save(folder / "bad.npy", np.array([{}, {}], dtype=object), allow_pickle=True)


def whole_numbers(folder):
    np.save(folder / "bad.npy", np.arange(60).reshape(30, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (constant, "every item has the same embedding"),
        (not_finite, "embedding of item 11 holds NaN"),
        (pickled, "without pickled objects"),
        (whole_numbers, "must be a float array"),
    ],
)
def test_unusable_vectors_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, make, message):
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    assert tokenize("bad.npy", "--method", "rq-kmeans", *SMALL) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if message in line]) == 1
    assert list(tmp_path.glob("runs/*/codes.npy")) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "rq-means"), "unknown method 'rq-means'; known: balanced-rq-kmeans"),
        (("--levels", "0"), "levels must be at least 1, got 0"),
        (("--codebook-size", "100"), "60 items cannot fill a codebook of 100 codes"),
        (("--set", "covarianc=diag"), "--set 'covarianc=diag' is not NAME=VALUE with an option of rq-gmm"),
        (("--set", "covariance=round"), "--covariance must be one of diag"),
        (("--set", "seed=3"), "use --seed and --seeds"),
        (("--collisions", "sometimes"), "'sometimes'"),
        (("--collisions", "hash_last", *SMALL), "hash_last takes domain and categories"),
        (("--hold-out-cold",), "need a log; an .npy file has none"),
        (("--whiten",), "need the step pca"),
        (("--item-ids", "absent.txt", *SMALL), "absent.txt cannot be read as item ids"),
        (("--method", "letter", *SMALL, "--set", "diversity_clusters=2"), "letter needs behaviour vectors"),
        (("--collaborative", "vectors.npy", *SMALL), "does not use behaviour vectors"),
        (("--resume",), "--resume needs --out DIR"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(world, monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    assert tokenize(world / "vectors.npy", *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if message in line]) == 1, lines
    assert list(tmp_path.glob("runs/*/codes.npy")) == []


def test_vectors_of_another_catalogue_are_refused(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("few.npy", themed_vectors(59))
    assert tokenize(world / "shop", "--vectors", "few.npy", *SMALL) == 2
    assert "holds 59 vectors where 'shop' has 60 items" in capsys.readouterr().err
    (tmp_path / "few.txt").write_text("".join(f"i{item}\n" for item in range(59)))
    assert tokenize(world / "shop", "--vectors", "few.npy", "--item-ids", "few.txt", *SMALL) == 2
    assert "item 'i59' has no vector (1 of 60 items have none)" in capsys.readouterr().err


def test_help_lists_the_methods_without_loading_torch():
    heavy = "{'torch', 'scipy', 'pyarrow', 'pandas', 'faiss'}"
    code = (
        "import sys; from recollect.cli.main import main; main(['tokenize', '--help']); "
        f"main(['tokenize-bench', '--help']); assert not {heavy} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("rq-gmm", "rq-kmeans", "prq-kmeans", "rq-vae", "letter", "vq", "pq", "opq", "fsq", "random"):
        assert done.stdout.count(f"\n  {name} ") == 2, name


@pytest.mark.parametrize("command", ["tokenize", "tokenize-bench"])
def test_what_is_refused_leaves_the_folder_as_it_is(tmp_path, capsys, command):
    good, bad, out = tmp_path / "good.npy", tmp_path / "bad.npy", tmp_path / "run"
    vectors = themed_vectors(30)
    np.save(good, vectors)
    vectors[11, 2] = np.nan
    np.save(bad, vectors)
    ids = tmp_path / "ids.txt"
    ids.write_text("".join(f"n{row + 1}\n" for row in range(30)))
    method = ["--method", "rq-kmeans"] if command == "tokenize" else ["--methods", "random,rq-kmeans", "--seeds", "1"]
    words = [*method, *SMALL, "--item-ids", str(ids), "--out", str(out)]
    assert main([command, str(bad), *words]) == 2
    assert f"{bad}: embedding of item 'n12' (row 11) holds NaN" in capsys.readouterr().err
    assert not out.exists()
    assert main([command, str(bad), *words, "--dry-run"]) == 2
    assert main([command, str(good), *words]) == 0
    before = contents(out)
    for again in ([str(bad), *words], [str(good), *words, "--codebook-size", "31"]):
        assert main([command, *again, "--overwrite"]) == 2
        assert contents(out) == before
    other = "tokenize-bench" if command == "tokenize" else "tokenize"
    (out / "run.json").write_text(json.dumps({"command": other}))
    assert main([command, str(good), *words, "--overwrite"]) == 2
    assert f"replaces runs of {command} only" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["tokenize", "tokenize-bench"])
def test_items_on_a_line_are_fitted_and_drawn(tmp_path, command):
    np.save(tmp_path / "line.npy", np.random.default_rng(0).normal(size=(40, 1)).astype(np.float32))
    method = ["--method", "rq-kmeans"] if command == "tokenize" else ["--methods", "random,rq-kmeans", "--seeds", "1"]
    assert main([command, str(tmp_path / "line.npy"), *method, *SMALL, "--out", str(tmp_path / "run")]) == 0
    panels = json.loads((tmp_path / "run" / "report.json").read_text())["panels"]
    drawn = [panel for panel in panels if panel["kind"] == "map"]
    assert drawn
    assert all(set(panel["y"]) == {0.0} and len(set(panel["x"])) > 20 for panel in drawn)


def test_a_byte_order_mark_is_no_part_of_the_first_id_and_odd_separators_are_refused(tmp_path, capsys):
    np.save(tmp_path / "v.npy", themed_vectors(30))
    names = [f"n{row}" for row in range(30)]
    (tmp_path / "ids.txt").write_text("\ufeff" + "\r\n".join(names) + "\r\n", encoding="utf-8", newline="")
    words = ("--item-ids", tmp_path / "ids.txt", "--method", "rq-kmeans", *SMALL, "--out", tmp_path / "run")
    assert tokenize(tmp_path / "v.npy", *words) == 0
    assert set(TokenizedItems.load(tmp_path / "run").ids.item_ids) == set(names)
    (tmp_path / "ids.txt").write_text("\n".join(["a\u2028b", *names[1:]]) + "\n", encoding="utf-8")
    assert tokenize(tmp_path / "v.npy", *words, "--overwrite") == 2
    assert "line 1: 'a\\u2028b' holds a separator of lines" in capsys.readouterr().err
