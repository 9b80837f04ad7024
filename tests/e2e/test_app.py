"""HTTP and gRPC in, tokens out, through three pools of real engines."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import openai
import pytest

from specprefill.rpc import specprefill_pb2 as pb
from specprefill.rpc.specprefill_pb2_grpc import SpecPrefillStub

from .conftest import BIN, command

pytestmark = pytest.mark.timeout(600)

KEEP = 0.2
POOLS = ("Speculator", "Prefill", "Decode")
STAGES = ("queue_s", "speculate_s", "prefill_s", "transfer_s", "first_decode_s", "ttft_s")


def pruned(**more):
    return {"specprefill": {"keep": KEEP}, **more}


@pytest.fixture
def chat(client, long_prompt):
    def ask(**options):
        options = {"temperature": 0, "max_tokens": 12, "extra_body": pruned(), **options}
        return client.chat.completions.create(
            model="demo", messages=long_prompt.messages, **options
        )

    return ask


# --- chat and completions -------------------------------------------------------------------


def test_chat_tells_what_was_kept(chat, long_prompt):
    answer = chat()
    assert answer.choices[0].finish_reason in {"stop", "length"}
    assert answer.usage.prompt_tokens == long_prompt.prompt_tokens
    report = answer.specprefill
    assert (report["plan"], report["reason"]) == ("prune", "asked")
    assert report["prompt_tokens"] == long_prompt.prompt_tokens
    assert 0 < report["kept_tokens"] < 0.5 * long_prompt.prompt_tokens
    assert report["keep_rate"] == pytest.approx(
        report["kept_tokens"] / report["prompt_tokens"], abs=1e-5
    )
    assert all(report[stage] >= 0 for stage in STAGES)
    assert report["speculate_s"] > 0
    assert not report["recomputed"]


def test_a_stream_says_the_same_as_a_whole_answer(chat):
    events = list(chat(stream=True))
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == chat().choices[0].message.content
    assert events[-1].specprefill["plan"] == "prune"


def test_the_stream_can_end_with_the_usage(chat, long_prompt):
    events = list(chat(stream=True, stream_options={"include_usage": True}))
    assert events[-1].usage.prompt_tokens == long_prompt.prompt_tokens
    assert events[-1].usage.completion_tokens > 0


def test_dense_and_keep_one_give_the_same_answer(chat):
    dense = chat(extra_body={"specprefill": False})
    whole = chat(extra_body={"specprefill": {"keep": 1}})
    assert dense.specprefill["reason"] == "asked_off"
    assert whole.specprefill["reason"] == "keep_is_one"
    assert dense.specprefill["kept_tokens"] == dense.specprefill["prompt_tokens"]
    assert dense.choices[0].message.content == whole.choices[0].message.content


def test_a_short_prompt_is_left_whole(client):
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
    )
    assert answer.specprefill["reason"] == "short_prompt"


@pytest.mark.parametrize("stream", [False, True])
def test_completions(client, long_prompt, stream):
    answer = client.completions.create(
        model="demo", prompt=long_prompt.messages[-1]["content"], max_tokens=6, temperature=0,
        stream=stream, extra_body=pruned(ignore_eos=True),
    )  # fmt: skip
    events = list(answer) if stream else [answer]
    assert "".join(event.choices[0].text for event in events if event.choices)
    assert events[-1].specprefill["plan"] == "prune"


# --- sampling -------------------------------------------------------------------------------


def test_two_samples(chat):
    answer = chat(n=2, temperature=1.0, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.finish_reason for choice in answer.choices)
    assert answer.usage.completion_tokens >= 2


def test_samples_without_a_choice_agree(chat):
    first, second = chat(n=2, temperature=1.0, extra_body=pruned(top_k=1)).choices
    assert first.message.content == second.message.content


def test_a_stop_string_ends_the_answer(chat):
    text = chat(max_tokens=16, extra_body=pruned(ignore_eos=True))
    whole = text.choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    answer = chat(max_tokens=16, stop=[stop])
    assert answer.choices[0].finish_reason == "stop"
    assert stop not in answer.choices[0].message.content
    assert whole.startswith(answer.choices[0].message.content)


def test_logprobs(chat):
    answer = chat(logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(max(top.logprob for top in entry.top_logprobs))


def test_a_seed_makes_sampling_reproducible(chat):
    texts = {chat(temperature=1.5, seed=5).choices[0].message.content for _ in range(3)}
    assert len(texts) == 1


def test_a_tool_call_follows_its_schema(chat, demo_tokenizer):
    schema = {
        "type": "object",
        "properties": {"unit": {"type": "string", "enum": ["metre", "mile"]}},
        "required": ["unit"],
        "additionalProperties": False,
    }
    function = {"name": "measure", "parameters": schema, "strict": True}
    # The grammar allows blanks anywhere, and a small model may like nothing better.
    blanks = {
        str(token): -100
        for token in range(len(demo_tokenizer))
        if not demo_tokenizer.decode([token]).strip()
    }
    answer = chat(
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "measure"}},
        max_tokens=64,
        logit_bias=blanks,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "measure"
    assert json.loads(call.function.arguments)["unit"] in {"metre", "mile"}


def test_the_output_follows_a_json_schema(chat):
    schema = {
        "type": "object",
        "properties": {"sure": {"type": "boolean"}, "side": {"enum": ["left", "right"]}},
        "required": ["sure", "side"],
        "additionalProperties": False,
    }
    answer = chat(
        max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    )
    said = json.loads(answer.choices[0].message.content)
    assert isinstance(said["sure"], bool)
    assert said["side"] in {"left", "right"}


def test_eight_requests_at_once_give_the_answers_of_one(chat):
    alone = chat().choices[0].message.content
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda _: chat().choices[0].message.content, range(8)))
    assert together == [alone] * 8


# --- errors ---------------------------------------------------------------------------------


def test_an_unknown_model_is_404(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="none", messages=[{"role": "user", "content": "x"}])
    assert "none" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"keep": 0}, "specprefill.keep"),
        ({"keep": 1.5}, "specprefill.keep"),
        ({"keep": "half"}, "specprefill.keep"),
        ({"kep": 0.5}, "specprefill.kep"),
        ("yes", "specprefill"),
    ],
)
def test_a_bad_control_is_400_and_named(chat, field, param):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(extra_body={"specprefill": field})
    assert caught.value.param == param
    assert "Traceback" not in str(caught.value)


def test_a_prompt_beyond_the_model_is_400(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt=[20] * 9000, max_tokens=1)
    assert "8192" in str(caught.value)


def test_an_empty_prompt_is_400(client):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="demo", prompt="", max_tokens=1)


def test_a_deadline_that_passes_is_504(app, long_prompt):
    reply = httpx.post(
        f"{app.http_url}/v1/chat/completions",
        json={"messages": long_prompt.messages, "max_tokens": 2000, "ignore_eos": True},
        headers={"x-request-timeout-seconds": "0.2"},
        timeout=60,
    )
    assert reply.status_code == 504
    assert reply.json()["error"]["code"] == "deadline_exceeded"


def test_clients_that_leave_free_the_engines(app, chat, long_prompt):
    """More endless answers than the decode engine can run at once, all abandoned."""

    def leave(_):
        body = {
            "messages": long_prompt.messages, "max_tokens": 6000, "ignore_eos": True,
            "stream": True, "specprefill": {"keep": KEEP},
        }  # fmt: skip
        url = f"{app.http_url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as reply:
            lines = (line for line in reply.iter_lines() if line.startswith("data: {"))
            for _ in range(5):
                next(lines)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(leave, range(32)))
    started_s = time.monotonic()
    assert chat().choices[0].finish_reason
    assert time.monotonic() - started_s < 30


# --- gRPC -----------------------------------------------------------------------------------


@pytest.fixture
def stub(app):
    with grpc.insecure_channel(app.grpc_address) as channel:
        yield SpecPrefillStub(channel)


def grpc_request(prompt, **fields):
    messages = [pb.Message(role=m["role"], content=m["content"]) for m in prompt.messages]
    return pb.GenerateRequest(
        conversation=pb.Conversation(messages=messages),
        sampling=pb.Sampling(max_tokens=12, temperature=0),
        prune=pb.Prune(keep=KEEP),
        **fields,
    )


def test_grpc_answers_as_http_does(stub, chat, long_prompt):
    answer = stub.Generate(grpc_request(long_prompt), timeout=60)
    assert answer.outputs[0].text == chat().choices[0].message.content
    assert answer.usage.prompt_tokens == long_prompt.prompt_tokens
    assert answer.report.decision.plan == "prune"
    assert answer.report.decision.kept_tokens == chat().specprefill["kept_tokens"]
    assert answer.report.times.ttft_s > 0


def test_a_grpc_stream_ends_with_usage_and_report(stub, long_prompt):
    chunks = list(stub.GenerateStream(grpc_request(long_prompt), timeout=60))
    whole = stub.Generate(grpc_request(long_prompt), timeout=60)
    assert "".join(chunk.output.text for chunk in chunks) == whole.outputs[0].text
    assert chunks[-1].HasField("report")
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_score_tells_the_kept_runs(stub, long_prompt):
    asked = grpc_request(long_prompt)
    score = stub.Score(
        pb.ScoreRequest(conversation=asked.conversation, prune=asked.prune), timeout=60
    )
    kept = sum(run.stop - run.start for run in score.kept)
    assert kept == score.decision.kept_tokens
    assert score.kept[0].start == 0
    assert score.kept[-1].stop == long_prompt.prompt_tokens


def test_health_counts_the_pools(stub):
    health = stub.Health(pb.HealthRequest(), timeout=30)
    assert health.serving
    assert {pool.name: pool.healthy_replicas for pool in health.pools} == {
        "speculator": 1, "prefill": 1, "decode": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"model": "none"}, grpc.StatusCode.NOT_FOUND, "none"),
        ({"timeout_s": 0.01}, grpc.StatusCode.DEADLINE_EXCEEDED, "timeout_s"),
        ({"timeout_s": -1.0}, grpc.StatusCode.INVALID_ARGUMENT, "timeout_s"),
    ],
)
def test_grpc_failures_have_codes(stub, long_prompt, fields, code, said):
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(grpc_request(long_prompt, **fields), timeout=60)
    assert caught.value.code() is code
    assert said in caught.value.details()
    assert "Traceback" not in caught.value.details()


def test_a_bad_keep_rate_is_an_invalid_argument(stub, long_prompt):
    request = grpc_request(long_prompt)
    request.prune.keep = 1.5
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(request, timeout=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "keep" in caught.value.details()


def test_reflection_lists_the_service(app):
    from google.protobuf.descriptor_pool import DescriptorPool
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    with grpc.insecure_channel(app.grpc_address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "specprefill.v1.SpecPrefill" in database.get_services()
        service = DescriptorPool(database).FindServiceByName("specprefill.v1.SpecPrefill")
    assert {"Generate", "GenerateStream", "Score", "Health"} == set(service.methods_by_name)


# --- the command line -----------------------------------------------------------------------


def test_ray_and_our_own_status_say_healthy(app):
    ours = command([BIN / "specprefill", "status", "--address", app.dashboard_url]).stdout
    rays = command([BIN / "serve", "status", "-a", app.dashboard_url]).stdout
    assert "specprefill: running" in ours
    assert ours.count("1 of 1 replicas") == 4
    assert "status: RUNNING" in rays
    assert rays.count("status: HEALTHY") == 4


@pytest.mark.parametrize("over", ["http", "grpc"])
def test_ask_prints_the_answer_and_the_report(app, tmp_path, long_prompt, over):
    file = tmp_path / "prompt.txt"
    file.write_text(long_prompt.messages[-1]["content"])
    where = {"http": ["--http", app.http_url], "grpc": ["--grpc", app.grpc_address]}[over]
    said = command(
        [BIN / "specprefill", "ask", *where, "--keep", KEEP, "--prompt-file", file,
         "--max-tokens", 8, "What is it?"]
    )  # fmt: skip
    assert said.stdout.strip()
    assert said.stderr.startswith("prune (asked): kept ")


def test_score_marks_the_kept_text(app, tmp_path, long_prompt):
    file = tmp_path / "prompt.txt"
    file.write_text(long_prompt.messages[-1]["content"])
    said = command(
        [BIN / "specprefill", "score", "--http", app.http_url, "--grpc", app.grpc_address,
         "--keep", KEEP, "--prompt-file", file]
    )  # fmt: skip
    marked = said.stdout.replace("[[", "").replace("]]", "")
    assert long_prompt.messages[-1]["content"][:200] in marked
    assert 2 <= said.stdout.count("[[") < 60


def test_a_refusal_is_one_line(app):
    said = command(
        [BIN / "specprefill", "ask", "--http", app.http_url, "--model", "none", "Hello"], code=1
    )
    assert said.stderr.startswith("specprefill: 404: ")
    assert len(said.stderr.strip().splitlines()) == 1


# --- pools that change and fail: last, since they disturb the others ------------------------


class Load:
    """Requests one after the other from a few threads, until told to stop."""

    def __init__(self, ask, threads=3):
        self._ask = ask
        self._stop = threading.Event()
        self.answers, self.failures = [], []
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self):
        while not self._stop.is_set():
            try:
                self.answers.append(self._ask().choices[0].message.content)
            except openai.OpenAIError as error:
                self.failures.append(error)


def test_pools_grow_and_shrink_without_dropping_a_request(app, chat):
    def replicas(count):
        def change(raw):
            for deployment in raw["applications"][0]["deployments"]:
                if deployment["name"] in POOLS:
                    deployment["num_replicas"] = count

        return change

    with Load(chat) as load:
        for count in (2, 1):
            app.redeploy(replicas(count))
            snapshot = app.wait_healthy()
            assert {p.name: p.running for p in snapshot.pools if p.name in POOLS} == dict.fromkeys(
                POOLS, count
            )
            answered = len(load.answers)
            while len(load.answers) < answered + 6 and not load.failures:
                time.sleep(0.1)
    assert load.failures == []
    assert len(set(load.answers)) == 1


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
    options = {"max_tokens": 300, "extra_body": pruned(ignore_eos=True)}
    wanted = chat(**options).choices[0].message.content
    (pid,) = app.replica_pids("Decode")
    text = ""
    for number, event in enumerate(chat(stream=True, **options)):
        text += (event.choices[0].delta.content or "") if event.choices else ""
        if number == 20:
            os.kill(pid, signal.SIGKILL)
    assert text == wanted
    app.wait_healthy()


def test_a_prompt_outlives_the_prefill_replica_it_was_sent_to(app, chat):
    wanted = chat().choices[0].message.content
    (pid,) = app.replica_pids("Prefill")
    os.kill(pid, signal.SIGKILL)
    assert chat().choices[0].message.content == wanted
    app.wait_healthy()


def test_rays_object_store_can_carry_the_kv(app, chat):
    """Last: the pools are replaced by ones with another carrier."""
    wanted = chat(n=2).choices[0].message.content

    def change(raw):
        raw["applications"][0]["args"]["kv"]["carrier"] = "object_ref"

    app.redeploy(change)
    app.wait_healthy()
    answer = chat(n=2)
    assert [choice.message.content for choice in answer.choices] == [wanted, wanted]
    assert not answer.specprefill["recomputed"]
    assert answer.specprefill["transfer_s"] > 0
