"""`specprefill ask | score`: questions to a running service."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..client import grpc as grpc_caller
from ..client import http as http_caller
from ..client.question import CallFailed, ServiceQuestion, report_line
from ..core.types import PromptMode, Span
from .arguments import API_KEY_VARIABLE, positive_number, rate
from .exit_codes import Failed, Misused

HTTP_URL = "http://127.0.0.1:8000"
GRPC_ADDRESS = "127.0.0.1:9000"
_BOLD, _DIM, _PLAIN = "\033[1m", "\033[2m", "\033[0m"


def add_commands(commands: Any) -> None:
    """Register this module's commands with the parser."""
    ask = commands.add_parser(
        "ask",
        help="ask a running service",
        description="Stream the answer to QUESTION about the prompt file's text, then print "
        "what happened to the prompt. HTTP unless --grpc is given.",
    )
    _add_question(ask)
    ask.add_argument("--grpc", metavar="HOST:PORT", help="ask over gRPC instead of HTTP")
    ask.add_argument(
        "--max-tokens", type=int, default=128, metavar="N",
        help="maximum number of answer tokens (default: %(default)s)",
    )  # fmt: skip
    ask.add_argument(
        "--temperature", type=float, default=0.0, metavar="T",
        help="sampling temperature; 0 is greedy (default: %(default)g)",
    )  # fmt: skip
    ask.set_defaults(run=run_ask)
    score = commands.add_parser(
        "score",
        help="show which prompt tokens would be kept",
        description="Score the prompt without answering it, and print it with the kept text in "
        "bold (marked [[like this]] if the output is not a terminal).",
    )
    _add_question(score)
    score.add_argument(
        "--grpc", metavar="HOST:PORT", default=GRPC_ADDRESS,
        help="the gRPC endpoint that scores (default: %(default)s)",
    )  # fmt: skip
    score.set_defaults(run=run_score)


def _add_question(command: argparse.ArgumentParser) -> None:
    command.add_argument("question", nargs="*", metavar="QUESTION", help="what to ask")
    command.add_argument(
        "--prompt-file", metavar="FILE", help="text to put before the question; - reads stdin"
    )
    command.add_argument(
        "--http", metavar="URL", default=HTTP_URL, help="the HTTP endpoint (default: %(default)s)"
    )
    command.add_argument("--model", metavar="NAME", help="default: the only model served")
    command.add_argument(
        "--timeout", type=positive_number, default=300.0, metavar="S",
        help="seconds to wait for the answer (default: %(default)g)",
    )  # fmt: skip
    how = command.add_mutually_exclusive_group()
    how.add_argument(
        "--keep", type=rate, metavar="R",
        help="share of the prompt to keep, above 0 and at most 1 (default: the deployment's)",
    )  # fmt: skip
    how.add_argument("--dense", action="store_true", help="keep the whole prompt")
    command.add_argument(
        "--mode", type=PromptMode, choices=(PromptMode.POSITIONS, PromptMode.TEXT),
        help="how to send what is kept (default: the deployment's)",
    )  # fmt: skip


def run_ask(args: argparse.Namespace) -> int:
    """Stream an answer to stdout and the report to stderr."""
    question = _question(args, max_tokens=args.max_tokens, temperature=args.temperature)
    try:
        if args.grpc is None:
            answered = http_caller.ask(args.http, question, _write)
        else:
            answered = grpc_caller.ask(args.grpc, question, _write)
    except CallFailed as error:
        raise Failed(str(error)) from error
    print()
    if answered.report:
        print(report_line(answered.report), file=sys.stderr)
    return 0


def run_score(args: argparse.Namespace) -> int:
    """Print the prompt with its kept tokens highlighted."""
    question = _question(args)
    try:
        tokens = http_caller.tokenize(args.http, question)
        kept, decision = grpc_caller.score(args.grpc, question, tokens)
        pieces = [
            (http_caller.detokenize(args.http, tokens[run.start : run.stop], question), is_kept)
            for run, is_kept in split(kept, len(tokens))
        ]
    except CallFailed as error:
        raise Failed(str(error)) from error
    print(highlight(pieces, colours=sys.stdout.isatty()))
    print(
        f"{decision['plan']} ({decision['reason']}): {decision['kept_tokens']} of "
        f"{decision['prompt_tokens']} tokens kept ({decision['keep_rate']:.0%}), scored in "
        f"{decision['speculate_s'] * 1e3:.0f} ms",
        file=sys.stderr,
    )
    return 0


def split(kept: Sequence[Span], prompt_tokens: int) -> list[tuple[Span, bool]]:
    """Split the whole prompt into runs, each with True if it is kept."""
    edges = sorted({0, prompt_tokens, *(edge for run in kept for edge in (run.start, run.stop))})
    starts = {run.start for run in kept}
    return [(Span(start, stop), start in starts) for start, stop in pairwise(edges)]


def highlight(pieces: Sequence[tuple[str, bool]], *, colours: bool) -> str:
    """Return the text with kept pieces in bold, or in double brackets."""
    if colours:
        return "".join(f"{_BOLD if kept else _DIM}{text}{_PLAIN}" for text, kept in pieces)
    return "".join(f"[[{text}]]" if kept else text for text, kept in pieces)


def _question(
    args: argparse.Namespace, max_tokens: int = 1, temperature: float = 0.0
) -> ServiceQuestion:
    parts = [_prompt_text(args.prompt_file), " ".join(args.question)]
    content = "\n\n".join(part for part in parts if part)
    if not content:
        raise Misused("specprefill: give a QUESTION, a --prompt-file, or both")
    return ServiceQuestion(
        messages=({"role": "user", "content": content},),
        model=args.model,
        keep=args.keep,
        dense=args.dense,
        mode=args.mode,
        max_tokens=max_tokens,
        temperature=temperature,
        timeout_s=args.timeout,
        api_key=os.environ.get(API_KEY_VARIABLE),
    )


def _prompt_text(source: str | None) -> str:
    if source is None:
        return ""
    if source == "-":
        return sys.stdin.read().rstrip()
    try:
        return Path(source).read_text(encoding="utf-8").rstrip()
    except OSError as error:
        raise Misused(f"specprefill: --prompt-file {source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Misused(f"specprefill: --prompt-file {source}: not UTF-8") from error


def _write(text: str) -> None:
    print(text, end="", flush=True)
