"""Finds a model by folder, GGUF file or hub name, and brings it onto this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..config import local_path
from ..core.errors import UnsupportedModel
from ..core.findings import Finding, Severity
from ..deployment.model_files import locate_model
from .gguf import convert

_CONFIG = "config.json"
# What the engines and the speculator read; not the same weights in other formats.
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "pytorch_model*.bin")
_DUPLICATES = ("original/*", "onnx/*", "openvino/*", "*.msgpack", "*.h5")


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model on this machine."""

    path: str  # for the deployment file: a folder, or a hub name that is in the cache
    name: str  # a short one, which clients may use
    folder: Path


def find_model(option: str, given: str, show: Callable[[str], None]) -> LocalModel:
    """Return the model that `given` names; `option` names the argument in messages.

    Converts GGUF files and downloads from the hub, which `show` reports. Raises UnsupportedModel
    with what is missing.
    """
    path = Path(local_path(given))
    if path.is_file():
        return _of_file(option, path, show)
    if path.is_dir() and not (path / _CONFIG).exists():
        return _of_file(option, _only_gguf(option, path), show)
    found = locate_model(option, given, None, offline=False)
    if isinstance(found, Path) and path.is_dir():
        return LocalModel(str(found.resolve()), path.resolve().name, found)
    if isinstance(found, Finding) and found.severity is Severity.ERROR:
        raise UnsupportedModel(f"{option}: {found.message}")
    return LocalModel(given, given, _download(option, given, show))


def _of_file(option: str, file: Path, show: Callable[[str], None]) -> LocalModel:
    if file.suffix.lower() != ".gguf":
        raise UnsupportedModel(
            f"{option}: {file} is neither a GGUF file nor a folder with a model; deployment files "
            "end in .yaml"
        )
    folder = convert(file.resolve(), show)
    return LocalModel(str(folder), file.stem, folder)


def _only_gguf(option: str, folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise UnsupportedModel(f"{option}: {folder} has no {_CONFIG} and no GGUF file")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UnsupportedModel(f"{option}: {folder} has several GGUF files, name one: {names}")
    return files[0]


def _download(option: str, name: str, show: Callable[[str], None]) -> Path:
    """Bring a hub model into the cache; return its folder there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    show(f"looking for {name} on the hub; what is missing in the cache is downloaded")
    try:
        folder = snapshot_download(
            name, allow_patterns=[*_HUB_FILES], ignore_patterns=[*_DUPLICATES]
        )
    except GatedRepoError as error:
        raise UnsupportedModel(
            f"{option}: {name} asks you to accept its licence on its page, and then for your "
            "token: `hf auth login`, or HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise UnsupportedModel(
            f"{option}: {name} is no folder here and no model on the hub (a private one needs "
            "your token: `hf auth login`, or HF_TOKEN)"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:  # ValueError: offline, or a bad name
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModel(
            f"{option}: {name} is no folder here, and the hub cannot be asked for it: {reason}"
        ) from error
    return Path(folder)
