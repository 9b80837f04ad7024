"""A model is found by folder, GGUF file or hub name; what is missing is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from specprefill.core.errors import UnsupportedModel
from specprefill.quickstart import gguf
from specprefill.quickstart.local_models import find_model

Shown = list[str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "specprefill"


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were converted; nothing is read of them."""
    converted: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        converted.append(file)
        (folder / "config.json").write_text("{}")
        if file.read_bytes() == b"broken":
            raise UnsupportedModel(f"{file}: transformers cannot read it: no magic bytes")

    monkeypatch.setattr(gguf, "_NEEDED", ())
    monkeypatch.setattr(gguf, "_convert_apart", convert)
    return converted


def refusal(given: object) -> str:
    with pytest.raises(UnsupportedModel) as refused:
        find_model("MODEL", str(given), lambda _line: None)
    return str(refused.value)


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    found = find_model("MODEL", str(folder), lambda _line: None)
    assert (found.path, found.name, found.folder) == (str(folder), "mine", folder)


def test_a_gguf_file_is_converted_once(tmp_path: Path, cache: Path, converter: list[Path]) -> None:
    file = tmp_path / "Small.Q4.gguf"
    file.write_bytes(b"some weights")
    shown: Shown = []
    first = find_model("MODEL", str(tmp_path), shown.append)
    again = find_model("MODEL", str(file), shown.append)
    assert converter == [file]
    assert first == again
    assert first.name == "Small.Q4"
    assert first.folder.parent == cache / "gguf"
    assert [line.split()[0] for line in shown] == ["converting", "Small.Q4.gguf"]
    file.write_bytes(b"other weights")
    assert find_model("MODEL", str(file), shown.append).folder != first.folder
    assert sorted(each.name for each in (cache / "gguf").iterdir()) == sorted(
        each.folder.name for each in (first, find_model("MODEL", str(file), shown.append))
    )


def test_a_failed_conversion_leaves_nothing_behind(
    tmp_path: Path, cache: Path, converter: list[Path]
) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"broken")
    assert refusal(file) == f"{file}: transformers cannot read it: no magic bytes"
    assert list((cache / "gguf").iterdir()) == []


def test_a_file_that_is_no_gguf_is_refused_by_the_conversion_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "_NEEDED", ())
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF but no more")
    assert refusal(file).startswith(f"{file}: transformers cannot read it: ")


def test_what_gguf_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "_NEEDED", ("gguf_that_is_not_here",))
    file = tmp_path / "x.gguf"
    file.write_bytes(b"")
    assert "pip install 'specprefill[gguf]'" in refusal(file)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"MODEL: {tmp_path} has no config.json and no GGUF file"
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).touch()
    assert refusal(tmp_path) == (
        f"MODEL: {tmp_path} has several GGUF files, name one: a.gguf, b.gguf"
    )


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({}))
    assert "neither a GGUF file nor a folder" in refusal(file)


def test_a_path_that_does_not_exist_is_no_hub_name() -> None:
    assert refusal("/none/here") == "MODEL: /none/here does not exist"


def test_a_hub_that_cannot_be_asked_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # As where there is no network: the hub's client looks at it when it is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal("org/no-such-model")
    assert message.startswith("MODEL: org/no-such-model is no folder here, and the hub cannot be")
    assert len(message.splitlines()) == 1


def test_the_conversion_is_a_program_of_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert gguf.main([str(tmp_path / "none.gguf"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().out.startswith("transformers cannot read it: ")
    assert "specprefill.quickstart.gguf" in sys.modules


def test_digits_are_split_where_the_file_asks_for_it(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    file = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer(models.WordLevel({"1": 0, "2": 1, "12": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(file))
    assert tokenizer.encode("12").tokens == ["12"]
    gguf.split_digits(file)
    assert Tokenizer.from_file(str(file)).encode("12").tokens == ["1", "2"]
