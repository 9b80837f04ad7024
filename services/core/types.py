"""The values that pass between modules: frozen, typed, free of any framework.

Those that every token makes are structs: to make or decode one costs a fraction of a dataclass's
time, and a message leaves out what is not set.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

import msgspec

from .request_spans import TraceContext


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A half-open range `[start, stop)` of token indices."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class PlanKind(enum.StrEnum):
    """The service's decision about a prompt."""

    PRUNE = "prune"
    DENSE = "dense"


class PromptMode(enum.StrEnum):
    """The form in which the main model gets what is kept of a prompt."""

    POSITIONS = "positions"  # the kept tokens, at their original positions
    TEXT = "text"  # the kept text, tokenised again, at consecutive positions
    DENSE = "dense"  # all of the prompt


class Reason(enum.StrEnum):
    """The reason for a plan. The caller sees it in every response."""

    ASKED = "asked"  # the caller set a keep rate or switched pruning on
    DEFAULT = "default"  # the deployment's default keep rate
    AUTO = "auto"  # the keep rate that the scores chose
    CARRIED_OVER = "carried_over"  # what the conversation's last turn kept, and the new part
    EXTENDED = "extended"  # the same, and dropped text that the new question needs
    RESELECTED = "reselected"  # chosen anew: what the last turn kept does not serve this one
    ASKED_OFF = "asked_off"  # the caller switched pruning off
    DISABLED = "disabled"  # the deployment prunes only on request
    DENSE_MODE = "dense_mode"  # the model, or selection.mode, lets no prompt be pruned
    KEEP_IS_ONE = "keep_is_one"
    SHORT_PROMPT = "short_prompt"
    LOAD = "load"  # a lower keep rate than the default's, so that many get their answers in time
    NO_GAIN = "no_gain"  # a dense prefill is expected to give the first token sooner
    PROMPT_LOGPROBS = "prompt_logprobs"  # they need every prompt token computed
    PROTECTED_SPANS = "protected_spans"  # protection left nothing to drop
    FLAT_SCORES = "flat_scores"  # the speculator saw no difference between chunks
    SPREAD_SCORES = "spread_scores"  # the important tokens are spread over too much of the prompt
    UNCERTAIN = "uncertain"  # scores are spread out, and the speculator is unsure of its look-ahead
    PROMPT_TOO_LONG_FOR_SPECULATOR = "prompt_too_long_for_speculator"
    PROMPT_TOO_LARGE_FOR_SPECULATOR = "prompt_too_large_for_speculator"  # beyond its KV memory
    SPECULATOR_UNAVAILABLE = "speculator_unavailable"
    SPECULATOR_TIMEOUT = "speculator_timeout"
    SPECULATOR_OVERLOADED = "speculator_overloaded"
    UNSURE_ANSWER = "unsure_answer"  # pruned, the main model was unsure how to begin its answer
    SPECULATOR_UNFIT = "speculator_unfit"  # its self-test failed: it drops what answers need


# The prompt was sent to the speculator and came back without scores.
UNSCORED = (
    Reason.SPECULATOR_UNAVAILABLE,
    Reason.SPECULATOR_TIMEOUT,
    Reason.SPECULATOR_OVERLOADED,
)


@dataclass(frozen=True, slots=True)
class TtftEstimate:
    """Seconds to the first token, by either plan, as far as the service can estimate."""

    dense_s: float
    prune_s: float
    is_trial: bool = False  # pruned whatever is expected: the expectation may be out of date
    remembered_tokens: int = 0  # of the prompt, by the speculator
    dense_cached_tokens: int = 0  # of what either plan sends, by an engine
    prune_cached_tokens: int = 0

    def for_plan(self, kind: PlanKind) -> float:
        """Return the expected seconds to the first token of `kind`."""
        return self.prune_s if kind is PlanKind.PRUNE else self.dense_s


@dataclass(frozen=True, slots=True)
class KeepRange:
    """The keep rates that the scores choose from, in (0, 1]."""

    floor: float
    ceiling: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Prune to `keep` of the prompt, or prefill all of it; always with a reason."""

    kind: PlanKind
    reason: Reason
    keep: float = 1.0  # keep rate in (0, 1]; of no meaning until the scores chose it from `within`
    within: KeepRange | None = None  # not None: the scores choose the keep rate
    expected: TtftEstimate | None = None  # None: not estimated
    mode: PromptMode = PromptMode.POSITIONS  # if tokens are dropped
    lowered: bool = False  # admission lowered the rate, or its ceiling

    @property
    def highest_keep(self) -> float:
        """The highest keep rate that the plan allows."""
        return self.keep if self.within is None else self.within.ceiling


@dataclass(frozen=True, slots=True)
class Controls:
    """A caller's settings in the `specprefill` field. None means: the service decides."""

    prune: bool | None = None
    keep: float | None = None  # (0, 1]
    floor: float | None = None  # (0, 1]: the service never keeps less
    protect: tuple[str, ...] = ()  # substrings of the prompt that must survive
    ceiling: float | None = None  # (0, 1]: when pruning, the service never keeps more
    auto: bool = False  # the scores choose the keep rate, from floor to ceiling
    mode: PromptMode | None = None  # how to send what is kept: positions or text


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What vLLM's server knows of an answer's reasoning: a grammar binds only what follows it."""

    has_ended: bool | None  # before the first output token; None: the engine finds out
    parser_kwargs: bytes | None  # of vLLM's reasoning parser, in msgpack: opaque, as `sampling`


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to answer.

    `sampling` is the engine's own sampling parameters in msgpack: opaque to every module
    but the engines, so that no option of theirs is lost on the way.
    """

    request_id: str
    prompt: tuple[int, ...]  # [N] token ids of the main model's tokenizer
    sampling: bytes
    samples: int = 1  # OpenAI's `n`
    protected: tuple[Span, ...] = ()  # token spans that must survive pruning
    asked: tuple[Span, ...] = ()  # the question and the call, where the prompt's end is neither
    opening_tokens: int = 0  # the last ones: the template's behind all contents, to open the answer
    controls: Controls = field(default_factory=Controls)
    prompt_logprobs: bool = False
    plan: Plan | None = None  # None: not planned yet, see `Planner.with_plan`
    digests: tuple[int, ...] | None = None  # of the prompt, see `prefix_digests`
    adapter: str | None = None  # the LoRA adapter that answers; None: the model as it is
    cache_salt: str | None = None  # only requests of the same salt find what was computed for it
    session: str | None = None  # requests of the same one share a beginning, and replicas
    hold_back_chars: int = 0  # text that stop strings may still take back (0: none)
    timeout_s: float = 300.0
    priority: int = 0
    key: str | None = None  # the owner of the fair share that it uses; None: a share of its own
    wants_scores: bool = False  # the selection is to carry the scores behind it
    wants_sureness: bool = False  # engines are to report how sure they are of the first token
    trace: TraceContext | None = None  # the span that its spans belong to; None: not traced
    reasoning: Reasoning | None = None  # where a grammar binds the answer, if it is known


@dataclass(frozen=True, slots=True)
class ChunkScores:
    """The scores that chunks were chosen by; with the protected tokens, enough to choose again."""

    worth: tuple[float, ...]  # [chunks], of what keeping each would add; 0: all of it is protected
    certainty: float  # of the draft model's least sure look-ahead token, in [0, 1]
    is_flat: bool  # no chunk stands out, or a score is not finite: the prompt is not pruned
    starts: tuple[int, ...]  # [chunks], the first token of each


@dataclass(frozen=True, slots=True)
class Selection:
    """The prompt tokens that go to the main model, as runs of original positions.

    `runs` are disjoint, in the order of their slots; none is continued by the next. They are
    sorted, except that an `EXTENDED` selection has text that earlier turns had dropped behind what
    those kept. A dense plan has the one run `[0, N)`.
    """

    prompt_tokens: int  # N
    runs: tuple[Span, ...]
    plan: Plan
    queue_s: float = 0.0  # waited for the speculator
    speculate_s: float = 0.0  # computed in the speculator
    remembered_tokens: int = 0  # prompt tokens that the speculator had read before
    scores: ChunkScores | None = None  # where the request wants them, and there are any
    text: tuple[int, ...] | None = None  # text mode: the kept text's token ids, with its marks
    carried_tokens: int = 0  # of the first kept tokens: an earlier turn has them in the same slots
    discarded_s: float = 0.0  # of prefilling for an answer that was not sent

    @property
    def kept_tokens(self) -> int:
        return sum(len(run) for run in self.runs)

    @property
    def engine_tokens(self) -> int:
        """The length of the prompt that the engines compute."""
        return self.kept_tokens if self.text is None else len(self.text)

    @property
    def mode(self) -> PromptMode:
        """The form in which the engines get the prompt."""
        return PromptMode.DENSE if self.kept_tokens == self.prompt_tokens else self.plan.mode

    @property
    def keep_rate(self) -> float:
        return self.kept_tokens / self.prompt_tokens

    def engine_prompt(self, prompt: tuple[int, ...]) -> list[int]:
        """Return the token ids that the engines compute. `prompt` is the caller's, `[N]`."""
        if self.text is not None:
            return list(self.text)
        kept: list[int] = []
        for run in self.runs:
            kept += prompt[run.start : run.stop]
        return kept

    def dropped_token_ids(self, prompt: tuple[int, ...]) -> list[int]:
        """Return the token ids that are not kept, in the prompt's order. `prompt` is `[N]`."""
        in_order = sorted(self.runs, key=lambda run: run.start)  # slots may have another one
        starts = (0, *(run.stop for run in in_order))
        stops = (*(run.start for run in in_order), len(prompt))
        dropped: list[int] = []
        for start, stop in zip(starts, stops, strict=True):
            dropped += prompt[start:stop]
        return dropped


def dense_selection(prompt_tokens: int, reason: Reason) -> Selection:
    """Return the selection that keeps the whole prompt for `reason`."""
    return keep_all(prompt_tokens, Plan(PlanKind.DENSE, reason))


def keep_all(prompt_tokens: int, plan: Plan) -> Selection:
    """Return the selection that keeps the whole prompt, with `plan`."""
    return Selection(prompt_tokens, (Span(0, prompt_tokens),), plan)


def whole_prompt(selection: Selection, reason: Reason) -> Selection:
    """Return a pruned selection with all of the prompt in place of what was kept."""
    plan = Plan(PlanKind.DENSE, reason, expected=selection.plan.expected)
    runs = (Span(0, selection.prompt_tokens),)
    return replace(selection, runs=runs, plan=plan, text=None, carried_tokens=0)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One candidate of one output position."""

    token_id: int
    logprob: float
    rank: int | None
    text: str | None


class Chunk(msgspec.Struct, frozen=True, omit_defaults=True):
    """Some output tokens of one sample, as they came out of an engine."""

    index: int  # which of the `samples`
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[tuple[TokenLogprob, ...], ...] | None = None  # one entry per token
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    cached_tokens: int = 0  # prompt tokens found in the prefill engine's prefix cache
    # [N] on a request's first chunk, if requested; the first token has none
    prompt_logprobs: tuple[tuple[TokenLogprob, ...] | None, ...] | None = None
    report: Report | None = None  # on the last chunk of a request
    # On a request's first chunk: retries, a second prefill, or stop strings held it back.
    late_by_itself: bool = False

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None


class Carrier(enum.StrEnum):
    """A way to pull a worker's KV. gRPC always works."""

    GRPC = "grpc"
    NIXL = "nixl"


@dataclass(frozen=True, slots=True)
class Lease:
    """What a prefill worker holds one request's KV cache under; `secret` authenticates."""

    id: str
    secret: str


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to pull one request's KV cache from a prefill engine.

    Its lease is time-bounded and is released exactly once. A ticket is never shown to a client.
    """

    lease: Lease
    endpoints: tuple[str, ...]  # host:port per worker of the prefill engine
    fingerprint: str  # layout of the KV; a decode engine that differs refuses the pull
    tokens: int  # k, the prompt tokens whose KV is held
    carrier: Carrier = Carrier.GRPC  # the best that every endpoint offers


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """The result of a prefill engine: the first token at once, and a ticket for the KV."""

    first: Chunk
    ticket: Ticket | None  # None: the first token ended the answer (of one sample)
    queue_s: float
    prefill_s: float
    sureness: float | None = None  # if wanted: the highest probability of any first token


Replay = tuple[tuple[int, ...], ...]  # per sample: output tokens to repeat before going on


@dataclass(frozen=True, slots=True)
class LocalPrefillTimes:
    """Times of a prompt that the decode engine computed itself: nothing was handed over."""

    queue_s: float
    prefill_s: float


class DecodeStep(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step of a decode engine's stream; the last one carries the KV transfer time."""

    chunk: Chunk
    transfer_s: float | None = None  # the part of the pull that did not overlap with prefill
    first_decode_s: float | None = None
    recomputed: bool = False  # the pull failed; the pruned prompt was prefilled here
    computed: LocalPrefillTimes | None = None  # on the last, where there was no ticket
    sureness: float | None = None  # as in PrefillResult; on a sample's first, without a ticket


class PrefilledBy(enum.StrEnum):
    """The pool whose engine computed the prompt."""

    PREFILL = "prefill"
    DECODE = "decode"  # short enough to be computed where the answer is


@dataclass(frozen=True, slots=True)
class Report:
    """The report of a finished request, part of its response. Times are seconds."""

    plan: PlanKind
    reason: Reason
    prompt_tokens: int
    kept_tokens: int
    keep_rate: float
    queue_s: float
    speculate_s: float
    prefill_s: float
    transfer_s: float  # the part of the KV transfer that did not overlap with prefill
    first_decode_s: float
    ttft_s: float  # until the first token left the pipeline
    recomputed: bool = False
    cached_tokens: int = 0  # kept tokens found in the prefix cache of the engine that computed them
    expected: TtftEstimate | None = None  # the estimate behind the plan
    remembered_tokens: int = 0  # prompt tokens that the speculator had read before
    carried_tokens: int = 0  # kept tokens that an earlier turn of the conversation kept
    prefilled_by: PrefilledBy = PrefilledBy.PREFILL
    mode: PromptMode = PromptMode.POSITIONS
    text_tokens: int | None = None  # text mode: the kept text's tokens, with its marks
    retries: int = 0  # replicas that were lost under the request: others did their part
    discarded_s: float = 0.0  # of prefilling for an answer that was not sent

    @property
    def engine_tokens(self) -> int:
        """The length of the prompt that the engines computed."""
        return self.kept_tokens if self.text_tokens is None else self.text_tokens
