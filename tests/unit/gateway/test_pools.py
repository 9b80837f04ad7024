"""Serve handles as ports: what Ray raises comes out as ours, and nothing is left running."""

from __future__ import annotations

import asyncio
import pickle  # noqa: TID251 - Ray pickles what replicas raise
import threading
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError

from specprefill.core import wire
from specprefill.core.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PrefillUnavailable,
    ScoringTimeout,
    SpecPrefillError,
    SpeculatorLost,
    SpeculatorUnavailable,
    Unavailable,
)
from specprefill.core.types import (
    Chunk,
    DecodeStep,
    Lease,
    Plan,
    PlanKind,
    PrefillResult,
    Reason,
    Replay,
    Request,
    Ticket,
    dense_selection,
)
from specprefill.gateway.openai.failures import RpcFailed, rpc_failure
from specprefill.gateway.pools import replica_counts
from specprefill.gateway.pools.handles import (
    Carried,
    ServeDecoder,
    ServePrefiller,
    ServeSpeculator,
    map_errors,
)
from specprefill.gateway.pools.replica_counts import ServeHealth

REQUEST = Request("r", (1, 2, 3), b"")
PLAN = Plan(PlanKind.PRUNE, Reason.ASKED, 0.5)
SELECTION = dense_selection(3, Reason.ASKED_OFF)
TICKET = Ticket(Lease("lease", "secret"), ("peer:1",), "layout", 3)
REPLAY: Replay = ((1,),)
OBJECTS = ["a reference"]
PREFILLED = PrefillResult(Chunk(0, (1,), "a"), TICKET, 0.0, 0.0)


class Response:
    """One call, or one stream of items; an exception among the items is raised."""

    def __init__(self, items: list[Any], pause_s: float) -> None:
        self._items = list(items)
        self._pause_s = pause_s
        self.cancelled = False

    def __await__(self) -> Any:
        return self.__anext__().__await__()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        await asyncio.sleep(self._pause_s)
        if not self._items:
            raise StopAsyncIteration
        item = self._items.pop(0)
        if isinstance(item, BaseException):
            raise item
        if isinstance(item, PrefillResult):
            return wire.pack((None, item)), OBJECTS
        return (wire.pack((item, None)), []) if isinstance(item, Ticket) else wire.pack(item)

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    def __init__(self, *items: Any, pause_s: float = 0.0) -> None:
        self.response = Response(list(items), pause_s)
        self.options_seen: dict[str, Any] = {}
        self.payload = b""

    def options(self, **options: Any) -> Handle:
        self.options_seen = options
        return self

    def remote(
        self, payload: bytes = b"", load: bytes = b"", objects: Sequence[Any] = ()
    ) -> Response:
        self.payload, self.load, self.objects = payload, load, objects
        return self.response


class Leases:
    """The workers that hold KV: notes what is released."""

    def __init__(self) -> None:
        self.released: list[Ticket] = []

    async def renew(self, ticket: Ticket) -> bool:
        return True

    async def release(self, ticket: Ticket) -> None:
        self.released.append(ticket)


def remote_error(cause: Exception) -> RayTaskError:
    return RayTaskError("prefill", "remote traceback", cause, "p", 1, "ip").as_instanceof_cause()


def actor_lost() -> Exception:
    return ActorUnavailableError("gone", None)


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (remote_error(InvalidRequest("no", "n")), InvalidRequest, "no"),
        (InvalidRequest("no", "n"), InvalidRequest, "no"),
        (remote_error(Overloaded("full", 3.0)), Overloaded, "full"),
        (remote_error(BackPressureError(1, 1)), Overloaded, "prefill"),
        (remote_error(remote_error(DeadlineExceeded("late"))), DeadlineExceeded, "late"),
        (remote_error(TimeoutError()), SpecPrefillError, "failed"),
        (remote_error(ValueError("secret")), SpecPrefillError, "failed"),
        (ValueError("secret"), SpecPrefillError, "failed"),
        (BackPressureError(1, 1, 429, 5.0), Overloaded, "prefill"),
        (actor_lost(), PrefillUnavailable, "no prefill replica"),
        (TimeoutError(), DeadlineExceeded, "prefill"),
    ],
)
def test_rays_errors_become_ours(
    raised: Exception, kind: type[SpecPrefillError], message: str
) -> None:
    with pytest.raises(SpecPrefillError) as seen, map_errors("prefill", PrefillUnavailable):
        raise raised
    assert type(seen.value) is kind
    assert message in str(seen.value)
    assert "secret" not in str(seen.value)


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("no", "n"),
        Overloaded("full", 3.0),
        Unavailable("gone"),
        ScoringTimeout("slow", 1.0, 2.0),
    ],
)
def test_our_errors_survive_rays_pickling(error: SpecPrefillError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.args, again.__dict__) == (type(error), error.args, error.__dict__)


def test_a_failed_rpc_survives_rays_pickling() -> None:
    again = pickle.loads(pickle.dumps(rpc_failure(Unavailable("gone"))))
    assert isinstance(again, RpcFailed)
    assert (str(again), again.code.name) == ("gone", "UNAVAILABLE")


async def test_select_sends_its_arguments_and_returns_the_selection() -> None:
    handle = Handle(SELECTION)
    assert await ServeSpeculator(handle).select(REQUEST, PLAN, 2.0) == SELECTION
    assert wire.unpack(handle.payload, tuple[Request, Plan, float]) == (REQUEST, PLAN, 2.0)
    assert handle.options_seen == {"method_name": "select"}
    assert handle.response.cancelled is False


async def test_a_call_past_its_deadline_is_cancelled() -> None:
    handle = Handle(SELECTION, pause_s=5.0)
    with pytest.raises(DeadlineExceeded):
        await ServeSpeculator(handle).select(REQUEST, PLAN, 0.01)
    assert handle.response.cancelled is True


UNKNOWN = None  # the controller has not answered yet


@pytest.mark.parametrize(
    ("replicas", "kind"),
    [(0, SpeculatorUnavailable), (1, DeadlineExceeded), (UNKNOWN, DeadlineExceeded)],
)
async def test_waiting_for_a_pool_without_replicas_is_not_slowness(
    replicas: int | None, kind: type[SpecPrefillError]
) -> None:
    async def count() -> dict[str, int] | None:
        return None if replicas is UNKNOWN else {"speculator": replicas}

    handle = Handle(SELECTION, pause_s=5.0)
    with pytest.raises(kind):
        await ServeSpeculator(handle, count).select(REQUEST, PLAN, 0.01)
    assert handle.response.cancelled is True


async def nobody(pool: str) -> bool:
    return pool == "speculator"


class UnusedPool(Handle):
    """A pool without replicas: calls wait, or are refused where too many do."""

    def __init__(self, *items: Any, pause_s: float) -> None:
        super().__init__(*items, pause_s=pause_s)
        self.methods: list[str] = []

    def options(self, **options: Any) -> Handle:
        self.methods.append(options["method_name"])
        return self


async def test_a_pool_known_to_be_empty_gets_one_call_that_wakes_it_and_no_prompt() -> None:
    handle = UnusedPool(0.5, pause_s=0.05)
    pool = ServeSpeculator(handle, is_empty=nobody)
    async with asyncio.timeout(5):
        for _ in range(3):
            with pytest.raises(SpeculatorUnavailable, match="no speculator replica runs"):
                await pool.select(REQUEST, PLAN, 60.0)
            await asyncio.sleep(0)
        assert handle.methods == ["self_test"]
        while pool._waking:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("lost", "kind"), [(True, SpeculatorUnavailable), (False, Overloaded)])
async def test_a_full_queue_in_front_of_an_empty_pool_is_not_overload(
    lost: bool, kind: type[SpecPrefillError]
) -> None:
    asked = []

    async def is_empty(pool: str) -> bool:
        asked.append(pool)
        return lost and len(asked) > 1  # the replica dies while the call is on its way

    handle = Handle(BackPressureError(1, 1))
    with pytest.raises(kind):
        await ServeSpeculator(handle, is_empty=is_empty).select(REQUEST, PLAN, 1.0)
    assert asked == ["speculator"] * 2


async def test_the_replicas_own_word_on_a_time_out_is_waited_for() -> None:
    handle = Handle(ScoringTimeout("slow", 0.25, 0.75), pause_s=0.1)
    with pytest.raises(ScoringTimeout) as caught:
        await ServeSpeculator(handle).select(REQUEST, PLAN, 0.05)
    assert (caught.value.queue_s, caught.value.speculate_s) == (0.25, 0.75)


async def test_a_cancelled_caller_cancels_the_call() -> None:
    handle = Handle(SELECTION, pause_s=5.0)
    task = asyncio.create_task(ServeSpeculator(handle).select(REQUEST, PLAN, 9.0))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert handle.response.cancelled is True


@pytest.mark.parametrize("failure", [actor_lost(), ValueError(), remote_error(ValueError())])
async def test_a_lost_or_broken_speculator_is_unavailable(failure: Exception) -> None:
    with pytest.raises(SpeculatorUnavailable):
        await ServeSpeculator(Handle(failure)).select(REQUEST, PLAN, 1.0)


@pytest.mark.parametrize(
    ("replicas", "others"), [(0, False), (1, False), (2, True), (UNKNOWN, True)]
)
async def test_a_lost_speculator_may_have_others(replicas: int | None, others: bool) -> None:
    async def count() -> dict[str, int] | None:
        return None if replicas is UNKNOWN else {"speculator": replicas}

    with pytest.raises(SpeculatorUnavailable) as caught:
        await ServeSpeculator(Handle(actor_lost()), count).select(REQUEST, PLAN, 1.0)
    assert isinstance(caught.value, SpeculatorLost) is others


@pytest.mark.parametrize("failure", [None, ValueError("inside"), asyncio.CancelledError()])
async def test_the_lease_is_released_once_whatever_happens(failure: BaseException | None) -> None:
    leases = Leases()

    async def use() -> None:
        async with ServePrefiller(Handle(PREFILLED), leases, {}).prefill(
            REQUEST, SELECTION, 1.0
        ) as prefilling:
            assert await prefilling.ticket() is None
            assert await prefilling.result() == PREFILLED
            assert leases.released == []
            if failure is not None:
                raise failure

    outcome = (await asyncio.gather(use(), return_exceptions=True))[0]
    assert type(outcome) is type(failure)
    assert leases.released == [TICKET]


async def test_an_early_ticket_is_held_from_its_first_word_on() -> None:
    leases = Leases()
    handle = Handle(TICKET, PREFILLED)
    async with ServePrefiller(handle, leases, {}).prefill(REQUEST, SELECTION, 1.0) as prefilling:
        assert await prefilling.ticket() == TICKET
    assert leases.released == [TICKET]
    assert handle.response.cancelled is True


async def test_an_early_ticket_and_the_results_are_one_lease() -> None:
    leases = Leases()
    handle = Handle(TICKET, PREFILLED)
    async with ServePrefiller(handle, leases, {}).prefill(REQUEST, SELECTION, 1.0) as prefilling:
        assert await prefilling.ticket() == TICKET
        assert await prefilling.result() == PREFILLED
        prefilling.kv_arrived()
    assert leases.released == [TICKET]


async def test_decode_streams_and_always_cancels() -> None:
    steps = [DecodeStep(Chunk(0, (token,), "x")) for token in (1, 2)]
    handle = Handle(*steps)
    seen = [
        s async for s in ServeDecoder(handle, {}).decode(REQUEST, SELECTION, TICKET, ((1,),), 5.0)
    ]
    assert seen == steps
    assert handle.options_seen == {"method_name": "decode", "stream": True}
    assert handle.response.cancelled is True


async def test_closing_a_decode_stream_cancels_it() -> None:
    handle = Handle(*[DecodeStep(Chunk(0, (1,), "x"))] * 3)
    stream = ServeDecoder(handle, {}).decode(REQUEST, SELECTION, TICKET, ((1,),), 5.0)
    await anext(stream)
    assert handle.response.cancelled is False
    await stream.aclose()  # type: ignore[attr-defined]
    assert handle.response.cancelled is True


async def test_a_decode_stream_ends_at_its_deadline() -> None:
    handle = Handle(DecodeStep(Chunk(0, (1,), "x")), pause_s=5.0)
    with pytest.raises(DeadlineExceeded):
        await anext(ServeDecoder(handle, {}).decode(REQUEST, SELECTION, TICKET, ((1,),), 0.01))
    assert handle.response.cancelled is True


async def test_health_counts_running_replicas_and_asks_seldom() -> None:
    clock, asked = [100.0], []

    def status() -> Any:
        asked.append(clock[0])
        prefill = SimpleNamespace(replica_states={"RUNNING": 2, "STARTING": 1})
        deployments = {"Prefill": prefill, "Decode": SimpleNamespace(replica_states={})}
        return SimpleNamespace(applications={"app": SimpleNamespace(deployments=deployments)})

    pools = {"prefill": "Prefill", "decode": "Decode", "speculator": "Speculator"}
    health = ServeHealth("app", pools, status, lambda: clock[0])
    assert await health.count() == {"prefill": 2, "decode": 0, "speculator": 0}
    clock[0] += 0.5
    await health.count()
    assert asked == [100.0]
    clock[0] += 0.6
    await health.count()
    assert asked == [100.0, 101.1]


async def test_health_answers_at_once_while_the_controller_is_slow() -> None:
    clock, answers = [0.0], threading.Event()

    def status() -> Any:
        if clock[0] > 0:
            answers.wait(10)
        running = SimpleNamespace(replica_states={"RUNNING": 1})
        application = SimpleNamespace(deployments={"Decode": running})
        return SimpleNamespace(applications={"app": application})

    health = ServeHealth("app", {"decode": "Decode"}, status, lambda: clock[0], patience_s=0.01)
    assert await health.count() == {"decode": 1}
    clock[0] = 5.0
    for _ in range(3):
        async with asyncio.timeout(1):
            assert await health.count() == {"decode": 1}
    answers.set()


async def test_the_newest_counts_are_not_remembered_ones() -> None:
    running = [1]

    def status() -> Any:
        deployment = SimpleNamespace(replica_states={"RUNNING": running[0]})
        application = SimpleNamespace(deployments={"Speculator": deployment})
        return SimpleNamespace(applications={"app": application})

    health = ServeHealth("app", {"speculator": "Speculator"}, status, lambda: 0.0)
    assert await health.count() == {"speculator": 1}
    running[0] = 0
    assert await health.count() == {"speculator": 1}
    assert await health.count_afresh() == {"speculator": 0}


async def test_a_pool_is_empty_only_by_a_count_of_the_last_second() -> None:
    clock, running = [0.0], [0]

    def status() -> Any:
        deployment = SimpleNamespace(replica_states={"RUNNING": running[0]})
        application = SimpleNamespace(deployments={"Speculator": deployment})
        return SimpleNamespace(applications={"app": application})

    health = ServeHealth("app", {"speculator": "Speculator"}, status, lambda: clock[0])
    assert await health.is_empty("speculator") is False  # nobody has counted yet
    assert await health.count() == {"speculator": 0}
    assert await health.is_empty("speculator") is True
    running[0] = 1
    assert await health.is_empty("speculator") is True
    clock[0] += 1.0
    assert await health.is_empty("speculator") is False


async def test_replicas_count_while_serve_builds_their_application_anew() -> None:
    clock = [0.0]
    deployment = SimpleNamespace(replica_states={"RUNNING": 2})
    deployments = {"Speculator": deployment}

    def status() -> Any:
        if clock[0] == 2.0:  # a controller that has come back, and has not read its state yet
            return SimpleNamespace(applications={})
        application = SimpleNamespace(deployments=deployments)
        return SimpleNamespace(applications={"app": application})

    health = ServeHealth("app", {"speculator": "Speculator"}, status, lambda: clock[0])
    assert await health.count() == {"speculator": 2}
    deployments = {}
    for clock[0] in (1.0, 2.0, 3.0):
        assert await health.count() == {"speculator": 2}
        assert await health.count_afresh() == {"speculator": 2}
        assert await health.is_empty("speculator") is False

    started_now = ServeHealth("app", {"speculator": "Speculator"}, status, lambda: clock[0])
    assert await started_now.count() == {"speculator": 1}
    assert await started_now.count_afresh() is None
    deployments = {"Speculator": deployment}
    clock[0] += 1.0
    assert await started_now.count() == {"speculator": 2}


@pytest.mark.parametrize("state", ["PENDING_MIGRATION", "RECOVERING"])
async def test_replicas_that_still_get_calls_count(state: str) -> None:
    deployment = SimpleNamespace(replica_states={state: 1, "STARTING": 1, "STOPPING": 1})
    application = SimpleNamespace(deployments={"Speculator": deployment})
    status = SimpleNamespace(applications={"app": application})
    health = ServeHealth("app", {"speculator": "Speculator"}, lambda: status)
    assert await health.count() == {"speculator": 1}


async def test_no_request_waits_for_a_controller_that_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replica_counts, "AFRESH_S", 0.1)
    back, away = threading.Event(), False

    def status() -> Any:
        if away:
            back.wait(30)
        deployment = SimpleNamespace(replica_states={"RUNNING": 2})
        application = SimpleNamespace(deployments={"Speculator": deployment})
        return SimpleNamespace(applications={"app": application})

    health = ServeHealth("app", {"speculator": "Speculator"}, status)
    assert await health.count() == {"speculator": 2}
    away = True
    try:
        async with asyncio.timeout(5):
            for _ in range(2):  # the second one finds the first one's question under way
                assert await health.count_afresh() == {"speculator": 2}
    finally:
        back.set()


async def test_replicas_that_nobody_has_counted_yet_are_not_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replica_counts, "AFRESH_S", 0.1)
    answers = threading.Event()

    def status() -> Any:
        answers.wait(30)
        deployment = SimpleNamespace(replica_states={"RUNNING": 2})
        application = SimpleNamespace(deployments={"Speculator": deployment})
        return SimpleNamespace(applications={"app": application})

    health = ServeHealth("app", {"speculator": "Speculator"}, status)
    try:
        assert await health.count_afresh() is None
    finally:
        answers.set()
    assert await health.count_afresh() == {"speculator": 2}


async def test_kv_that_ray_carries_goes_along_and_is_dropped_at_the_end() -> None:
    carried: Carried = {}
    handle = Handle(DecodeStep(Chunk(0, (1,), "x", finish_reason="stop")))
    prefiller = ServePrefiller(Handle(PREFILLED), Leases(), carried)
    async with prefiller.prefill(REQUEST, SELECTION, 1.0) as prefilling:
        await prefilling.result()
        steps = ServeDecoder(handle, carried).decode(REQUEST, SELECTION, TICKET, REPLAY, 5.0)
        assert len([step async for step in steps]) == 1
        assert handle.objects == OBJECTS
    assert carried == {}
