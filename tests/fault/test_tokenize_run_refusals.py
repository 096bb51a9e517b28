"""Runs of `recollect tokenize` that must fail are refused before they begin; finished ones keep to their input."""

import json

import numpy as np
import pytest
from support.token_worlds import CountingEmbedder, themed_log, themed_vectors, write_shop

import recollect
from recollect.cli.main import main
from recollect.errors import InputError, ResumeRefused
from recollect.tokenize.artefact import TokenizedItems
from recollect.tokenize.collisions import CollisionConfig, check_strategy
from recollect.tokenize.methods import make_entries

SMALL = ("--levels", "2", "--codebook-size", "4")
TITLES = [f"thing {item}" for item in range(60)]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The folder the commands run in: vectors of 60 items, a shop that has them, and an embedder of its texts."""
    monkeypatch.chdir(tmp_path)
    np.save("vectors.npy", themed_vectors())
    write_shop(tmp_path / "shop", themed_log(), TITLES)
    monkeypatch.setattr("recollect.backbones.resolve.open_embedder", lambda name: CountingEmbedder())
    return tmp_path


def tokenize(*words):
    return main(["tokenize", *map(str, words)])


def contents(folder):
    """Bytes of the files of a run, but for run.json, which every start writes anew."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "run.json"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("vectors.npy", "--method", "rq-gmm", "--collisions", "hash_last"), "hash_last takes domain and categories"),
        (("shop", "--method", "prq-kmeans", "--collisions", "neighbour_repair"), "prq-kmeans has no reconstruction"),
        (("shop", "--method", "rq-kmeans", "--set", "normalize_residuals=true", "--collisions", "zcr"), "no reconstr"),
        (("shop", "--method", "fsq", "--collisions", "zcr"), "fsq: what a last digit adds depends on the digits"),
        (("shop", "--method", "random", "--collisions", "neighbour_repair"), "random: codes are drawn, not searched"),
        (("shop", "--method", "rq-gmm", "--collisions", "neighbour_repair", "--levels", "9"), "tuples per item"),
        (("shop", "--method", "pq", "--beam", "2"), "pq: greedy codes are already the best ones"),
        (("shop", "--method", "opq", "--beam", "2"), "opq: greedy codes are already the best ones"),
        (("shop", "--method", "fsq", "--beam", "2"), "every scalar of fsq is rounded on its own, got 2"),
        (("shop", "--method", "random", "--beam", "2"), "random: codes are drawn, not searched"),
        (("shop", "--method", "rq-gmm", "--set", "residual=soft", "--beam", "2"), "beam 2 needs the hard residual"),
        (("shop", "--method", "constrained-rq-kmeans", "--weight", "popularity"), "'constrained' takes no weights"),
        (("vectors.npy", "--method", "letter"), "letter needs behaviour vectors"),
        (("shop", "--method", "rq-gmm", "--collaborative", "vectors.npy"), "does not use behaviour vectors"),
        (("shop", "--method", "letter", "--collaborative", "absent.npy"), "absent.npy is not a file"),
    ],
)
def test_what_cannot_go_together_is_refused_before_anything_is_embedded_or_written(
    world, monkeypatch, capsys, words, message
):
    monkeypatch.setattr(CountingEmbedder, "embed", None)
    before = set(world.iterdir())
    sizes = () if "--levels" in words else SMALL
    for more in ((), ("--dry-run",), ("--out", "run")):
        assert tokenize(*words, *sizes, *more) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if message in line]
        assert len(lines) == 1
    assert set(world.iterdir()) == before


def test_what_does_go_together_is_not_refused():
    for method, strategy in (
        ("fsq:hidden=16", "neighbour_repair"),
        ("fsq:counts=5+5", "suffix"),
        ("prq-kmeans", "zcr"),
        ("rq-vae", "zcr"),
        ("opq", "sinkhorn"),
        ("random", "capacity"),
        ("rq-gmm:residual=projection", "hash_last"),
    ):
        (entry,) = make_entries([method], {}, levels=2, codebook_size=8)
        check_strategy(strategy, entry.spec.open(entry.options, seed=0), entry.codebook_sizes)
    (entry,) = make_entries(["random"], {}, levels=2, codebook_size=8)
    tokenizer = entry.spec.open(entry.options, seed=0)
    check_strategy("neighbour_repair", tokenizer, entry.codebook_sizes, CollisionConfig(neighbours=1))
    with pytest.raises(InputError, match="top_m 1"):
        check_strategy("neighbour_repair", tokenizer, entry.codebook_sizes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("shop", "--methods", "random,constrained-rq-kmeans", "--weight", "popularity"), "takes no weights"),
        (("vectors.npy", "--methods", "random,letter"), "letter needs behaviour vectors"),
    ],
)
def test_a_comparison_refuses_such_a_row_before_the_first_one_is_fitted(world, capsys, words, message):
    before = set(world.iterdir())
    for more in ((), ("--dry-run",)):
        assert main(["tokenize-bench", *words, *SMALL, "--core", "0", *more]) == 2
        assert message in capsys.readouterr().err
    assert set(world.iterdir()) == before


@pytest.mark.parametrize(
    ("data", "message"),
    [(("shop", "--vectors", "vectors.npy"), "other item vectors or ids"), (("vectors.npy",), "has data_fingerprint")],
)
def test_a_finished_run_is_not_continued_with_a_changed_file_of_vectors(world, capsys, data, message):
    words = (*data, "--method", "rq-gmm", *SMALL, "--out", "run")
    assert tokenize(*words) == 0
    before = contents(world / "run")
    np.save("vectors.npy", themed_vectors(seed=5))
    assert tokenize(*words, "--resume") == 2
    assert message in capsys.readouterr().err
    assert contents(world / "run") == before
    np.save("vectors.npy", themed_vectors())
    assert tokenize(*words, "--resume") == 0


def test_an_unfinished_run_is_not_continued_with_a_changed_file_of_vectors(world, monkeypatch, capsys):
    words = ("shop", "--vectors", "vectors.npy", "--method", "rq-gmm", *SMALL, "--out", "run")
    with monkeypatch.context() as patched:
        patched.setattr(TokenizedItems, "save", None)
        assert tokenize(*words) == 1
    np.save("vectors.npy", themed_vectors(seed=5))
    capsys.readouterr()
    assert tokenize(*words, "--resume") == 2
    assert "the run in run was made of other item vectors or ids" in capsys.readouterr().err
    np.save("vectors.npy", themed_vectors())
    assert tokenize(*words, "--resume") == 0


def test_a_comparison_is_not_continued_with_a_changed_file_of_vectors(world):
    options = {"vectors": "vectors.npy", "methods": ("random",), "seeds": 1, "downstream": False, "core": 0}
    options |= {"levels": 2, "codebook_size": 4, "resamples": 10, "out": "run"}
    recollect.tokenize_bench("shop", **options)
    np.save("vectors.npy", themed_vectors(seed=5))
    with pytest.raises(ResumeRefused, match="the run in run was made of other item vectors or ids"):
        recollect.tokenize_bench("shop", resume=True, **options)
    np.save("vectors.npy", themed_vectors())
    recollect.tokenize_bench("shop", resume=True, **options)


def test_a_run_from_before_vectors_were_recorded_keeps_to_them_too(world, capsys):
    words = ("shop", "--vectors", "vectors.npy", "--method", "rq-gmm", *SMALL, "--out", "run")
    assert tokenize(*words) == 0
    held = json.loads((world / "run" / "run.json").read_text())
    del held["vectors_sha256"]
    (world / "run" / "run.json").write_text(json.dumps(held))
    np.save("vectors.npy", themed_vectors(seed=5))
    assert tokenize(*words, "--resume") == 2
    assert "the semantic IDs in run are of other item vectors or ids" in capsys.readouterr().err
    np.save("vectors.npy", themed_vectors())
    assert tokenize(*words, "--resume") == 0


def test_a_finished_run_is_not_continued_with_other_ids(world, capsys):
    names = [f"sku-{item}\n" for item in range(60)]
    (world / "ids.txt").write_text("".join(names))
    words = ("vectors.npy", "--item-ids", "ids.txt", "--method", "rq-gmm", *SMALL, "--out", "run")
    assert tokenize(*words) == 0
    before = contents(world / "run")
    (world / "ids.txt").write_text("".join(["sku-new\n", *names[1:]]))
    assert tokenize(*words, "--resume") == 2
    assert "other item vectors or ids" in capsys.readouterr().err
    assert contents(world / "run") == before


def test_ids_of_items_nobody_has_touched_count_too(world, capsys):
    with (world / "shop" / "items.csv").open("a") as handle:
        handle.write("i60,new\n")
    np.save("all.npy", themed_vectors(61))
    words = ("shop", "--vectors", "all.npy", "--method", "rq-gmm", *SMALL, "--out", "run")
    assert tokenize(*words) == 0
    before = contents(world / "run")
    items = (world / "shop" / "items.csv").read_text()
    (world / "shop" / "items.csv").write_text(items.replace("i60,new", "i61,new"))
    assert tokenize(*words, "--resume") == 2
    assert "are of other item vectors or ids" in capsys.readouterr().err
    assert contents(world / "run") == before


def test_a_finished_run_is_not_continued_with_other_texts(world, capsys):
    words = ("shop", "--method", "rq-gmm", *SMALL, "--out", "run")
    assert tokenize(*words) == 0
    before = contents(world / "run")
    items = (world / "shop" / "items.csv").read_text()
    (world / "shop" / "items.csv").write_text(items.replace('"thing 7"', '"quite another thing"'))
    assert tokenize(*words, "--resume") == 2
    assert "other item vectors or ids" in capsys.readouterr().err
    changed = {name for name, content in contents(world / "run").items() if content != before[name]}
    assert changed == {"embeddings.npy", "embeddings.json"}
    (world / "shop" / "items.csv").write_text(items)
    assert tokenize(*words, "--resume") == 0
    after = contents(world / "run")
    assert all(after[name] == before[name] for name in ("codes.npy", "manifest.json", "embeddings.npy"))


def test_a_finished_run_is_not_continued_with_other_behaviour_vectors(world, capsys):
    np.save("behaviour.npy", np.eye(60, 4, dtype=np.float32))
    options = "hidden=8,steps=3,batch_size=32,code_dim=4,diversity_weight=0"
    words = ("vectors.npy", "--method", "letter", *SMALL, "--set", options, "--collaborative", "behaviour.npy")
    assert tokenize(*words, "--out", "run") == 0
    before = contents(world / "run")
    assert len(json.loads((world / "run" / "run.json").read_text())["identity"]["collaborative_sha256"]) == 64
    np.save("behaviour.npy", np.eye(60, 4, dtype=np.float32)[::-1])
    assert tokenize(*words, "--out", "run", "--resume") == 2
    assert "has collaborative_sha256" in capsys.readouterr().err
    assert contents(world / "run") == before
