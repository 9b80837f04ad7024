"""Use of a server's processes: counted by pool, and waited for."""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE

from loadtest.bench.server_processes import Process, processes, resident_by_pool, wait_idle

REPLICA = "ray::ServeReplica:specprefill:"
TABLE = [
    Process(1, 0, "server", 1, 0.0),
    Process(2, 1, "raylet", 10, 0.0),
    Process(3, 2, f"{REPLICA}Prefill.prefill", 100, 0.0),
    Process(4, 3, "VLLM::EngineCore", 1000, 0.0),
    Process(5, 2, "ray::SERVE_REPLICA::x#Decode#1:ServeReplica:x:Decode.__init__", 7, 0.0),
    Process(6, 0, f"{REPLICA}Decode", 5, 0.0),
]


def test_an_engine_counts_with_the_replica_that_started_it():
    assert resident_by_pool(TABLE, 1, "Ray") == {"Ray": 11, "Prefill": 1100, "Decode": 7}


def test_this_process_is_in_the_table():
    (this,) = [each for each in processes() if each.pid == os.getpid()]
    assert this.parent == os.getppid()
    assert this.resident_bytes > 1 << 20
    assert this.cpu_s > 0


SPINS = """
import sys, time
print("spinning", flush=True)
stop = time.process_time() + 0.5
while time.process_time() < stop:
    pass
print("done", flush=True)
sys.stdin.read()
"""


async def test_a_spinning_process_is_waited_for():
    command = [sys.executable, "-c", SPINS]
    program = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    try:
        assert await program.stdout.readline() == b"spinning\n"
        async with asyncio.timeout(60):
            await wait_idle([program.pid])
            assert await program.stdout.readline() == b"done\n"
        (spun,) = [each for each in processes() if each.pid == program.pid]
        assert spun.cpu_s > 0.4
    finally:
        await program.communicate(b"")
