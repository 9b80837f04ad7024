"""A report page holds its data and needs nothing from outside."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from specprefill.lab.reporting.charts import Line, bar_chart, line_chart, table, write_page


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.sources += [value or "" for name, value in attrs if name in {"src", "href"}]


def test_a_page_is_self_contained_and_escaped(tmp_path):
    lines = [Line("a", [1, 2, 3], [1, 4, 9], low=[0, 3, 8], high=[2, 5, 10])]
    chart = line_chart("TTFT", lines, x_label="QPS", y_label="s", limit=5.0)
    path = tmp_path / "deep" / "report.html"
    write_page(path, "a < b", {"command": "x & y"}, [("One", [chart, table(["h"], [["<i>"]])])])
    text = path.read_text(encoding="utf-8")
    page = _Tags()
    page.feed(text)
    assert page.seen.count("svg") == 1
    assert "table" in page.seen
    assert "i" not in page.seen
    assert "a &lt; b" in text
    assert "x &amp; y" in text
    assert all(source.startswith("#") for source in page.sources)
    assert not re.search(r"<(script|link|img)", text)


def test_a_bar_chart_has_a_bar_for_each_group_and_series():
    heights = {"dense": [3.0, 2.0], "pruned": [1.0, 1.0]}
    chart = bar_chart("scores", ["niah", "vt"], heights, y_label="%")
    assert chart.startswith("<figure><svg")
    for name in ("niah", "vt", "dense", "pruned"):
        assert f"<!-- {name} -->" in chart
