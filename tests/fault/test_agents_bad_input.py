"""What users and disks get wrong: a clear refusal before anything is written, or a run that goes on."""

import errno
import json
import os

import pytest
from support.agent_worlds import no_report, play, reader, tiny_dataset, with_titles

import recollect
from recollect.agents.simulate import simulate
from recollect.data import HarborConfig, build_harbor
from recollect.errors import ConfigError, InputError, ResumeRefused, StorageRefused, UnknownName
from recollect.journal import hooks

SMALL = HarborConfig(n_users=6, n_domains=2, items_per_domain=24, min_events=7, max_events=8, shock_items=2)
OPTIONS = {"interactions_per_user": 2, "held_out": 1, "recall": False}


@pytest.fixture(scope="module")
def world():
    return build_harbor(SMALL, seed=3).dataset


def run(dataset, out, **options):
    backbone = reader()
    with no_report():
        return simulate(dataset, backbone=backbone, embedder=backbone, out=str(out), **{**OPTIONS, **options})


def refused(error, dataset, out, *words, **options):
    with pytest.raises(error) as caught:
        run(dataset, out, **options)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not out.exists(), "something was written"


def items_of(domain, count):
    return [(f"{domain}{at}", f"{domain} title {at}", domain, (f"kind {at % 3}",), None) for at in range(count)]


def test_a_domain_with_fewer_items_than_candidates_is_refused_by_name(tmp_path):
    events = [(f"u{user}", f"tiny{at}", 10 * user + at) for user in range(3) for at in range(4)]
    dataset = tiny_dataset(events, items_of("tiny", 8))
    refused(InputError, dataset, tmp_path / "out", "8 items", "fewer candidates", candidates=10)
    refused(InputError, dataset, tmp_path / "out", "candidates", candidates=6)
    assert run(dataset, tmp_path / "fits", candidates=4, negatives="uniform").kind == "simulate"


def test_a_user_who_took_everything_leaves_nothing_to_compare_with(tmp_path):
    events = [("u0", f"all{at}", at) for at in range(5)]
    refused(InputError, tiny_dataset(events, items_of("all", 5)), tmp_path / "out", candidates=2)


def test_a_log_in_which_nobody_has_three_interactions_is_refused_with_the_number(tmp_path):
    events = [(f"u{user}", f"few{at}", at) for user in range(5) for at in range(2)]
    dataset = tiny_dataset(events, items_of("few", 30))
    refused(InputError, dataset, tmp_path / "out", "3 interactions", "2")


def test_users_with_one_interaction_are_left_out_and_counted(world, tmp_path):
    events = [(f"u{user}", f"shop{(3 * user + at) % 40}", 100 * at + user) for user in range(4) for at in range(6)]
    events += [("lonely", "shop1", 5), ("pair", "shop2", 5), ("pair", "shop3", 6)]
    dataset = tiny_dataset(events, items_of("shop", 40))
    report = run(dataset, tmp_path / "out")
    assert any(warning.startswith("2 users have fewer than 3 interactions") for warning in report.warnings)
    users = {json.loads(line)["user"] for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()}
    assert users - {""} == {"u0", "u1", "u2", "u3"}


def test_items_without_title_or_any_text_are_shown_by_a_name_of_their_own(world, tmp_path):
    titles = [str(title) for title in world.catalog.titles]
    for item in range(0, len(titles), 3):
        titles[item] = ["", "   ", "\u200b\n"][item % 3]
    texts = [None if at % 2 else text for at, text in enumerate(world.catalog.texts)]
    played = play(with_titles(world, titles, texts), tmp_path, reader(), one_by_one=True, **OPTIONS)
    scored = [title for _, call in played.prompts for title in getattr(call, "continuations", ())]
    assert all(title.strip() for title in scored)
    assert any(title.startswith("untitled ") for title in scored)
    named = {title for title in scored if title.startswith("untitled ")}
    ids = {title.rsplit(" ", 1)[1] for title in named}
    assert len(ids) == len(named)
    assert ids <= {str(name) for name in world.catalog.item_ids}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backbone": "smolm2"}, ("smolm2", "smollm2")),
        ({"backbone": "openai:nowhere"}, ("nowhere",)),
        ({"backbone": "path:"}, ("path:",)),
        ({"embedder": "minilmm"}, ("minilmm", "minilm")),
    ],
)
def test_an_unknown_model_is_refused_before_anything_is_written(world, tmp_path, options, words):
    backbone = reader()
    given = {"backbone": backbone, "embedder": backbone, **options}
    with pytest.raises(InputError) as caught:
        simulate(world, out=str(tmp_path / "out"), **given, **OPTIONS)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_unknown_data_is_refused_with_the_known_names(tmp_path):
    backbone = reader()
    with pytest.raises(InputError, match="harbour") as caught:
        simulate("harbour", backbone=backbone, embedder=backbone, out=str(tmp_path / "out"))
    assert "harbor" in str(caught.value).replace("'harbour'", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"users": 0},
        {"candidates": 1},
        {"held_out": 0},
        {"interactions_per_user": 0},
        {"groups": 0},
        {"clusters": 1},
        {"group_window": 0},
        {"concurrency": 0},
        {"batch_size": 0},
        {"max_failed": 1.5},
        {"resume": True, "overwrite": True},
    ],
)
def test_an_illegal_option_is_refused_by_name_and_value(world, tmp_path, options):
    refused(ConfigError, world, tmp_path / "out", next(iter(options)), **options)


@pytest.mark.parametrize(
    "options",
    [{"method": "agentcf+++"}, {"writer": "gpt"}, {"ranking": "best"}, {"matching": "none"}, {"order": "any"}],
)
def test_an_unknown_value_of_a_closed_option_is_refused_with_those_allowed(world, tmp_path, options):
    ((name, value),) = options.items()
    refused(InputError, world, tmp_path / "out", name, repr(value), **options)


def test_an_option_that_does_not_exist_is_refused_with_those_that_do(world, tmp_path):
    refused(
        ConfigError, world, tmp_path / "out", "'interaction_per_user'", "interactions_per_user", interaction_per_user=3
    )


def test_a_path_object_is_as_good_as_its_text(world, tmp_path):
    backbone = reader()
    with no_report():
        simulate(world, backbone=backbone, embedder=backbone, out=tmp_path / "out", **OPTIONS)
    assert (tmp_path / "out" / "events.jsonl").is_file()


@pytest.mark.parametrize("fault", [float("nan"), float("-inf"), -1e-9])
def test_a_temperature_that_is_no_temperature_is_refused(world, tmp_path, fault):
    refused(ConfigError, world, tmp_path / "out", "temperature", temperature=fault)


def test_a_folder_that_holds_something_is_left_alone(world, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("two years of work")
    with pytest.raises(InputError, match=r"not empty.*--resume.*--overwrite"):
        run(world, out)
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]
    report = run(world, out, overwrite=True)
    assert report.kind == "simulate"
    assert (out / "thesis.txt").read_text() == "two years of work"


def test_a_file_in_place_of_the_folder_is_left_alone(world, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match="not a folder"):
        run(world, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"


@pytest.mark.parametrize("recall", [False, True])
def test_overwriting_a_run_gives_what_a_fresh_run_gives(world, tmp_path, recall):
    run(world, tmp_path / "out", seed=5, interactions_per_user=4, recall=recall)
    run(world, tmp_path / "out", overwrite=True, recall=recall)
    run(world, tmp_path / "fresh", recall=recall)
    assert (tmp_path / "out" / "events.jsonl").read_bytes() == (tmp_path / "fresh" / "events.jsonl").read_bytes()


def test_resuming_with_other_options_is_refused_and_names_each(world, tmp_path):
    run(world, tmp_path / "out")
    before = {
        file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.suffix in (".jsonl", ".json")
    }
    with pytest.raises(ResumeRefused) as caught:
        run(world, tmp_path / "out", resume=True, seed=1, group_window=3)
    assert caught.value.exit_code == 2
    for word in ("group_window: 5 -> 3", "seed: 0 -> 1"):
        assert word in str(caught.value)
    after = {
        file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.suffix in (".jsonl", ".json")
    }
    assert after == before


def test_resuming_with_another_model_or_other_data_is_refused(world, tmp_path):
    run(world, tmp_path / "out")
    other = reader(name="another-model")
    with pytest.raises(ResumeRefused, match=r"backbone: .*reader.* -> .*another-model"), no_report():
        simulate(world, backbone=other, embedder=other, out=str(tmp_path / "out"), resume=True, **OPTIONS)
    with pytest.raises(ResumeRefused, match="data"):
        run(build_harbor(SMALL, seed=8).dataset, tmp_path / "out", resume=True)


def test_options_that_do_not_decide_events_may_change_on_resume(world, tmp_path):
    run(world, tmp_path / "out")
    events = (tmp_path / "out" / "events.jsonl").read_bytes()
    run(world, tmp_path / "out", resume=True, concurrency=3, server_patience=1.0)
    assert (tmp_path / "out" / "events.jsonl").read_bytes() == events


def test_a_dry_run_counts_and_makes_no_folder(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = recollect.simulate(world, backbone="smollm2", dry_run=True, **OPTIONS)
    assert report.protocol["dry_run"]
    assert report.ledger["users"] == 6
    assert report.ledger["steps"] > report.ledger["test_cases"] > 0
    assert report.ledger["calls"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": "paper"},
        {"ranking": "pairwise", "candidates": 4},
        {"ranking": "listwise"},
        {"method": "agentcf"},
        {"writer": "llm", "decision": "generate", "max_failed": 1.0},
        {"writer": "llm", "fusion": "one_call", "max_failed": 1.0},
    ],
)
def test_the_plan_promises_at_least_the_calls_that_a_run_makes(world, tmp_path, options):
    with no_report():
        plan = simulate(world, backbone="smollm2", dry_run=True, **OPTIONS, **options)
    played = play(world, tmp_path, reader(), one_by_one=True, **OPTIONS, **options)
    assert len(played.prompts) <= plan.ledger["calls"]
    if "writer" not in options:
        assert len(played.prompts) == plan.ledger["calls"]


# ---- the disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", ["record:written", "commit:written", "embeddings:written", "export:written"])
@pytest.mark.parametrize("nth", [1, 3])
def test_a_full_disk_stops_with_74_and_the_run_goes_on_where_it_was(world, tmp_path, monkeypatch, write, nth):
    expected = play(world, tmp_path / "undisturbed", reader(), **OPTIONS).log
    count = {"left": 1 if write in ("export:written", "embeddings:written") else nth}

    def full(name):
        if name == write:
            count["left"] -= 1
            if count["left"] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def translated(name):
        """SQLite reports a full disk by its own error; the file writer by OSError."""
        import sqlite3

        try:
            full(name)
        except OSError:
            if name.startswith("export"):
                raise
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error from None

    monkeypatch.setattr(hooks, "trigger", translated)
    out = tmp_path / "out"
    with pytest.raises(StorageRefused) as caught:
        run(world, out)
    assert caught.value.exit_code == 74
    assert "free some space and resume" in str(caught.value)
    assert not (out / "events.jsonl").exists()
    assert not [file.name for file in out.iterdir() if file.name.endswith(".tmp")]
    monkeypatch.undo()
    run(world, out, resume=True)
    assert (out / "events.jsonl").read_bytes() == expected


def test_a_folder_that_cannot_be_written_is_refused(world, tmp_path, monkeypatch):
    def readonly(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("recollect.io.Path.mkdir", readonly)
    with pytest.raises(StorageRefused):
        run(world, tmp_path / "out")


def test_a_second_process_may_not_write_a_run_under_way(world, tmp_path):
    seen = []

    def during(name):
        if name == "commit:begin" and not seen:
            seen.append(name)
            with pytest.raises(recollect.errors.RecollectError) as caught:
                run(world, tmp_path / "out", resume=True)
            assert caught.value.exit_code == 2

    original = hooks.trigger
    hooks.trigger = during
    try:
        run(world, tmp_path / "out")
    finally:
        hooks.trigger = original
    assert seen


def test_a_name_of_a_method_is_checked_before_data_is_read(tmp_path):
    with pytest.raises(InputError):
        simulate("does-not-exist", method="agentcf+++", out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UnknownName, match="known"):
        recollect.open_backbone("gpt-9")
