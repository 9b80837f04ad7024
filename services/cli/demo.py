"""The demo of `make demo`: one long question over HTTP and one over gRPC, dense and pruned.

Starts a local Ray cluster and the application of `cluster/local.yaml` on free ports, asks, prints
the times of every answer, and stops everything. Exits 1 when an answer was wrong or a step failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..client import grpc as grpc_caller
from ..client import http as http_caller
from ..client.question import CallFailed, ServiceQuestion, ServiceReply
from ..config import local_path
from ..deployment.checked_yaml import InvalidFile
from ..deployment.file import LoadedFile, load, with_ports
from ..deployment.local_ray import LocalRay, StartFailed, free_port
from ..deployment.serve_api import DeploymentFailed, ServeApi
from ..lab.reporting.tables import markdown
from ..synthetic.needles import NeedlePrompt, needle_prompt
from .serve import ProgressLines

FILE = Path("cluster/local.yaml")
PROMPT_TOKENS = 4000
WARM_UP_TOKENS = 1200
KEEP = 0.1
ANSWER_TOKENS = 24
START_TIMEOUT_S = 600.0
_STAGES = ("queue_s", "speculate_s", "prefill_s", "transfer_s", "first_decode_s")

Caller = Callable[[ServiceQuestion], ServiceReply]


@dataclass(frozen=True, slots=True)
class DemoResult:
    """One question, its transport and plan, and the reply."""

    transport: str
    prompt: NeedlePrompt
    dense: bool
    answered: ServiceReply

    @property
    def is_right(self) -> bool:
        return self.prompt.answer in self.answered.text


def ask_both_ways(
    transport: str, call: Caller, prompt: NeedlePrompt, show: Callable[[str], None]
) -> list[DemoResult]:
    """Ask the same prompt dense, then pruned: the dense run's cache does not help the pruned."""
    asked = []
    for dense in (True, False):
        show(f"{transport}: asking {'with the whole prompt' if dense else f'at keep {KEEP:g}'}")
        answered = call(question(prompt, dense=dense))
        asked.append(DemoResult(transport, prompt, dense, answered))
    return asked


def question(prompt: NeedlePrompt, *, dense: bool) -> ServiceQuestion:
    """Return a needle prompt as a question."""
    return ServiceQuestion(
        messages=tuple(prompt.messages),
        keep=None if dense else KEEP,
        dense=dense,
        max_tokens=ANSWER_TOKENS,
    )


def table(results: Sequence[DemoResult]) -> str:
    """Return a table of every answer and its times."""
    headers = ("over", "prompt", "tokens kept", "answer", "expected", "right", "TTFT", "queue",
               "speculate", "prefill", "transfer", "first decode")  # fmt: skip
    return markdown(headers, [_row(asked) for asked in results])


def _row(asked: DemoResult) -> list[str]:
    report: Any = asked.answered.report
    return [
        asked.transport,
        "dense" if asked.dense else f"keep {KEEP:g}",
        f"{report['kept_tokens']} of {report['prompt_tokens']}",
        " ".join(asked.answered.text.split())[:40],
        asked.prompt.answer,
        "yes" if asked.is_right else "NO",
        _ms(asked.answered.ttft_s),
        *(_ms(report[stage]) for stage in _STAGES),
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def find_faults(results: Sequence[DemoResult]) -> list[str]:
    """Return the faults: wrong answers, and plans that were not requested."""
    found = []
    for asked in results:
        how = f"{asked.transport}, {'dense' if asked.dense else f'keep {KEEP:g}'}"
        plan = "dense" if asked.dense else "prune"
        if not asked.is_right:
            found.append(f"{how}: expected {asked.prompt.answer!r}, got {asked.answered.text!r}")
        if asked.answered.report["plan"] != plan:
            found.append(f"{how}: the plan was not {plan}: {asked.answered.report['reason']}")
    return found


def needles(loaded: LoadedFile, seed: int) -> list[NeedlePrompt]:
    """Return a short warm-up prompt and two long ones, for the deployment's tokenizer."""
    from transformers import AutoTokenizer

    path = local_path(loaded.file.applications[0].args.model.path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    lengths = (WARM_UP_TOKENS, PROMPT_TOKENS, PROMPT_TOKENS)
    return [needle_prompt(seed + i, length, tokenizer) for i, length in enumerate(lengths)]


def run(file: Path, seed: int, show: Callable[[str], None]) -> list[DemoResult]:
    """Start the service, ask, and stop it.

    Raises InvalidFile, StartFailed, DeploymentFailed or CallFailed.
    """
    loaded = load(file)
    http_port, grpc_port = free_port(), free_port()
    warm_up, first, second = needles(loaded, seed)
    show("starting a local Ray cluster")
    with LocalRay(file=file) as ray:
        api = ServeApi(ray.dashboard_url)
        show(f"deploying {file}: gateway, speculator, prefill and decode")
        api.deploy(with_ports(loaded.raw, http_port, grpc_port))
        api.wait_healthy(START_TIMEOUT_S, show)
        show("all pools are healthy; warming up with one request")

        def over_http(ask: ServiceQuestion) -> ServiceReply:
            return http_caller.ask(f"http://127.0.0.1:{http_port}", ask, _ignore_text)

        def over_grpc(ask: ServiceQuestion) -> ServiceReply:
            return grpc_caller.ask(f"127.0.0.1:{grpc_port}", ask, _ignore_text)

        over_http(question(warm_up, dense=False))
        results = ask_both_ways("HTTP", over_http, first, show)
        results += ask_both_ways("gRPC", over_grpc, second, show)
        show("stopping")
    show("stopped")
    return results


def _ignore_text(_text: str) -> None:
    """Ignore the pieces: the table shows the whole answer."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m specprefill.cli.demo", description=__doc__)
    parser.add_argument(
        "--file", type=Path, default=Path(local_path(str(FILE))), help="deployment file"
    )
    parser.add_argument("--seed", type=int, default=7, help="of the generated prompts")
    args = parser.parse_args(argv)
    try:
        results = run(args.file, args.seed, ProgressLines())
    except (InvalidFile, StartFailed, DeploymentFailed, CallFailed) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(f"\nThe prompt ends with: {results[0].prompt.messages[-1]['content'].splitlines()[-1]}")
    print(f"\n{table(results)}\n")
    found = find_faults(results)
    for fault in found:
        print(f"demo: {fault}", file=sys.stderr)
    if not found:
        print("Every answer is right.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
