"""Values are set in a file's text; all else stays, comments and order included."""

from __future__ import annotations

import pytest
import yaml

from specprefill.deployment.yaml_edit import CannotEdit, with_values

TEXT = """\
# the deployment
applications:
  - name: one
    args:
      model: {path: main}   # which answers
      speculator:
        path: draft         # the small one
        score_heads:        # found before
          1: [2]
          # and
          3: [4, 5]
        threads: 1
        # nothing follows
      prefill: &engine
        block_size: 32
      decode: *engine
"""
ARGS = ("applications", 0, "args")


def test_values_are_added_and_replaced() -> None:
    values = {"score_heads": {7: [7, 8]}, "score_reduction": "mean"}
    edited = with_values(TEXT, (*ARGS, "speculator"), values)
    raw = yaml.safe_load(edited)["applications"][0]["args"]
    assert raw["speculator"] == {"path": "draft", "threads": 1, **values}
    assert "        score_heads: {7: [7, 8]}\n" in edited
    for comment in ("# the deployment", "# which answers", "# the small one", "# nothing follows"):
        assert comment in edited
    assert with_values(edited, (*ARGS, "speculator"), values) == edited


def test_a_missing_mapping_is_made() -> None:
    edited = with_values(TEXT, (*ARGS, "selection"), {"peak_share": 0.1})
    assert yaml.safe_load(edited)["applications"][0]["args"]["selection"] == {"peak_share": 0.1}


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ((*ARGS, "model"), "flow style"),
        ((*ARGS, "decode"), "cannot be edited"),
        ((*ARGS, "prefill", "block_size"), "no mapping"),
        (("applications", 3, "args", "speculator"), "there is no 3"),
        (("nothing", "speculator"), "there is no 'nothing'"),
    ],
)
def test_other_forms_are_refused(path: tuple[str | int, ...], reason: str) -> None:
    with pytest.raises(CannotEdit, match=reason):
        with_values(TEXT, path, {"new": 1})
