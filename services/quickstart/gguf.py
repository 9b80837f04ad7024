"""Converts a GGUF file to a model folder, once, in a process of its own.

    python -m specprefill.quickstart.gguf FILE FOLDER

transformers reads GGUF files but refuses to save what it has read, so the weights are copied into
a fresh model of the same configuration. They are stored as bfloat16.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..core.errors import UnsupportedModel

_DIGESTED_BYTES = 1 << 20  # the head of the file, with its metadata
_NEEDED = ("gguf", "accelerate")
# What transformers raises about a file that it cannot read.
_UNREADABLE = (
    ImportError, KeyError, NotImplementedError, OSError, RuntimeError, ValueError, struct.error,
)  # fmt: skip
_DIGIT_SPLITTERS = ("smollm", "codeshell", "refact", "starcoder", "command-r")  # llama.cpp's names
_FORMAT = 2  # of what is written; another one is converted again


def cache_folder() -> Path:
    """Return the folder of this user for what can be made again."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "specprefill"


def convert(file: Path, show: Callable[[str], None]) -> Path:
    """Return the folder of a converted file. Raises UnsupportedModel with the reason."""
    folder = cache_folder() / "gguf" / f"{file.stem}-{_digest(file)}"
    if folder.is_dir():
        show(f"{file.name} was converted before: {folder}")
        return folder
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedModel(
            f"{file}: reading GGUF needs {' and '.join(missing)}: pip install 'specprefill[gguf]'"
        )
    show(f"converting {file.name} ({file.stat().st_size >> 20} MiB) into {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        _convert_apart(file, Path(unfinished))
        try:
            os.rename(unfinished, folder)
        except OSError:  # somebody else was faster
            if not folder.is_dir():
                raise
        Path(unfinished).mkdir(exist_ok=True)  # for the clean-up
    return folder


def _convert_apart(file: Path, folder: Path) -> None:
    """Run the conversion in a process, whose memory ends with it; its bars go to the terminal."""
    command = [sys.executable, "-m", __name__, str(file), str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        ended = f"the conversion ended with {done.returncode}; its error is above"
        reason = done.stdout.strip() or ended
        raise UnsupportedModel(f"{file}: {reason}")


def _digest(file: Path) -> str:
    """Return a name for the file's content, from its head and its length."""
    with file.open("rb") as opened:
        head = opened.read(_DIGESTED_BYTES)
    return hashlib.sha256(b"%d %d " % (_FORMAT, file.stat().st_size) + head).hexdigest()[:12]


def write_folder(file: Path, folder: Path) -> None:
    """Write the model and its tokenizer. Raises what transformers raises for files it cannot."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(
        **place, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(read.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = read.generation_config
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
    if _splits_digits(file):
        split_digits(folder / "tokenizer.json")


def _splits_digits(file: Path) -> bool:
    """Return True if its tokenizer takes every digit alone, which transformers leaves out."""
    from gguf import GGUFReader

    field = GGUFReader(file).fields.get("tokenizer.ggml.pre")
    return field is not None and field.contents() in _DIGIT_SPLITTERS


def split_digits(tokenizer: Path) -> None:
    """Make a `tokenizer.json` split digits before anything else."""
    settings = json.loads(tokenizer.read_text(encoding="utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    settings["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [digits, settings["pre_tokenizer"]],
    }
    tokenizer.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")


def main(argv: list[str]) -> int:
    """Convert in this process. Prints the reason and returns 1 where that fails."""
    file, folder = map(Path, argv)
    try:
        write_folder(file, folder)
    except _UNREADABLE as error:
        sys.stdout.write(f"transformers cannot read it: {str(error).partition(chr(10))[0]}\n")
        shutil.rmtree(folder, ignore_errors=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
