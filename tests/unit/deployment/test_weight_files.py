"""Weight files that are missing or cut off are found by their headers and lengths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specprefill.deployment.weight_files import check_weights, safetensors_fault

HEADER = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    }
).encode()
WHOLE = len(HEADER).to_bytes(8, "little") + HEADER + bytes(16)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (WHOLE, None),
        (WHOLE[:-1], f"cut off: it has {len(WHOLE) - 1} of {len(WHOLE)} bytes"),
        (WHOLE[:20], "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a safetensors file"),
        (b"", "empty"),
        ((2).to_bytes(8, "little") + b"[]", "not a safetensors file"),
        ((2).to_bytes(8, "little") + b"{}", None),
    ],
)
def test_a_file_is_judged_by_its_header_and_length(
    tmp_path: Path, content: bytes, fault: str | None
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    assert safetensors_fault(file) == fault


def test_the_shipped_models_are_whole(root: Path) -> None:
    for name in ("demo-main", "demo-speculator"):
        assert list(check_weights("model.path", root / "models" / name, is_complete=True)) == []


def test_missing_weights_are_an_error_where_nothing_will_be_downloaded(tmp_path: Path) -> None:
    (found,) = check_weights("model.path", tmp_path, is_complete=True)
    assert found.line().startswith(f"error: model.path: {tmp_path} holds no weights (*.safetensors")
    assert list(check_weights("model.path", tmp_path, is_complete=False)) == []


def test_a_shard_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "m-1.safetensors").write_bytes(WHOLE)
    (found,) = check_weights("model.path", tmp_path, is_complete=True)
    assert found.message == (
        f"{tmp_path} lacks m-2.safetensors, which model.safetensors.index.json names"
    )


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.safetensors").write_bytes(WHOLE)
    (tmp_path / "m.safetensors.index.json").write_text(text)
    (found,) = check_weights("model.path", tmp_path, is_complete=True)
    assert "is not an index of weight files" in found.message
