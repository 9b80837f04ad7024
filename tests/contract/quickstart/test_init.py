"""`specprefill init` writes a file that `check` finds fine, or reports what it needs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from specprefill.cli import main as cli
from specprefill.cli.quickstart import write_for_serve
from specprefill.deployment.file import load
from specprefill.deployment.yaml_edit import with_values
from specprefill.engine.model_check import MainModelCheck
from specprefill.quickstart.local_machine import LocalMachine
from specprefill.quickstart.shapes import read_shape
from specprefill.quickstart.sizes import GIB

from ..model_folders import write

MACHINE = LocalMachine(memory_bytes=24 * GIB, cores=4)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the machine, whatever this one has."""
    monkeypatch.setattr("specprefill.cli.quickstart.read_machine", lambda: MACHINE)


@pytest.fixture
def model(tmp_path: Path, root: Path) -> Callable[..., Path]:
    """Write a model's folder, with the demo pair's tokenizer and weights that nobody reads."""

    def folder(name: str, weights: bool = True) -> Path:
        written = write(name, tmp_path)
        for file in (root / "models" / "demo-main").glob("*"):
            if file.name.startswith(("tokenizer", "chat_template")):
                shutil.copy(file, written)
        if weights:
            header = b'{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'
            weight = len(header).to_bytes(8, "little") + header + bytes(16)
            (written / "model.safetensors").write_bytes(weight)
        return written

    return folder


def run(*argv: object) -> int:
    return cli.main([str(each) for each in argv])


def test_the_file_for_a_model_that_no_example_knows_is_fine(
    model: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    main, draft, file = model("qwen3"), model("llama"), tmp_path / "mine.yaml"
    assert run("init", main, "--speculator", draft, "--keep", "auto", "--output", file) == 0
    assert f"wrote {file}" in capsys.readouterr().out
    args = load(file).file.applications[0].args
    assert (args.model.path, args.speculator.path) == (str(main), str(draft))
    assert args.selection.keep == "auto"
    assert run("check", file) == 0
    assert "error" not in capsys.readouterr().out


def test_a_file_that_exists_is_kept_unless_forced(
    model: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("mine")
    argv = ("init", model("qwen3"), "--speculator", model("llama"), "--output", file)
    assert run(*argv) == 2
    assert f"{file} exists: --force replaces it" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert run(*argv, "--force") == 0
    assert yaml.safe_load(file.read_text())["applications"]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "phi3", "gemma"])
def test_a_tokens_kv_is_as_large_as_vllm_will_make_it(
    model: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder, file = model(name), tmp_path / "mine.yaml"
    assert run("init", folder, "--speculator", model("llama"), "--output", file) == 0
    config = load(file).file.applications[0].args
    checked = MainModelCheck(config, folder)
    sizes = [each for each in checked.findings() if "kv_cache_memory_bytes" in each.key]
    assert sizes == []
    shape = read_shape(folder)
    assert checked.model is not None
    heads, dim = checked.model.get_total_num_kv_heads(), checked.model.get_head_size()
    assert shape.kv_numbers == 2 * checked.model.get_total_num_hidden_layers() * heads * dim


def test_latent_attention_is_counted_by_its_latents(model: Callable[..., Path]) -> None:
    shape = read_shape(model("deepseek2"))
    assert shape.kv_numbers == 3 * (512 + 64)
    assert shape.kv_parts(workers=8) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "needs a draft model, and none is known for it"),
        (("--speculator", "/none"), "--speculator: /none does not exist"),
        (("--speculator", "{draft}", "--max-model-len", "9000"), "exceed the model's 8192"),
        (("--speculator", "{draft}", "--gpus", "2"), "--gpus (2) must not exceed the 0 GPUs"),
        (("--speculator", "{empty}"), "holds no weights"),
    ],
)  # fmt: skip
def test_what_is_needed_is_named(
    model: Callable[..., Path], capsys: Any, argv: tuple[str, ...], message: str
) -> None:
    main, draft, empty = model("qwen3"), model("llama"), model("qwen2", weights=False)
    filled = [each.format(draft=draft, empty=empty) for each in argv]
    assert run("init", main, *filled) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.strip().splitlines()) == 1


def test_a_type_that_transformers_does_not_know_is_one_line(
    model: Callable[..., Path], capsys: Any
) -> None:
    main = model("qwen3")
    (main / "config.json").write_text('{"model_type": "no-such-type"}')
    assert run("init", main, "--speculator", model("llama")) == 2
    printed = capsys.readouterr().err
    assert f"{main}: config.json cannot be used: " in printed
    assert len(printed.strip().splitlines()) == 1


def test_options_for_a_model_do_not_change_a_file(capsys: Any, root: Path) -> None:
    assert run("serve", root / "cluster" / "local.yaml", "--keep", "auto", "--port", "1234") == 2
    assert "--keep, --port cannot be combined with a deployment file" in capsys.readouterr().err


class TestTheFileOfServe:
    """`serve MODEL` writes a file of its own, and overwrites no change of it."""

    @pytest.fixture
    def argv(
        self, model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> tuple[object, ...]:
        """The command, with a state folder of the test's own."""
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        return ("serve", model("qwen3"), "--speculator", model("llama"))

    def write(self, *argv: object) -> Path:
        """Do the first part of the command; return the file."""
        args = cli.parser().parse_args([str(each) for each in argv])
        return write_for_serve(args, print)

    def test_an_unchanged_file_is_written_again(self, argv: tuple[object, ...]) -> None:
        file = self.write(*argv)
        assert "selection" not in file.read_text()
        assert self.write(*argv, "--keep", "0.5") == file
        assert load(file).file.applications[0].args.selection.keep == 0.5

    def test_a_state_folder_that_cannot_be_written_is_one_line(
        self, argv: tuple[object, ...], tmp_path: Path, capsys: Any
    ) -> None:
        (tmp_path / "state").mkdir()
        (tmp_path / "state" / "specprefill").symlink_to(tmp_path / "none" / "none")
        assert run(*argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"specprefill: {tmp_path / 'state' / 'specprefill'}")

    def test_a_calibrated_file_is_kept(self, argv: tuple[object, ...], capsys: Any) -> None:
        file = self.write(*argv)
        place = ("applications", 0, "args", "speculator")
        calibrated = with_values(file.read_text(), place, {"score_reduction": "squares"})
        file.write_text(calibrated)
        assert run(*argv) == 2
        printed = capsys.readouterr().err
        assert f"{file} has been changed" in printed
        assert f"`specprefill serve {file}`" in printed
        assert "or remove it" in printed
        assert file.read_text() == calibrated
        file.unlink()
        assert self.write(*argv) == file

    def test_a_file_without_a_digest_is_kept(self, argv: tuple[object, ...], capsys: Any) -> None:
        file = self.write(*argv)
        mine = file.read_text().partition("\n")[2]
        file.write_text(mine)
        assert run(*argv) == 2
        assert f"{file} has been changed" in capsys.readouterr().err
        assert file.read_text() == mine
