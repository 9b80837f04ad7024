"""Tokens by the name of the key, as the metric gets them."""

from specprefill.gateway.observe import key_usage


class Counter:
    """Stands in for Ray's, which shows its values to nobody in this process."""

    def __init__(self, name, description, tag_keys):
        self.name, self.tag_keys, self.counted = name, tag_keys, []

    def inc(self, value, tags):
        assert set(tags) == set(self.tag_keys)
        self.counted.append((value, tags["key"], tags["kind"]))


def test_prompt_and_output_are_counted_apart(monkeypatch):
    monkeypatch.setattr(key_usage.metrics, "Counter", Counter)
    usage = key_usage.KeyUsage()
    usage.count("team-a", 100, 7)
    usage.count("team-b", 5, 0)  # refused before its first token
    assert usage._tokens.counted == [
        (100, "team-a", "prompt"), (7, "team-a", "output"), (5, "team-b", "prompt"),
    ]  # fmt: skip
