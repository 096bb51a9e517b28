"""`recollect continual --diagnostics`: files of every round, page, methods without routes, resume, later request."""

import json
import shutil

import pytest
import torch
from support.continual_worlds import SMALL, TASKS, write_byte_decoder, write_stream

from recollect.cli.main import main
from recollect.continual.methods.state_file import read_state
from recollect.continual.run import continual
from recollect.progress import SilentProgress

TWO = TASKS[:2]
METHODS = "mh-moe-gated,sd-moe,seq-lora"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnosed")
    write_stream(folder / "trace", TWO, n_train=8, n_test=2)
    write_byte_decoder(folder / "bytes")
    return folder


def words(world, out, *more):
    flags = {"--tasks": ",".join(TWO), "--backbone": world / "bytes", "--out": out, "--diagnostic-examples": 6}
    flags |= {f"--{name.replace('_', '-')}": value for name, value in SMALL.items()}
    return ["continual", str(world / "trace"), *(str(text) for pair in flags.items() for text in pair), *more]


@pytest.fixture(scope="module")
def finished(world):
    out = world / "run"
    assert main(words(world, out, "--method", METHODS, "--diagnostics")) == 0
    return out


def measured(out, method="*"):
    """Every diagnostics file of a method, or of all."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob(f"methods/{method}/*/*/diagn*"))}


def test_every_round_leaves_its_reports_and_arrays(finished):
    seed = finished / "methods" / "mh-moe-gated" / "seed-0"
    first, last = (json.loads((seed / f"round-{number}" / "diagnostics.json").read_text()) for number in (1, 2))
    assert (first["tasks"], last["tasks"]) == ([TWO[0]], list(TWO))
    assert (first["examples"], last["examples"]) == (6, 12)
    assert {entry["layer"] for entry in last["neff"]} == {0, 1}
    assert {entry["factor"] for entry in last["probes"]} == {"task", "label", "frequency", "position", "class"}
    assert {entry["slice"] for entry in last["probes"]} == {None, 0, 1, 2, 3}
    assert all(entry["sharing_pairs"] + entry["apart_pairs"] <= 15 for entry in last["alignment"])
    assert len(last["spectra"]) == 6
    leak = json.loads((finished / "methods/sd-moe/seed-0/round-2/diagnostics.json").read_text())["spectra"][0]
    assert leak["metrics"]["leak_left"] < 1e-4


def test_the_report_says_what_applies_and_compares_tasks_before_and_after(finished):
    section = json.loads((finished / "report.json").read_text())["diagnostics"]
    assert section["examples"] == 12
    assert "no router" in section["methods"]["seq-lora"]["no_routes"]
    gated = section["methods"]["mh-moe-gated"]
    assert [entry["after"] for entry in gated["rounds"]] == list(TWO)
    assert gated["rounds"][0]["gated_share"] == 0.0
    assert gated["rounds"][1]["gated_share"] > 0
    assert [(entry["learning"], entry["tokens"]) for entry in gated["collision"]] == [
        (TWO[1], "answer"),
        (TWO[1], "all"),
    ]
    flat = section["methods"]["sd-moe"]
    assert flat["collision"][1]["routes"] >= 1
    assert flat["rounds"][0]["neff"]["joint"] <= flat["rounds"][0]["compositions"]


def test_the_page_shows_every_diagnostic_and_is_rebuilt_from_the_file(finished):
    page = (finished / "report.html").read_bytes()
    text = page.decode()
    for title in (
        "Diagnostics of routes: what was looked at",
        "Compositions that a route collects (N_eff)",
        "N_eff of joint routes at the end, layer by layer",
        "Collision against forgetting",
        "input tells of a token: mh-moe-gated",
        "The same as a map: mh-moe-gated",
        "Do compositions that share a route pull its experts the same way?",
        "How far the experts differ",
        "seq-lora: does not apply, it has no router",
    ):
        assert title in text, title
    (finished / "report.html").unlink()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.html").read_bytes() == page


def test_asking_later_or_after_a_kill_gives_the_same_bytes_and_no_other_scores(world, finished, tmp_path):
    out = tmp_path / "run"
    assert main(words(world, out, "--method", "sd-moe")) == 0
    plain = json.loads((out / "report.json").read_text())
    assert "diagnostics" not in plain
    assert not measured(out)

    class Killed(Exception):
        pass

    class Dying(SilentProgress):
        def stage(self, name, total=None):
            if "after task 2: diagnostics" in name:
                raise Killed

    options = {**SMALL, "backbone": str(world / "bytes"), "tasks": TWO, "method": "sd-moe", "diagnostic_examples": 6}
    with pytest.raises(Killed):
        continual(world / "trace", progress=Dying(), out=str(out), resume=True, diagnostics=True, **options)
    assert len(measured(out)) == 2
    assert main(words(world, out, "--method", "sd-moe", "--diagnostics", "--resume")) == 0
    assert len(measured(out)) == 4
    assert measured(out) == measured(finished, "sd-moe")
    later, at_once = (json.loads((folder / "report.json").read_text()) for folder in (out, finished))
    assert later["diagnostics"]["methods"]["sd-moe"] == at_once["diagnostics"]["methods"]["sd-moe"]
    scores = [report["methods"]["sd-moe"]["accuracy_matrix"] for report in (plain, later, at_once)]
    assert scores[0] == scores[1] == scores[2]
    states = [read_state(folder / "methods/sd-moe/seed-0/round-2") for folder in (out, finished)]
    assert states[0].values == states[1].values
    assert states[0].tensors.keys() == states[1].tensors.keys()
    for name, tensor in states[0].tensors.items():
        assert torch.equal(tensor, states[1].tensors[name]), name  # looking changed no training


def test_a_torn_file_is_named_and_another_number_of_examples_measures_anew(world, finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    arrays = out / "methods" / "sd-moe" / "seed-0" / "round-1" / "diagnostics.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:40])
    again = words(world, out, "--method", "sd-moe", "--diagnostics", "--resume")
    assert main(again) == 2
    assert "diagnostics.safetensors is not what the diagnostics wrote" in capsys.readouterr().err
    again[again.index("--diagnostic-examples") + 1] = "2"
    assert main(again) == 0
    assert json.loads(arrays.with_suffix(".json").read_text())["examples"] == 2
    again[again.index("--diagnostic-examples") + 1] = "0"
    assert main(again) == 2
    assert "diagnostic_examples must be at least 1" in capsys.readouterr().err
