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
import yaml
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
ANSWER_TOKENS = 4000  # the stream lasts longer than Ray takes to list its objects
WATCHED_S = 240.0  # less than a gateway may take for its last requests
PAUSE_S = 0.5  # of each client: the new replicas start on the same two cores


def scaled(app, chat, count):
    """Every pool gets `count` replicas, and a few requests after that, under load."""
    before = {pool: app.replica_pids(pool) for pool in POOLS}
    assert count not in {len(pids) for pids in before.values()}

    def change(raw):
        for deployment in raw["applications"][0]["deployments"]:
            if deployment["name"] in POOLS:
                deployment["num_replicas"] = count

    with Load(partial(chat, **HANDED_OVER), pause_s=PAUSE_S) as load:
        load.wait_for(1)
        app.redeploy(change)
        snapshot = app.wait_healthy()
        assert {p.name: p.running for p in snapshot.pools if p.name in POOLS} == dict.fromkeys(
            POOLS, count
        )
        load.wait_for(6)
    assert load.failures == []
    assert len({answer.choices[0].message.content for answer in load.answers}) == 1
    assert handed_over(load.answers)
    # A prefill replica that goes waits until its tickets are pulled.
    assert not any(answer.specprefill["recomputed"] for answer in load.answers)


def handed_over(answers) -> bool:
    """Return True if the prefill pool computed most of the prompts."""
    by_prefill = [answer for answer in answers if answer.specprefill["prefilled_by"] == "prefill"]
    return 2 * len(by_prefill) > len(answers)


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


def test_pools_shrink_without_dropping_a_request(app, chat, long_prompt):
    """There are two replicas of each pool since the first test; all of them have answered."""
    before = {pool: app.replica_pids(pool) for pool in POOLS}
    with Load(lambda: chat(messages=unasked(long_prompt), **HANDED_OVER), pause_s=0) as load:
        while idle := idle_replicas(app):
            load.wait_for(1)
            assert load.failures == [], idle
    scaled(app, chat, 1)
    for pool in POOLS:  # one of the two is left, and none has been replaced
        assert set(app.replica_pids(pool)) < set(before[pool])


def idle_replicas(app) -> list[str]:
    """Return the pools of the running replicas that have finished no request, by their logs."""
    return [pool for pool in POOLS for log in app.logs(pool) if "outcome=finished" not in log]


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


def test_a_stream_outlives_the_decode_engine_that_began_it(app, chat):
    options = {"max_tokens": 300, "extra_body": pruned(ignore_eos=True), **HANDED_OVER}
    wanted = [choice.message.content for choice in chat(**options).choices]
    replica, engine = processes(app, "Decode")
    texts = ["", ""]
    for number, event in enumerate(chat(stream=True, **options)):
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
        if number == 20:
            engine.kill()
    assert texts == wanted
    replica.wait(10)  # its process has ended, too: Serve replaces it
    app.wait_healthy()


def test_prompts_outlive_the_prefill_engine_that_they_were_sent_to(app, chat):
    replica, engine = processes(app, "Prefill")
    with Load(partial(chat, **HANDED_OVER), pause_s=0) as load:
        load.wait_for(2)
        engine.kill()
        load.wait_for(12)
    assert load.failures == []
    assert len({answer.choices[0].message.content for answer in load.answers}) == 1
    replica.wait(10)
    app.wait_healthy()


def processes(app, pool) -> tuple[psutil.Process, psutil.Process]:
    """Return a pool's only replica, and its engine."""
    (pid,) = app.replica_pids(pool)
    replica = psutil.Process(pid)
    (engine,) = [
        each
        for each in replica.children(recursive=True)
        if "EngineCore" in " ".join(each.cmdline())
    ]
    return replica, engine


def test_a_rolling_update_loses_no_request(app, chat):
    """Every replica of every pool is replaced, the gateway's too; Ray carries the KV then."""
    wanted = [choice.message.content for choice in chat(**HANDED_OVER).choices]

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
        with Load(partial(chat, **HANDED_OVER), pause_s=PAUSE_S) as load:
            app.redeploy(change)
            app.wait_healthy()
            load.wait_for(6)
        # It ends with its gateway, which it does not hold up, and reports no failure.
        assert {each.status for each in health} <= {HealthCheckResponse.SERVING}
    assert load.failures == []
    assert len({answer.choices[0].message.content for answer in load.answers}) == 1
    assert handed_over(load.answers)
    for pool in POOLS:
        assert not set(before[pool]) & set(app.replica_pids(pool))

    answer = chat(**HANDED_OVER)
    assert [choice.message.content for choice in answer.choices] == wanted
    assert not answer.specprefill["recomputed"]
    assert answer.specprefill["transfer_s"] > 0


def test_a_full_speculator_sheds_with_a_reason_and_makes_nothing_dense(app, long_prompt):
    """Its queue is short since the test before."""

    def ask(number):
        body = {"model": "demo", "messages": unasked(long_prompt), "max_tokens": 1, **pruned()}
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


def test_no_ray_object_outlives_the_request_whose_kv_it_held(app, chat, long_prompt):
    """Clients that leave before, while and after the KV travels, as Ray's objects: see above."""
    (application,) = yaml.safe_load(app.file.read_text())["applications"]
    assert application["args"]["kv"]["carrier"] == "object_ref"

    def stream(max_tokens):
        messages = unasked(long_prompt)  # decode has nothing of it: its KV is handed over
        options = {"max_tokens": max_tokens, "extra_body": pruned(ignore_eos=True)}
        return chat(messages=messages, stream=True, **options)

    before = large_objects(app)
    with stream(ANSWER_TOKENS) as events:
        next(iter(events))
        next(iter(events))
        assert large_objects(app) - before  # its own
    for count in range(12):
        with stream(200) as events:
            for _ in itertools.islice(events, count):
                pass
    give_up_s = time.monotonic() + 30
    while large_objects(app) - before and time.monotonic() < give_up_s:
        time.sleep(0.5)
    assert large_objects(app) <= before


def unasked(prompt):
    """Return the chat with another beginning: no cache has it."""
    (first, *rest) = prompt.messages
    return [{**first, "content": f"{uuid.uuid4().hex} {first['content']}"}, *rest]


def large_objects(app) -> set[str]:
    """Objects in Ray's store that are large enough to hold KV: Serve has some of its own."""
    # An object that several workers know is counted once for each: that is not a missing one.
    objects = list_objects(address=app.dashboard_url, limit=10_000, raise_on_missing_output=False)
    assert len(objects) < 5_000
    return {held.object_id for held in objects if held.object_size > KV_BYTES}
