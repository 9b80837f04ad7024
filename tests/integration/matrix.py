"""One row of the table of models: an architecture, served on one model runner.

    python -m tests.integration.matrix FOLDER NAME...

Every architecture gets a prefill and a decode engine inside this one process, one after the
other, so that vLLM is imported once; a line of JSON is printed for each. The engines' workers,
connector and scheduler are those of a deployment.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.model_executor.models import registry

from specprefill.core.positions import PositionMap
from specprefill.core.support import Mode
from specprefill.core.types import Lease, Span

from ..no_vision import vision_modules
from .quantised import plain_folder
from .tiny_architectures import BY_NAME, LENGTH, Architecture

BLOCK_SIZE = 32
CHUNK = 256  # tokens of a step: the longest prompt is prefilled in several
PROMPT = 900
RUNS = (Span(0, 40), Span(100, 229), Span(333, 600), Span(880, 900))
STEPS = 8
MARK = "@row "  # before a line of JSON


@dataclass(frozen=True)
class Row:
    """What one architecture did on one runner."""

    name: str
    mode: str
    parity: bool | None = None  # one engine equals transformers at the kept positions
    handoff: bool | None = None  # and so does a decode engine that pulled the KV
    window_binds: bool | None = None  # transformers answers otherwise without the window
    speculator: str = ""  # whether it can be one, or why not
    error: str = ""


def main(folder: Path, names: Sequence[str]) -> None:
    """Print a row for each name."""
    sys.modules.update(vision_modules())
    registry._run_in_subprocess = lambda inspect: inspect()  # else seconds for each class
    for name in names:
        try:
            row = _row(BY_NAME[name], folder)
        except Exception as error:  # noqa: BLE001  # the row of this architecture holds it
            traceback.print_exc()
            row = Row(name, "", error=f"{type(error).__name__}: {error}")
        print(MARK + json.dumps(asdict(row)), flush=True)
        gc.collect()


def _row(architecture: Architecture, folder: Path) -> Row:
    from specprefill.engine.support import engine_support, is_served

    path = architecture.write(folder)
    model, engine = _configurations(path)
    support = engine_support(model, engine)
    plain = path if architecture.quantisation is None else plain_folder(path)
    row = Row(architecture.name, support.mode, speculator=_speculator(plain))
    if not is_served(support):
        return row
    prompt, runs = _prompt(), RUNS
    if not support.keeps_positions:  # as text the kept tokens are a prompt of their own
        prompt = [prompt[p] for run in runs for p in range(run.start, run.stop)]
        runs = (Span(0, len(prompt)),)
    expected = reference(plain, prompt, runs, STEPS)
    with Pair(model, engine) as pair:
        alone = pair.aggregated(prompt, runs, STEPS)
        # The second time with the prefix caches of both engines.
        handed = [pair.handed_over(prompt, runs, STEPS) for _ in range(2 * support.hands_over)]
    row = replace(row, parity=alone == expected)
    if support.hands_over:
        row = replace(row, handoff=handed == [expected] * 2)
    if support.mode is Mode.WINDOWED:
        row = replace(row, window_binds=_answer_without_window(path, prompt) != expected)
    if not row.parity or row.handoff is False:
        row = replace(row, error=f"{alone} alone, {handed} handed over, {expected} expected")
    return row


def _speculator(path: Path) -> str:
    from specprefill.config import SpeculatorConfig
    from specprefill.core.errors import UnsupportedModel
    from specprefill.speculator.draft import load_draft

    try:
        load_draft(SpeculatorConfig(path=str(path), device="cpu"))
    except UnsupportedModel as refused:
        return str(refused).removeprefix("speculator: ").removeprefix(f"{path} ")
    return "scores"


def _answer_without_window(path: Path, prompt: Sequence[int]) -> list[int]:
    """Return transformers' answer where every layer sees all kept tokens."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    for key in ("sliding_window", "attention_chunk_size"):
        if config.get(key) is not None:
            config[key] = LENGTH
    file.write_text(json.dumps(config))
    return reference(path, prompt, RUNS, STEPS)


def _configurations(path: Path) -> tuple[Any, Any]:
    from specprefill.config import EngineConfig, MainModel

    return (
        MainModel(path=str(path), dtype="float32", max_model_len=2048),
        EngineConfig(
            block_size=BLOCK_SIZE,
            kv_cache_memory_bytes=32 << 20,
            enforce_eager=True,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=4,
        ),
    )


def _prompt() -> list[int]:
    import random

    rng = random.Random(5)
    return [rng.randrange(10, 1000) for _ in range(PROMPT)]


def reference(path: Path, prompt: Sequence[int], runs: Sequence[Span], steps: int) -> list[int]:
    """Return transformers' greedy answer to the kept tokens at explicit positions.

    The masks are the model's own: a window or chunk counts the keys in the cache, which are the
    kept tokens, as it counts the keys of a whole prompt.
    """
    import torch
    import transformers
    from transformers import AutoConfig, DynamicCache

    config = AutoConfig.from_pretrained(path)
    kind = getattr(transformers, config.architectures[0])
    # Eager: the others leave out what they do not support, such as soft caps.
    model = kind.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    positions = [p for run in runs for p in range(run.start, run.stop)]
    ids, tokens = [prompt[p] for p in positions], []
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for step in range(steps):
            logits = model(
                input_ids=torch.tensor([ids]),
                position_ids=torch.tensor([positions]),
                past_key_values=cache,
                use_cache=True,
            ).logits
            tokens.append(int(logits[0, -1].argmax()))
            ids, positions = tokens[-1:], [len(prompt) + step]
    return tokens


class Pair:
    """A prefill and a decode engine in this process, stepped by the caller."""

    def __init__(self, model: Any, engine: Any) -> None:
        self._model, self._engine = model, engine
        self._count = 0
        self._connectors: dict[int, Any] = {}

    def __enter__(self) -> Pair:
        from specprefill.engine.args import Role

        self._prefill = self._started(Role.PREFILL)
        self._decode = self._started(Role.DECODE)
        return self

    def __exit__(self, *_: object) -> None:
        for engine in (self._decode, self._prefill):
            self._enter(engine)
            engine.engine_core.shutdown()

    def _started(self, role: Any) -> Any:
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        from specprefill.config import KvConfig
        from specprefill.engine.args import engine_args, vllm_config

        kv = KvConfig(
            host="127.0.0.1",
            carrier="grpc",
            max_held_bytes=64 << 20,
            lease_s=300.0,
            pull_timeout_s=60.0,
        )
        config = vllm_config(engine_args(self._model, self._engine, kv, role))
        kv_transfer_state._KV_CONNECTOR_AGENT = None
        engine = LLMEngine.from_vllm_config(
            config, usage_context=UsageContext.OPENAI_API_SERVER, disable_log_stats=True
        )
        self._connectors[id(engine)] = kv_transfer_state._KV_CONNECTOR_AGENT
        return engine

    def _enter(self, engine: Any) -> None:
        """Make `engine` the one whose worker's connector vLLM finds: it knows one a process."""
        kv_transfer_state._KV_CONNECTOR_AGENT = self._connectors[id(engine)]

    def aggregated(self, prompt: Sequence[int], runs: Sequence[Span], steps: int) -> list[int]:
        """Return one engine's answer."""
        return self._answer(self._prefill, prompt, runs, steps, {}).outputs[0].token_ids

    def handed_over(self, prompt: Sequence[int], runs: Sequence[Span], steps: int) -> list[int]:
        """Return the decode engine's answer with KV of the prefill engine."""
        from specprefill.engine.params import (
            REPLAY,
            consume_args,
            handed_in,
            produce_args,
            pulled_in,
        )

        lease = Lease(f"lease-{self._count}", "secret")
        first = self._answer(self._prefill, prompt, runs, 1, produce_args(lease))
        ticket = handed_in(first.kv_transfer_params)
        assert ticket is not None
        extra = {**consume_args(ticket), REPLAY: list(first.outputs[0].token_ids)}
        last = self._answer(self._decode, prompt, runs, steps, extra)
        outcome = pulled_in(last.kv_transfer_params)
        assert outcome is not None
        assert not outcome.recomputed
        return last.outputs[0].token_ids

    def _answer(
        self,
        engine: Any,
        prompt: Sequence[int],
        runs: Sequence[Span],
        steps: int,
        extra: dict[str, Any],
    ) -> Any:
        from vllm import SamplingParams

        from specprefill.engine.params import POSITIONS

        self._enter(engine)
        self._count += 1
        mapping = PositionMap.from_runs(tuple(runs), len(prompt))
        kept = [prompt[p] for run in runs for p in range(run.start, run.stop)]
        params = SamplingParams(
            temperature=0.0, max_tokens=steps, ignore_eos=True, detokenize=False,
            extra_args={POSITIONS: mapping.to_wire(), **extra},
        )  # fmt: skip
        engine.add_request(f"r{self._count}", {"prompt_token_ids": kept}, params)
        last = None
        while engine.has_unfinished_requests():
            for output in engine.step():
                last = output
        return last


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
