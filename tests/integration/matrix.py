"""One row of the table of models: an architecture, served on one model runner.

    python -m tests.integration.matrix FOLDER NAME...

Every architecture gets a prefill and a decode engine inside this one process, one after the
other, so that vLLM is imported once; a line of JSON is printed for each. The engines' workers,
connector and scheduler are those of a deployment.
"""

from __future__ import annotations

from ..no_vision import vision_modules

# isort: split
import gc
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.model_executor.models import registry

from specprefill.core.model_modes import Mode, Support
from specprefill.core.positions import PositionMap
from specprefill.core.types import Lease, Span

from .quantised import Quantisation, plain_folder
from .tiny_architectures import BY_NAME, LENGTH, WINDOW, Architecture

BLOCK_SIZE = 32
CHUNK = 256  # tokens of a step: the longest prompt is prefilled in several
PROMPT = 900
RUNS = (Span(0, 40), Span(100, 229), Span(333, 600), Span(880, 900))
STEPS = 8
AT_ONCE = 3  # prompts that are pulled together
MARK = "@row "  # before a line of JSON


@dataclass(frozen=True)
class Row:
    """What one architecture did on one runner."""

    name: str
    mode: str
    parity: bool | None = None  # one engine equals transformers at the kept positions
    handoff: bool | None = None  # and so does a decode engine that pulled the KV
    at_once: bool | None = None  # and that pulls several prompts which end a window with a block
    window_binds: bool | None = None  # transformers answers otherwise without the window
    speculator: str = ""  # whether it can be one, or why not
    error: str = ""


@dataclass(frozen=True)
class Prepared:
    """An architecture's model, and what transformers answers with it."""

    path: Path
    support: Support
    prompt: Sequence[int]
    runs: Sequence[Span]
    expected: Sequence[int]
    without_window: Sequence[int] | None
    speculator: str


def main(folder: Path, names: Sequence[str]) -> None:
    """Print a row for each name."""
    sys.modules.update(vision_modules())
    registry._run_in_subprocess = lambda inspect: inspect()  # else seconds for each class
    # All references first: vLLM changes transformers' classes where it runs them itself.
    prepared = {
        name: _attempted(lambda name=name: _prepare(BY_NAME[name], folder)) for name in names
    }
    for name, found in prepared.items():
        row = found
        if isinstance(found, Prepared):
            row = _attempted(lambda found=found, name=name: _row(BY_NAME[name], found))
        if isinstance(row, Exception):
            row = Row(name, "", error=f"{type(row).__name__}: {row}")
        print(MARK + json.dumps(asdict(row)), flush=True)
        gc.collect()


def _attempted(step: Callable[[], Any]) -> Any:
    """Return the step's result, or the error that ended it."""
    try:
        return step()
    except Exception as error:  # noqa: BLE001  # the row of this architecture holds it
        traceback.print_exc()
        return error


def _prepare(architecture: Architecture, folder: Path) -> Prepared:
    from specprefill.engine.support import engine_support

    path = architecture.write(folder)
    support = engine_support(*_configurations(path, architecture.quantisation))
    plain = path if architecture.quantisation is None else plain_folder(path)
    prompt, runs = _prompt(), RUNS
    if not support.keeps_positions:  # as text the kept tokens are a prompt of their own
        prompt = [prompt[p] for run in runs for p in range(run.start, run.stop)]
        runs = (Span(0, len(prompt)),)
    expected = reference(plain, prompt, runs, STEPS)
    windowed = support.mode is Mode.WINDOWED
    without_window = _answer_without_window(path, prompt) if windowed else None
    return Prepared(path, support, prompt, runs, expected, without_window, _speculator(plain))


def _row(architecture: Architecture, found: Prepared) -> Row:
    from specprefill.engine.support import is_served

    row = Row(architecture.name, found.support.mode, speculator=found.speculator)
    if not is_served(found.support):
        return row
    prompt, runs, hands_over = found.prompt, found.runs, found.support.hands_over
    configurations = _configurations(found.path, architecture.quantisation)
    with Pair(*configurations, hands_over=hands_over) as pair:
        alone = pair.aggregated(prompt, runs, STEPS)
        # The second time with the prefix caches of both engines.
        handed = [pair.handed_over(prompt, runs, STEPS) for _ in range(2 * hands_over)]
        at_once = pair.equals_at_once() if hands_over and found.without_window else None
    if architecture.quantisation is None:  # else in bfloat16, where rounding decides
        row = replace(row, parity=alone == found.expected)
    if hands_over:
        row = replace(row, handoff=handed == [alone] * 2, at_once=at_once)
    if found.without_window is not None:
        row = replace(row, window_binds=found.without_window != found.expected)
    if False in (row.parity, row.handoff):
        row = replace(row, error=f"{alone} alone, {handed} handed over, {found.expected} expected")
    return row


def _speculator(path: Path) -> str:
    from specprefill.config import SpeculatorConfig
    from specprefill.core.errors import UnsupportedModel
    from specprefill.speculator.draft import load_draft

    try:
        load_draft(SpeculatorConfig(path=str(path), device="cpu"))
    except UnsupportedModel as refused:
        return (
            str(refused)
            .removeprefix("speculator: ")
            .removeprefix(f"{path} ")
            .partition(" <class")[0]
        )
    return "scores"


def _answer_without_window(path: Path, prompt: Sequence[int]) -> list[int]:
    """Return transformers' answer where every layer sees all kept tokens."""
    file = path / "config.json"
    text = file.read_text()
    config = json.loads(text)
    for key in ("sliding_window", "attention_chunk_size"):
        if config.get(key) is not None:
            config[key] = LENGTH
    file.write_text(json.dumps(config))
    answer = reference(path, prompt, RUNS, STEPS)
    file.write_text(text)
    return answer


def _configurations(path: Path, quantisation: Quantisation | None) -> tuple[Any, Any]:
    from specprefill.config import EngineConfig, MainModel

    dtype = "float32" if quantisation is None else "bfloat16"  # vLLM's kernels have no other
    return (
        MainModel(path=str(path), dtype=dtype, max_model_len=2048),
        EngineConfig(
            block_size=BLOCK_SIZE,
            kv_cache_memory_bytes=32 << 20,
            enforce_eager=True,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=4,
        ),
    )


def _prompt(tokens: int = PROMPT, seed: int = 5) -> list[int]:
    import random

    rng = random.Random(seed)
    return [rng.randrange(10, 1000) for _ in range(tokens)]


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

    def __init__(self, model: Any, engine: Any, *, hands_over: bool) -> None:
        self._model, self._engine, self._hands_over = model, engine, hands_over
        self._count = 0
        self._connectors: dict[int, Any] = {}

    def __enter__(self) -> Pair:
        from specprefill.engine.args import Role

        self._prefill = self._started(Role.PREFILL)
        self._decode = self._started(Role.DECODE) if self._hands_over else None
        return self

    def __exit__(self, *_: object) -> None:
        for engine in (self._decode, self._prefill):
            if engine is not None:
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
        config = vllm_config(
            engine_args(self._model, self._engine, kv, role, hands_over=self._hands_over)
        )
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
        ticket, extra = self._prefilled(prompt, runs)
        last = self._answer(self._decode, prompt, runs, steps, extra)
        self._check_pulled(last, ticket)
        return last.outputs[0].token_ids

    def equals_at_once(self) -> bool:
        """Return True if prompts that are pulled together are answered as by one engine.

        At their length the last token's window begins with the last token of a block.
        """
        length = WINDOW - 1 + BLOCK_SIZE
        runs = (Span(0, length),)
        prompts = [_prompt(length, seed) for seed in range(AT_ONCE)]
        wanted = [self._answer(self._prefill, prompt, runs, STEPS, {}) for prompt in prompts]
        prefilled = [self._prefilled(prompt, runs) for prompt in prompts]
        names = [
            self._ask(self._decode, prompt, runs, STEPS, extra)
            for prompt, (_, extra) in zip(prompts, prefilled, strict=True)
        ]
        outputs = self._run(self._decode)
        for name, (ticket, _) in zip(names, prefilled, strict=True):
            self._check_pulled(outputs[name], ticket)
        return all(
            _differ_by(want, outputs[name]) < 1e-3 for want, name in zip(wanted, names, strict=True)
        )

    def _prefilled(self, prompt: Sequence[int], runs: Sequence[Span]) -> tuple[Any, dict[str, Any]]:
        """Return a ticket for the prompt's KV, and the decode engine's arguments with it."""
        from specprefill.engine.params import REPLAY, consume_args, handed_in, produce_args

        lease = Lease(f"lease-{self._count}", "secret")
        first = self._answer(self._prefill, prompt, runs, 1, produce_args(lease))
        ticket = handed_in(first.kv_transfer_params)
        assert ticket is not None
        return ticket, {**consume_args(ticket), REPLAY: list(first.outputs[0].token_ids)}

    def _check_pulled(self, last: Any, ticket: Any) -> None:
        from specprefill.engine.params import pulled_in

        outcome = pulled_in(last.kv_transfer_params)
        if outcome is None:  # its own cache had all that is handed over
            assert last.num_cached_tokens >= ticket.tokens
        else:
            assert not outcome.recomputed

    def _answer(
        self,
        engine: Any,
        prompt: Sequence[int],
        runs: Sequence[Span],
        steps: int,
        extra: dict[str, Any],
    ) -> Any:
        name = self._ask(engine, prompt, runs, steps, extra)
        return self._run(engine)[name]

    def _ask(
        self,
        engine: Any,
        prompt: Sequence[int],
        runs: Sequence[Span],
        steps: int,
        extra: dict[str, Any],
    ) -> str:
        """Queue a prompt; return its name."""
        from vllm import SamplingParams

        from specprefill.engine.params import POSITIONS

        self._enter(engine)
        self._count += 1
        mapping = PositionMap.from_runs(tuple(runs), len(prompt))
        kept = [prompt[p] for run in runs for p in range(run.start, run.stop)]
        params = SamplingParams(
            temperature=0.0, max_tokens=steps, ignore_eos=True, detokenize=False, logprobs=1,
            extra_args={POSITIONS: mapping.to_wire(), **extra},
        )  # fmt: skip
        name = f"r{self._count}"
        engine.add_request(name, {"prompt_token_ids": kept}, params)
        return name

    def _run(self, engine: Any) -> dict[str, Any]:
        """Run the engine until nothing waits; return the last output of each name."""
        last = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                last[output.request_id] = output
        return last


def _differ_by(one: Any, other: Any) -> float:
    """Return the largest difference of the tokens' log probabilities; infinite for other tokens."""
    mine, yours = (each.outputs[0] for each in (one, other))
    if list(mine.token_ids) != list(yours.token_ids):
        return float("inf")
    return max(
        abs(a[token].logprob - b[token].logprob)
        for token, a, b in zip(mine.token_ids, mine.logprobs, yours.logprobs, strict=True)
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
