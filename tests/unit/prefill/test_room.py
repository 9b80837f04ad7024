"""Room for KV: nothing starts that would not fit, and nothing waits for nothing."""

from __future__ import annotations

import asyncio
import random

import pytest

from specprefill.prefill.room import FRAME_BYTES, SETTLE_S, Room
from tests.unit.control.virtual_time import run_in_virtual_time

MAX_BYTES = 10 << 20
MEBI = 1 << 20


class Worker:
    """A worker's store: what was computed stays until it is pulled."""

    def __init__(self, max_bytes=MAX_BYTES):
        loop = asyncio.get_running_loop()
        self.bytes_held = self.most_held = self.asked = 0
        self.answers = True
        self.room = Room(max_bytes, self.held, loop.time)

    async def held(self):
        self.asked += 1
        await asyncio.sleep(0.001)
        return self.bytes_held if self.answers else None

    async def prefill(self, size, *, compute_s=1.0, hold_s=0.0):
        """One request: room, prefill, hand-over; returns how long it waited for room."""
        async with self.room.reserve(size) as waited_s:
            for _ in range(4):
                await asyncio.sleep(compute_s / 4)
                self.bytes_held += size // 4
                self.most_held = max(self.most_held, self.bytes_held)
        await asyncio.sleep(hold_s)
        self.bytes_held -= size // 4 * 4
        return waited_s


def test_what_fits_starts_at_once_and_asks_nobody():
    async def main():
        worker = Worker()
        waited = await asyncio.gather(*(worker.prefill(2 * MEBI) for _ in range(4)))
        return waited, worker.asked

    assert run_in_virtual_time(main()) == ([0.0] * 4, 0)


def test_what_does_not_fit_waits_until_kv_was_pulled():
    async def main():
        worker = Worker()
        return await asyncio.gather(*(worker.prefill(6 * MEBI, hold_s=3.0) for _ in range(2)))

    first, second = run_in_virtual_time(main())
    assert first == 0.0
    assert second == pytest.approx(4.0, abs=0.2)  # 1 s computed, 3 s held


@pytest.mark.parametrize("seed", range(5))
def test_the_cap_holds_under_pressure_and_everybody_is_served(seed):
    rng = random.Random(seed)
    jobs = [
        (rng.randrange(MEBI // 8, 7 * MEBI), rng.uniform(0.05, 1.0), rng.uniform(0.0, 2.0))
        for _ in range(150)
    ]

    async def main():
        worker = Worker()
        await asyncio.gather(
            *(worker.prefill(size, compute_s=compute, hold_s=hold) for size, compute, hold in jobs)
        )
        return worker.most_held, worker.room.waiting

    most_held, waiting = run_in_virtual_time(main())
    assert 0.5 * MAX_BYTES < most_held <= MAX_BYTES
    assert waiting == 0


def test_first_come_first_served():
    async def main():
        worker, order = Worker(), []

        async def one(name, size):
            await worker.prefill(size, hold_s=1.0)
            order.append(name)

        tasks = [one("first", 9 * MEBI), one("large", 8 * MEBI), one("small", 2 * MEBI)]
        await asyncio.gather(*tasks)
        return order

    assert run_in_virtual_time(main()) == ["first", "large", "small"]


def test_kv_beyond_the_cap_waits_for_all_of_it_and_goes_on():
    async def main():
        worker = Worker()
        small = asyncio.create_task(worker.prefill(MEBI, hold_s=1.0))
        await asyncio.sleep(0)
        async with worker.room.reserve(50 * MEBI) as waited_s:
            pass
        await small
        return waited_s

    assert run_in_virtual_time(main()) == pytest.approx(2.0, abs=0.2)


def test_giving_up_the_wait_leaves_no_reservation():
    async def main():
        worker = Worker()
        holder = asyncio.create_task(worker.prefill(9 * MEBI, hold_s=5.0))
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await worker.prefill(5 * MEBI)
        await holder
        waited_s = await worker.prefill(9 * MEBI)
        return worker.room.waiting, waited_s

    waiting, waited_s = run_in_virtual_time(main())
    assert waiting == 0
    assert waited_s < 2 * SETTLE_S


def test_a_prefill_that_failed_frees_its_room_when_its_frames_are_gone():
    async def main():
        worker = Worker()
        with pytest.raises(RuntimeError):
            async with worker.room.reserve(9 * MEBI):
                raise RuntimeError
        return await worker.prefill(9 * MEBI)

    assert SETTLE_S <= run_in_virtual_time(main()) < 2 * SETTLE_S


def test_a_worker_that_does_not_answer_is_not_taken_for_an_empty_one():
    async def main():
        worker = Worker()
        await worker.prefill(9 * MEBI)
        worker.answers = False
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5.0):
                await worker.prefill(9 * MEBI)

    run_in_virtual_time(main())


def test_a_prompt_whose_kv_nobody_takes_waits_for_nothing():
    async def main():
        worker = Worker()
        holder = asyncio.create_task(worker.prefill(9 * MEBI, hold_s=5.0))
        await asyncio.sleep(0)
        async with worker.room.reserve(0) as waited_s:
            pass
        await holder
        return waited_s

    assert run_in_virtual_time(main()) == 0.0


def test_headers_of_frames_count():
    async def main():
        worker = Worker()
        async with worker.room.reserve(MEBI):
            return worker.room.bytes_reserved

    assert run_in_virtual_time(main()) >= MEBI + FRAME_BYTES
