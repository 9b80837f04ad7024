"""The `specprefill eval` command: measures answer quality at every keep rate."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..client.question import CallFailed
from ..core.errors import SpecPrefillError
from ..deployment.checked_yaml import InvalidFile
from ..deployment.file import load
from ..lab.evaluation.arms import Arm, arms_of
from ..lab.families.catalog import FAMILIES, REAL_FAMILIES
from ..quickstart.local_machine import usable_cores
from .arguments import API_KEY_VARIABLE, positive_number, rate, require_charts
from .exit_codes import Failed, Misused
from .progress_bar import ProgressBar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..config import AppConfig, SpeculatorConfig
    from ..lab.evaluation.journal import Journal
    from ..lab.evaluation.suite import Backend, Suite

CONFIG = Path("cluster/local.yaml")
OUT = Path("out")
JOURNAL = "eval-journal.jsonl"
LENGTHS = (1024, 4096)
KEEPS = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05)
CONTROL_KEEP = 0.1
TEXT_KEEPS = (0.3, 0.1)
# Of the speculator: neither scores nor what is kept depend on these. Its path is shown in full.
_UNSCORED = {
    "path", "threads", "prefill_chunk_tokens", "kv_memory_bytes", "score_cache_bytes",
    "kept_memory_bytes", "max_batch", "max_wait_s", "timeout_s", "timeout_token_s", "max_queued",
    "self_test", "on_overload",
}  # fmt: skip
CHUNKS = {"text": "chunks that follow the text, of about", "equal": "chunks of"}
ITEMS, LEAST_DENSE = 8, 0.2
QUICK_FAMILIES, QUICK_LENGTHS, QUICK_KEEPS, QUICK_ITEMS = ("needles", "vt"), (768,), (1.0, 0.1), 2


def add_commands(commands: Any) -> None:
    """Register this module's command with the parser."""
    command = commands.add_parser(
        "eval",
        help="measure answer quality at every keep rate",
        description="Ask generated tasks with known answers at every keep rate. Without "
        "--endpoint, the models of --config run in this process, beside controls that choose at "
        "random and the main model as its own speculator. With --endpoint, any OpenAI-compatible "
        "service is asked. Writes JSON and an HTML page.",
        epilog=f"families: {', '.join(FAMILIES)}; over prose that this machine has: "
        f"{', '.join(REAL_FAMILIES)}",
    )
    _add_subject(command)
    _add_size(command)
    command.add_argument(
        "--out", type=Path, default=OUT, metavar="DIR",
        help="folder for the reports (default: %(default)s)",
    )  # fmt: skip
    command.add_argument("--document", type=Path, metavar="FILE", help="write the tables here too")
    command.add_argument(
        "--resume", action="store_true",
        help="reuse the answers that an earlier run with these settings left in the folder for "
        "the reports: one that was interrupted, or had fewer families, lengths or prompts",
    )  # fmt: skip
    command.set_defaults(run=run_eval)


def _add_subject(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", type=Path, default=CONFIG, metavar="FILE",
        help="the deployment whose models and selection are measured (default: %(default)s)",
    )  # fmt: skip
    command.add_argument("--model", help="use this instead of the deployment's model or model name")
    command.add_argument(
        "--speculator", metavar="PATH", help="use this instead of the deployment's speculator"
    )
    command.add_argument("--endpoint", metavar="URL", help="ask this service over HTTP instead")
    command.add_argument(
        "--tokenizer", metavar="PATH",
        help="counts prompt tokens (default: the model's; needed where --model is only a name)",
    )  # fmt: skip
    command.add_argument(
        "--plain", action="store_true", help="the endpoint cannot prune: dense answers only"
    )
    command.add_argument(
        "--timeout", type=positive_number, default=300.0, metavar="S", help="per request"
    )
    command.add_argument("--workers", type=int, default=1, metavar="N", help="requests at a time")
    command.add_argument(
        "--threads", type=int, default=usable_cores(), metavar="N",
        help="threads of both models in this process (default: %(default)s)",
    )  # fmt: skip


def _add_size(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--families", nargs="+", choices=(*FAMILIES, *REAL_FAMILIES), default=FAMILIES,
        metavar="FAMILY", help="default: all that are generated",
    )  # fmt: skip
    command.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="TOKENS")
    command.add_argument("--keeps", nargs="+", type=rate, default=KEEPS, metavar="R")
    command.add_argument(
        "--control-keep", type=rate, default=CONTROL_KEEP, metavar="R",
        help="keep rate of the controls and the ceiling (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--text-keeps", nargs="*", type=rate, default=TEXT_KEEPS, metavar="R",
        help="keep rates in text mode; without values: none",
    )  # fmt: skip
    command.add_argument(
        "--no-controls", action="store_true", help="skip the controls and the ceiling"
    )
    command.add_argument(
        "--no-ceiling", action="store_true", help="skip the ceiling: do not load the model twice"
    )
    command.add_argument(
        "--no-paper", action="store_true", help="skip the paper's scorer beside a calibrated one"
    )
    command.add_argument(
        "--gold-only", action="store_true", help="run the speculator alone, without answers"
    )
    command.add_argument(
        "--items", type=int, default=ITEMS, metavar="N",
        help="prompts of each family and length (default: %(default)s)",
    )  # fmt: skip
    command.add_argument("--seed", type=int, default=1)
    command.add_argument(
        "--least-dense", type=float, default=LEAST_DENSE, metavar="SCORE",
        help="skip answers for families whose dense score is below this; gold survival is still "
        "measured (default: %(default)s)",
    )  # fmt: skip
    command.add_argument("--quick", action="store_true", help="two families, two short prompts")


def run_eval(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the files."""
    require_charts()
    from ..lab.evaluation import report
    from ..lab.evaluation.suite import measure
    from ..lab.reporting.tables import provenance

    config = _config(args)
    suite = _suite(args, config)
    subject = _subject(args, config)
    tokenizer = _tokenizer(args, config)
    journal = _journal(args, suite, {**subject, **provenance(args.seed).versions})
    try:
        backend = _backend(args, config, tokenizer, suite)
        bar = ProgressBar(suite.prompts, time.monotonic)
        measured = measure(suite, backend, tokenizer, args.workers, bar.draw, journal)
    except (CallFailed, SpecPrefillError) as error:
        raise Failed(f"{error}; {_resume_hint(journal)}") from error
    except KeyboardInterrupt:
        raise Failed(f"interrupted; {_resume_hint(journal)}") from None
    finally:
        print(file=sys.stderr)
    found = report.report_of(measured, suite, subject)
    origin = provenance(args.seed)
    print(report.text(found))
    paths = report.write(found, origin, args.out)
    if args.document is not None:
        report.write_document(found, origin, args.document)
    print("written to " + ", ".join(map(str, paths)))
    return 0


def _journal(args: argparse.Namespace, suite: Suite, settings: dict[str, str]) -> Journal:
    """Open the journal of results. Raises Misused if it belongs to a run with other settings."""
    from ..lab.evaluation.journal import Journal, OtherSettings

    open_journal = Journal.resume if args.resume else Journal.create
    arms = ", ".join(arm.name for arm in suite.arms)
    asked = {"seed": str(suite.seed), "arms": arms, "answered": str(suite.answered)}
    if args.tokenizer is not None:
        asked["tokenizer"] = args.tokenizer
    try:
        return open_journal(args.out / JOURNAL, {**settings, **asked})
    except OtherSettings as error:
        raise Misused(f"specprefill: --resume: {error}") from error


def _resume_hint(journal: Journal) -> str:
    """Return how an evaluation that stopped can continue."""
    return f"{len(journal)} prompts are in {journal.path}: continue with --resume"


def _config(args: argparse.Namespace) -> AppConfig:
    """Return the deployment's application, with the command line's models. Raises Misused."""
    try:
        config = load(args.config).file.applications[0].args
    except InvalidFile as error:
        raise Misused(str(error)) from error
    threads = {"threads": args.threads}
    draft = {"score_by": "draft", "path": args.speculator, "revision": None}
    named = {} if args.speculator is None else draft
    speculator = config.speculator.model_copy(update={**threads, **named})
    model = config.model
    if args.model is not None and args.endpoint is None:
        model = model.model_copy(update={"path": args.model, "revision": None})
    return config.model_copy(update={"speculator": speculator, "model": model})


def _suite(args: argparse.Namespace, config: AppConfig) -> Suite:
    """Return the suite. Raises Misused for impossible sizes."""
    from ..lab.evaluation.suite import Suite

    if args.items < 1 or args.workers < 1 or min(args.lengths) < 1:
        raise Misused("specprefill: --items, --workers and --lengths must be at least 1")
    quick = args.quick
    return Suite(
        families=QUICK_FAMILIES if quick else tuple(args.families),
        lengths=QUICK_LENGTHS if quick else tuple(args.lengths),
        items=QUICK_ITEMS if quick else args.items,
        arms=_arms(args, config),
        seed=args.seed,
        least_dense=args.least_dense,
        answered=not args.gold_only,
        gold_known=args.endpoint is None,
    )


def _arms(args: argparse.Namespace, config: AppConfig) -> tuple[Arm, ...]:
    """Return the arms. Endpoints accept no positions: no controls, no ceiling, one scorer."""
    if args.plain:
        return arms_of((), None, automatic=False, ceiling=False)
    remote = args.endpoint is not None
    return arms_of(
        QUICK_KEEPS if args.quick else args.keeps,
        None if remote or args.no_controls else args.control_keep,
        text_keeps=(CONTROL_KEEP,) if args.quick else args.text_keeps,
        automatic=True,
        ceiling=not (args.no_ceiling or args.gold_only),
        paper=not remote and config.speculator.is_calibrated and not args.no_paper,
    )


def _tokenizer(args: argparse.Namespace, config: AppConfig) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from ..config import local_path

    disable_progress_bar()
    path = config.model.path if args.tokenizer is None else args.tokenizer
    return AutoTokenizer.from_pretrained(local_path(path))


def _backend(
    args: argparse.Namespace, config: AppConfig, tokenizer: PreTrainedTokenizerBase, suite: Suite
) -> Backend:
    """Return the endpoint, or both models loaded here."""
    if args.endpoint is not None:
        from ..lab.evaluation.endpoint import Endpoint

        return Endpoint(
            base_url=args.endpoint,
            model=args.model,
            api_key=os.environ.get(API_KEY_VARIABLE),
            timeout_s=args.timeout,
            understands_pruning=not args.plain,
            fresh=random.Random(),
        )
    from ..lab.evaluation.arms import Chooser
    from ..lab.evaluation.pair import load_pair

    return load_pair(
        config.model.path,
        config.speculator,
        config.selection,
        tokenizer,
        answered=suite.answered,
        ceiling=any(arm.chooser is Chooser.MAIN_MODEL for arm in suite.arms),
    )


def _without_home(path: str) -> str:
    """Return the path as it may stand in a published table."""
    return path.replace(str(Path.home()), "~", 1) if path.startswith(str(Path.home())) else path


def _scoring(speculator: SpeculatorConfig) -> str:
    if not speculator.reads_with_model:
        return "words"
    if not speculator.is_calibrated:
        return "the paper's scorer"
    heads = speculator.score_heads
    count = "all heads" if heads is None else f"{sum(map(len, heads.values()))} heads"
    return f"{count}, {speculator.score_reduction}, {speculator.score_queries}"


def _subject(args: argparse.Namespace, config: AppConfig) -> dict[str, str]:
    if args.endpoint is not None:
        return {"endpoint": args.endpoint, "model": args.model or "the only one"}
    selection = config.selection
    return {
        "main model": _without_home(config.model.path),
        "speculator": _without_home(config.speculator.path),
        "dtype": config.speculator.dtype,
        "scored by": _scoring(config.speculator),
        "selection": f"{CHUNKS[selection.chunks]} {selection.chunk_tokens} tokens, at least "
        f"{selection.min_kept_tokens} kept, {selection.sink_tokens} first and "
        f"{selection.tail_tokens} last protected, {selection.next_chunk_share:g} of a chunk's "
        "score for the next one",
        "settings": _settings_digest(config),
    }


def _settings_digest(config: AppConfig) -> str:
    """Return a digest of all settings that decide what is kept, alike on every machine."""
    settings = [
        config.selection.model_dump(mode="json"),
        config.speculator.model_dump(mode="json", exclude=_UNSCORED),
    ]
    content = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]
