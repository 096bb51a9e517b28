"""Scores, lists and options that cannot be used: clear errors or counted invalids, never a silently wrong metric."""

import numpy as np
import pytest
from support.ranking_worlds import FixedScores, MostPopular, log_dataset, random_world

from recollect.data import global_temporal, leave_one_out
from recollect.errors import ConfigError, InputError
from recollect.eval.list_metrics import list_columns
from recollect.eval.protocol import compare_protocols, data_fingerprint, protocol_hash
from recollect.eval.ranking import evaluate_ranker
from recollect.eval.ranking_inputs import StreamedCounts, evaluate_counts, evaluate_lists
from recollect.eval.setting import evaluation_setting
from recollect.rng import stream


@pytest.fixture(scope="module")
def world():
    return random_world(41)


@pytest.fixture(scope="module")
def split(world):
    return leave_one_out(world)


@pytest.fixture
def scores(world, split):
    return stream(1, "scores").normal(size=(len(split.test_row), world.n_items)).astype(np.float32)


def test_nan_scores_name_the_case_the_user_and_the_model(world, split, scores):
    scores[17, 3] = np.nan
    user = world.users.user_ids[world.interactions.user[split.test_row[17]]]
    for batch_size in (4, 256):
        with pytest.raises(InputError, match=rf"'fixed' gave NaN scores, first for case 17 \(user '{user}'\)"):
            evaluate_ranker(FixedScores(scores), world, split, batch_size=batch_size)


def test_infinite_scores_are_ranked(world, split, scores):
    finite = evaluate_ranker(FixedScores(scores), world, split)
    infinite = scores.copy()
    infinite[np.arange(len(scores)), scores.argmax(axis=1)] = np.inf
    infinite[np.arange(len(scores)), scores.argmin(axis=1)] = -np.inf
    found = evaluate_ranker(FixedScores(infinite), world, split)
    np.testing.assert_array_equal(found.greater, finite.greater)
    np.testing.assert_array_equal(found.lists, finite.lists)


@pytest.mark.parametrize("kind", ["own", "read-only", "strided", "double", "one row for all"])
def test_a_models_own_arrays_are_left_as_they_were(world, split, scores, kind):
    given = {
        "own": scores,
        "read-only": scores.copy(),
        "strided": np.repeat(scores, 2, axis=1)[:, ::2],
        "double": scores.astype(np.float64),
        "one row for all": np.lib.stride_tricks.as_strided(scores[0], scores.shape, (0, scores.itemsize)),
    }[kind]
    if kind == "read-only":
        given.flags.writeable = False
    before = given.copy()
    table = evaluate_ranker(FixedScores(given), world, split, batch_size=7)
    np.testing.assert_array_equal(given, before)
    again = evaluate_ranker(FixedScores(before), world, split)
    np.testing.assert_array_equal(table.greater, again.greater)
    np.testing.assert_array_equal(table.lists, again.lists)


def test_scores_of_another_shape_are_refused(world, split, scores):
    padded = np.concatenate([np.zeros((len(scores), 1), dtype=np.float32), scores], axis=1)
    with pytest.raises(InputError, match=r"\(40, 61\) where \(40, 60\).*without a padding column"):
        evaluate_ranker(FixedScores(padded), world, split)
    with pytest.raises(InputError, match="scores must be numbers"):
        evaluate_ranker(FixedScores(np.full(scores.shape, "1", dtype=object)), world, split)


def test_half_precision_becomes_float32_and_its_ties_are_counted(world, split, scores, caplog):
    narrow = (1.0 + scores / 4096).astype(np.float16)
    table = evaluate_ranker(FixedScores(narrow), world, split)
    assert (table.equal > 0).mean() > 0.5
    assert len(table.warnings) == 1
    assert f"'fixed' scores in float16, compared as float32: {(table.equal > 0).mean():.1%}" in table.warnings[0]
    assert table.warnings[0] in caplog.text
    wide = evaluate_ranker(FixedScores(narrow.astype(np.float32)), world, split)
    assert wide.warnings == ()
    np.testing.assert_array_equal(table.column("ndcg@10"), wide.column("ndcg@10"))


def test_bfloat16_tensors_are_accepted_with_the_same_warning(world, split, scores):
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(scores)
    assert evaluate_ranker(FixedScores(tensor), world, split).warnings == ()
    table = evaluate_ranker(FixedScores((1 + tensor / 512).to(torch.bfloat16)), world, split)
    assert "scores in bfloat16, compared as float32" in table.warnings[0]
    assert (table.equal > 0).mean() > 0.5


def test_a_log_without_a_case_is_refused():
    lonely = log_dataset([0, 0, 1], [0, 1, 1], [1, 2, 3])
    split = leave_one_out(lonely)
    with pytest.raises(InputError, match="no test case under leave_one_out: every user's history is too short"):
        evaluate_ranker(MostPopular(lonely, split.train), lonely, split)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "seen"}, "mask must be one of history, none, train, got 'seen'"),
        ({"tie": "random"}, "tie must be one of"),
        ({"ks": (0, 10)}, "cut-offs must be whole numbers of at least 1"),
        ({"ks": ()}, "cut-offs must be whole numbers"),
        ({"list_length": 0}, "list_length must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"part": "train"}, "part must be 'valid' or 'test'"),
        ({"history": "all"}, "history must be"),
    ],
)
def test_illegal_options_are_refused(world, split, scores, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_ranker(FixedScores(scores), world, split, **options)


def test_a_training_mask_of_another_log_is_refused(world, split, scores):
    with pytest.raises(InputError, match="rows must be a boolean mask over"):
        evaluate_ranker(FixedScores(scores), world, split, rows=np.ones(3, dtype=bool))


# Ranked lists


@pytest.fixture
def tiny():
    """One user whose history is 0, 1, 2 and whose target is 5, among eight items."""
    world = log_dataset([0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 5, 3, 4, 6, 7], np.arange(8), 8)
    return world, leave_one_out(world)


def first_case(tiny, row, **options):
    world, split = tiny
    return evaluate_lists([row, []], world, split, name="list", ks=(1, 2, 3, 5), **options)


def test_invalid_ids_keep_their_place_and_repeats_do_not(tiny):
    table = first_case(tiny, [-7, 99, 5])
    assert (table.greater[0], table.column("hr@2")[0], table.column("hr@3")[0]) == (2, 0.0, 1.0)
    assert table.lists[0].tolist() == [-1, -1, 5, -1, -1]
    assert (table.invalid_rate, table.duplicate_rate) == (2 / 3, 0.0)
    repeated = first_case(tiny, [3, 3, 3, 5])
    assert (repeated.greater[0], repeated.duplicate_rate, repeated.invalid_rate) == (1, 0.5, 0.0)
    assert repeated.lists[0].tolist() == [3, 5, -1, -1, -1]


def test_masked_items_are_taken_out_of_a_list_but_not_without_masking(tiny):
    assert first_case(tiny, [0, 1, 5]).greater[0] == 0
    assert first_case(tiny, [0, 1, 5], mask="none").greater[0] == 2
    assert first_case(tiny, [0, 2, 5], mask="train").greater[0] == 1


def test_a_target_that_is_not_listed_and_an_empty_list_score_zero_and_stay_cases(tiny):
    table = first_case(tiny, [3, 4])
    assert len(table) == 2
    assert all(column.tolist() == [0.0, 0.0] for column in table.metrics.values())
    assert table.aggregate(["hr@5"], resamples=10)["hr@5"]["n"] == 2
    padded = first_case(tiny, [5, -1, -1])
    assert padded.invalid_rate == 0.0, "trailing -1 end a list"


def test_short_lists_are_filled_only_when_told_to_and_the_row_says_so(tiny):
    world, split = tiny
    options = {"name": "list", "ks": (3,), "list_length": 5}
    lists = [[-3, 3], []]
    plain = evaluate_lists(lists, world, split, **options)
    filled = evaluate_lists(lists, world, split, fill="popularity", **options)
    assert plain.lists.tolist() == [[-1, 3, -1, -1, -1], [-1] * 5]
    assert filled.lists[0].tolist() == [-1, 3, 4, 5, 6]
    assert filled.column("hr@3").tolist() == [0.0, 0.0]
    assert filled.greater[0] == 3
    assert compare_protocols(plain.protocol, filled.protocol)["fill"] == (None, "popularity")
    backbone = np.array([[7, 7, 3, 5, 0], [0, 7, 1, 2, 3]])
    other = evaluate_lists(lists, world, split, fill="backbone", fill_lists=backbone, **options)
    assert other.lists.tolist() == [[-1, 3, 7, 5, -1], [0, 7, 1, 2, -1]]
    assert other.column("hr@3").tolist() == [0.0, 1.0]
    for wrong in ({"fill": "backbone"}, {"fill": "popularity", "fill_lists": backbone}, {"fill": "random"}):
        with pytest.raises(ConfigError, match="fill must be"):
            evaluate_lists(lists, world, split, **wrong, **options)


def test_lists_and_scores_that_do_not_fit_the_cases_are_refused(tiny):
    world, split = tiny
    with pytest.raises(InputError, match="brings 1 lists for 2 cases"):
        evaluate_lists([[5]], world, split, name="list")
    with pytest.raises(InputError, match=r"gave a NaN score in case 0 \(user 'u0'\)"):
        first_case(tiny, [5, 3], scores=[[1.0, np.nan], []])
    with pytest.raises(InputError, match="gave 1 scores for 2 listed items in case 0"):
        first_case(tiny, [5, 3], scores=[[1.0], []])


# Counts


def test_counts_no_ranking_has_are_refused(tiny):
    world, split = tiny
    fine = np.array([2, 0])
    for greater, equal, message in (
        (np.array([8, 0]), fine * 0, "counts 8 candidates above the target and 0 tied with it in case 0"),
        (np.array([0, -1]), fine * 0, r"case 1 \(user 'u1'\)"),
        (fine.astype(float), fine * 0, "whole numbers of shape"),
        (fine[:1], fine[:1], "whole numbers of shape"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate_counts(greater, equal, world, split, name="counts")
    with pytest.raises(ConfigError, match="tie='index' needs scores"):
        evaluate_counts(fine, fine * 0, world, split, name="counts", tie="index")


def test_a_table_without_lists_has_no_list_metrics(tiny):
    world, split = tiny
    table = evaluate_counts(np.array([2, 0]), np.zeros(2, dtype=int), world, split, name="counts")
    with pytest.raises(InputError, match="keeps lists of 0 items where 10 are asked for"):
        list_columns(table, world, split, k=10)
    assert table.leak is not None
    assert table.leak.future_share is None


def test_blocks_that_do_not_cover_the_catalogue_are_refused(tiny):
    world, split = tiny
    setting = evaluation_setting(world, split)
    counts = StreamedCounts(setting, 0, 2, np.zeros(2))
    counts.add(np.zeros((2, 5)))
    with pytest.raises(InputError, match="only 5 of 8 items were scored"):
        counts.result()
    with pytest.raises(InputError, match="does not continue 2 cases at item 5 of 8"):
        counts.add(np.zeros((2, 4)))
    with pytest.raises(InputError, match=r"first in case 1 \(user 'u1'\)"):
        counts.add(np.array([[0.0, 0, 0], [0, np.nan, 0]]))


# Protocol


def test_the_protocol_hash_covers_what_changes_a_number_and_nothing_else(world, split, scores):
    def block(**options):
        return evaluate_ranker(FixedScores(scores), world, split, **options).protocol

    plain = block(seed=1)
    assert protocol_hash(plain) == protocol_hash(block(seed=2))
    assert compare_protocols(plain, block(seed=2)) == {"seeds": ([1], [2])}
    for options in ({"mask": "none"}, {"tie": "index"}, {"ks": (3,)}, {"history": "train"}, {"part": "valid"}):
        other = block(**options)
        assert protocol_hash(other) != protocol_hash(plain), options
        assert set(options) <= set(compare_protocols(plain, other))
    assert plain["fingerprint"] == data_fingerprint(world)


def test_list_metrics_of_another_split_are_refused(world, split, scores):
    table = evaluate_ranker(FixedScores(scores), world, split)
    with pytest.raises(InputError, match="which are not the"):
        list_columns(table, world, global_temporal(world, 0.7))
