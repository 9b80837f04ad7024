"""A report that a person opens: one HTML file with its plots inside, nothing fetched."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a node that serves has no matplotlib
    from matplotlib.figure import Figure

SIZE_INCHES = (7.0, 3.6)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: right }
th:first-child, td:first-child { text-align: left }
figure { display: inline-block; margin: 0 1rem 1rem 0 }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 1rem; color: #555 }
"""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve of a chart, optionally with a band around it (a confidence interval)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    steps: bool = False  # the value holds until the next point


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    limit: float | None = None,
) -> str:
    """Draw an SVG element. `limit` draws a horizontal dashed line, e.g. an SLO."""
    figure = _new_figure()
    axes = figure.subplots()
    for line in lines:
        style = "steps-post" if line.steps else "default"
        markers = "" if line.steps or len(line.x) > 60 else "o"
        axes.plot(line.x, line.y, drawstyle=style, marker=markers, markersize=3, label=line.name)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, alpha=0.15)
    if limit is not None:
        axes.axhline(limit, linestyle="--", linewidth=1, color="gray")
    axes.set(title=title, xlabel=x_label, ylabel=y_label, xscale="log" if log_x else "linear")
    axes.grid(visible=True, alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize="small")
    return _svg(figure)


def bar_chart(
    title: str, groups: Sequence[str], bars: Mapping[str, Sequence[float]], *, y_label: str
) -> str:
    """Draw an SVG element: for every group one bar of each series in `bars`, side by side."""
    figure = _new_figure()
    axes = figure.subplots()
    width = 0.8 / max(1, len(bars))
    for place, (name, heights) in enumerate(bars.items()):
        left = [index - 0.4 + (place + 0.5) * width for index in range(len(groups))]
        axes.bar(left, heights, width=width, label=name)
    axes.set(title=title, ylabel=y_label)
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right", fontsize="small")
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend(fontsize="small")
    return _svg(figure)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table; cells are escaped."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in headers)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def write_page(
    path: Path, title: str, facts: Mapping[str, str], sections: Sequence[tuple[str, Sequence[str]]]
) -> None:
    """Write a self-contained page.

    `facts` are what was run and how. A section is a heading and its elements, each of them
    HTML or SVG as the functions above return it.
    """
    known = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        for name, value in facts.items()
    )
    body = "".join(
        f"<h2>{html.escape(heading)}</h2>{''.join(parts)}" for heading, parts in sections
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><dl>{known}</dl>{body}</html>\n",
        encoding="utf-8",
    )


def is_installed() -> bool:
    """Return whether matplotlib, which the extra `lab` brings, is there."""
    return find_spec("matplotlib") is not None


def _new_figure() -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=SIZE_INCHES, layout="constrained")


def _svg(figure: Figure) -> str:
    """Return the figure as an element to put into a page."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    FigureCanvasSVG(figure)
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    markup = buffer.getvalue()
    return f"<figure>{markup[markup.index('<svg') :]}</figure>"
