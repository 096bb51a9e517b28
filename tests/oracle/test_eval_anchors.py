"""AgentCF's published CDs subsets: the null scorers reproduce the measured anchors, and the audit finds the leak.

The spec's row '"never seen in training first"' is, digit for digit, the popularity counts negated; both it and the
scorer that only asks "seen or not" are pinned here.
"""

import gzip
from pathlib import Path

import numpy as np
import pytest

from recollect.eval.metrics import chance, rank_counts, ranking_metrics, ranking_table
from recollect.eval.null_scorers import audit, null_scores
from recollect.eval.slates import Slates, sample_slates
from recollect.eval.statistics import clustered_standard_error
from recollect.types import Catalog, Dataset, Interactions, Users

METRICS = ("ranking/hr@1", "ranking/ndcg@10", "ranking/mrr")

ANCHORS = {
    ("dense", "popularity"): (0.173, 0.511, 0.365),
    ("dense", "tfidf-history"): (0.160, 0.524, 0.379),
    ("dense", "bm25-history"): (0.150, 0.526, 0.381),
    ("dense", "anti-popularity"): (0.140, 0.454, 0.297),
    ("dense", "seen-first"): (0.161, 0.493, 0.343),
    ("sparse", "popularity"): (0.025, 0.323, 0.139),
    ("sparse", "tfidf-history"): (0.250, 0.584, 0.456),
    ("sparse", "bm25-history"): (0.230, 0.583, 0.453),
    ("sparse", "anti-popularity"): (0.560, 0.800, 0.734),
    ("sparse", "seen-first"): (0.561, 0.803, 0.737),
}


def _lines(path: Path) -> list[list[str]]:
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        return [line.rstrip("\n").split("\t") for line in handle]


def read_subset(folder: Path, kind: str) -> tuple[Dataset, Slates, np.ndarray]:
    """Data set of the items in lists, histories and positives; the published slates; the training mask.

    Each user's 8 events become the log: 7 of history, then the held-out positive. As the source does, the positive is
    removed from the list, the first 9 are kept and the positive is added.
    """
    tests = _lines(folder / f"CDs-100-user-{kind}.test.inter.gz")[1:]
    lists = {user: items.split() for user, items in _lines(folder / f"CDs-100-user-{kind}.random.gz")}
    histories = [history.split() for _, history, _ in tests]
    slates = [[target, *[item for item in lists[user] if item != target][:9]] for user, _, target in tests]
    used = sorted({item for rows in (*histories, *slates) for item in rows}, key=int)
    number = {item: index for index, item in enumerate(used)}
    about = {row[0]: row[1:] for row in _lines(folder / "CDs.item.gz")[1:] if row[0] in number}
    n_users, n_items = len(tests), len(used)
    events = [[*history, target] for history, (_, _, target) in zip(histories, tests, strict=True)]
    log = Interactions(
        user=np.repeat(np.arange(n_users), 8),
        item=np.array([number[item] for row in events for item in row]),
        time=np.tile(np.arange(8), n_users),
    )
    none = np.full(n_items, None, dtype=object)
    catalog = Catalog(
        item_ids=np.array(used, dtype=object),
        titles=np.array([about[item][0] for item in used], dtype=object),
        domain=np.zeros(n_items, dtype=np.int16),
        categories=[tuple(about[item][1].split("; ")) if len(about[item]) > 1 else () for item in used],
        texts=none,
    )
    dataset = Dataset("cds", log, catalog, Users(np.array([user for user, _, _ in tests], dtype=object)), ("cds",))
    rows = np.arange(n_users) * 8 + 7
    train = np.ones(len(log), dtype=bool)
    train[rows] = False
    zeros = np.zeros(n_users, dtype=np.int64)
    candidates = np.array([[number[item] for item in row] for row in slates])
    return dataset, Slates(np.arange(n_users), rows, log.time[rows], zeros, candidates, zeros, zeros > 0), train


@pytest.fixture(scope="module", params=["dense", "sparse"])
def subset(request, shared_data):
    dataset, slates, train = read_subset(shared_data / "recsys" / "agentcf_cds", request.param)
    return request.param, dataset, slates, null_scores(slates, dataset, train_rows=train, seed=0), train


def test_null_scorers_reproduce_the_measured_anchors_to_three_digits(subset):
    kind, _, slates, scores, _ = subset
    for (where, name), expected in ANCHORS.items():
        if where == kind:
            table = ranking_table(scores[name], slates)
            got = [float(table[metric].mean()) for metric in METRICS]
            np.testing.assert_allclose(got, expected, rtol=0, atol=5.1e-4, err_msg=f"{kind} {name}")


def test_random_row_is_the_closed_form():
    constant = ranking_metrics(*rank_counts(np.zeros((100, 10)), np.zeros(100, dtype=int)))
    got = [float(constant[metric].mean()) for metric in METRICS]
    np.testing.assert_allclose(got, (0.100, 0.454, 0.293), rtol=0, atol=5e-4)
    np.testing.assert_allclose(got, [chance(10)[metric] for metric in METRICS], rtol=1e-12)


def test_random_scorer_stays_within_three_standard_errors_of_chance(subset):
    _, _, slates, scores, _ = subset
    values = ranking_table(scores["random"], slates)["ranking/mrr"]
    assert abs(values.mean() - chance(10)["ranking/mrr"]) < 3 * clustered_standard_error(values, slates.user)


def test_audit_flags_the_sparse_set_by_itself(subset):
    kind, _, slates, scores, _ = subset
    # The published lists put the positive first, which a position scorer would rightly shout about.
    found = {finding.scorer: finding for finding in audit(scores, slates) if finding.scorer != "candidate-position"}
    if kind == "sparse":
        assert set(found) >= {"popularity", "anti-popularity", "seen-first"}
        assert found["seen-first"].z > 10
        assert "'seen-first' gets ranking/mrr 0.737 where chance is 0.293" in found["seen-first"].text
    else:
        assert not found, "on the dense set no such scorer is 3 standard errors from chance"


def test_audit_reports_a_target_that_always_stands_in_one_place(subset):
    _, _, slates, scores, _ = subset
    found = {finding.scorer: finding for finding in audit({"candidate-position": scores["candidate-position"]}, slates)}
    assert found["candidate-position"].value == 1.0
    assert found["candidate-position"].z == pytest.approx((1 - 0.292897) / (0.2633 / 10), rel=1e-2)


def test_seen_counts_of_the_published_sets(subset):
    kind, _, _, scores, _ = subset
    unseen = scores["popularity"] == 0
    others = unseen.sum() - unseen[:, 0].sum()
    assert (unseen[:, 0].sum(), others) == ((91, 104) if kind == "sparse" else (13, 50))


def test_matched_negatives_of_our_own_do_not_leak_on_the_same_log(subset):
    _, dataset, slates, _, train = subset
    ours = sample_slates(
        dataset.interactions, dataset.n_items, dataset.catalog.domain, slates.row, seed=3, train_rows=train
    )
    scores = null_scores(ours, dataset, train_rows=train, seed=3)
    assert not [finding.scorer for finding in audit(scores, ours) if finding.scorer != "title-length"]


def test_tfidf_equals_scikit_learn(subset):
    from sklearn.feature_extraction.text import TfidfVectorizer

    _, dataset, slates, scores, _ = subset
    catalog = dataset.catalog
    texts = [
        " ".join([title, *categories]) for title, categories in zip(catalog.titles, catalog.categories, strict=True)
    ]
    vectorizer = TfidfVectorizer(stop_words="english")
    items = vectorizer.fit_transform(texts)
    for case in range(0, 100, 7):
        row = int(slates.row[case])
        history = vectorizer.transform([" ".join(texts[i] for i in dataset.interactions.item[row - 7 : row])])
        expected = (items[slates.candidates[case]] @ history.T).toarray()[:, 0]
        np.testing.assert_allclose(scores["tfidf-history"][case], expected, rtol=0, atol=1e-12)
