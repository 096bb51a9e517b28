"""What the page and its tables say about given numbers."""

import csv
import html
import io
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.eval.formats import direction, interval, number
from recollect.eval.panels import panel_views, word_changes
from recollect.eval.plots import lines_svg
from recollect.eval.report import further_tables, main_table, rebuild, render_html, table_csv, verdict
from recollect.io import read_json
from recollect.types import Report


def entry(value, half=0.02, n=100):
    return {"value": value, "ci95": [value - half, value + half], "n": n}


def report(ours, baselines, metric="ranking/mrr", **sections):
    return Report(
        kind="simulate",
        protocol={"data": "harbor", "split": "last 3 of each user"},
        metrics={metric: entry(ours)},
        baselines={name: {metric: entry(value)} for name, value in baselines.items()},
        sections=sections,
    )


def text_of(page):
    body = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (19284, "19,284"),
        (0.4123456, "0.412"),
        (-0.3, "−0.300"),
        (12.5, "12.500"),
        (412.71, "412.7"),
        (123456.7, "123,457"),
        (0.00001234, "1.2e-05"),
        (float("nan"), "–"),
        (float("-inf"), "−∞"),
        (True, "yes"),
    ],
)
def test_numbers_have_one_format(value, text):
    assert number(value) == text


def test_intervals_are_lo_hi_in_brackets():
    assert interval([0.1, 0.25]) == "[0.100, 0.250]"
    assert interval(None) == ""
    assert interval([None, None]) == ""


@pytest.mark.parametrize("metric", ["rating/mae", "rating/w1", "calibration/ece", "popularity/tv", "ctr/logloss"])
def test_errors_and_distances_are_better_low(metric):
    assert direction(metric) == "lower"


@pytest.mark.parametrize("metric", ["ranking/mrr", "ranking/ndcg@10", "choice/accuracy", "taste/balanced_accuracy"])
def test_agreements_are_better_high(metric):
    assert direction(metric) == "higher"


@pytest.mark.parametrize(
    ("ours", "metric", "state"),
    [
        (0.50, "ranking/mrr", "ahead"),
        (0.41, "ranking/mrr", "tied"),
        (0.30, "ranking/mrr", "behind"),
        (0.50, "rating/mae", "behind"),
        (0.21, "rating/mae", "ahead"),
    ],
)
def test_the_verdict_needs_intervals_that_do_not_overlap(ours, metric, state):
    found = verdict(report(ours, {"random": 0.293, "popularity": 0.40}, metric))
    assert found["state"] == state
    assert found["best"]["name"] == ("random" if metric == "rating/mae" else "popularity")


@pytest.mark.parametrize(
    ("difference", "metric", "state"),
    [
        ([0.001, 0.02], "ranking/mrr", "ahead"),
        ([-0.001, 0.02], "ranking/mrr", "tied"),
        ([-0.02, -0.001], "ranking/mrr", "behind"),
        ([-0.02, -0.001], "rating/mae", "ahead"),
    ],
)
def test_a_paired_difference_decides_where_there_is_one(difference, metric, state):
    comparisons = {metric: {"baseline": "popularity", "difference": {"value": 0.01, "ci95": difference, "n": 100}}}
    found = verdict(report(0.41, {"popularity": 0.40}, metric, comparisons=comparisons))
    assert found["state"] == state


def test_a_comparison_with_another_baseline_than_the_best_does_not_decide():
    comparisons = {"ranking/mrr": {"baseline": "random", "difference": {"value": 0.1, "ci95": [0.05, 0.15], "n": 9}}}
    assert verdict(report(0.41, {"random": 0.29, "mf": 0.40}, comparisons=comparisons))["state"] == "tied"


def test_a_run_without_baselines_or_metrics_claims_nothing():
    assert verdict(report(0.41, {}))["state"] == "alone"
    assert verdict(Report("doctor", {}, {})) is None
    assert "No baseline was run" in text_of(render_html(report(0.41, {})))


def test_best_of_each_column_is_marked_and_the_chance_row_named():
    table = main_table(
        Report(
            "simulate",
            {"data": "harbor"},
            {"ranking/mrr": entry(0.4), "rating/mae": entry(0.9)},
            {"random": {"ranking/mrr": entry(0.293)}, "mf": {"ranking/mrr": entry(0.3), "rating/mae": entry(0.7)}},
        )
    )
    best = {(row["name"], i) for row in table["rows"] for i, cell in enumerate(row["cells"]) if cell["best"]}
    assert best == {("simulated agents", 0), ("mf", 1)}
    assert [row["name"] for row in table["rows"] if row["is_chance"]] == ["random"]
    near = {(row["name"], i) for row in table["rows"] for i, cell in enumerate(row["cells"]) if cell["chance"]}
    assert near == {("mf", 0)}
    assert table["rows"][1]["cells"][1]["text"] == "–"


def test_agents_at_chance_are_called_so():
    assert "Their interval holds chance" in text_of(render_html(report(0.30, {"random": 0.293})))
    assert "Their interval holds chance" not in text_of(render_html(report(0.50, {"random": 0.293})))


def test_the_page_says_first_what_was_run_then_the_verdict_then_warnings_then_the_table():
    shown = report(0.41, {"random": 0.293})
    shown.warnings.append("only forty cases")
    shown.ledger["requests"] = 1234
    text = text_of(render_html(shown))
    order = ["Data harbor", "simulated agents predict", "only forty cases", "Agreement with the real log", "How these"]
    places = [text.index(words) for words in [*order, "Requests 1,234"]]
    assert places == sorted(places)
    assert "0.410 [0.390, 0.430]" in text


def test_biases_have_no_best_value():
    assert direction("rating/bias") == direction("rating/variance_ratio") == "neither"
    shown = Report("x", {"a": 1}, {"rating/bias": entry(0.1)}, {"mf": {"rating/bias": entry(0.3)}})
    assert not any(cell["best"] for row in main_table(shown)["rows"] for cell in row["cells"])


def test_every_metric_is_in_exactly_one_table():
    metrics = ["ranking/mrr", "ranking/hr@3", "rating/bias", "choice/flip_rate", "taste/f1"]
    shown = Report("simulate", {"a": 1}, {m: entry(0.5) for m in metrics}, {"always-yes": {"taste/f1": entry(0.4)}})
    tables = [main_table(shown), *further_tables(shown)]
    assert sorted(column["name"] for table in tables for column in table["columns"]) == sorted(metrics)
    assert [row["name"] for row in tables[0]["rows"]] == ["simulated agents"]
    text = text_of(render_html(shown))
    assert all(metric in text for metric in metrics[1:])


def test_an_entry_without_an_interval_decides_nothing():
    shown = report(0.9, {"random": 0.1})
    shown.metrics["ranking/mrr"]["ci95"] = [None, None]
    assert verdict(shown)["state"] == "tied"


def test_numbers_without_a_protocol_are_warned_about():
    shown = report(0.41, {"random": 0.293})
    shown.protocol.clear()
    assert "it has no protocol block" in text_of(render_html(shown))


def test_csv_holds_every_row_and_metric():
    rows = list(csv.DictReader(io.StringIO(table_csv(report(0.41, {"random": 0.293, "mf": 0.3})))))
    assert [(row["who"], row["metric"], float(row["value"])) for row in rows] == [
        ("simulated agents", "ranking/mrr", 0.41),
        ("random", "ranking/mrr", 0.293),
        ("mf", "ranking/mrr", 0.3),
    ]


ALL_PANELS = [
    {"kind": "table", "title": "t", "columns": ["a", "b"], "rows": [["x", {"value": 0.5, "ci95": [0.4, 0.6], "n": 9}]]},
    {"kind": "intervals", "title": "i", "labels": ["a", "b"], "values": [1, None], "low": [0, None], "high": [2, None]},
    {"kind": "bars", "title": "b", "labels": [], "series": {}},
    {
        "kind": "distribution",
        "title": "d",
        "labels": ["1", "2"],
        "series": {"simulated": [0.3, 0.7], "real": [0.5, None]},
    },
    {
        "kind": "reliability",
        "title": "r",
        "predicted": [0.1, None],
        "observed": [0.2, None],
        "counts": [4, 0],
        "ece": 0.1,
    },
    {
        "kind": "lines",
        "title": "l",
        "x": [0, 1],
        "series": {"a": [1, None]},
        "low": {"a": [0, 0]},
        "high": {"a": [2, 2]},
    },
    {"kind": "samples", "title": "s", "items": [{"title": "u", "before": "", "after": "likes tea"}]},
    {"kind": "text", "title": "x", "text": "one\n\ntwo"},
    {"kind": "hologram", "title": "h"},
]


def test_every_kind_of_panel_is_drawn_and_drawing_is_deterministic(tmp_path):
    shown = report(0.41, {"random": 0.293}, panels=ALL_PANELS)
    page = render_html(shown)
    assert page == render_html(shown)
    assert page.count("<svg ") == 5
    assert "cannot draw a panel of kind 'hologram'" in text_of(page)
    shown.save(tmp_path)
    (tmp_path / "report.html").unlink()
    assert rebuild(tmp_path).to_json() == read_json(tmp_path / "report.json")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page


def test_lines_over_whole_numbers_have_whole_ticks():
    def ticks(x):
        groups = ElementTree.fromstring(lines_svg(x, {"a": [0.0] * len(x)})).iter("{http://www.w3.org/2000/svg}g")
        return ["".join(group.itertext()).strip() for group in groups if "xtick" in group.get("id", "")]

    for epochs in (2, 3, 5, 11):
        assert ticks(range(1, epochs + 1))
        assert all(tick.isdigit() for tick in ticks(range(1, epochs + 1)))
    assert not all(tick.isdigit() for tick in ticks([0.5, 1.0, 1.5]))


def test_ids_of_two_plots_never_meet():
    panels = [ALL_PANELS[3], ALL_PANELS[3]]
    page = render_html(report(0.41, {}, panels=panels))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    references = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)
    assert {first or second for first, second in references} <= set(ids)


def test_plots_take_their_colours_from_the_page():
    views = panel_views([ALL_PANELS[3]])
    assert "var(--series-1)" in views[0]["svg"]
    assert "#0102" not in views[0]["svg"]


def test_changed_words_of_a_memory_are_marked():
    before, after = word_changes("Likes tea, maps.", "Likes coffee, maps, boats.")
    assert [piece.strip() for piece, changed in before if changed] == ["tea,"]
    assert [piece.strip() for piece, changed in after if changed] == ["coffee,", "boats."]


@given(st.text(), st.text())
def test_marking_changes_loses_no_character(before, after):
    left, right = word_changes(before, after)
    assert "".join(piece for piece, _ in left) == before
    assert "".join(piece for piece, _ in right) == after
