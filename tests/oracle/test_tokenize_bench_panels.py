"""What a person is shown of a set of codes: counted by hand on small catalogues."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from support.token_worlds import HOSTILE, themed_vectors

from recollect.errors import InputError
from recollect.eval.panels import panel_views
from recollect.eval.report import render_html
from recollect.tokenize.embeddings import Items
from recollect.tokenize.panels import cluster_panels, collision_panels, uncertain_panel, usage_curve
from recollect.types import Report


def items_of(vectors, titles=None):
    n = len(vectors)
    titles = tuple(titles or (f"thing {item}" for item in range(n)))
    return Items(vectors, tuple(f"i{item}" for item in range(n)), titles, {}, "")


def test_usage_is_items_per_code_most_used_first_with_dead_codes_at_zero():
    codes = np.array([[0, 2], [0, 2], [0, 1], [3, 2]])
    panel = usage_curve(codes, (4, 3))
    assert panel["x"] == [1, 2, 3, 4]
    assert panel["series"] == {"level 1": [3, 1, 0, 0], "level 2": [3, 1, 0, None]}


def test_digits_that_are_absent_are_not_counted():
    assert usage_curve(np.array([[0, -1], [0, 0], [1, -1]]), (2, 2))["series"]["level 2"] == [1, 0]


def test_groups_are_listed_by_size_with_their_titles_and_distinct_vectors():
    vectors = themed_vectors(7)
    vectors[4] = vectors[2]
    codes = np.array([[0, 1], [1, 1], [1, 0], [0, 1], [1, 0], [1, 0], [2, 2]])
    bars, table = collision_panels(items_of(vectors), codes)
    assert dict(zip(bars["labels"], bars["series"]["items"], strict=True)) == {"1": 2, "2": 2, "3": 3}
    assert table["rows"] == [
        ["<a_1><b_0>", 3, 2, "thing 2; thing 4; thing 5"],
        ["<a_0><b_1>", 2, 2, "thing 0; thing 3"],
    ]


def test_without_a_collision_there_is_no_table_of_groups_and_large_groups_are_one_bar():
    assert len(collision_panels(items_of(themed_vectors(3)), np.array([[0], [1], [2]]))) == 1
    bars = collision_panels(items_of(themed_vectors(14)), np.array([[0]] * 10 + [[1], [2], [3], [3]]))[0]
    assert dict(zip(bars["labels"], bars["series"]["items"], strict=True)) == {"1": 2, "2": 2, "9 or more": 10}


def test_clusters_name_the_items_nearest_to_their_mean_and_the_furthest():
    vectors = np.array([[0, 0], [0.1, 0], [0.2, 0], [0.3, 0], [0.15, 0], [3, 0], [9, 9], [9, 8]], dtype=np.float32)
    codes = np.array([[0], [0], [0], [0], [0], [0], [1], [1]])
    panels = cluster_panels(items_of(vectors), codes)
    assert [panel["kind"] for panel in panels] == ["table"]  # two clusters make no map
    first, second = panels[0]["rows"]
    assert first[:2] == ["<a_0>", 6]
    assert first[2].split("; ")[0] == "thing 3"  # the mean is at 0.625
    assert first[3] == "thing 5"
    assert second == ["<a_1>", 2, "thing 6; thing 7", ""]


def test_the_map_keeps_apart_what_the_first_level_keeps_apart():
    vectors = themed_vectors(60, n_themes=3)
    codes = (np.arange(60) % 3)[:, None]
    panel = cluster_panels(items_of(vectors), codes)[0]
    assert panel["kind"] == "map"
    points = np.stack([panel["x"], panel["y"]], axis=1)
    for place, label in enumerate(panel["labels"]):
        own = int(label["text"].removeprefix("a_"))
        inside = points[np.array(panel["group"]) == own].mean(axis=0)
        np.testing.assert_allclose(inside, [label["x"], label["y"]], atol=1e-4)
        assert place < 3
    spread = np.linalg.norm(points - points.mean(axis=0), axis=1).max()
    assert (
        np.linalg.norm(np.diff([[label["x"], label["y"]] for label in panel["labels"]], axis=0), axis=1).min()
        > spread / 4
    )


def test_items_with_a_doubtful_first_code_are_listed_least_sure_first():
    confidence = np.array([[0.9, 1], [0.4, 1], [0.2, 1]])
    (panel,) = uncertain_panel(items_of(themed_vectors(3)), np.array([[0, 0], [0, 1], [1, 1]]), confidence)
    assert panel["rows"] == [["thing 2", "<a_1><b_1>", 0.2], ["thing 1", "<a_0><b_1>", 0.4]]
    assert uncertain_panel(items_of(themed_vectors(3)), np.zeros((3, 2), int), np.ones((3, 2))) == []


def test_hostile_titles_and_labels_are_text_on_the_page():
    vectors = themed_vectors(12, n_themes=4)
    codes = (np.arange(12) % 4)[:, None]
    hostile = items_of(vectors, [HOSTILE + "\x1b[31m\u202e"] * 12)
    panels = [*cluster_panels(hostile, codes), *collision_panels(hostile, codes)]
    panels[0]["labels"][0]["text"] = "</text><script>x</script>$\\frac{1}{2}$"
    page = render_html(Report("tokenize", {}, {}, sections={"panels": panels}))
    assert "<script" not in page
    assert "<img" not in page
    assert "\u202e" not in page
    assert "&lt;img src=x" in page
    ElementTree.fromstring(panel_views(panels)[0]["svg"])


def test_a_malformed_map_is_named():
    with pytest.raises(InputError, match=r"panel 0 \('m'\) of the report is malformed"):
        panel_views([{"kind": "map", "title": "m", "x": [1.0], "y": [1.0], "group": [0], "labels": [{"x": 1}]}])
