"""Stands in for `ray.serve.metrics`: what was counted can be read."""

from __future__ import annotations

from collections import defaultdict


class _Metric:
    def __init__(self, tag_keys=()):
        self.tag_keys = tuple(tag_keys)
        self.values = defaultdict(list)
        self.default_tags = {}

    def set_default_tags(self, tags):
        self.default_tags = tags

    def note(self, value, tags):
        tags = {**self.default_tags, **(tags or {})}
        assert set(tags) == set(self.tag_keys)
        self.values[tuple(tags[key] for key in self.tag_keys)].append(value)


class Instruments:
    """One `make`; its metrics by name."""

    def __init__(self):
        self.made = {}

    def Counter(self, name, description="", tag_keys=()):
        return self._add(name, _Counter(tag_keys))

    def Gauge(self, name, description="", tag_keys=()):
        return self._add(name, _Gauge(tag_keys))

    def Histogram(self, name, description="", boundaries=(), tag_keys=()):
        assert boundaries
        assert all(bound > 0 for bound in boundaries)  # as Ray demands
        return self._add(name, _Histogram(boundaries, tag_keys))

    def total(self, name, *tags):
        """The sum of what was counted or observed; of a gauge, the newest value."""
        values = self.made[name].values[tags]
        return (values or [0])[-1] if isinstance(self.made[name], _Gauge) else sum(values)

    def observed(self, name, *tags):
        """Every value of a histogram."""
        return self.made[name].values[tags]

    def _add(self, name, metric):
        assert name not in self.made
        self.made[name] = metric
        return metric


class _Counter(_Metric):
    def inc(self, value=1.0, tags=None):
        assert value > 0  # as Ray demands
        self.note(value, tags)


class _Gauge(_Metric):
    def set(self, value, tags=None):
        self.note(value, tags)


class _Histogram(_Metric):
    def __init__(self, boundaries, tag_keys):
        super().__init__(tag_keys)
        self.boundaries = tuple(boundaries)

    def observe(self, value, tags=None):
        self.note(value, tags)
