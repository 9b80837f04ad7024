"""The failure matrix: real engine processes, killed; the client gets the same tokens."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from concurrent import futures
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import msgspec
import pytest

from specprefill.control.decode_caches import DecodeCaches
from specprefill.control.local_prefill import LocalLimits, LocalPrefillRule
from specprefill.control.stages import DEFAULT_CURVES
from specprefill.core.errors import DeadlineExceeded, Overloaded
from specprefill.core.fallback import OnOverload, static_selection
from specprefill.core.types import (
    Carrier,
    Controls,
    DecodeStep,
    Plan,
    PlanKind,
    PrefilledBy,
    PrefillResult,
    Reason,
    Request,
    Selection,
    Span,
    Ticket,
)
from specprefill.kv.announcements import Announcements
from specprefill.kv.leases import UNCLAIMED_S, LeaseStore
from specprefill.kv.rpc import KvServer, _Handler
from tests.integration.conftest import BLOCK_SIZE

from ..policies import SHIPPED
from .conftest import ANSWER_TOKENS, RELEASED_S, ask
from .relay import cut_after, flip_at, relay

pytestmark = [pytest.mark.faults, pytest.mark.asyncio(loop_scope="session")]

LENGTH = 3000
RUNS = (Span(0, 40), Span(100, 1100), Span(1500, 2400), Span(2930, 3000))


def request(name, **sampling) -> Request:
    """Each test has a prompt of its own, so that no prefix cache shortens its stages."""
    from vllm import SamplingParams

    rng = random.Random(name)
    prompt = tuple(rng.randrange(10, 1000) for _ in range(LENGTH))
    params = SamplingParams(
        **{"temperature": 0.0, "max_tokens": 48, "ignore_eos": True, **sampling}
    )
    wire = msgspec.msgpack.encode(params)
    request_id = f"{name}-{rng.random()}"
    return Request(request_id, prompt, wire, controls=Controls(keep=0.5), timeout_s=60.0)


def selection() -> Selection:
    return Selection(LENGTH, RUNS, Plan(PlanKind.PRUNE, Reason.ASKED, 0.5))


# A replica was lost under the request.
LOST = ("prefilled elsewhere", "pulled by another decode", "replayed by another decode")
RECOMPUTED = ("prompt recomputed by decode", "replayed by another decode")


class Ask:
    """Asks with a fault, then the same without one, and compares."""

    def __init__(self, pools, table, name):
        self.pools, self.table, self.name = pools, table, name

    async def and_expect_the_same(self, recovered, **sampling):
        asked = request(self.name, **sampling)
        got, seconds, report = await ask(self.pools, asked, selection())
        held = await self.pools.bytes_held()
        await self.pools.restore()
        again = replace(asked, request_id=f"{asked.request_id}-undisturbed")
        wanted, _, undisturbed = await ask(self.pools, again, selection())
        self.table.add(self.name, recovered, seconds, got == wanted, held)
        assert got == wanted
        assert held == 0
        assert report.recomputed == (recovered in RECOMPUTED)
        assert (report.retries > 0) == (recovered in LOST)
        assert not undisturbed.recomputed


@pytest.fixture
def asking(whole, table, request) -> Ask:
    return Ask(whole, table, request.node.name.removeprefix("test_"))


def once(kind, action):
    """A hook that acts on the first `kind` (of Ticket, PrefillResult and DecodeStep) only."""
    done = False

    async def hook(*args):
        nonlocal done
        if done or not isinstance(args[-1], kind):
            return args[0]
        done = True
        return await action(*args)

    return hook


@pytest.fixture(params=list(Carrier))
def late(asking, request) -> Ask:
    """Decode begins to pull when prefill has answered: as without early tickets."""
    asking.pools.overlap = False
    asking.pools.carrier = request.param
    return asking


@pytest.fixture(params=["early", "late"])
def both(asking, request) -> Ask:
    """Decode begins to pull before prefill has answered, and after."""
    asking.pools.overlap = request.param == "early"
    return asking


async def test_no_fault(both):
    await both.and_expect_the_same("nothing to do")


async def test_prefill_dies_before_it_answers(asking):
    prefill = asking.pools.prefills[0]
    asyncio.get_running_loop().call_later(0.1, prefill.kill)
    first = prefill.process.pid
    await asking.and_expect_the_same("prefilled elsewhere")
    assert prefill.process.pid != first  # it was dead, and has been replaced


async def test_prefill_dies_before_the_transfer(late):

    async def kill(prefilled):
        late.pools.prefills[0].kill()
        await asyncio.to_thread(late.pools.prefills[0].process.wait, 5)
        return prefilled

    late.pools.on_prefill_step = once(PrefillResult, kill)
    await late.and_expect_the_same("prompt recomputed by decode")


async def test_prefill_dies_during_the_transfer(late):
    """Stopped first, so that the pull is under way and gets nothing; then killed."""
    prefill = late.pools.prefills[0]

    async def stop(prefilled):
        prefill.signal(signal.SIGSTOP)
        asyncio.get_running_loop().call_later(0.3, prefill.kill)
        return prefilled

    late.pools.on_prefill_step = once(PrefillResult, stop)
    await late.and_expect_the_same("prompt recomputed by decode")


async def test_prefill_dies_after_the_transfer(asking):

    async def kill(_member, _step):
        asking.pools.prefills[0].kill()

    asking.pools.on_step = once(DecodeStep, kill)
    await asking.and_expect_the_same("nothing to do")


async def test_decode_dies_queued(late):
    decode = late.pools.decodes[0]

    async def kill(prefilled):
        decode.kill()
        await asyncio.to_thread(decode.process.wait, 5)
        return prefilled

    late.pools.on_prefill_step = once(PrefillResult, kill)
    await late.and_expect_the_same("pulled by another decode")


async def test_decode_dies_mid_transfer(late):
    prefill, decode = late.pools.prefills[0], late.pools.decodes[0]

    async def stop(prefilled):
        prefill.signal(signal.SIGSTOP)  # the pull hangs
        loop = asyncio.get_running_loop()
        loop.call_later(0.3, decode.kill)
        loop.call_later(0.6, prefill.signal, signal.SIGCONT)
        return prefilled

    late.pools.on_prefill_step = once(PrefillResult, stop)
    await late.and_expect_the_same("pulled by another decode")


async def test_prefill_dies_while_decode_pulls_early(asking):
    """Decode waits for the KV's end, which will not come; prefill is started elsewhere."""
    prefill = asking.pools.prefills[0]

    async def stop(ticket):
        prefill.signal(signal.SIGSTOP)
        asyncio.get_running_loop().call_later(0.3, prefill.kill)
        return ticket

    asking.pools.on_prefill_step = once(Ticket, stop)
    await asking.and_expect_the_same("prefilled elsewhere")


async def test_decode_dies_while_it_pulls_early(asking):
    decode = asking.pools.decodes[0]

    async def kill(ticket):
        asyncio.get_running_loop().call_later(0.05, decode.kill)
        return ticket

    asking.pools.on_prefill_step = once(Ticket, kill)
    await asking.and_expect_the_same("pulled by another decode")


SAMPLINGS = {
    "greedy": {},
    "seeded": {"temperature": 0.9, "seed": 3},
    "grammar": {"regex": r"[ab]{20,40}!", "ignore_eos": False},
}


@pytest.mark.parametrize("fault", ["nothing", "between_turns", "in_the_next_turn"])
async def test_the_decode_engine_of_a_conversation_dies(asking, fault):
    """Its next turn would have been computed there."""
    pools, decode = asking.pools, asking.pools.decodes[0]
    limits = LocalLimits(prompt_tokens=0, turn_tokens=500)
    rule = LocalPrefillRule(limits, lambda: DEFAULT_CURVES, DecodeCaches(1000))
    asked = request(asking.name)
    tokens, _, report = await ask(pools, asked, selection(), local=rule)
    assert report.prefilled_by is PrefilledBy.PREFILL

    async def kill(*_):
        decode.kill()
        await asyncio.to_thread(decode.process.wait, 5)

    if fault == "between_turns":
        await kill()
    if fault == "in_the_next_turn":
        pools.on_step = once(DecodeStep, kill)
    prompt = (*asked.prompt, *tokens, *request("more").prompt[:200])
    turn = replace(asked, prompt=prompt, request_id=f"{asked.request_id}-next")
    kept, new = selection(), Span(RUNS[-1].start, len(prompt))
    plan = replace(kept.plan, reason=Reason.CARRIED_OVER)
    carried = Selection(len(prompt), (*RUNS[:-1], new), plan, carried_tokens=kept.kept_tokens)
    got, seconds, report = await ask(pools, turn, carried, local=rule)
    assert report.prefilled_by is PrefilledBy.DECODE
    if fault == "nothing":  # computed: what is new, and the last block before it
        assert report.kept_tokens - report.cached_tokens <= 200 + 1 + BLOCK_SIZE
    if fault == "between_turns":
        assert report.cached_tokens == 0
    await pools.restore()
    again = replace(turn, request_id=f"{turn.request_id}-undisturbed")
    wanted, _, undisturbed = await ask(pools, again, carried)
    assert undisturbed.prefilled_by is PrefilledBy.PREFILL
    recovered = "nothing to do" if fault == "nothing" else "turn computed by another decode"
    asking.table.add(asking.name, recovered, seconds, got == wanted, await pools.bytes_held())
    assert got == wanted


@pytest.mark.parametrize("sampling", SAMPLINGS)
async def test_decode_dies_mid_stream(asking, sampling):
    from vllm.sampling_params import StructuredOutputsParams

    options = dict(SAMPLINGS[sampling])
    if "regex" in options:
        options["structured_outputs"] = StructuredOutputsParams(regex=options.pop("regex"))
    steps = 0

    async def kill_at_the_fifth(member, _step):
        nonlocal steps
        steps += 1
        if steps == 5:
            member.kill()

    asking.pools.on_step = kill_at_the_fifth
    await asking.and_expect_the_same("replayed by another decode", **options)
    assert steps > 5


def through_a_relay(asking, hurt):
    """The first decode engine pulls through a relay that hurts the gRPC stream."""
    asking.pools.carrier = Carrier.GRPC

    @asynccontextmanager
    async def hooked():
        target = (await asking.pools.prefills[0].service._engine.kv_addresses())[0]
        async with relay(target, hurt) as one:

            async def detour(step):
                if isinstance(step, Ticket):
                    return replace(step, endpoints=(one.address,))
                return replace(step, ticket=replace(step.ticket, endpoints=(one.address,)))

            asking.pools.on_prefill_step = once(
                Ticket if asking.pools.overlap else PrefillResult, detour
            )
            yield one

    return hooked()


@pytest.mark.parametrize("place", [20_000, 400_001, 1_500_000])
async def test_a_byte_flips_on_the_way(both, place):
    async with through_a_relay(both, flip_at(place)) as one:
        await both.and_expect_the_same("prompt recomputed by decode")
        assert one.passed > place


@pytest.mark.parametrize("count", [100, 300_000])
async def test_the_stream_is_cut(both, count):
    async with through_a_relay(both, cut_after(count)) as one:
        await both.and_expect_the_same("prompt recomputed by decode")
        assert one.reached.is_set()


async def test_a_stale_peer_answers_at_the_same_address(late):
    """The prefill engine has died, and another process has taken its port."""
    stale = LeaseStore(max_bytes=1, lease_s=1.0, now=time.monotonic)

    async def replace_peer(prefilled):
        fingerprint = prefilled.ticket.fingerprint
        server = grpc.server(
            futures.ThreadPoolExecutor(1),
            handlers=[_Handler(KvServer(stale, Announcements(), fingerprint, "127.0.0.1"))],
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        late.servers = [server]
        return replace(
            prefilled, ticket=replace(prefilled.ticket, endpoints=(f"127.0.0.1:{port}",))
        )

    late.pools.on_prefill_step = once(PrefillResult, replace_peer)
    await late.and_expect_the_same("prompt recomputed by decode")
    late.servers[0].stop(0).wait()


async def test_the_lease_ends_before_a_slow_decode_pulls(late):
    """The gateway is cut off from the prefill worker, so it cannot renew the lease."""

    async def wait_out(prefilled):
        assert await late.pools.prefills[0].service.drain(10.0)  # until it expires
        return prefilled

    late.pools.cut_off = True
    late.pools.on_prefill_step = once(PrefillResult, wait_out)
    await late.and_expect_the_same("prompt recomputed by decode")


async def test_a_slow_decode_pulls_late(late):
    """The gateway renews the lease for as long as the request waits."""

    async def wait(prefilled):
        assert not await late.pools.prefills[0].service.drain(UNCLAIMED_S + 1.0)
        return prefilled

    late.pools.on_prefill_step = once(PrefillResult, wait)
    await late.and_expect_the_same("lease renewed")


async def test_nobody_pulls(whole, table):
    """The gateway itself dies: the ticket is neither pulled nor released."""
    service = whole.prefills[0].service
    await service.prefill(request("orphan"), selection(), 30.0)
    started_s = time.monotonic()
    assert await whole.bytes_held() > 0
    assert await service.drain(10.0)
    seconds = time.monotonic() - started_s
    held = await whole.bytes_held()
    table.add("nobody_pulls", "lease expired", seconds, None, held)
    assert held == 0
    assert UNCLAIMED_S - 0.5 < seconds < UNCLAIMED_S + 3.0


STAGES = {
    "prefilling": None,
    "pulling early": Ticket,
    "handing over": PrefillResult,
    "decoding": DecodeStep,
}


@pytest.mark.parametrize("stage", STAGES)
async def test_the_client_leaves(asking, stage):
    """Whatever it interrupts, its work ends, and the memory is free before its lease would end."""
    pools, reached = asking.pools, asyncio.Event()

    async def mark(first, *_rest):
        reached.set()
        return first

    if stage == "prefilling":
        asyncio.get_running_loop().call_later(0.1, reached.set)
    elif stage == "decoding":
        pools.on_step = mark
    else:
        pools.on_prefill_step = once(STAGES[stage], mark)
    asked = request(asking.name, max_tokens=ANSWER_TOKENS)
    running = asyncio.create_task(ask(pools, asked, selection()))
    await reached.wait()
    running.cancel()
    started_s = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await pools.released(RELEASED_S)
    seconds = time.monotonic() - started_s
    held = await pools.bytes_held()
    asking.table.add(asking.name, "released", seconds, None, held)
    assert held == 0
    assert seconds < RELEASED_S


async def test_the_speculator_is_full_and_the_prompt_is_shed(asking):
    started_s = time.monotonic()
    with pytest.raises(Overloaded) as refused:
        await ask(asking.pools, request(asking.name), selection(), OnOverload.SHED)
    seconds = time.monotonic() - started_s
    held = await asking.pools.bytes_held()
    asking.table.add(asking.name, "refused, to be tried again", seconds, None, held)
    assert (refused.value.reason, refused.value.retry_after_s) == ("speculator_overloaded", 2.0)
    assert held == 0


async def test_the_speculator_is_full_and_the_prompt_is_pruned_by_its_words(asking):
    """The answer is that of the same kept tokens, had a speculator chosen them."""
    asked = request(asking.name)
    got, seconds, report = await ask(asking.pools, asked, selection(), OnOverload.STATIC)
    held = await asking.pools.bytes_held()
    plan = Plan(PlanKind.PRUNE, Reason.ASKED, 0.5)
    chosen = static_selection(asked, plan, SHIPPED)
    again = replace(asked, request_id=f"{asked.request_id}-undisturbed")
    wanted, _, _ = await ask(asking.pools, again, chosen)
    asking.table.add(asking.name, "pruned without scores", seconds, got == wanted, held)
    assert got == wanted
    assert (report.reason, report.kept_tokens) == ("speculator_overloaded", chosen.kept_tokens)
    assert held == 0


async def test_the_kv_store_is_full(asking):
    """The prefill waits for room instead of computing what would be dropped."""
    room = asking.pools.prefills[0].service._room
    async with room.reserve(1 << 40):  # all that there is
        asked = asyncio.create_task(asking.and_expect_the_same("waited for room"))
        for _ in range(1000):
            if room.waiting > 0:
                break
            await asyncio.sleep(0.01)
        assert room.waiting == 1
        assert not asked.done()
    await asked


async def test_the_deadline_passes(asking):
    late = replace(request(asking.name), timeout_s=0.2)
    started_s = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await ask(asking.pools, late, selection())
    assert await asking.pools.prefills[0].service.drain(RELEASED_S)
    seconds = time.monotonic() - started_s
    held = await asking.pools.bytes_held()
    asking.table.add(asking.name, "refused in time", seconds, None, held)
    assert held == 0
    assert seconds < RELEASED_S
