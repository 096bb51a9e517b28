"""Plots of a report as inline SVG, drawn by matplotlib without pyplot or a display.

Every label is untrusted: it is stripped of control characters, shortened, never read as mathematics, and escaped by the
SVG writer. Colours are the page's CSS variables, so a plot follows the light and the dark theme.
"""

from __future__ import annotations

import io
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recollect.eval.formats import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES_COLOURS = 5
AGENT_LABELS = ("agents", "simulated agents")

# Stand-ins matplotlib can draw with; `_themed` replaces each by the CSS variable of the page.
_INK, _MUTED, _GRID, _PAPER = "#010203", "#010204", "#010205", "#010206"
_SERIES = tuple(f"#01030{index}" for index in range(1, SERIES_COLOURS + 1))
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid", _PAPER: "--paper"} | {
    colour: f"--series-{index}" for index, colour in enumerate(_SERIES, start=1)
}

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"

_STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


def intervals_svg(
    labels: Sequence[str],
    values: Sequence[float | None],
    low: Sequence[float | None],
    high: Sequence[float | None],
    reference: float | None = None,
    axis: str = "",
    key: str = "intervals",
) -> str:
    """A forest plot: one row per label, first on top, its point and its interval; `reference` is a dashed line.

    Where one of the labels is the simulated agents, the others are drawn in grey.
    """

    has_agents = any(label in AGENT_LABELS for label in labels)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        rows = range(len(labels))
        if reference is not None:
            axes.axvline(reference, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for row, value, left, right in zip(rows, values, low, high, strict=True):
            if value is None:
                continue
            colour = _MUTED if has_agents and labels[row] not in AGENT_LABELS else _SERIES[0]
            if left is not None and right is not None:
                axes.plot([left, right], [row, row], color=colour, linewidth=2.4, solid_capstyle="round", zorder=2)
            axes.plot([value], [row], "o", color=colour, markersize=7, markeredgecolor=_PAPER, zorder=3)
        axes.set_yticks(list(rows), [one_line(text, 36) for text in labels])
        axes.set_ylim(len(labels) - 0.4, -0.6)
        _finish(axes, grid="x", x_label=axis)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)

    return _render(draw, (7.2, 0.7 + 0.34 * max(1, len(labels))), key)


def bars_svg(
    labels: Sequence[str], series: Mapping[str, Sequence[float | None]], axis: str = "", key: str = "bars"
) -> str:
    """Grouped vertical bars, one group per label and one bar per series; horizontal where there are many labels."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        width = 0.8 / max(1, len(series))
        for index, values in enumerate(series.values()):
            offset = (index - (len(series) - 1) / 2) * width
            positions = [row + offset for row in range(len(labels))]
            heights = [0.0 if value is None else value for value in values]
            colour = _SERIES[index % SERIES_COLOURS]
            if is_horizontal:
                axes.barh(positions, heights, height=width * 0.92, color=colour)
            else:
                axes.bar(positions, heights, width=width * 0.92, color=colour)
        ticks, names = list(range(len(labels))), [one_line(text, 28) for text in labels]
        if is_horizontal:
            axes.set_yticks(ticks, names)
            axes.set_ylim(len(labels) - 0.4, -0.6)
            axes.tick_params(axis="y", length=0)
            _finish(axes, grid="x", x_label=axis)
        else:
            axes.set_xticks(ticks, names)
            axes.tick_params(axis="x", length=0)
            _finish(axes, grid="y", y_label=axis)

    is_horizontal = len(labels) > 12 or max((len(one_line(text, 28)) for text in labels), default=0) > 12
    height = 0.7 + 0.2 * len(labels) * max(1, len(series)) if is_horizontal else 2.7
    return _render(draw, (7.2, height), key)


def reliability_svg(
    predicted: Sequence[float | None],
    observed: Sequence[float | None],
    counts: Sequence[int],
    key: str = "reliability",
) -> str:
    """Observed frequency against predicted probability per bin, with the diagonal and the bin sizes below."""

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [4, 1], "hspace": 0.12})
        shown = [
            (x, y, n)
            for x, y, n in zip(predicted, observed, counts, strict=True)
            if x is not None and y is not None and n
        ]
        xs, ys, ns = ([row[column] for row in shown] for column in range(3))
        upper.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        upper.plot(xs, ys, "o-", color=_SERIES[0], linewidth=2, markersize=6, markeredgecolor=_PAPER)
        upper.set_xlim(-0.02, 1.02)
        upper.set_ylim(-0.02, 1.02)
        _finish(upper, grid="both", y_label="observed frequency")
        lower.bar(xs, ns, width=0.06, color=_SERIES[1])
        _finish(lower, grid="y", x_label="predicted probability", y_label="cases")

    return _render(draw, (5.4, 4.4), key)


def lines_svg(
    x: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    low: Mapping[str, Sequence[float | None]] | None = None,
    high: Mapping[str, Sequence[float | None]] | None = None,
    x_label: str = "",
    y_label: str = "",
    key: str = "lines",
) -> str:
    """One line per series over numeric `x`, with a band where `low` and `high` hold it; whole `x` get whole ticks."""
    from matplotlib.ticker import MaxNLocator

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for index, (name, values) in enumerate(series.items()):
            colour = _SERIES[index % SERIES_COLOURS]
            if low and high and name in low and name in high:
                axes.fill_between(x, _floats(low[name]), _floats(high[name]), color=colour, alpha=0.18, linewidth=0)
            markers = "o-" if len(x) <= 40 else "-"
            axes.plot(x, _floats(values), markers, color=colour, linewidth=2, markersize=4.5, markeredgecolor=_PAPER)
        if all(float(value).is_integer() for value in x):
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # epochs and rounds have no quarters
        _finish(axes, grid="y", x_label=x_label, y_label=y_label)

    return _render(draw, (7.2, 2.9), key)


def pareto_svg(
    curves: Mapping[str, Mapping[str, Sequence[Any]]],
    marks: Mapping[str, Mapping[str, Sequence[Any]]],
    x_label: str = "",
    y_label: str = "",
    key: str = "pareto",
) -> str:
    """Curves of points {"x", "y"}, each joined in its own order, and single grey points with their names."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for index, curve in enumerate(curves.values()):
            colour = _SERIES[index % SERIES_COLOURS]
            axes.plot(curve["x"], curve["y"], "o-", color=colour, linewidth=1.8, markersize=4.5, markeredgecolor=_PAPER)
        for name, mark in marks.items():
            axes.plot(mark["x"], mark["y"], "D", color=_MUTED, markersize=5, markeredgecolor=_PAPER)
            for x, y in zip(mark["x"], mark["y"], strict=True):
                axes.annotate(
                    one_line(name, 28), (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8, color=_MUTED
                )
        _finish(axes, grid="both", x_label=x_label, y_label=y_label)

    return _render(draw, (7.2, 4.6), key)


def map_svg(
    x: Sequence[float],
    y: Sequence[float],
    group: Sequence[int],
    labels: Sequence[Mapping[str, Any]],
    x_label: str = "",
    y_label: str = "",
    key: str = "map",
) -> str:
    """A dot per point, coloured by group in turn, and short words {"x", "y", "text"} over them; no ticks."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for colour in range(SERIES_COLOURS):
            chosen = [row for row, of in enumerate(group) if of % SERIES_COLOURS == colour]
            points = [x[row] for row in chosen], [y[row] for row in chosen]
            axes.plot(*points, "o", color=_SERIES[colour], markersize=3, markeredgecolor="none", alpha=0.45)
        for place in labels:
            axes.annotate(
                one_line(place["text"], 24),
                (place["x"], place["y"]),
                ha="center",
                va="center",
                fontsize=9,
                fontweight="bold",
                bbox={"boxstyle": "round,pad=0.15", "facecolor": _PAPER, "edgecolor": _GRID, "alpha": 0.85},
            )
        axes.set_xticks([])
        axes.set_yticks([])
        _finish(axes, grid="both", x_label=x_label, y_label=y_label)

    return _render(draw, (7.2, 5.4), key)


def heat_svg(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    low: float,
    high: float,
    x_label: str = "",
    y_label: str = "",
    key: str = "heat",
) -> str:
    """A matrix of cells, the first row on top: the deeper the colour the higher the value, which stands in the cell.

    A cell without a value stays empty; colours run from `low` to `high`.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        span = high - low or 1.0
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if value is None:
                    continue
                depth = 0.06 + 0.5 * min(1.0, max(0.0, (value - low) / span))
                corner = (column - 0.48, row - 0.48)
                axes.add_patch(Rectangle(corner, 0.96, 0.96, facecolor=_SERIES[0], alpha=depth, linewidth=0))
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=_INK)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(columns)), [one_line(text, 16) for text in columns], rotation=35, ha="right")
        axes.set_yticks(range(len(rows)), [one_line(text, 28) for text in rows])
        axes.tick_params(length=0)
        _finish(axes, grid="", x_label=x_label, y_label=y_label)

    from matplotlib.patches import Rectangle

    return _render(draw, (7.2, 1.3 + 0.33 * len(rows)), key)


def _floats(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else float(value) for value in values]


def _finish(axes: Axes, grid: str, x_label: str = "", y_label: str = "") -> None:
    if grid:
        axes.grid(axis=grid)  # type: ignore[arg-type]
    axes.tick_params(width=0.8, labelsize=9.5)
    if x_label:
        axes.set_xlabel(one_line(x_label, 60))
    if y_label:
        axes.set_ylabel(one_line(y_label, 40))


def _render(draw: Any, size: tuple[float, float], key: str) -> str:
    """Draw on a fresh figure and return the `<svg>` element; equal input gives equal bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=size)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.04)
    return _themed(buffer.getvalue(), key)


def _themed(svg: bytes, key: str) -> str:
    """Bring matplotlib's document to what a page may hold: no prolog, own ids, colours by variable, fluid width."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(svg)
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    prefix = "".join(character if character.isalnum() else "-" for character in key)
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            if name == "id":
                element.set(name, f"{prefix}-{value}")
            elif name == f"{{{_XLINK}}}href" and value.startswith("#"):
                element.set(name, f"#{prefix}-{value[1:]}")
            elif name == "clip-path":
                element.set(name, value.replace("url(#", f"url(#{prefix}-"))
            elif name == "style":
                element.set(name, _with_variables(value))
    width = root.get("width", "")
    root.attrib.pop("height", None)
    root.set("width", "100%")
    root.set("style", f"max-width: {width}")
    root.set("role", "img")
    return ElementTree.tostring(root, encoding="unicode")


def _with_variables(style: str) -> str:
    for colour, variable in _VARIABLES.items():
        style = style.replace(colour, f"var({variable})")
    return style
