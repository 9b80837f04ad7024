"""An engine with a reasoning parser, and what it is given of a request's reasoning."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vllm.sampling_params import SamplingParams

from specprefill.config import AppConfig
from specprefill.core.types import Reasoning

PLUGIN = """
from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser


@ReasoningParserManager.register_module("engines_own")
class OwnReasoningParser(BaseThinkingReasoningParser):
    start_token = "<|assistant|>"
    end_token = "<|pad|>"
"""


@pytest.mark.parametrize("role", ["PREFILL", "DECODE"])
def test_both_pools_engines_have_the_gateways_reasoning_parser(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    from vllm.model_executor.models import registry

    from specprefill.engine.args import Role, engine_args, vllm_config

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    plugin = tmp_path / "own.py"
    plugin.write_text(PLUGIN)
    parser = ("--reasoning-parser", "engines_own", "--reasoning-parser-plugin", str(plugin))
    config = AppConfig.model_validate(
        {
            "model": {"path": str(root / "models" / "demo-main"), "dtype": "float32"},
            "speculator": {"path": "small"},
            "gateway": {"vllm_args": parser},
        }
    ).for_engines()
    engine = config.prefill if role == "PREFILL" else config.decode
    found = vllm_config(engine_args(config.model, engine, config.kv, Role[role]))
    outputs = found.structured_outputs_config
    assert outputs.reasoning_parser == "engines_own"
    assert outputs.reasoning_parser_plugin == str(plugin)
    assert found.reasoning_config.reasoning_end_token_ids == [0]


class RecordingLlm:
    """Takes the place of vLLM's engine client."""

    def __init__(self) -> None:
        self.given: list[dict[str, Any]] = []

    async def generate(self, *_args: Any, **given: Any) -> AsyncIterator[Any]:
        self.given.append(given)
        return
        yield


@pytest.mark.parametrize(
    ("reasoning", "has_ended", "kwargs"),
    [
        (None, None, None),
        (Reasoning(None, None), None, None),
        (
            Reasoning(has_ended=False, parser_kwargs=msgspec.msgpack.encode({"a": {"b": 1}})),
            False,
            {"a": {"b": 1}},
        ),
        (Reasoning(has_ended=True, parser_kwargs=None), True, None),
    ],
)
async def test_a_requests_reasoning_reaches_vllm(
    root: Path, reasoning: Reasoning | None, has_ended: bool | None, kwargs: dict[str, Any] | None
) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    from specprefill.engine.engine import Engine

    engine = Engine(AsyncEngineArgs(model=str(root / "models" / "demo-main")))
    llm = engine._llm = RecordingLlm()
    async for _ in engine.generate([1], SamplingParams(), "r", reasoning=reasoning):
        pass
    (given,) = llm.given
    assert given["reasoning_ended"] is has_ended
    assert given["reasoning_parser_kwargs"] == kwargs
