"""Cancelled requests cost the others nothing, and leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import time
from dataclasses import dataclass, replace

import psutil
import pytest

from specprefill.core.types import Plan, PlanKind, Reason, Selection, Span

from .conftest import ANSWER_TOKENS, RELEASED_S, Pools, ask
from .test_matrix import request

pytestmark = [pytest.mark.faults, pytest.mark.asyncio(loop_scope="session")]

LONG, SHORT = 8000, 500
AT_ONCE = 25
MAX_RATIO = 2.5
ROUNDS = 5


def whole_prompt(length: int) -> Selection:
    return Selection(length, (Span(0, length),), Plan(PlanKind.DENSE, Reason.ASKED_OFF))


def prompt(name: str, length: int, **sampling):
    rng = random.Random(name)
    tokens = tuple(rng.randrange(10, 1000) for _ in range(length))
    return replace(request(name, **sampling), prompt=tokens)


async def ttft(pools: Pools, name: str) -> float:
    """Seconds until the first token of a short prompt."""
    started_s = time.monotonic()
    await ask(pools, prompt(name, SHORT, max_tokens=1), whole_prompt(SHORT))
    return time.monotonic() - started_s


async def test_ten_long_prompts_cancelled_mid_prefill_do_not_delay_a_short_one(whole, table):
    await ttft(whole, "warm")
    idle, after_one, after_ten = [], [], []
    for number in range(ROUNDS):  # in turns, so that a busy machine slows all three
        idle.append(await ttft(whole, f"idle-{number}"))
        await long_prompts_cancelled(whole, f"one-{number}", 1)
        after_one.append(await ttft(whole, f"after-one-{number}"))
        await long_prompts_cancelled(whole, f"ten-{number}", 10)
        after_ten.append(await ttft(whole, f"after-ten-{number}"))
    to_idle, to_one = (
        statistics.median(after_ten) / statistics.median(other) for other in (idle, after_one)
    )
    assert await whole.prefills[0].service.drain(RELEASED_S)
    held = await whole.bytes_held()
    name = f"ten 8k prompts cancelled ({to_idle:.2f} x the idle TTFT, {to_one:.2f} x after one)"
    table.add(name, "aborted", max(after_ten), None, held)
    assert held == 0
    # A step under way is not interrupted, and what it costs differs by machine: a short prompt
    # waits for its rest after one cancelled prompt as after ten.
    assert to_one <= MAX_RATIO, f"{after_one} {after_ten}"
    assert to_idle <= 2 * MAX_RATIO, f"{idle} {after_ten}"


async def long_prompts_cancelled(pools: Pools, name: str, count: int) -> None:
    """The first is being prefilled, the others are queued, when all their clients leave."""
    begun = asyncio.Event()

    async def mark(step):
        begun.set()
        return step

    pools.on_prefill_step = mark
    running = [
        asyncio.create_task(ask(pools, prompt(f"long-{name}-{place}", LONG), whole_prompt(LONG)))
        for place in range(count)
    ]
    await begun.wait()
    assert not any(task.done() for task in running)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    pools.on_prefill_step = None


@dataclass(frozen=True)
class Footprint:
    """What this process and the engines hold."""

    bytes_held: int
    leases: int
    unfinished: int
    tasks: int
    descriptors: int


async def footprint(pools: Pools) -> Footprint:
    gc.collect()
    gauges = [g for member in pools.prefills for g in await member.service.gauges()]
    return Footprint(
        bytes_held=sum(g.bytes_held for g in gauges),
        leases=sum(g.leases for g in gauges),
        unfinished=sum(member.unfinished for member in (*pools.prefills, *pools.decodes)),
        tasks=len(asyncio.all_tasks()),
        descriptors=psutil.Process().num_fds(),
    )


async def settled(pools: Pools, wanted: Footprint) -> Footprint:
    """The footprint, once it is back at `wanted` or a minute has passed."""
    give_up_s = time.monotonic() + 60
    now = await footprint(pools)
    while now != wanted and time.monotonic() < give_up_s:
        await asyncio.sleep(0.1)
        now = await footprint(pools)
    return now


@pytest.mark.parametrize("cancelled", [250, pytest.param(1000, marks=pytest.mark.thorough)])
async def test_requests_cancelled_at_random_leave_nothing_behind(whole, table, cancelled):
    rng = random.Random(0)
    # Warm connections and threads: they stay, and are no leak.
    await asyncio.gather(*(one_cancelled(whole, f"warm-{n}", rng, 2.0) for n in range(AT_ONCE)))
    assert await whole.released(RELEASED_S)
    before = await footprint(whole)
    started_s = time.monotonic()
    ended = 0
    for first in range(0, cancelled, AT_ONCE):
        outcomes = await asyncio.gather(
            *(
                one_cancelled(whole, f"cancelled-{first + n}", rng, rng.uniform(0.0, 0.8))
                for n in range(AT_ONCE)
            )
        )
        ended += sum(outcomes)
        assert await whole.released(RELEASED_S)
    after = await settled(whole, before)
    seconds = time.monotonic() - started_s
    name = f"{cancelled} cancelled at random ({ended} had ended)"
    table.add(name, "released", seconds, None, after.bytes_held)
    assert ended < cancelled / 2
    assert after == before


async def one_cancelled(pools: Pools, name: str, rng: random.Random, after_s: float) -> bool:
    """Ask and leave after `after_s`. True if the answer was complete by then."""
    length = rng.choice([100, 500, 1500])
    asked = prompt(name, length, max_tokens=rng.choice([4, ANSWER_TOKENS]))
    task = asyncio.create_task(ask(pools, asked, whole_prompt(length)))
    done, _ = await asyncio.wait([task], timeout=after_s)
    if not done:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    return bool(done) and not task.cancelled()
