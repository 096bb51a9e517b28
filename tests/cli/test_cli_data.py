"""`recollect data` as a user types it."""

import json
import subprocess
import sys

import pytest


def recollect(*words, cwd):
    return subprocess.run(
        [sys.executable, "-m", "recollect", *words], capture_output=True, text=True, cwd=cwd, timeout=120, check=False
    )


@pytest.fixture
def shop(tmp_path):
    """A csv log of three users and four items."""
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "items.csv").write_text(
        "item_id,title,categories\n" + "".join(f"i{i},<b>Lamp {i}</b>,light|home\n" for i in range(4))
    )
    rows = [f"u{u},i{(u + i) % 4},{1_700_000_000 + 60 * i + u},{1 + (u + i) % 5}\n" for u in range(3) for i in range(3)]
    (folder / "interactions.csv").write_text("user_id,item_id,timestamp,rating\n" + "".join(rows))
    return folder


def test_list_names_the_bundled_world(tmp_path):
    datasets = json.loads(recollect("data", "list", "--json", cwd=tmp_path).stdout)["datasets"]
    assert "harbor" in {row["name"] for row in datasets}


def test_describe_counts_and_stores_on_request(tmp_path):
    done = recollect("data", "describe", "harbor", "--json", "--out", "facts", cwd=tmp_path)
    assert done.returncode == 0
    facts = json.loads(done.stdout)["dataset"]
    assert facts["counts"]["users"] > 0
    assert len(facts["fingerprint"]) == 64
    assert json.loads((tmp_path / "facts" / "report.json").read_text())["dataset"] == facts
    assert facts["fingerprint"] in (tmp_path / "facts" / "report.html").read_text()


def test_describe_of_another_seed_is_another_world(tmp_path):
    prints = {
        json.loads(recollect("data", "describe", "harbor", "--seed", seed, "--json", cwd=tmp_path).stdout)["dataset"][
            "fingerprint"
        ]
        for seed in ("0", "1")
    }
    assert len(prints) == 2


def test_import_writes_a_folder_that_describe_reads_the_same(tmp_path, shop):
    imported = recollect("data", "import", "csv", "shop", "made", "--json", cwd=tmp_path)
    assert imported.returncode == 0
    described = recollect("data", "describe", "made", "--json", cwd=tmp_path)
    facts = json.loads(described.stdout)["dataset"]
    assert facts == json.loads(imported.stdout)["dataset"]
    assert (facts["counts"]["users"], facts["counts"]["interactions"]) == (3, 9)
    again = recollect("data", "import", "csv", "shop", "made", cwd=tmp_path)
    assert again.returncode == 2
    assert "made" in again.stderr
    assert recollect("data", "import", "csv", "shop", "made", "--overwrite", cwd=tmp_path).returncode == 0


def test_import_dry_run_writes_nothing(tmp_path, shop):
    assert recollect("data", "import", "csv", "shop", "made", "--dry-run", cwd=tmp_path).returncode == 0
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("describe", "no-such-data"),
        ("describe", "no/such/folder"),
        ("fetch", "no-such-data"),
        ("import", "papyrus", "shop", "made"),
        ("import", "csv", "no-such-folder", "made"),
    ],
    ids=" ".join,
)
def test_bad_names_are_one_line_and_exit_code_2(tmp_path, shop, words):
    done = recollect("data", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("recollect: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "made").exists()
