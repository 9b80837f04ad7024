"""Readings of a service's metrics: from Ray's exporters, or from a gateway's `/metrics`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

PREFIX = "ray_specprefill_"
_TIMEOUT_S = 10.0  # a gateway reads the exporters of all nodes for its answer
_AT_ONCE = 16

Labels = tuple[tuple[str, str], ...]  # sorted


@dataclass(frozen=True, slots=True)
class Readings:
    """Every series of the service at one time. A name that nobody exported is absent."""

    series: Mapping[str, Mapping[Labels, float]]
    silent: int = 0  # exporters that did not answer

    def select(self, name: str, **labels: str) -> Iterator[tuple[dict[str, str], float]]:
        """Yield the series of a name whose labels do not contradict `labels`."""
        for own, value in self.series.get(PREFIX + name, {}).items():
            known = dict(own)
            if all(known.get(label, wanted) == wanted for label, wanted in labels.items()):
                yield known, value

    def total(self, name: str, **labels: str) -> float | None:
        """Return the sum of the selected series; None if there is none."""
        values = [value for _, value in self.select(name, **labels)]
        return sum(values) if values else None

    def since(self, before: Readings) -> Readings:
        """Return what every series grew by; one that went back or is new has started at zero."""
        return Readings(
            {
                name: {
                    labels: _growth(value, before.series.get(name, {}).get(labels, 0.0))
                    for labels, value in rows.items()
                }
                for name, rows in self.series.items()
            },
            self.silent,
        )


def _growth(now: float, before: float) -> float:
    return now - before if now >= before else now


def parse(texts: Iterable[str], silent: int = 0) -> Readings:
    """Read expositions in Prometheus' text format. Raises ValueError."""
    series: dict[str, dict[Labels, float]] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith(PREFIX):
                    labels = tuple(sorted(sample.labels.items()))
                    series.setdefault(sample.name, {})[labels] = sample.value
    return Readings(series, silent)


def collect(urls: Sequence[str], headers: Mapping[str, str] | None = None) -> Readings:
    """Read every exporter at once; one that does not answer is counted."""
    with httpx.Client(timeout=_TIMEOUT_S) as client, ThreadPoolExecutor(_AT_ONCE) as pool:

        def read(url: str) -> str | None:
            try:
                return client.get(url, headers=headers).raise_for_status().text
            except httpx.HTTPError:
                return None

        texts = list(pool.map(read, urls))
    answered = [text for text in texts if text is not None]
    return parse(answered, silent=len(texts) - len(answered))
