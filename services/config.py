"""The deployment's configuration: the `args` of a Serve application, validated.

Serve ignores unknown YAML keys in silence; these models refuse them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

Rate = Annotated[float, Field(gt=0.0, le=1.0)]
Seconds = Annotated[float, Field(gt=0.0)]

_REASONING_ARGS = ("reasoning_parser", "reasoning_parser_plugin")


class Strict(BaseModel):
    """Frozen, and an unknown field is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class MainModel(Strict):
    """The model that answers. Prefill and decode load the same one."""

    path: str  # a folder or a hub name
    name: str | None = None  # the name clients use; the path if absent
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"  # dummy: random weights, for benchmarks
    max_model_len: PositiveInt | None = None
    trust_remote_code: bool = False
    # LoRA adapters: folders, on every node, by the names that clients use as `model`
    adapters: dict[str, str] = {}

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if self.served_name in self.adapters:
            raise ValueError(f"adapters: {self.served_name} is the name of the model itself")
        return self

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names that clients may use: the model's first."""
        return (self.served_name, *self.adapters)

    @property
    def served_name(self) -> str:
        return self.name if self.name is not None else self.path


class SpeculatorConfig(Strict):
    """The small model that chooses which tokens matter."""

    # What scores prompts. draft: the model of `path`. words: none; chunks are chosen by the words
    # that they share with the question, which finds what it names and not what it means.
    score_by: Literal["draft", "words"] = "draft"
    path: str = ""
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt = 1  # intra-op threads on a CPU
    random_weights: bool = False  # for benchmarks
    # Of a pass: bounds the memory of a long prompt, and how long a short one waits for it. Absent:
    # 2048 on a GPU, 512 on a CPU.
    prefill_chunk_tokens: PositiveInt | None = None
    # Keys and values at once, of prompts being scored and of those remembered for reuse. If
    # absent: 1 GiB on a CPU, most of the free memory on a GPU.
    kv_memory_bytes: PositiveInt | None = None
    score_cache_bytes: NonNegativeInt = 64 << 20  # scores of recent prompts, for exact repeats
    kept_memory_bytes: NonNegativeInt = 32 << 20  # what recent prompts kept, for their next turns
    max_batch: PositiveInt = 8
    # To fill a batch. While one is scored the next one fills by itself, so waiting rarely pays.
    max_wait_s: Annotated[float, Field(ge=0.0)] = 0.0
    # Layer -> its query heads whose attention counts; absent: all heads of all layers.
    score_heads: dict[NonNegativeInt, tuple[NonNegativeInt, ...]] | None = Field(None, min_length=1)
    # How the attention of these heads becomes one number; the maximum is the paper's, squares is
    # the mean of squares. `specprefill calibrate` finds heads, reduction and queries that keep more
    # than the paper's.
    score_reduction: Literal["maximum", "mean", "squares"] = "maximum"
    # Whose attention counts. look_ahead: the last prompt token's and that of generated ones.
    # question: that of the last 64 prompt tokens; nothing is generated, and layers behind those of
    # `score_heads` are left out. both: the mean of the two. Where a tool's results end the prompt,
    # always that of the question and the call before them.
    score_queries: Literal["look_ahead", "question", "both"] = "look_ahead"
    look_ahead: PositiveInt = 8  # the last prompt token's query plus look_ahead - 1 generated
    # Scoring a prompt is given up after `timeout_s` plus `timeout_token_s` per token.
    timeout_s: Seconds = 10.0
    timeout_token_s: Annotated[float, Field(ge=0.0)] = 2e-4
    max_queued: PositiveInt = 64  # prompts that wait in one replica; more are overload
    # At the start, generated facts show whether the model can choose. Where it cannot, prompts are
    # pruned only on request. Random weights are not tested.
    self_test: bool = True
    # The fallback for a prompt that finds the queue full, or is given up. shed: 429 with a time to
    # try again. static: pruned at the nominal rate, by the words of the query alone, which may
    # lose what the answer needs. dense: the whole prompt, which multiplies the prefill pool's load.
    on_overload: Literal["shed", "static", "dense"] = "shed"

    @model_validator(mode="after")
    def _has_a_model_or_needs_none(self) -> Self:
        if self.score_by == "draft" and not self.path:
            raise ValueError("path is missing: the draft model's folder or hub name")
        if self.score_by == "words" and self.path:
            raise ValueError(f"path ({self.path}) must be absent with score_by: words")
        return self

    @property
    def reads_with_model(self) -> bool:
        """True where a draft model scores."""
        return self.score_by == "draft"

    @property
    def is_calibrated(self) -> bool:
        """True where prompts are not scored as in the paper."""
        scored = (self.score_heads, self.score_reduction, self.score_queries)
        return scored != (None, "maximum", "look_ahead")


class SelectionConfig(Strict):
    """The share of a prompt that is kept, and the tokens that always are."""

    enabled: bool = True  # False: prune only when a request asks
    # How the main model gets what is kept. positions: the kept tokens at their original positions.
    # text: the kept text, tokenised again, at consecutive positions. dense: nothing is ever
    # dropped. auto: the first of these that the model can.
    mode: Literal["auto", "positions", "text", "dense"] = "auto"
    # Text mode: the longest prompt with its answer, before anything is dropped. What is kept must
    # fit into model.max_model_len: the limit of every other prompt, and of all prompts if absent.
    max_text_mode_len: PositiveInt | None = None
    # What stands in kept text where something was dropped. Line breaks keep what is cut on both
    # sides from being read as one word or sentence; the dots are how writers mark an omission.
    gap_mark: Annotated[str, Field(min_length=1, max_length=64)] = "\n...\n"
    keep: Rate | Literal["auto"] = 0.3  # default keep rate; auto: the scores choose
    floor: Rate = 0.05  # of the rates that the scores choose from
    ceiling: Rate = 1.0
    # Below this probability of its least sure look-ahead token, the speculator counts as unsure;
    # where the scores choose the rate, much more is then kept, or all.
    least_certainty: Annotated[float, Field(ge=0.0, le=1.0)] = 0.95
    # Where the scores choose the rate: chunks with at least this share of the highest score.
    peak_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.05
    min_prompt_tokens: PositiveInt = 1024  # shorter prompts are prefilled dense
    # Least share of the expected dense time to first token that pruning must save; null: prune
    # whether it pays or not. Callers who ask for pruning get it in any case.
    min_gain: Annotated[float, Field(ge=0.0, lt=1.0)] | None = 0.05

    @model_validator(mode="after")
    def _floor_is_below_ceiling(self) -> Self:
        if self.floor > self.ceiling:
            raise ValueError(f"floor ({self.floor:g}) must not exceed ceiling ({self.ceiling:g})")
        return self

    min_kept_tokens: PositiveInt = 256  # absolute floor under any keep rate
    # text: chunks end with lines, sentences or clauses, within 0.5 to 1.75 times chunk_tokens;
    # equal: of exactly chunk_tokens, as in the paper, which has 32.
    chunks: Literal["text", "equal"] = "text"
    chunk_tokens: PositiveInt = 16  # tokens that are kept or dropped together
    # With chunks that follow the text: of code that is kept, the signature, imports and return
    # lines come first.
    code_lines: bool = True
    # A chunk counts for at least this share of the one before it: a fact that the speculator looks
    # at continues behind the chunk's border.
    next_chunk_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    pool_tokens: PositiveInt = 13
    sink_tokens: PositiveInt = 4  # the first tokens: the attention sink
    tail_tokens: PositiveInt = 64  # the last tokens of the last user turn: the query
    # The next turn of a conversation keeps what the last one kept, so that engines share its KV.
    carry_over: bool = True
    whole_turn_tokens: NonNegativeInt = 512  # a turn's new tokens, up to this many, are all kept
    # A pruned prompt is prefilled again, dense, before anything is sent, where the main model gives
    # no token this probability to begin its answer with. 0: never.
    recompute_below: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    protect_fences: bool = False  # code between ``` fences is never pruned


_OF_THE_MODEL = ("revision", "dtype", "load_format", "max_model_len", "trust_remote_code")
_OF_THE_ENGINE = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "block_size",
    "kv_cache_memory_bytes",
    "max_num_batched_tokens",
    "enforce_eager",
    "enable_prefix_caching",
)
# Arguments of vLLM's that `engine_args` must not hold, and what to set in their place.
_SET_ELSEWHERE = {
    "kv_transfer_config": "set kv",
    "worker_cls": "the workers that keep positions and hand KV over are the service's own",
    "distributed_executor_backend": "set executor",
    "max_num_seqs": "set it beside engine_args, where admission and autoscaling read it",
    "model": "set model.path",
    **{name: f"set model.{name}" for name in _OF_THE_MODEL},
    **dict.fromkeys(_OF_THE_ENGINE, "set it beside engine_args"),
}


class EngineConfig(Strict):
    """One vLLM engine. `engine_args` passes any other argument of vLLM's AsyncEngineArgs."""

    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    executor: Literal["auto", "uni", "mp", "ray"] = "auto"
    block_size: PositiveInt | None = None
    kv_cache_memory_bytes: PositiveInt | None = None
    max_num_seqs: PositiveInt | None = None
    max_num_batched_tokens: PositiveInt | None = None
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    cpu_threads: PositiveInt = 1
    fork_engine: bool = True  # from a process that has imported vLLM; false: start a new one
    max_ongoing_requests: PositiveInt = 256  # in one replica; more wait in the gateways
    max_queued_requests: PositiveInt = 512  # that wait in one gateway; more are shed
    # Any other argument of vLLM's `AsyncEngineArgs`, by name. Refused: those that the service sets
    # itself, `speculative_config`, `kv_offloading_size`, `data_parallel_size` above 1.
    engine_args: dict[str, Any] = Field(default_factory=dict)

    @field_validator("engine_args")
    @classmethod
    def _no_second_speculation(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value.get("speculative_config") is not None:
            raise ValueError(
                "must not hold speculative_config: vLLM's proposers do not know the dropped "
                "tokens and their positions; set decode.speculation"
            )
        return value

    @field_validator("engine_args")
    @classmethod
    def _fits_the_service(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, reason in _SET_ELSEWHERE.items():
            if name in value:
                raise ValueError(f"must not hold {name}: {reason}")
        if value.get("kv_offloading_size") is not None:
            raise ValueError(
                "must not hold kv_offloading_size: vLLM would put a connector of its own in the "
                "place of the one that hands KV over"
            )
        if value.get("data_parallel_size") not in (None, 1):
            raise ValueError(
                f"data_parallel_size ({value['data_parallel_size']}) must be 1: a replica is one "
                "engine; set more replicas"
            )
        return value


class SpeculationConfig(Strict):
    """Speculative decoding: tokens copied from the prompt, checked by the main model.

    The longest match of the answer's last tokens in the whole prompt, dropped tokens included, or
    in the answer so far is continued. Greedy answers are the same with it.
    """

    method: Literal["ngram"] = "ngram"  # the way to find proposals: equal tokens before
    tokens: Annotated[int, Field(ge=1, le=64)] = 5  # the most that a step proposes
    min_match: Annotated[int, Field(ge=1, le=16)] = 3  # tokens; shorter matches propose nothing
    max_match: Annotated[int, Field(ge=1, le=16)] = 8  # tokens; longer matches count as this long

    @model_validator(mode="after")
    def _matches_in_order(self) -> Self:
        if self.min_match > self.max_match:
            raise ValueError(
                f"min_match ({self.min_match}) must not exceed max_match ({self.max_match})"
            )
        return self


class DecodeConfig(EngineConfig):
    """The engines of the decode pool."""

    speculation: SpeculationConfig | None = None  # None: one token a step

    @model_validator(mode="after")
    def _no_prompts_in_logs(self) -> Self:
        if self.speculation is not None and self.engine_args.get("enable_log_requests"):
            raise ValueError(
                "engine_args.enable_log_requests must not be set beside speculation: vLLM would "
                "log the dropped tokens of every prompt"
            )
        return self


class KvTls(Strict):
    """Mutual TLS between KV ports: PEM files, at these paths on every node."""

    certificate: str  # shown by both sides of every connection
    key: str  # of the certificate; without a password
    authority: str  # whose certificates are accepted
    name: str = "specprefill"  # a DNS name in every certificate: nodes' addresses come and go


class KvConfig(Strict):
    """The KV hand-off between prefill and decode workers."""

    # grpc: a stream from worker to worker, everywhere. nixl: the decode worker reads the prefill
    # worker's memory, over RDMA, shared memory or TCP. object_ref: through Ray's object store.
    # auto: nixl between workers that both have it, unless `tls` is set; else grpc.
    carrier: Literal["auto", "grpc", "nixl", "object_ref"] = "auto"
    # Where a prefill worker holds KV until it is pulled. device: in its GPU, from where the decode
    # worker's GPU reads it (carrier nixl only); max_held_bytes of it are reserved, besides what
    # vLLM takes. Nothing crosses the host then, and no digest is checked.
    memory: Literal["host", "device"] = "host"
    host: str | None = None  # address KV ports listen on; their own node's if absent
    lease_s: Seconds = 30.0  # a lease that its holder does not renew is dropped after this time
    # Per worker. A prefill waits, within its deadline, until its KV has room; one whose KV alone
    # exceeds it hands nothing over. Set aside at the start with nixl, and on GPUs (page-locked).
    max_held_bytes: PositiveInt = 4 << 30
    # Per worker, for copies under way between an engine's caches and the KV's carrier: device
    # memory in prefill workers, host buffers in decode workers; more wait for the oldest copy.
    # Absent: an eighth of max_held_bytes, at most 128 MiB.
    staging_bytes: PositiveInt | None = None
    pull_timeout_s: Seconds = 20.0  # a pull to which nothing comes for so long has failed
    overlap: bool = True  # decode starts to pull while prefill computes
    streams: Annotated[int, Field(ge=1, le=16)] = 1  # grpc's connections per pull
    on_failure: Literal["recompute", "fail"] = "recompute"
    # Dense prompts of at most this many tokens are computed by the decode engine, without a
    # hand-over, while their gateway has nothing else to answer, or where that takes the engine
    # no longer than pulling the KV. 0: every prompt is handed over.
    local_prefill_tokens: NonNegativeInt = 512
    # So is the next turn of a conversation, pruned or not, if the decode engine should have most of
    # it and lack at most this many tokens. 0: only short prompts are.
    local_turn_tokens: NonNegativeInt = 2048
    tls: KvTls | None = None  # plaintext if absent

    @property
    def staging(self) -> int:
        """The bytes for copies under way."""
        most = min(self.max_held_bytes // 8, 128 << 20)
        return most if self.staging_bytes is None else self.staging_bytes

    @model_validator(mode="after")
    def _staging_within_held(self) -> Self:
        if self.memory == "device" and self.carrier != "nixl":
            raise ValueError(f"memory 'device' requires carrier 'nixl', not '{self.carrier}'")
        if self.staging > self.max_held_bytes // 2:
            raise ValueError(
                f"staging_bytes ({self.staging}) must be at most half of max_held_bytes "
                f"({self.max_held_bytes})"
            )
        return self


class AdmissionConfig(Strict):
    """Admission control under load: lower keep rates, then queue late requests last, then 429."""

    # The SLO of first tokens that keep rates are lowered for. Leave it out where `slo` is set.
    ttft_s: Seconds | None = None
    # That of the second tokens, from the first: requests are late where the decode pool's sequences
    # (`decode.max_num_seqs` of each replica) are taken for longer. Needs `decode.max_num_seqs`.
    # Leave it out where `slo` is set.
    gap_s: Seconds | None = None
    keep_floor: Rate = 0.1  # for requests that name no floor and no rate of their own
    max_waiting: PositiveInt = 1024  # requests in the queue, over all gateways; more are shed
    max_waiting_per_key: PositiveInt = 256  # likewise, of one API key, where there are several
    per_engine: PositiveInt = 2  # requests admitted for each speculator and prefill replica
    # One process decides for all gateways; while it is away, each gateway decides by an equal part
    # of the pools. `false`: always so. With one gateway, it decides by itself.
    shared: bool = True


def key_digest(key: str) -> str:
    """Return the digest that is kept of an API key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def default_name(place: int) -> str:
    """Return the name of a key that has none, by its place in the list."""
    return f"key-{place + 1}"


class ApiKey(Strict):
    """One client's key, under a name that logs and metrics may show."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    # Exactly one source. `key` is replaced by its digest before the file is deployed.
    key: str | None = Field(None, min_length=1, repr=False)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None  # of the key, in hex
    env: str | None = None  # an environment variable of the gateways' nodes
    # A file on the gateways' nodes: a key, or several, one a line. Read again when it changes.
    file: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if [self.key, self.sha256, self.env, self.file].count(None) != 3:
            raise ValueError("must have exactly one of key, sha256, env and file")
        return self


class FrontTls(Strict):
    """TLS between clients and the service: PEM files, at these paths on every node."""

    certificate: str  # with its chain
    key: str  # of the certificate; without a password
    client_authority: str | None = None  # clients must show a certificate that it signed


class FrontConfig(Strict):
    """HAProxy, which Ray Serve starts before the gateways on every node that serves."""

    tls: FrontTls | None = None  # plaintext if absent; HTTP and gRPC alike
    max_connections: PositiveInt = 8192  # at once; fewer where the process may open fewer files
    header_timeout_s: Seconds = 10.0  # for a request's headers, and a body that fits the buffer
    # Of each connection that has data. A request that fits goes to another gateway when its own
    # dies before it answers.
    buffer_bytes: Annotated[int, Field(ge=16_384, le=1_000_000)] = 65_536
    metrics_host: str | None = "127.0.0.1"  # where its metrics listen; null: nowhere
    stats_host: str | None = None  # where its statistics page listens; null: nowhere


class GatewayConfig(Strict):
    """The gateway: the OpenAI-compatible and gRPC APIs."""

    request_timeout_s: Seconds = 300.0
    max_body_bytes: PositiveInt = 32 << 20  # of an HTTP body, and of a gRPC message
    # Objects, lists and texts in lists (messages, parts, tools, prompts) of one request: each
    # costs the event loop about 0.1 ms.
    max_request_items: PositiveInt = 10_000
    # Answers of one request: its prompts (a list, in `/v1/completions`) times `n`. However many,
    # they count as one of `max_concurrent_requests`.
    max_samples: PositiveInt = 1024
    # Prompts of one request that are before their first token; the others wait. Many would fill the
    # pools' queues, and use up each other's time. More keep more prefill replicas at work.
    prompts_at_once: PositiveInt = 8
    body_timeout_s: Seconds = 10.0  # for a request's body, and more as its bytes arrive
    max_buffered_bytes: PositiveInt = 1 << 30  # of bodies that are not complete yet, per gateway
    max_concurrent_requests: PositiveInt = 1024  # per gateway, waiting ones too; more get 429
    front: FrontConfig = FrontConfig()
    admission: AdmissionConfig | None = (
        None  # None: first come, first served, at the planned keep rate
    )
    # Any of them is accepted; empty: no authentication. A plain string is a key in the file.
    api_keys: tuple[ApiKey | Annotated[str, Field(min_length=1)], ...] = ()
    # Answered without a key. `/metrics` shows how much each key asks for; `/playground` is a page
    # that asks for a key.
    open_paths: tuple[str, ...] = ("/health", "/ping")
    # More arguments of `vllm serve`'s front, e.g. a tool parser. The engines get the reasoning
    # parser and its plug-in, too, where `engine_args` holds no other.
    vllm_args: tuple[str, ...] = ()

    @field_validator("vllm_args")
    @classmethod
    def _no_second_list_of_keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(each.partition("=")[0] in ("--api-key", "--api_key") for each in value):
            raise ValueError("--api-key protects only some of the paths; use gateway.api_keys")
        return value


class SloConfig(Strict):
    """`percentile` of all requests get their first token within `ttft_s`. Turns autoscaling on."""

    ttft_s: Seconds
    percentile: Annotated[float, Field(gt=0.0, lt=100.0)] = 95.0
    gap_s: Seconds = 1.0  # and the second token within this of the first: sizes the decode pool


class PoolScaling(Strict):
    """Bounds and cost of one pool."""

    min_replicas: NonNegativeInt = 1  # 0: sleeps when nothing arrives
    max_replicas: PositiveInt = 1
    cost: Annotated[float, Field(gt=0.0)] = 1.0  # of one replica, in any unit, e.g. its GPUs
    cold_start_s: Seconds = 100.0

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas ({self.min_replicas}) must not exceed "
                f"max_replicas ({self.max_replicas})"
            )
        return self


class ScalingConfig(Strict):
    """The bounds by which the pools are sized for the SLO."""

    # True: the autoscaler decides and reports, and changes nothing. Every pool keeps its size,
    # within its bounds; on a new deployment that is min_replicas.
    advisory: bool = False
    speculator: PoolScaling = PoolScaling()
    prefill: PoolScaling = PoolScaling()
    decode: PoolScaling = PoolScaling()
    # Always this many, unless `deployments` names another number. One that dies takes its streams
    # with it, so a single one means an outage.
    gateway_replicas: PositiveInt = 2
    # A pool shrinks only after a smaller size sufficed this long. None: its `cold_start_s`.
    settle_s: Seconds | None = None
    idle_s: Seconds = 600.0  # without arrivals for this long, a pool of minimum 0 sleeps
    window_s: Seconds = 600.0  # how far back arrivals count


class QualityConfig(Strict):
    """The comparison of pruned answers with dense ones, on live traffic."""

    # Share of the requests that are answered again, dense, in the background. Greedy ones only.
    shadow_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    shadow_running: PositiveInt = 1  # copies at once, per gateway; others are dropped
    shadow_most_live: NonNegativeInt = 2  # live requests of a gateway, beyond which none starts


class EnginesConfig(Strict):
    """The part of AppConfig that the engine pools read. It is validated there."""

    model: MainModel
    prefill: EngineConfig
    decode: DecodeConfig
    kv: KvConfig


class AppConfig(Strict):
    """The whole configuration of `specprefill.app:build`."""

    model: MainModel
    speculator: SpeculatorConfig
    selection: SelectionConfig = SelectionConfig()
    prefill: EngineConfig = EngineConfig()
    decode: DecodeConfig = DecodeConfig()
    kv: KvConfig = KvConfig()
    gateway: GatewayConfig = GatewayConfig()
    slo: SloConfig | None = None  # None: the deployments set the numbers of replicas
    scaling: ScalingConfig = ScalingConfig()
    quality: QualityConfig = QualityConfig()

    @field_validator("decode", mode="before")
    @classmethod
    def _as_prefill(cls, value: Any) -> Any:
        """Take a prefill engine's configuration, too: engines of one shape share it."""
        return value.model_dump() if type(value) is EngineConfig else value

    @model_validator(mode="after")
    def _same_caches(self) -> Self:
        """Require one KV format: decode refuses any other than its own, whatever the prompt."""
        for name in ("kv_cache_dtype", "quantization"):
            prefill, decode = (pool.engine_args.get(name) for pool in (self.prefill, self.decode))
            if prefill != decode:
                raise ValueError(
                    f"decode.engine_args.{name} ({decode!r}) must equal prefill.engine_args.{name} "
                    f"({prefill!r}), or no KV can be handed over"
                )
        return self

    @model_validator(mode="after")
    def _engines_report_probabilities(self) -> Self:
        """Require what `selection.recompute_below` reads of both engines."""
        if self.selection.recompute_below == 0.0:
            return self
        for pool, engine in (("prefill", self.prefill), ("decode", self.decode)):
            most, mode = (
                engine.engine_args.get(name) for name in ("max_logprobs", "logprobs_mode")
            )
            if most == 0 or mode not in {None, "raw_logprobs"}:
                given = f"max_logprobs ({most!r}), logprobs_mode ({mode!r})"
                raise ValueError(
                    f"{pool}.engine_args: {given}: beside selection.recompute_below max_logprobs "
                    "must not be 0, and logprobs_mode must be raw_logprobs or absent"
                )
        return self

    @model_validator(mode="after")
    def _one_slo(self) -> Self:
        """Require one SLO: pools are sized and requests admitted for the same one."""
        admission = self.gateway.admission
        if admission is None:
            return self
        if self.slo is None and admission.ttft_s is None:
            raise ValueError(
                "gateway.admission needs an SLO: set slo.ttft_s, or gateway.admission.ttft_s "
                "where the pools have fixed sizes"
            )
        if self.slo is not None and admission.ttft_s is not None:
            raise ValueError(
                f"gateway.admission.ttft_s ({admission.ttft_s:g}) must not be set beside "
                f"slo.ttft_s ({self.slo.ttft_s:g}), which counts for both"
            )
        if self.slo is not None and admission.gap_s is not None:
            raise ValueError(
                f"gateway.admission.gap_s ({admission.gap_s:g}) must not be set beside "
                f"slo.gap_s ({self.slo.gap_s:g}), which counts for both"
            )
        if admission.gap_s is not None and self.decode.max_num_seqs is None:
            raise ValueError(
                f"gateway.admission.gap_s ({admission.gap_s:g}) needs decode.max_num_seqs, with "
                "which admission compares the number of answers under way"
            )
        return self

    def for_engines(self) -> EnginesConfig:
        """Return the engine pools' configuration."""
        parsed = reasoning_args(self.gateway.vllm_args)
        prefill, decode = (
            pool.model_copy(update={"engine_args": {**parsed, **pool.engine_args}})
            for pool in (self.prefill, self.decode)
        )
        return EnginesConfig(model=self.model, prefill=prefill, decode=decode, kv=self.kv)

    def for_speculators(self) -> AppConfig:
        """Return the speculators' configuration: the sections that they do not read are empty."""
        return AppConfig(
            model=self.model,
            speculator=self.speculator,
            selection=self.selection,
            prefill=EngineConfig(block_size=self.prefill.block_size),
        )

    def for_gateways(self) -> AppConfig:
        """Return the gateways' configuration: its admission holds the SLO itself."""
        admission = self.gateway.admission
        if admission is None:
            return self.model_copy(update={"slo": None})
        ttft_s = admission.ttft_s if self.slo is None else self.slo.ttft_s
        gap_s = admission.gap_s if self.slo is None else self.slo.gap_s
        gap_s = None if self.decode.max_num_seqs is None else gap_s  # `check` warns
        shared = admission.shared and self.scaling.gateway_replicas > 1
        known = admission.model_copy(update={"ttft_s": ttft_s, "gap_s": gap_s, "shared": shared})
        gateway = self.gateway.model_copy(update={"admission": known})
        return self.model_copy(update={"gateway": gateway, "slo": None})


def reasoning_args(vllm_args: Sequence[str]) -> dict[str, str]:
    """Return the engines' arguments among `gateway.vllm_args`: the reasoning parser's.

    An engine finds the end of the reasoning itself: a grammar binds only what follows it.
    """
    given: dict[str, str] = {}
    for each, following in pairwise((*vllm_args, "")):
        option, is_joined, value = each.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if option.startswith("--") and name in _REASONING_ARGS:
            given[name] = value if is_joined else following
    return given


def local_path(path: str) -> str:
    """Resolve a model path on this machine: itself, below the source tree, or a hub name.

    The shipped models lie beside the package in a source checkout, and Serve replicas do
    not run in the checkout's folder, so a relative path is looked up there too. Beside an
    installed package lie other packages, whose names may be those of hub organizations.
    """
    if Path(path).exists():
        return str(Path(path).resolve())
    root = Path(__file__).resolve().parent.parent
    is_checkout = (root / "pyproject.toml").exists()
    return str(root / path) if is_checkout and (root / path).exists() else path
