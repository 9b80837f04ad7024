"""Clients that know nothing of this service, unchanged."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import anthropic
import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from .conftest import KEEP, command

pytestmark = pytest.mark.timeout(600)


def test_langchain(app, long_prompt):
    langchain = pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
    model = langchain.ChatOpenAI(
        base_url=f"{app.http_url}/v1", api_key="none", model="demo", temperature=0, max_tokens=12,
        extra_body={"specprefill": {"keep": KEEP}},
    )  # fmt: skip
    messages = [(each["role"], each["content"]) for each in long_prompt.messages]
    answer = model.invoke(messages)
    assert answer.usage_metadata["input_tokens"] == long_prompt.prompt_tokens
    assert "".join(piece.content for piece in model.stream(messages)) == answer.content


LITELLM = """
import json, sys, litellm
asked = json.loads(sys.argv[1])
answer = litellm.completion(**asked)
pieces = litellm.completion(**asked, stream=True)
text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
print(json.dumps([answer.usage.prompt_tokens, answer.choices[0].message.content, text]))
"""


def test_litellm(app, long_prompt, monkeypatch):
    """In a process of its own: it warns at import, and leaves an event loop open."""
    if find_spec("litellm") is None:
        pytest.skip("pip install '.[clients]'")
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network
    asked = {
        "model": "openai/demo", "api_base": f"{app.http_url}/v1", "api_key": "none",
        "messages": long_prompt.messages, "temperature": 0, "max_tokens": 12,
        "extra_body": {"specprefill": {"keep": KEEP}},
    }  # fmt: skip
    printed = command([sys.executable, "-c", LITELLM, json.dumps(asked)])
    prompt_tokens, whole, streamed = json.loads(printed.stdout.splitlines()[-1])
    assert prompt_tokens == long_prompt.prompt_tokens
    assert streamed == whole != ""


def test_anthropics_client(app, long_prompt):
    asked = {
        "model": "demo", "max_tokens": 12, "messages": long_prompt.messages,
        "extra_body": {"specprefill": {"keep": KEEP}, "temperature": 0},
    }  # fmt: skip
    with anthropic.Anthropic(base_url=app.http_url, auth_token="none", max_retries=0) as client:
        answer = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            text = "".join(stream.text_stream)
    assert answer.stop_reason in {"end_turn", "max_tokens"}
    assert text == answer.content[0].text


def test_a_client_that_knows_only_grpcs_reflection(app, long_prompt):
    """As grpcurl does: services, methods and messages are all learnt from the server."""
    with grpc.insecure_channel(app.grpc_address) as channel:
        described = ProtoReflectionDescriptorDatabase(channel)
        assert "specprefill.v1.SpecPrefill" in described.get_services()
        pool = descriptor_pool.DescriptorPool(described)
        service = pool.FindServiceByName("specprefill.v1.SpecPrefill")
        method = service.FindMethodByName("Generate")
        asked = message_factory.GetMessageClass(method.input_type)()
        for each in long_prompt.messages:
            asked.conversation.messages.add(role=each["role"], content=each["content"])
        asked.prune.keep = KEEP
        asked.sampling.max_tokens = 4
        call = channel.unary_unary(
            f"/{service.full_name}/{method.name}",
            request_serializer=type(asked).SerializeToString,
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )
        answer = call(asked, timeout=60)
    assert answer.usage.prompt_tokens == long_prompt.prompt_tokens
    assert answer.report.decision.plan == "prune"


def test_vllms_benchmark_client(app, root, tmp_path):
    """`vllm bench serve`, by the program that starts it in the CPU build, too."""
    result = tmp_path / "result.json"
    command(
        [sys.executable, root / "loadtest" / "bench_serve.py", "--backend", "openai-chat",
         "--base-url", app.http_url, "--endpoint", "/v1/chat/completions",
         "--model", "demo", "--tokenizer", root / "models" / "demo-main",
         "--dataset-name", "random", "--random-input-len", 64, "--random-output-len", 4,
         "--num-prompts", 4, "--ignore-eos", "--save-result",
         "--result-filename", result]
    )  # fmt: skip
    measured = json.loads(result.read_text())
    assert (measured["completed"], measured["failed"]) == (4, 0)
    assert measured["total_output_tokens"] == 16
