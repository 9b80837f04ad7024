"""gRPC calls as bytes: valid messages with odd values, and messages that are none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from specprefill.rpc import specprefill_pb2 as pb

from .http_cases import MODEL, MOST_TOKENS, drawn, mutated

SERVICE = "/specprefill.v1.SpecPrefill"
METHODS = ("Generate", "GenerateStream", "Score", "Health")


@dataclass(frozen=True, slots=True)
class GrpcCase:
    """One call."""

    source: str
    method: str
    payload: bytes
    streams: bool = False
    metadata: tuple[tuple[str, str], ...] = ()


_TEXT = st.text(max_size=30) | st.sampled_from(
    ["", "\x00", "<|user|>", "x" * 3000, "[" * 3000, '{"$ref": "#"}', '{"type": 1}', "(", "a{9999}"]
)
_FLOATS = st.floats(width=32) | st.sampled_from([0.0, -1.0, 0.5, 1.0, 2.0, 1e30])
_COUNTS = st.integers(0, 2**32 - 1) | st.integers(0, 5)


def _message(kind: Any, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Some of the fields of a message, each absent about as often as not."""
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: kind(**values))


_PRUNE = _message(
    pb.Prune, enabled=st.booleans(), keep=_FLOATS, floor=_FLOATS, ceiling=_FLOATS,
    protect=st.lists(_TEXT, max_size=3), auto=st.booleans(),
)  # fmt: skip
_SAMPLING = _message(
    pb.Sampling, min_tokens=_COUNTS, temperature=_FLOATS, top_p=_FLOATS,
    top_k=st.integers(-(2**31), 2**31 - 1), min_p=_FLOATS, seed=st.integers(-(2**63), 2**63 - 1),
    n=st.integers(0, 3) | st.just(2**32 - 1), stop=st.lists(_TEXT, max_size=3),
    stop_token_ids=st.lists(_COUNTS, max_size=3), presence_penalty=_FLOATS,
    frequency_penalty=_FLOATS, repetition_penalty=_FLOATS, logprobs=_COUNTS,
    ignore_eos=st.booleans(), json_schema=_TEXT, regex=_TEXT,
)  # fmt: skip
_CONVERSATION = _message(
    pb.Conversation,
    messages=st.lists(
        _message(
            pb.Message, content=_TEXT,
            role=st.sampled_from(["system", "user", "assistant", "tool", "", "nobody"]),
        ),
        max_size=3,
    ),
    tools_json=_TEXT,
)  # fmt: skip
_INPUT = st.one_of(
    st.fixed_dictionaries({"conversation": _CONVERSATION}),
    st.fixed_dictionaries({"text": _TEXT}),
    st.fixed_dictionaries(
        {"token_ids": st.lists(_COUNTS, max_size=8).map(lambda ids: pb.TokenIds(ids=ids))}
    ),
    st.just({}),
)
_MODEL = st.sampled_from([MODEL, MODEL, MODEL, "", "other"])


@st.composite
def _generate(draw: st.DrawFn) -> pb.GenerateRequest:
    asked = pb.GenerateRequest(**draw(_INPUT))
    if draw(st.booleans()):
        asked.model = draw(_MODEL)
    asked.sampling.CopyFrom(draw(_SAMPLING))
    asked.sampling.max_tokens = draw(st.integers(0, MOST_TOKENS))
    if draw(st.booleans()):
        asked.prune.CopyFrom(draw(_PRUNE))
    if draw(st.booleans()):
        asked.timeout_s = draw(_FLOATS)
    if draw(st.booleans()):
        asked.priority = draw(st.integers(-(2**31), 2**31 - 1))
    return asked


@st.composite
def _score(draw: st.DrawFn) -> pb.ScoreRequest:
    asked = pb.ScoreRequest(**draw(_INPUT))
    if draw(st.booleans()):
        asked.prune.CopyFrom(draw(_PRUNE))
    return asked


def from_strategies(count: int, seed: int) -> Iterator[GrpcCase]:
    """Yield messages that parse, with values that careless code trusts."""
    calls = st.one_of(
        st.tuples(st.sampled_from(("Generate", "GenerateStream")), _generate()),
        st.tuples(st.just("Score"), _score()),
        st.tuples(st.just("Health"), st.just(pb.HealthRequest())),
    )
    for method, message in drawn(calls, count, seed):
        payload = message.SerializeToString()
        yield GrpcCase("hypothesis", method, payload, streams=method == "GenerateStream")


def from_mutation(count: int, seed: int) -> Iterator[GrpcCase]:
    """Yield messages with changed bytes, other methods' messages, and methods that are none."""
    rng = random.Random(seed)
    valid = [message.SerializeToString() for message in drawn(_generate(), 50, seed)]
    for _ in range(count):
        method = rng.choice((*METHODS, rng.choice(("Generate", "Nothing", "generate", ""))))
        payload = mutated(rng.choice(valid), rng) if rng.random() < 0.8 else rng.randbytes(40)
        metadata = (rng.choice(_METADATA),) if rng.random() < 0.2 else ()
        yield GrpcCase(
            "bytes", method, payload, streams=method == "GenerateStream", metadata=metadata
        )


_METADATA = (
    ("authorization", "Bearer"), ("authorization", "x" * 2000), ("application", "none"),
    ("application", "specprefill"), ("request_id", "a b"), ("multiplexed_model_id", "x"),
    ("session_id", ""), ("x-request-id", "%0a"), ("traceparent", "x"),
)  # fmt: skip
