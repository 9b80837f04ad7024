"""Engines whose workers are on several Ray nodes: the real replicas in their placement groups.

Every simulated node has its own raylet and object store on this machine, and GPUs in name
only, since vLLM's Ray executor finds its workers' places by that resource.
"""

import asyncio
import os
import time

import pytest
import pytest_asyncio

from specprefill.app import engine_placement
from specprefill.config import AppConfig
from specprefill.core.types import Span
from specprefill.deployment.local_ray import free_port, set_auth_mode
from specprefill.gateway.pools.handles import ServeDecoder, ServePrefiller
from specprefill.kv.rpc import KvPeers

from .conftest import BLOCK_SIZE, answer, kept

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(900),
]

NODES = 2
RANKS = {
    "tensor_parallel_size": NODES,
    "executor": "ray",
    "block_size": BLOCK_SIZE,
    "kv_cache_memory_bytes": 64 << 20,
    "enforce_eager": True,
}
PROMPT = [(11 * place) % 900 + 10 for place in range(700)]


@pytest.fixture(scope="module")
def nodes():
    """A Ray of two nodes, each with room for one worker of each engine."""
    set_auth_mode()
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 4, "num_gpus": 2, "object_store_memory": 80 << 20}
    # Another Ray may have the usual port: even without a dashboard, it is tried.
    head = {**size, "include_dashboard": False, "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(NODES - 1):
            cluster.add_node(**size)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        serve.start(proxy_location="Disabled")
        yield ray
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def pools(nodes, model_dir):
    """Handles of a prefill and a decode replica, placed as the application places them."""
    from ray import serve

    from specprefill.decode.replica import DecodeReplica
    from specprefill.prefill.replica import PrefillReplica

    config = AppConfig.model_validate(
        {
            "model": {"path": model_dir, "dtype": "float32", "max_model_len": 2048},
            "speculator": {"path": model_dir},
            "prefill": RANKS,
            "decode": RANKS,
            "kv": {"carrier": "grpc", "max_held_bytes": 64 << 20},
        }
    )
    place = engine_placement(config.prefill, gpus=False).options()
    place["placement_group_strategy"] = "STRICT_SPREAD"  # a node per worker
    place["graceful_shutdown_timeout_s"] = 60.0
    place["graceful_shutdown_wait_loop_s"] = 0.1
    targets = [
        serve.RunTarget(
            serve.deployment(replica, **place).bind(config.for_engines().model_dump_json()),
            name=replica.__name__,
            route_prefix=None,
        )
        for replica in (PrefillReplica, DecodeReplica)
    ]
    return serve.run_many(targets)


@pytest_asyncio.fixture(loop_scope="session")
async def ports(pools):
    """The pipeline's ports over the two replicas."""
    peers, carried = KvPeers(), {}
    yield ServePrefiller(pools[0], peers, carried), ServeDecoder(pools[1], carried)
    await peers.close()


async def test_workers_on_two_nodes_answer_as_one_engine_does(ports, engines):
    prefiller, decoder = ports
    pruned = kept(700, Span(0, 40), Span(100, 400), Span(630, 700))
    for selection in (kept(700, Span(0, 700)), pruned):
        request = engines.request(PROMPT, ignore_eos=True)
        want = await engines.aggregated(request, selection)
        async with prefiller.prefill(request, selection, 60.0) as prefill:
            prefilled = await prefill.result()
            assert len(prefilled.ticket.endpoints) == NODES
            first = (prefilled.first.token_ids,)
            stream = decoder.decode(request, selection, prefilled.ticket, first, 60.0)
            steps = [step async for step in stream]
        assert answer(steps) == list(want.token_ids)
        assert not steps[-1].recomputed


async def test_each_engine_has_a_worker_on_each_node(nodes, pools, engines):
    """`engines` only keeps this test between the others: pytest groups tests by what they share."""
    del engines
    groups = nodes.util.placement_group_table().values()
    spread = [len(set(group["bundles_to_node_id"].values())) for group in groups]
    assert spread == [NODES, NODES]
    assert nodes.available_resources().get("GPU", 0) == 0  # the workers hold them all


async def test_a_replica_that_goes_waits_until_its_tickets_are_pulled(ports, engines):
    """Last: the prefill replica is gone then."""
    from ray import serve

    prefiller, decoder = ports
    selection = kept(700, Span(0, 700))
    request = engines.request(PROMPT, ignore_eos=True)
    async with prefiller.prefill(request, selection, 60.0) as prefill:
        prefilled = await prefill.result()
        serve.delete("PrefillReplica", _blocking=False)
        assert not await asyncio.to_thread(gone_within, 3.0, "PrefillReplica")
        first = (prefilled.first.token_ids,)
        stream = decoder.decode(request, selection, prefilled.ticket, first, 60.0)
        steps = [step async for step in stream]
    assert not steps[-1].recomputed
    assert await asyncio.to_thread(gone_within, 120.0, "PrefillReplica")


def gone_within(timeout_s, name):
    """Return True if Serve is done with an application in time."""
    from ray import serve

    give_up_s = time.monotonic() + timeout_s
    while name in serve.status().applications:
        if time.monotonic() > give_up_s:
            return False
        time.sleep(0.2)
    return True
