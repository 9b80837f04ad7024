"""Scores how much prompt tokens matter to the answer (Speculative Prefill, arXiv 2502.02789, 3.2).

The draft model reads the whole prompt and looks a few greedy tokens ahead. The queries of the last
prompt token and of the look-ahead tokens attend to the prompt; what they look at matters. Or those
of the prompt's last tokens do, and the draft ends with the last layer that counts (`method`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from ..config import SpeculatorConfig
from ..core.errors import UnsupportedModel
from ..core.selection import Scores
from ..core.types import Reason, Span
from .draft import Draft, feed_token, load_draft, read_chunk
from .method import PAPER, QUESTION_TOKENS, Heads, Queries, Reduction, ScoringMethod
from .prefix_memory import PrefixCache
from .rating import rate
from .reading import Block, Reading
from .translation import Prompt, SamePrompt, Translator, load_translator

BLOCK_TOKENS = 64  # of the prefix cache
CHUNK_TOKENS = {True: 2048, False: 512}  # on a GPU, and on a CPU
CPU_MEMORY_BYTES = 1 << 30  # for KV, where the configuration sets none
GPU_MEMORY_SHARE = 0.7  # of what the loaded model leaves free


def load_scorer(config: SpeculatorConfig, pool_tokens: int, main_path: str | None = None) -> Scorer:
    """Load the draft model; with `main_path`, prompts are in the tokens of that model.

    Raises UnsupportedModel when the models cannot work together.
    """
    torch.set_num_threads(config.threads)
    translator = None if main_path is None else load_translator(main_path, config.path)
    draft = load_draft(config)
    method = ScoringMethod(
        _check_heads(config.score_heads, draft),
        Reduction(config.score_reduction),
        Queries(config.score_queries),
    )
    if not method.looks_ahead:
        draft = draft.up_to(max(method.heads or draft.layout.scoring_layers))
    return Scorer(
        draft,
        config.look_ahead,
        config.prefill_chunk_tokens or CHUNK_TOKENS[draft.layout.device.type == "cuda"],
        pool_tokens,
        _memory_bytes(config, draft),
        method,
        translator,
    )


def _check_heads(heads: Heads | None, draft: Draft) -> Heads | None:
    """Raise UnsupportedModel where the draft model has no such layer or head."""
    text = draft.model.config.get_text_config(decoder=True)
    for layer, chosen in (heads or {}).items():
        if layer not in draft.layout.layers:
            raise UnsupportedModel(f"speculator.score_heads: there is no layer {layer}")
        if layer not in draft.layout.scoring_layers:
            raise UnsupportedModel(
                f"speculator.score_heads: layer {layer} sees a window of the prompt; choose among "
                f"{', '.join(map(str, draft.layout.scoring_layers))}"
            )
        if not chosen or not all(0 <= head < text.num_attention_heads for head in chosen):
            raise UnsupportedModel(
                f"speculator.score_heads: layer {layer} has heads 0 to "
                f"{text.num_attention_heads - 1}, not {list(chosen)}"
            )
    return heads


def _memory_bytes(config: SpeculatorConfig, draft: Draft) -> int:
    """Return the configured budget for KV, or one that this machine can give."""
    if config.kv_memory_bytes is not None:
        return config.kv_memory_bytes
    if draft.layout.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(draft.layout.device)
        return int(free * GPU_MEMORY_SHARE)
    return CPU_MEMORY_BYTES


def never_abandoned(_reading: Reading) -> bool:
    """Return False: nobody abandons the request."""
    return False


class Scorer:
    """Scores prompts in three steps: read them, look ahead together, rate each.

    KV stays within `memory_bytes`: what is being read goes first, the prefix cache has the rest.
    A scorer belongs to one thread.
    """

    def __init__(
        self,
        draft: Draft,
        look_ahead: int,
        prefill_chunk_tokens: int,
        pool_tokens: int,
        memory_bytes: int = CPU_MEMORY_BYTES,
        method: ScoringMethod = PAPER,
        translator: Translator | None = None,
        *,
        question_tokens: int | None = None,
    ) -> None:
        """Make a scorer.

        `question_tokens` of each prompt have their queries recorded; None: those that the method
        needs.
        """
        self.draft = draft
        self.method = method
        if question_tokens is None:
            question_tokens = QUESTION_TOKENS if method.asks_question else 0
        self.question_tokens = question_tokens
        self.memory_bytes = memory_bytes
        self.translator = translator  # None: both models have the same tokens
        block_bytes = BLOCK_TOKENS * draft.layout.bytes_per_token
        self.prefix: PrefixCache[Block] = PrefixCache(BLOCK_TOKENS, block_bytes, memory_bytes)
        self.look_ahead_tokens = look_ahead if method.looks_ahead else 0
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.pool_tokens = pool_tokens

    @property
    def vocabulary_size(self) -> int:
        """Size of the vocabulary that prompt token ids come from."""
        if self.translator is not None:
            return self.translator.vocabulary_size
        return self.draft.vocabulary_size

    @property
    def max_prompt_tokens(self) -> int | None:
        """The longest prompt, in draft tokens, whose look-ahead stays within its positions."""
        if self.draft.max_positions is None:
            return None
        return self.draft.max_positions - self._generated_tokens

    def refusal(self, prompt_tokens: int) -> Reason | None:
        """Return why a prompt of this many draft tokens cannot be scored; None: it can."""
        longest = self.max_prompt_tokens
        if longest is not None and prompt_tokens > longest:
            return Reason.PROMPT_TOO_LONG_FOR_SPECULATOR
        if self.kv_bytes(prompt_tokens) > self.memory_bytes:
            return Reason.PROMPT_TOO_LARGE_FOR_SPECULATOR
        return None

    def kv_bytes(self, prompt_tokens: int, echo_tokens: int = 0) -> int:
        """Return the bytes of a prompt's KV while it is scored, and of what is read behind it."""
        return self._capacity(prompt_tokens, echo_tokens) * self.draft.layout.bytes_per_token

    def echo_of(self, prompt: Prompt, asked: Sequence[Span]) -> tuple[int, ...]:
        """Return the draft's tokens of what is asked, as many as a question has and as there is
        room for behind the prompt, in positions and in memory.
        """
        places = self.memory_bytes // self.draft.layout.bytes_per_token
        if self.draft.max_positions is not None:
            places = min(places, self.draft.max_positions)
        room = min(QUESTION_TOKENS, places - len(prompt.prompt))
        return prompt.parts(asked)[-room:] if room > 0 else ()

    def score(self, prompts: Sequence[tuple[int, ...]]) -> list[Scores]:
        """Return [N] float32 for each prompt, in order."""
        asked = [self.translate(prompt) for prompt in prompts]
        with self.open_readings([each.prompt for each in asked]) as readings:
            self.read(readings)
            self.look_ahead(readings)
            rated = [self.rate(reading) for reading in readings]
        return [each.scores(scores) for each, scores in zip(asked, rated, strict=True)]

    def translate(self, prompt: tuple[int, ...]) -> Prompt:
        """Return the prompt as the draft reads it. Safe on any thread."""
        return SamePrompt(prompt) if self.translator is None else self.translator.translate(prompt)

    @contextmanager
    def open_readings(
        self,
        prompts: Sequence[tuple[int, ...]],
        salts: Sequence[str | None] | None = None,
        echoes: Sequence[tuple[int, ...]] | None = None,
    ) -> Iterator[list[Reading]]:
        """Open readings of the prompts, filled from the prefix cache; free them on exit.

        `salts` and `echoes` have one for each prompt; None: none of them has one.

        The prefix cache makes room. The caller ensures that all fit into `memory_bytes`.
        """
        salts = salts or [None] * len(prompts)
        echoes = echoes or [()] * len(prompts)
        each = list(zip(prompts, salts, echoes, strict=True))
        self.make_room(sum(self.kv_bytes(len(prompt), len(echo)) for prompt, _, echo in each))
        readings = [self.open_reading(prompt, salt, echo) for prompt, salt, echo in each]
        try:
            yield readings
        finally:
            for reading in readings:
                reading.release()

    def make_room(self, open_bytes: int) -> None:
        """Leave `open_bytes` to readings: the prefix cache forgets what is beyond the rest."""
        self.prefix.shrink(self.memory_bytes - open_bytes)

    def remember(self, readings: Sequence[Reading], open_bytes: int | None = None) -> None:
        """Keep the prompts' KV in the prefix cache, in the memory that readings leave free.

        `open_bytes`: of all that are open; None: there are no others.
        """
        if open_bytes is None:
            open_bytes = sum(self.kv_bytes(len(each.prompt), len(each.echo)) for each in readings)
        free = self.memory_bytes - open_bytes
        for reading in readings:
            with torch.inference_mode():
                self.prefix.add(reading.prompt, free, partial(_block, reading), reading.salt)

    def open_reading(
        self, prompt: tuple[int, ...], salt: str | None, echo: tuple[int, ...] = ()
    ) -> Reading:
        """Return a reading, filled from the prefix cache; its memory has been made room for.

        `echo`: of `echo_of`.
        """
        reading = Reading(
            prompt,
            self.draft.layout,
            self._capacity(len(prompt), len(echo)),
            salt,
            question_tokens=self.question_tokens,
            looks_ahead=self.method.looks_ahead,
            echo=echo,
        )
        known = self.prefix.find_longest(prompt, salt)
        with torch.inference_mode():
            reading.restore(known[: reading.question_start // BLOCK_TOKENS])
        return reading

    @property
    def _generated_tokens(self) -> int:
        """The most tokens that are generated and fed; the first query is the last token's."""
        return max(0, self.look_ahead_tokens - 1)

    def _capacity(self, prompt_tokens: int, echo_tokens: int) -> int:
        return prompt_tokens + max(self._generated_tokens, echo_tokens)

    def read(
        self, readings: Sequence[Reading], is_abandoned: Callable[[Reading], bool] = never_abandoned
    ) -> list[Reading]:
        """Store the keys of all prompts up to their last token; returns those that were read.

        Prompts are packed into passes of `prefill_chunk_tokens`, which bounds memory. An
        abandoned one is released between two passes.
        """
        open_readings = list(readings)
        while True:
            for reading in [each for each in open_readings if is_abandoned(each)]:
                open_readings.remove(reading)
                reading.release()
            if not self.read_pass(open_readings):
                return open_readings

    def read_pass(self, readings: Sequence[Reading]) -> bool:
        """Store the keys of the next `prefill_chunk_tokens` of the prompts, in their order.

        Return False if all of them were read.
        """
        parts = self._next_parts(readings)
        if parts:
            with torch.inference_mode():
                read_chunk(self.draft.model, parts, self.draft.quick)
        return bool(parts)

    def wait_for_device(self) -> None:
        """Wait until the device has computed what it was given.

        Otherwise all passes of a long prompt would lie in its queue, before any later prompt's.
        """
        if self.draft.layout.device.type == "cuda":
            torch.cuda.current_stream(self.draft.layout.device).synchronize()

    def _next_parts(self, readings: Sequence[Reading]) -> list[tuple[Reading, int]]:
        """Return the readings of the next pass, and the number of tokens of each."""
        parts, room = [], self.prefill_chunk_tokens
        for reading in readings:
            tokens = min(room, reading.unread_tokens)
            if tokens > 0:
                parts.append((reading, tokens))
            room -= tokens
        return parts

    def look_ahead(self, readings: Sequence[Reading]) -> None:
        """Feed the last prompt token, generate greedily, and record each fed token's query.

        All requests take part in one batch; none where the method needs no answer. An answer that
        ends stops looking ahead: no end token is fed, so no query comes from one. Behind the prompt
        its echo is read then, in place of what was generated.
        """
        live = list(readings)
        for _ in range(self.look_ahead_tokens):
            if not live:
                break
            with torch.inference_mode():
                logits = feed_token(self.draft.model, live, self.draft.quick).float()
                certainties, following = logits.softmax(dim=-1).max(dim=-1)
            results = zip(live, following.tolist(), certainties.tolist(), strict=True)
            for reading, token, certainty in results:
                reading.next_token = token
                reading.certainties.append(certainty)
            live = [each for each in live if each.next_token not in self.draft.eos_ids]
        self._read_echoes(readings)

    def _read_echoes(self, readings: Sequence[Reading]) -> None:
        parts = [(each, len(each.echo)) for each in readings if each.echo]
        for reading, _ in parts:
            reading.forget_look_ahead()
        if parts:
            with torch.inference_mode():
                read_chunk(self.draft.model, parts, self.draft.quick)

    def follow(self, reading: Reading, answer: Sequence[int]) -> None:
        """Feed the last prompt token and a given answer's; record the query of each.

        The answer ends where the look-ahead would.
        """
        for token in (*answer[: self._generated_tokens], None):
            with torch.inference_mode():
                feed_token(self.draft.model, [reading], self.draft.quick)
            if token is not None:
                reading.next_token = token

    def rate(self, reading: Reading, method: ScoringMethod | None = None) -> Scores:
        """Return [N] float32; `method` None: by the scorer's own."""
        method = method or self.method
        return rate(reading, method.of_echo if reading.echo else method, self.pool_tokens)


def _block(reading: Reading, index: int) -> Block:
    return reading.block(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
