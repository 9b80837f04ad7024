from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Message(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Conversation(_message.Message):
    __slots__ = ("messages", "tools_json")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TOOLS_JSON_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    tools_json: str
    def __init__(self, messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ..., tools_json: _Optional[str] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "stop_token_ids", "presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs", "ignore_eos", "json_schema", "regex")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    n: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logprobs: int
    ignore_eos: bool
    json_schema: str
    regex: str
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., n: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logprobs: _Optional[int] = ..., ignore_eos: bool = ..., json_schema: _Optional[str] = ..., regex: _Optional[str] = ...) -> None: ...

class Prune(_message.Message):
    __slots__ = ("enabled", "keep", "floor", "protect", "auto", "ceiling", "mode")
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    PROTECT_FIELD_NUMBER: _ClassVar[int]
    AUTO_FIELD_NUMBER: _ClassVar[int]
    CEILING_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    keep: float
    floor: float
    protect: _containers.RepeatedScalarFieldContainer[str]
    auto: bool
    ceiling: float
    mode: str
    def __init__(self, enabled: bool = ..., keep: _Optional[float] = ..., floor: _Optional[float] = ..., protect: _Optional[_Iterable[str]] = ..., auto: bool = ..., ceiling: _Optional[float] = ..., mode: _Optional[str] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("model", "conversation", "text", "token_ids", "sampling", "prune", "timeout_s", "priority", "cache_salt", "prompt_cache_key")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRUNE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_CACHE_KEY_FIELD_NUMBER: _ClassVar[int]
    model: str
    conversation: Conversation
    text: str
    token_ids: TokenIds
    sampling: Sampling
    prune: Prune
    timeout_s: float
    priority: int
    cache_salt: str
    prompt_cache_key: str
    def __init__(self, model: _Optional[str] = ..., conversation: _Optional[_Union[Conversation, _Mapping]] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., prune: _Optional[_Union[Prune, _Mapping]] = ..., timeout_s: _Optional[float] = ..., priority: _Optional[int] = ..., cache_salt: _Optional[str] = ..., prompt_cache_key: _Optional[str] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob", "rank", "text")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    rank: int
    text: str
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., rank: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class PositionLogprobs(_message.Message):
    __slots__ = ("candidates",)
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    candidates: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, candidates: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("index", "text", "token_ids", "finish_reason", "stop_string", "stop_token_id", "logprobs")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    index: int
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: str
    stop_string: str
    stop_token_id: int
    logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    def __init__(self, index: _Optional[int] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[str] = ..., stop_string: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "cached_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Times(_message.Message):
    __slots__ = ("queue_s", "speculate_s", "prefill_s", "transfer_s", "first_decode_s", "ttft_s", "expected_dense_ttft_s", "expected_prune_ttft_s", "discarded_s")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    SPECULATE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_DECODE_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_DENSE_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_PRUNE_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    DISCARDED_S_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    speculate_s: float
    prefill_s: float
    transfer_s: float
    first_decode_s: float
    ttft_s: float
    expected_dense_ttft_s: float
    expected_prune_ttft_s: float
    discarded_s: float
    def __init__(self, queue_s: _Optional[float] = ..., speculate_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., first_decode_s: _Optional[float] = ..., ttft_s: _Optional[float] = ..., expected_dense_ttft_s: _Optional[float] = ..., expected_prune_ttft_s: _Optional[float] = ..., discarded_s: _Optional[float] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("plan", "reason", "prompt_tokens", "kept_tokens", "keep_rate", "mode", "text_tokens")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEEP_RATE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    TEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    plan: str
    reason: str
    prompt_tokens: int
    kept_tokens: int
    keep_rate: float
    mode: str
    text_tokens: int
    def __init__(self, plan: _Optional[str] = ..., reason: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., kept_tokens: _Optional[int] = ..., keep_rate: _Optional[float] = ..., mode: _Optional[str] = ..., text_tokens: _Optional[int] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("decision", "times", "recomputed", "prefilled_by", "carried_tokens", "retries")
    DECISION_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_BY_FIELD_NUMBER: _ClassVar[int]
    CARRIED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RETRIES_FIELD_NUMBER: _ClassVar[int]
    decision: Decision
    times: Times
    recomputed: bool
    prefilled_by: str
    carried_tokens: int
    retries: int
    def __init__(self, decision: _Optional[_Union[Decision, _Mapping]] = ..., times: _Optional[_Union[Times, _Mapping]] = ..., recomputed: bool = ..., prefilled_by: _Optional[str] = ..., carried_tokens: _Optional[int] = ..., retries: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("outputs", "usage", "report")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[Output]
    usage: Usage
    report: Report
    def __init__(self, outputs: _Optional[_Iterable[_Union[Output, _Mapping]]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ...) -> None: ...

class GenerateChunk(_message.Message):
    __slots__ = ("output", "usage", "report")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    output: Output
    usage: Usage
    report: Report
    def __init__(self, output: _Optional[_Union[Output, _Mapping]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("model", "conversation", "text", "token_ids", "prune", "timeout_s", "explain", "cache_salt")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PRUNE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    model: str
    conversation: Conversation
    text: str
    token_ids: TokenIds
    prune: Prune
    timeout_s: float
    explain: bool
    cache_salt: str
    def __init__(self, model: _Optional[str] = ..., conversation: _Optional[_Union[Conversation, _Mapping]] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., prune: _Optional[_Union[Prune, _Mapping]] = ..., timeout_s: _Optional[float] = ..., explain: bool = ..., cache_salt: _Optional[str] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("start", "stop")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("kept", "decision", "queue_s", "speculate_s", "explanation")
    KEPT_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    SPECULATE_S_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    kept: _containers.RepeatedCompositeFieldContainer[Span]
    decision: Decision
    queue_s: float
    speculate_s: float
    explanation: Explanation
    def __init__(self, kept: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., decision: _Optional[_Union[Decision, _Mapping]] = ..., queue_s: _Optional[float] = ..., speculate_s: _Optional[float] = ..., explanation: _Optional[_Union[Explanation, _Mapping]] = ...) -> None: ...

class PromptSpan(_message.Message):
    __slots__ = ("start", "end", "first_token", "end_token", "chunk", "reasons")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    first_token: int
    end_token: int
    chunk: int
    reasons: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., first_token: _Optional[int] = ..., end_token: _Optional[int] = ..., chunk: _Optional[int] = ..., reasons: _Optional[_Iterable[str]] = ...) -> None: ...

class SelectionRule(_message.Message):
    __slots__ = ("chunk_tokens", "min_kept_tokens", "is_flat", "least_certainty", "peak_share", "unsure_share", "most_chunks", "floor", "ceiling")
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IS_FLAT_FIELD_NUMBER: _ClassVar[int]
    LEAST_CERTAINTY_FIELD_NUMBER: _ClassVar[int]
    PEAK_SHARE_FIELD_NUMBER: _ClassVar[int]
    UNSURE_SHARE_FIELD_NUMBER: _ClassVar[int]
    MOST_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    CEILING_FIELD_NUMBER: _ClassVar[int]
    chunk_tokens: int
    min_kept_tokens: int
    is_flat: bool
    least_certainty: float
    peak_share: float
    unsure_share: float
    most_chunks: float
    floor: float
    ceiling: float
    def __init__(self, chunk_tokens: _Optional[int] = ..., min_kept_tokens: _Optional[int] = ..., is_flat: bool = ..., least_certainty: _Optional[float] = ..., peak_share: _Optional[float] = ..., unsure_share: _Optional[float] = ..., most_chunks: _Optional[float] = ..., floor: _Optional[float] = ..., ceiling: _Optional[float] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("text", "kept_text", "spans", "chunk_scores", "certainty", "threshold", "keep", "tokenize_s", "remembered_tokens", "expected_dense_ttft_s", "expected_prune_ttft_s", "rule")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    KEPT_TEXT_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_SCORES_FIELD_NUMBER: _ClassVar[int]
    CERTAINTY_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    TOKENIZE_S_FIELD_NUMBER: _ClassVar[int]
    REMEMBERED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_DENSE_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_PRUNE_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    text: str
    kept_text: str
    spans: _containers.RepeatedCompositeFieldContainer[PromptSpan]
    chunk_scores: _containers.RepeatedScalarFieldContainer[float]
    certainty: float
    threshold: float
    keep: float
    tokenize_s: float
    remembered_tokens: int
    expected_dense_ttft_s: float
    expected_prune_ttft_s: float
    rule: SelectionRule
    def __init__(self, text: _Optional[str] = ..., kept_text: _Optional[str] = ..., spans: _Optional[_Iterable[_Union[PromptSpan, _Mapping]]] = ..., chunk_scores: _Optional[_Iterable[float]] = ..., certainty: _Optional[float] = ..., threshold: _Optional[float] = ..., keep: _Optional[float] = ..., tokenize_s: _Optional[float] = ..., remembered_tokens: _Optional[int] = ..., expected_dense_ttft_s: _Optional[float] = ..., expected_prune_ttft_s: _Optional[float] = ..., rule: _Optional[_Union[SelectionRule, _Mapping]] = ...) -> None: ...

class HealthRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PoolHealth(_message.Message):
    __slots__ = ("name", "healthy_replicas")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    name: str
    healthy_replicas: int
    def __init__(self, name: _Optional[str] = ..., healthy_replicas: _Optional[int] = ...) -> None: ...

class HealthResponse(_message.Message):
    __slots__ = ("serving", "reason", "pools")
    SERVING_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    serving: bool
    reason: str
    pools: _containers.RepeatedCompositeFieldContainer[PoolHealth]
    def __init__(self, serving: bool = ..., reason: _Optional[str] = ..., pools: _Optional[_Iterable[_Union[PoolHealth, _Mapping]]] = ...) -> None: ...
