"""Writes the Grafana dashboards in cluster/grafana from its panels.yaml.

    python .ci/dashboards.py [--check]

--check writes nothing and exits 1 when a dashboard is stale.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent.parent / "cluster" / "grafana"
SOURCE = FOLDER / "panels.yaml"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, STAT_WIDTH, HEIGHT, STAT_HEIGHT = 12, 4, 8, 4  # of Grafana's 24 columns
COLUMNS = 24


def sources() -> list[dict[str, Any]]:
    """Return the dashboards as panels.yaml has them."""
    found: list[dict[str, Any]] = yaml.safe_load(SOURCE.read_text(encoding="utf-8"))
    return found


def dashboard(source: dict[str, Any]) -> dict[str, Any]:
    """Return one dashboard in Grafana's format."""
    return {
        "title": source["title"],
        "uid": f"specprefill-{source['file']}",
        "tags": ["specprefill"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_datasource_variable()]},
        "links": [
            {
                "title": "Specprefill", "type": "dashboards", "tags": ["specprefill"],
                "asDropdown": True, "keepTime": True, "includeVars": True,
            }
        ],
        "panels": _placed([_panel(each) for each in source["panels"]]),
    }  # fmt: skip


def _datasource_variable() -> dict[str, Any]:
    return {
        "name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus",
        "hide": 0, "refresh": 1, "regex": "", "multi": False, "includeAll": False,
    }  # fmt: skip


def _panel(source: dict[str, Any]) -> dict[str, Any]:
    is_stat = source.get("stat", False)
    return {
        "title": source["title"],
        "description": source.get("about", ""),
        "type": "stat" if is_stat else "timeseries",
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": source["unit"], "min": 0}, "overrides": []},
        "options": {"reduceOptions": {"calcs": ["lastNotNull"]}} if is_stat else {},
        "targets": [
            {
                "refId": chr(ord("A") + place), "datasource": DATASOURCE, "expr": expression,
                "legendFormat": legend,
            }
            for place, (expression, legend) in enumerate(source["queries"].items())
        ],
    }  # fmt: skip


def _placed(panels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Place panels left to right, row after row."""
    x = y = row_height = 0
    for number, panel in enumerate(panels, start=1):
        is_stat = panel["type"] == "stat"
        width, height = (STAT_WIDTH, STAT_HEIGHT) if is_stat else (WIDTH, HEIGHT)
        if x + width > COLUMNS or (row_height and height != row_height):
            x, y, row_height = 0, y + row_height, 0
        panel |= {"id": number, "gridPos": {"x": x, "y": y, "w": width, "h": height}}
        x, row_height = x + width, height
    return panels


def files() -> dict[Path, str]:
    """Return the text of each dashboard's file."""
    return {
        FOLDER / f"{source['file']}.json": json.dumps(dashboard(source), indent=2) + "\n"
        for source in sources()
    }


def main(argv: list[str] | None = None) -> int:
    """Write the dashboards, or compare them. Return 1 when --check finds one stale."""
    parser = argparse.ArgumentParser(description="Writes cluster/grafana/*.json.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args(argv)
    for path, text in files().items():
        if not args.check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            print(f"{path.name} is stale: run `make dashboards`", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
