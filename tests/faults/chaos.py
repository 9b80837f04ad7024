"""`make chaos`: 200 streams at once, 30 % of the clients leave, a replica of each pool is killed.

Every complete answer must be the one that the same prompt gets undisturbed. Every client that stays
must get one, except a few that are refused with 429 or 503 and a code. Leases, memory and
descriptors must return to where they were. Exits 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoTokenizer

from specprefill.deployment.file import load
from specprefill.deployment.serve_api import ServeApi
from specprefill.synthetic.needles import needle_prompt
from tests.fuzz.served import HOST, Served, serving
from tests.fuzz.watch import Holding, totals

STREAMS, LEAVING, PROMPTS, PROMPT_TOKENS, KEEP = 200, 0.3, 20, 1200, 0.2
POOLS = ("Speculator", "Prefill", "Decode")
KILL_EVERY_S = 3.0
SETTLED_S = 90.0
PATIENCE_S = 240.0
WITHOUT_CODE = "without a code"
MOST_REFUSED = 0.1  # of the clients that stay
REFUSAL = re.compile(r"(429|503) \S+")  # an ending's kind, with a code
HELD = re.compile(r"^ray_specprefill_kv_(bytes_held|leases_held)\{[^}]*\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of one stream.

    `kind` is complete, left, a status with its code, the code of an error in the stream, or broken:
    neither an end nor an error.
    """

    kind: str
    text: str = ""
    plan: str = ""
    recomputed: bool = False


@dataclass(slots=True)
class Outcome:
    """The findings of a run."""

    staying: int = 0  # clients that do not leave
    endings: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    recomputed: int = 0
    seconds: float = 0.0
    killed: list[str] = field(default_factory=list)
    held_after: float = 0.0
    before: str = ""
    after: str = ""
    grown: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """Return what must not be."""
        held = [f"{self.held_after:g} bytes and leases held"] if self.held_after else []
        return [*self.wrong, *self.unanswered, *held, *self.grown]

    @property
    def unanswered(self) -> list[str]:
        """Return the streams that should have been complete and were not."""
        refused = sum(count for kind, count in self.endings.items() if REFUSAL.fullmatch(kind))
        lost = [
            f"{count} streams ended with: {kind}"
            for kind, count in self.endings.items()
            if kind not in ("complete", "left") and not REFUSAL.fullmatch(kind)
        ]
        complete = self.endings["complete"]
        if complete < self.staying - refused:
            lost.append(
                f"{complete} complete, {self.staying - refused} stayed and were not refused"
            )
        if refused > MOST_REFUSED * self.staying:
            lost.append(f"{refused} refused, {self.staying} stayed")
        return lost


def deployment(file: Path) -> dict[str, Any]:
    """Return the file's content with two replicas of each pool, and time for all the streams."""
    raw = load(file).raw
    (application,) = raw["applications"]
    for one in application["deployments"]:
        if one["name"] in POOLS:
            one["num_replicas"] = 2
    application["args"]["speculator"]["timeout_s"] = PATIENCE_S
    return raw


def body(messages: Sequence[Mapping[str, Any]], *, pruned: bool) -> dict[str, Any]:
    """Return a greedy, streamed chat request."""
    return {
        "model": "demo", "messages": list(messages), "max_tokens": 24, "temperature": 0,
        "stream": True, "specprefill": {"keep": KEEP} if pruned else False,
    }  # fmt: skip


async def ask(
    client: httpx.AsyncClient, asked: Mapping[str, Any], leave_after_s: float | None = None
) -> Ended:
    """Stream one answer; the client leaves after a while, where it is to."""
    try:
        async with asyncio.timeout(leave_after_s):
            return await _stream(client, asked)
    except TimeoutError:
        return Ended("left")
    except httpx.HTTPError as error:
        return Ended("broken", f"{type(error).__name__}: {error}")


async def _stream(client: httpx.AsyncClient, asked: Mapping[str, Any]) -> Ended:
    text, report, finished, done = "", {}, False, False
    async with client.stream("POST", "/v1/chat/completions", json=asked) as reply:
        if reply.status_code != 200:
            await reply.aread()
            return Ended(f"{reply.status_code} {_code(reply)}")
        async for line in reply.aiter_lines():
            data = line.removeprefix("data: ")
            done = done or data == "[DONE]"
            if not data.startswith("{"):
                continue
            event = json.loads(data)
            if "error" in event:
                return Ended(f"in the stream: {event['error'].get('code')}")
            report = event.get("specprefill", report)
            for choice in event["choices"]:
                text += choice["delta"].get("content") or ""
                finished = finished or choice["finish_reason"] is not None
    if not (finished and done):
        return Ended("broken", text)
    return Ended("complete", text, str(report.get("plan")), bool(report.get("recomputed")))


def _code(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["error"]["code"] or WITHOUT_CODE)
    except (ValueError, KeyError, TypeError):
        return WITHOUT_CODE


async def storm(
    served: Served, seed: int, found: Outcome, headers: Mapping[str, str] | None = None
) -> dict[int, Holding]:
    """Learn the right answers, then ask all at once while replicas are killed.

    Returns what the processes held before the storm.
    """
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained("models/demo-main")
    prompts = [needle_prompt(seed + n, PROMPT_TOKENS, tokenizer).messages for n in range(PROMPTS)]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    base = f"http://{HOST}:{served.http_port}"
    async with httpx.AsyncClient(
        base_url=base, timeout=PATIENCE_S, limits=limits, headers=headers
    ) as client:
        right: dict[tuple[int, str], str] = {}
        for number, messages in enumerate(prompts):
            for pruned in (True, False):
                answer = await ask(client, body(messages, pruned=pruned))
                if answer.kind != "complete":
                    found.wrong.append(f"undisturbed: {answer.kind} {answer.text}")
                right[number, answer.plan] = answer.text
        before = served.watch.holdings()
        found.before = totals(before)
        started_s = time.monotonic()
        places = [n % PROMPTS for n in range(STREAMS)]
        leaving = [rng.uniform(0.0, 12.0) if rng.random() < LEAVING else None for _ in places]
        found.staying = leaving.count(None)
        killing = asyncio.create_task(kill(served, rng, found))
        endings = await asyncio.gather(*(
            ask(client, body(prompts[place], pruned=True), leave)
            for place, leave in zip(places, leaving, strict=True)
        ))  # fmt: skip
        await killing
        found.seconds = time.monotonic() - started_s
    for place, ended in zip(places, endings, strict=True):
        found.endings[ended.kind] += 1
        found.recomputed += ended.recomputed
        if ended.kind == "complete" and ended.text != right.get((place, ended.plan)):
            wanted = right.get((place, ended.plan))
            found.wrong.append(f"{ended.plan}: {ended.text!r}, undisturbed {wanted!r}")
    return before


async def kill(served: Served, rng: random.Random, found: Outcome) -> None:
    """SIGKILL one replica of each pool, one after the other."""
    api = await asyncio.to_thread(ServeApi, served.dashboard_url)
    for pool in POOLS:
        await asyncio.sleep(KILL_EVERY_S)
        pids = await asyncio.to_thread(api.replica_pids, pool)
        os.kill(rng.choice(pids), signal.SIGKILL)
        found.killed.append(pool)


def kv_held(served: Served, headers: Mapping[str, str] | None = None) -> float:
    """Return the sum of KV bytes and leases that any prefill replica reports."""
    url = f"http://{HOST}:{served.http_port}/metrics"
    samples = HELD.findall(httpx.get(url, headers=headers, timeout=30).text)
    if not samples:
        raise RuntimeError(f"{url} has no metric of what is held")
    return sum(float(value) for _, value in samples)


def settle(served: Served, found: Outcome, headers: Mapping[str, str] | None = None) -> None:
    """Wait until all replicas are back and nothing is held, or note what still is."""
    ServeApi(served.dashboard_url).wait_healthy(SETTLED_S * 2, lambda _line: None)
    give_up_s = time.monotonic() + SETTLED_S
    while (now := kv_held(served, headers)) and time.monotonic() < give_up_s:
        time.sleep(1.0)
    found.held_after = now
    found.after = totals(served.watch.holdings())


def main(argv: list[str] | None = None) -> int:
    """Run once and print what became of the streams."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.chaos", description=__doc__)
    parser.add_argument("--file", type=Path, default=Path("cluster/local.yaml"))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    found = Outcome()
    with serving(deployment(args.file)) as served:
        before = asyncio.run(storm(served, args.seed, found))
        settle(served, found)
        living = served.watch.holdings()
        found.grown = served.watch.grown({pid: one for pid, one in before.items() if pid in living})
    out = Path("out")
    out.mkdir(exist_ok=True)
    figures = {**asdict(found), "endings": dict(found.endings)}  # asdict breaks a Counter
    (out / "chaos.json").write_text(json.dumps(figures, indent=1))
    print(f"{STREAMS} streams in {found.seconds:.0f} s: {dict(found.endings)}")
    print(f"killed: {', '.join(found.killed)}; recomputed by decode: {found.recomputed}")
    print(f"before: {found.before}\nafter:  {found.after}\nheld: {found.held_after:g}")
    for fault in found.faults[:40]:
        print(f"  {fault}")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
