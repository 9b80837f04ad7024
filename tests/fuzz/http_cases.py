"""HTTP requests as bytes: from the OpenAPI description, from typed strategies, from mutation."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import hypothesis
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

MODEL = "demo"
MOST_TOKENS = 4  # of an answer: the engine is not what is tested here
Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class HttpCase:
    """One request, ready to be written to a socket."""

    source: str  # which generator made it
    label: str
    wire: bytes
    well_formed: bool = True  # False: the server may close the connection without an answer
    timed: bool = False  # asks for a deadline of its own: 504 is a right answer


def request(
    method: str, path: str, body: bytes | None = None, headers: Headers = (), version: str = "1.1"
) -> bytes:
    """Return a request that asks for the connection to be closed behind its answer."""
    lines = [f"{method} {path} HTTP/{version}", "host: 127.0.0.1", "connection: close"]
    if body is not None:
        lines.append(f"content-length: {len(body)}")
        if "content-type" not in {name.lower() for name, _ in headers}:
            lines.append("content-type: application/json")
    lines += [f"{name}: {value}" for name, value in headers]
    head = "\r\n".join(lines).encode("latin-1", "replace")
    return head + b"\r\n\r\n" + (body or b"")


CHAT: dict[str, Any] = {
    "model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2,
}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
# A valid request of every kind, which mutation starts from.
VALID: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 2, "stop": ["x"]}),
    ("/v1/chat/completions", {**CHAT, "specprefill": {"keep": 0.5, "protect": ["hello"]}}),
    ("/v1/chat/completions", {**CHAT, "tools": [TOOL], "tool_choice": "auto"}),
    (
        "/v1/chat/completions",
        {
            **CHAT,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": SCHEMA},
            },
        },
    ),
    ("/v1/completions", {"model": MODEL, "prompt": "hello", "max_tokens": 2, "echo": True}),
    ("/v1/completions", {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 2, "logprobs": 1}),
    ("/v1/completions", {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 1, "n": 2}),
    ("/v1/responses", {"model": MODEL, "input": "hello", "max_output_tokens": 2}),
    (
        "/v1/messages",
        {"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": "hello"}]},
    ),
    (
        "/v1/messages/count_tokens",
        {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]},
    ),
    ("/v1/selections", {"context": "hello " * 40, "question": "who?", "keep": 0.3}),
    ("/v1/selections", {"messages": CHAT["messages"], "tools": [TOOL], "keep": "auto"}),
    ("/v1/selections", {"model": MODEL, "prompt": [5, 6, 7], "floor": 0.1, "ceiling": 0.5}),
    ("/tokenize", {"model": MODEL, "prompt": "hello"}),
    ("/tokenize", {"model": MODEL, "messages": CHAT["messages"]}),
    ("/detokenize", {"model": MODEL, "tokens": [5, 6, 7]}),
)
PATHS = tuple(dict.fromkeys(path for path, _ in VALID))
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "get", "BREW")
NASTY_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 2**31, 2**53 + 1, 2**64, -(2**63), 10**400, 0.0, -0.0, 1e-320,
    1.5, 1e308, "", " ", "auto", "none", "required", "x" * 5000, "\x00", "\u202e", "\ud800",
    "<|user|>", "<|end|>" * 50, [], [[]], {}, {"": None}, [None], ["", ""], {"a": {"a": {}}},
    [1] * 200, ["x"] * 200, {"type": "text", "text": "x"}, {"role": "user", "content": []},
    [{"role": "user"}], [{"role": "nobody", "content": "x"}], [{"role": "tool", "content": "x"}],
)  # fmt: skip
FIELDS = (
    "model", "messages", "prompt", "input", "max_tokens", "max_completion_tokens",
    "max_output_tokens", "n", "best_of", "temperature", "top_p", "top_k", "min_p", "seed", "stop",
    "stop_token_ids", "bad_words", "logit_bias", "logprobs", "top_logprobs", "prompt_logprobs",
    "echo", "suffix", "stream", "stream_options", "tools", "tool_choice", "parallel_tool_calls",
    "response_format", "structured_outputs", "user", "priority", "request_id", "cache_salt",
    "prompt_cache_key",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "ignore_eos",
    "skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens",
    "add_generation_prompt", "continue_final_message", "add_special_tokens", "chat_template",
    "chat_template_kwargs", "documents", "reasoning_effort", "allowed_token_ids", "vllm_xargs",
    "kv_transfer_params", "prompt_embeds", "return_token_ids", "return_tokens_as_token_ids",
    "logits_processors", "use_beam_search", "length_penalty", "instructions", "text", "store",
    "previous_response_id", "background", "include", "system", "thinking", "specprefill",
    "speculative_prefill", "specprefill_keep_pct", "speculative_prefill_keep_pct", "tokens",
    "context", "question", "keep", "floor", "ceiling", "protect",
    "mm_processor_kwargs", "guided_json", "extra_args", "position_ids", "", "unknown",
)  # fmt: skip
NASTY_BYTES = (
    b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\xc3\x28", b"[" * 3000, b'{"a":' * 3000, b"NaN",
    b"Infinity", b"-1", b"1e999", b"9" * 400, b"null", b"true", b'"\\ud800"', b'"\\u0000"', b"\\",
    b'"', b"}", b"]", b",", b"\r\n", b"/*x*/", b"\xef\xbb\xbf", b"\x1b[2J", b"' OR 1=1", b"{}",
)  # fmt: skip


def tamed(path: str, body: Any) -> Any:
    """Return a body whose answer is short: a large limit is right, and takes minutes."""
    if not isinstance(body, dict) or "tokenize" in path or "count_tokens" in path:
        return body
    name = "max_output_tokens" if path.endswith("/responses") else "max_tokens"
    short = {name: MOST_TOKENS} if body.get(name) is None else {}
    short |= {
        key: MOST_TOKENS
        for key in ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")
        if isinstance(body.get(key), int) and body[key] > MOST_TOKENS
    }
    return {**body, **short}


def _tamed_bytes(path: str, data: bytes) -> bytes:
    """Return the bytes as they are, unless they still ask for an answer without a limit."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return data
    short = tamed(path, body)
    return data if short == body else encoded(short)


def encoded(body: Any) -> bytes:
    """Return JSON; what JSON cannot express is sent as Python would write it."""
    return json.dumps(body).encode("utf-8", "surrogatepass")


def from_openapi(document: Mapping[str, Any], count: int, seed: int) -> Iterator[HttpCase]:
    """Yield requests that schemathesis draws from the service's own description."""
    schema = schemathesis.openapi.from_dict(dict(document))
    operations = [
        schema[path][method.upper()]
        for path, methods in document["paths"].items()
        for method in methods
    ]
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    with_a_body = sum("post" in methods for methods in document["paths"].values())
    each = -(-count // (with_a_body * len(modes)))  # without one there are few different requests
    for operation in operations:
        for mode in modes:
            yield from map(
                _from_case, drawn(operation.as_strategy(generation_mode=mode), each, seed)
            )


def _from_case(case: Any) -> HttpCase:
    path = case.formatted_path
    query = "&".join(f"{name}={value}" for name, value in dict(case.query or {}).items())
    target = _target(path + ("?" + query if query else ""))
    body = case.body
    if isinstance(body, bytes) or body is None:
        payload = body
    elif type(body).__name__ == "NotSet":
        payload = None
    else:
        payload = encoded(tamed(path, body))
    headers = tuple(
        (_token(name), _field(str(value))) for name, value in dict(case.headers or {}).items()
    )
    wire = request(case.method, target, payload, headers)
    return HttpCase("openapi", f"{case.method} {path}", wire)


def _target(path: str) -> str:
    """Percent-encode what a request line cannot hold."""
    return "".join(c if "!" <= c <= "~" else f"%{ord(c) % 256:02X}" for c in path)


def _token(name: str) -> str:
    return "".join(c for c in name if c.isascii() and (c.isalnum() or c == "-")) or "x"


def _field(value: str) -> str:
    return "".join(c for c in value if " " <= c <= "~")


def from_strategies(count: int, seed: int) -> Iterator[HttpCase]:
    """Yield valid requests with some fields replaced by values that break careless code."""
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    values = st.sampled_from(NASTY_VALUES) | scalars | _holding(scalars | _holding(scalars))
    changes = st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3)
    cases = st.tuples(st.sampled_from(VALID), changes)
    for (path, valid), change in drawn(cases, count, seed):
        body = encoded(tamed(path, {**valid, **change}))
        yield HttpCase("hypothesis", f"POST {path} {sorted(change)}", request("POST", path, body))


def _holding(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)


def from_mutation(count: int, seed: int) -> Iterator[HttpCase]:
    """Yield valid requests whose bytes were changed: mostly the body's, sometimes the head's."""
    rng = random.Random(seed)
    for _ in range(count):
        path, valid = rng.choice(VALID)
        body = _tamed_bytes(path, mutated(json.dumps(valid).encode(), rng))
        kind = rng.random()
        if kind < 0.7:
            yield HttpCase("bytes", f"POST {path}", request("POST", path, body))
        elif kind < 0.85:
            yield _with_header(path, body, rng)
        elif kind < 0.93:
            method = rng.choice(METHODS)
            sent = None if method in {"GET", "HEAD", "OPTIONS", "TRACE"} else body
            wire = request(method, rng.choice(PATHS), sent)
            yield HttpCase("bytes", f"{method} {path}", wire, well_formed=method.isupper())
        else:
            wire = mutated(request("POST", path, body), rng)
            yield HttpCase("bytes", f"raw {path}", wire, well_formed=False)


_HEADERS: tuple[tuple[str, Sequence[str]], ...] = (
    ("content-type", ("text/plain", "", "application/json; charset=utf-16", "multipart/form-data",
                      "application/x-www-form-urlencoded", "application/json, text/html")),
    ("authorization", ("Bearer", "Bearer ", "Basic Og==", "bearer x", "Bearer " + "k" * 4000)),
    ("x-request-timeout-seconds", ("0", "-1", "nan", "inf", "1e-9", "0.001", "abc", "1e400")),
    ("x-request-id", ("a\tb", "x" * 4000, "", "%0d%0aset-cookie: a=b", "../../etc/passwd")),
    ("x-session-id", ("", "s", "x" * 2000)),
    ("content-encoding", ("gzip", "br", "identity, gzip")),
    ("expect", ("100-continue", "200-ok")),
    ("accept", ("text/html", "application/xml", "*/*;q=0")),
    ("range", ("bytes=0-1",)),
    ("traceparent", ("00-0-0-0", "x")),
    ("x-forwarded-for", ("127.0.0.1", "x")),
    ("upgrade", ("websocket", "h2c")),
)  # fmt: skip


def _with_header(path: str, body: bytes, rng: random.Random) -> HttpCase:
    name, values = rng.choice(_HEADERS)
    value = rng.choice(values)
    wire = request("POST", path, body, ((name, value),))
    return HttpCase(
        "bytes", f"POST {path} {name}: {value[:20]}", wire,
        well_formed=name not in {"expect", "upgrade"},
        timed=name == "x-request-timeout-seconds",
    )  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one to four changes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        rng.choice(_CHANGES)(changed, rng)
    return bytes(changed)


def _flip(data: bytearray, rng: random.Random) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _remove(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data) + 1)
    del data[start : start + rng.choice((1, 1, 2, 8, 64))]


def _repeat(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data) + 1)
    piece = bytes(data[start : start + rng.choice((1, 4, 16))])
    data[start:start] = piece * rng.choice((1, 2, 20))


def _insert(data: bytearray, rng: random.Random) -> None:
    place = rng.randrange(len(data) + 1)
    data[place:place] = rng.choice(NASTY_BYTES)


def _overwrite(data: bytearray, rng: random.Random) -> None:
    place = rng.randrange(len(data) + 1)
    piece = rng.choice(NASTY_BYTES)
    data[place : place + len(piece)] = piece


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


_CHANGES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip, _flip, _remove, _repeat, _insert, _insert, _overwrite, _cut,
)  # fmt: skip


def drawn(strategy: st.SearchStrategy[Any], count: int, seed: int) -> list[Any]:
    """Return `count` examples, the same ones for the same seed."""
    found: list[Any] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @hypothesis.given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    with suppress(Unsatisfiable):  # nothing can be wrong about a request without a parameter
        collect()
    return found[:count]
