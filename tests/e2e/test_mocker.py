"""A fleet without GPUs: real gateways and routers over `cluster/mock.yaml`'s engines."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import yaml

from .conftest import pruned
from .test_gateways import wait_until_alone

pytestmark = pytest.mark.timeout(900)

STREAMS, TOKENS = 40, 20
LONG = 300  # tokens of the answers that are under way when replicas die
SPEED = 5


@pytest.fixture(scope="module")
def fleet(app, root):
    """The shipped application beside the other one, under `/mock`."""
    raw = yaml.safe_load(app.file.read_text())
    (mock,) = yaml.safe_load((root / "cluster" / "mock.yaml").read_text())["applications"]
    mock |= {"name": "mock", "route_prefix": "/mock"}
    mock["runtime_env"]["env_vars"]["SPECPREFILL_MOCK_SPEED"] = str(SPEED)
    app.api.deploy({**raw, "applications": [*raw["applications"], mock]})
    app.wait_healthy()
    try:
        yield f"{app.http_url}/mock/v1/chat/completions"
    finally:
        app.api.deploy(raw)
        app.wait_healthy()
        wait_until_alone(app)


def body(messages, **fields) -> dict:
    return {"model": "mock", "messages": messages, "max_tokens": TOKENS, **pruned(), **fields}


def test_a_conversation_stays_where_its_kv_is(fleet, long_prompt):
    """Each turn through any gateway: one that did not see the last one knows its home."""
    messages, before, cached = list(long_prompt.messages), 0, 0
    for turn in range(4):
        answer = httpx.post(fleet, json=body(messages), timeout=60).raise_for_status().json()
        report = answer["specprefill"]
        if turn > 0:
            assert report["carried_tokens"] == before
            assert report["prefilled_by"] == "decode"
            cached += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        before = report["kept_tokens"]
        messages.append(
            {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}
        )
        messages.append({"role": "user", "content": "And what else is there?"})
    assert cached >= before


def test_nothing_is_lost_when_replicas_of_every_pool_die(app, fleet, long_prompt):
    """Forty answers; the first and short one tells that the others are under way."""
    lengths = [TOKENS, *[LONG] * (STREAMS - 1)]

    def asked(number):
        messages = [{"role": "user", "content": f"{number} {long_prompt.messages[-1]['content']}"}]
        answer = httpx.post(fleet, json=body(messages, max_tokens=lengths[number]), timeout=120)
        return answer.status_code, answer.json()["usage"]["completion_tokens"]

    with ThreadPoolExecutor(STREAMS) as threads:
        answers = [threads.submit(asked, number) for number in range(STREAMS)]
        answers[0].result()
        assert not any(answer.done() for answer in answers[1:])
        pools = app.api.details()["applications"]["mock"]["deployments"]
        for pool in ("Speculator", "Prefill", "Decode"):
            os.kill(pools[pool]["replicas"][0]["pid"], signal.SIGKILL)
        assert [answer.result() for answer in answers] == [(200, length) for length in lengths]
