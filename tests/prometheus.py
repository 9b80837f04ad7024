"""A real Prometheus, from its Debian package, for tests."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import yaml

PROGRAM, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
needs_prometheus = pytest.mark.skipif(
    PROGRAM is None or PROMTOOL is None,
    reason="prometheus is not installed: apt-get install prometheus",
)


class Prometheus:
    """Scrapes one target every three seconds, and evaluates rules; `with` starts and stops it."""

    def __init__(self, folder: Path, port: int, target: str, rules: Path) -> None:
        self._folder = folder
        self._url = f"http://127.0.0.1:{port}"
        self._address = f"127.0.0.1:{port}"
        self._config = {
            "global": {
                "scrape_interval": "3s",
                "scrape_timeout": "3s",
                "evaluation_interval": "1s",
            },
            "rule_files": [str(rules)],
            "scrape_configs": [{"job_name": "service", "static_configs": [{"targets": [target]}]}],
        }

    def __enter__(self) -> Prometheus:
        config = self._folder / "prometheus.yml"
        config.write_text(yaml.safe_dump(self._config))
        with (self._folder / "prometheus.log").open("w") as log:
            self._process = subprocess.Popen(
                [
                    PROGRAM,
                    f"--config.file={config}",
                    f"--storage.tsdb.path={self._folder / 'data'}",
                    f"--web.listen-address={self._address}",
                ],
                stdout=log,
                stderr=log,
            )
        return self

    def __exit__(self, *_exc: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Until the target was scraped."""
        give_up_s = time.monotonic() + timeout_s
        while not self._is_ready():
            assert self._process.poll() is None, (self._folder / "prometheus.log").read_text()
            assert time.monotonic() < give_up_s, "prometheus is not ready"
            time.sleep(0.2)

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series that an expression has now."""
        answer = httpx.get(
            f"{self._url}/api/v1/query", params={"query": expression}, timeout=30
        ).json()
        assert answer["status"] == "success", (expression, answer)
        return [(each["metric"], float(each["value"][1])) for each in answer["data"]["result"]]

    def data(self, expression: str, patience_s: float = 20.0) -> list[tuple[dict[str, str], float]]:
        """The same, once there is any: a scrape that took too long leaves a moment without."""
        give_up_s = time.monotonic() + patience_s
        while not (found := self.query(expression)) and time.monotonic() < give_up_s:
            time.sleep(0.5)
        return found

    def rules(self) -> list[dict]:
        """The rules, with the health of their evaluation."""
        answer = httpx.get(f"{self._url}/api/v1/rules", timeout=30).json()
        return [rule for group in answer["data"]["groups"] for rule in group["rules"]]

    def _is_ready(self) -> bool:
        try:
            return any(value == 1.0 for _, value in self.query("up"))
        except (httpx.TransportError, ValueError, AssertionError):
            return False  # not yet
