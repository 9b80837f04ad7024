"""Pools that change and fail under their requests."""

import itertools
import os
import signal
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from ray.util.state import list_objects

from .conftest import POOLS, pruned
from .load import Load

pytestmark = pytest.mark.timeout(600)

KV_BYTES = 1 << 15
MAX_QUEUED, STORM = 24, 64  # prompts that may wait for the speculator, and clients that ask at once
# Several samples: the prefill pool computes their prompt, whether a decode engine has it or not.
HANDED_OVER = {"n": 2, "temperature": 0.9, "seed": 3}
WATCHED_S = 240.0  # less than a gateway may take for its last requests
PAUSE_S = 0.5  # of each client: the new replicas start on the same two cores


def scaled(app, chat, count):
    """Every pool gets `count` replicas, and a few requests after that, under load."""

    def change(raw):
        for deployment in raw["applications"][0]["deployments"]:
            if deployment["name"] in POOLS:
                deployment["num_replicas"] = count

    with Load(chat, pause_s=PAUSE_S) as load:
        app.redeploy(change)
        snapshot = app.wait_healthy()
        assert {p.name: p.running for p in snapshot.pools if p.name in POOLS} == dict.fromkeys(
            POOLS, count
        )
        load.wait_for(6)
    assert load.failures == []
    assert len({answer.choices[0].message.content for answer in load.answers}) == 1
    # A prefill replica that goes waits until its tickets are pulled.
    assert not any(answer.specprefill["recomputed"] for answer in load.answers)


def test_pools_grow_without_dropping_a_request(app, chat):
    scaled(app, chat, 2)


def test_prompts_go_where_their_prefix_is_cached(app, client, long_prompt):
    """There are two prefill replicas since the test before."""
    assert len(app.replica_pids("Prefill")) == 2
    system = f"{uuid.uuid4().hex} {long_prompt.messages[-1]['content']}"  # 1,500 tokens

    def cached_tokens(question):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        answer = client.chat.completions.create(
            model="demo", messages=messages, max_tokens=1, extra_body={"specprefill": False}
        )
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached_tokens("Who asks first?") == 0
    hits = [cached_tokens(f"Who asks as number {number}?") for number in range(8)]
    assert min(hits) > 1400  # all of them came to one of the two replicas

    # While long prompts are computed there, the other one is faster. A gateway knows what it has
    # sent itself: several connections reach both.
    spilled = False
    with ThreadPoolExecutor(4) as others:
        busy = [
            others.submit(cached_tokens, " ".join(uuid.uuid4().hex for _ in range(150)))
            for _ in range(4)
        ]
        while not all(one.done() for one in busy) and not spilled:
            spilled = cached_tokens(f"Who cannot wait for {uuid.uuid4().hex}?") == 0
        spilled = spilled or any(one.result() == 0 for one in busy)
    assert spilled


@pytest.mark.parametrize("pool", ["Prefill", "Decode"])
def test_a_replica_whose_engine_dies_draws_no_requests(app, chat, pool):
    """There are two replicas of the pool since the first test; one of them is left."""
    replica = psutil.Process(app.replica_pids(pool)[0])
    (engine,) = [
        each
        for each in replica.children(recursive=True)
        if "EngineCore" in " ".join(each.cmdline())
    ]
    with Load(partial(chat, **HANDED_OVER), pause_s=0) as load:
        load.wait_for(2)
        engine.kill()
        load.wait_for(12)
    assert load.failures == []
    assert len({answer.choices[0].message.content for answer in load.answers}) == 1
    replica.wait(10)  # its process has ended, too: Serve replaces it


def test_pools_shrink_without_dropping_a_request(app, chat):
    scaled(app, chat, 1)


def test_without_a_speculator_prompts_go_dense_and_say_why(app, chat):
    (pid,) = app.replica_pids("Speculator")
    os.kill(pid, signal.SIGKILL)
    report = chat().specprefill
    assert report["plan"] == "dense"
    assert report["reason"] in {"speculator_unavailable", "speculator_timeout"}
    app.wait_healthy()
    give_up_s = time.monotonic() + 60
    while chat().specprefill["plan"] != "prune" and time.monotonic() < give_up_s:
        time.sleep(1)
    assert chat().specprefill["reason"] == "asked"


def test_a_stream_outlives_the_decode_replica_that_began_it(app, chat):
    options = {"max_tokens": 300, "extra_body": pruned(ignore_eos=True), **HANDED_OVER}
    wanted = [choice.message.content for choice in chat(**options).choices]
    (pid,) = app.replica_pids("Decode")
    texts = ["", ""]
    for number, event in enumerate(chat(stream=True, **options)):
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
        if number == 20:
            os.kill(pid, signal.SIGKILL)
    assert texts == wanted
    app.wait_healthy()


def test_a_prompt_outlives_the_prefill_replica_it_was_sent_to(app, chat):
    wanted = chat(**HANDED_OVER).choices[0].message.content
    (pid,) = app.replica_pids("Prefill")
    os.kill(pid, signal.SIGKILL)
    assert chat(**HANDED_OVER).choices[0].message.content == wanted
    app.wait_healthy()


def test_a_rolling_update_loses_no_request(app, chat):
    """Every replica of every pool is replaced, the gateway's too; Ray carries the KV then."""
    sampling = {"n": 2, "temperature": 0.9, "seed": 3}
    wanted = [choice.message.content for choice in chat(**sampling).choices]

    def change(raw):
        (application,) = raw["applications"]
        # Another one each time: the same file again would replace nothing.
        application["runtime_env"]["env_vars"]["SPECPREFILL_TEST_RELEASE"] = uuid.uuid4().hex
        application["args"]["kv"]["carrier"] = "object_ref"
        application["args"]["speculator"]["max_queued"] = MAX_QUEUED  # for the test below
        for deployment in application["deployments"]:
            deployment["max_surge_percent"] = 100  # the new replica first, then the old one goes

    before = {pool: app.replica_pids(pool) for pool in POOLS}
    with grpc.insecure_channel(app.grpc_address) as channel:
        health = HealthStub(channel).Watch(HealthCheckRequest(), timeout=WATCHED_S)
        assert next(health).status == HealthCheckResponse.SERVING
        with Load(chat, pause_s=PAUSE_S) as load:
            app.redeploy(change)
            app.wait_healthy()
            load.wait_for(6)
        *_, last = health  # it ends with its gateway, which it does not hold up
        assert last.status == HealthCheckResponse.NOT_SERVING
    assert load.failures == []
    assert len({answer.choices[0].message.content for answer in load.answers}) == 1
    for pool in POOLS:
        assert not set(before[pool]) & set(app.replica_pids(pool))

    answer = chat(**sampling)
    assert [choice.message.content for choice in answer.choices] == wanted
    assert not answer.specprefill["recomputed"]
    assert answer.specprefill["transfer_s"] > 0


def test_a_full_speculator_sheds_with_a_reason_and_makes_nothing_dense(app, long_prompt):
    """Its queue is short since the test before."""

    def ask(number):
        (first, *rest) = long_prompt.messages
        new = {**first, "content": f"{uuid.uuid4().hex} {first['content']}"}  # nobody has asked it
        body = {"model": "demo", "messages": [new, *rest], "max_tokens": 1, **pruned()}
        return httpx.post(f"{app.http_url}/v1/chat/completions", json=body, timeout=60)

    with ThreadPoolExecutor(STORM) as clients:
        answers = list(clients.map(ask, range(STORM)))
    served = [answer.json()["specprefill"] for answer in answers if answer.is_success]
    shed = [answer for answer in answers if not answer.is_success]
    assert {report["plan"] for report in served} == {"prune"}
    assert {answer.status_code for answer in shed} == {429}
    assert {answer.headers["x-specprefill-shed-reason"] for answer in shed} <= {
        "speculator_overloaded",
        "speculator_timeout",
    }
    assert all(float(answer.headers["retry-after"]) > 0 for answer in shed)


def test_no_ray_object_outlives_the_request_whose_kv_it_held(app, chat):
    """Clients that leave before, while and after the KV travels, as Ray's objects: see above."""
    assert chat().specprefill["plan"] == "prune"
    before = large_objects(app)
    for events in range(12):
        options = {"stream": True, "max_tokens": 200, "extra_body": pruned(ignore_eos=True)}
        with chat(**options) as stream:
            for _ in itertools.islice(stream, events):
                pass
    give_up_s = time.monotonic() + 30
    while large_objects(app) - before and time.monotonic() < give_up_s:
        time.sleep(0.5)
    assert large_objects(app) <= before


def large_objects(app) -> set[str]:
    """Objects in Ray's store that are large enough to hold KV: Serve has some of its own."""
    # An object that several workers know is counted once for each: that is not a missing one.
    objects = list_objects(address=app.dashboard_url, limit=10_000, raise_on_missing_output=False)
    assert len(objects) < 5_000
    return {held.object_id for held in objects if held.object_size > KV_BYTES}
