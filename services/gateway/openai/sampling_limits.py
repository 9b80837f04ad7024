"""The limits of what one request asks of the engines, beside those that vLLM checks itself."""

from __future__ import annotations

from vllm.config import ModelConfig
from vllm.sampling_params import SamplingParams

from ...core.errors import InvalidRequest

# The decode replica's event loop searches for each of them in every new piece of an answer.
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
# The room in the tables of vLLM's GPU runner: a request that does not fit ends the whole engine.
MAX_STOP_TOKENS = 128
MAX_BAD_WORD_TOKENS = 1024
MAX_BIASES = 1024
MAX_ALLOWED_TOKENS = 1024
# An engine's scheduler, which serves everybody, compares the tokens of each pattern in Python.
MAX_PATTERN_TOKENS = 64
MAX_REPEATED_TOKENS = 256
MAX_SEED = (1 << 63) - 1  # of vLLM's GPU runner, which ends at a higher one


def max_answer_tokens(model: ModelConfig) -> int:
    """Return the deployment's limit of every answer, by the rule of vLLM's handlers.

    `max_new_tokens` of the model's own folder is but a default.
    """
    limit: int | None = model.override_generation_config.get("max_new_tokens")
    if model.generation_config not in ("auto", "vllm"):
        limit = model.get_diff_sampling_param().get("max_tokens")
    return int(model.max_model_len) if limit is None else limit


def check_samples(prompts: int, samples: int, most: int) -> None:
    """Refuse more than `most` answers of one request. Raises InvalidRequest."""
    if prompts * samples > most:
        field = "n" if prompts == 1 else "prompt"
        raise InvalidRequest(
            f"{field}: prompts times n must be at most {most} (gateway.max_samples), "
            f"not {prompts} * {samples}",
            field,
        )


def check_sampling(params: SamplingParams) -> None:
    """Refuse lists that engines have no room or no time for. Raises InvalidRequest.

    `params` have passed vLLM's validation, which adds the model's stop tokens to the caller's.
    """
    last_seed = (params.seed or 0) + params.n - 1
    if last_seed > MAX_SEED:
        raise InvalidRequest(
            f"seed: must be at most {MAX_SEED}, the last sample's too (seed + n - 1), "
            f"not {last_seed}",
            "seed",
        )
    _check_repetition(params)
    longest_stop = max(map(len, params.stop), default=0)
    bad_word_tokens = sum(map(len, params.bad_words_token_ids or ()))
    for field, size, most, unit in (
        ("stop", len(params.stop), MAX_STOPS, "strings"),
        ("stop", longest_stop, MAX_STOP_CHARS, "characters per string"),
        ("stop_token_ids", len(params.all_stop_token_ids), MAX_STOP_TOKENS, "with the model's own"),
        ("bad_words", bad_word_tokens, MAX_BAD_WORD_TOKENS, "tokens in all"),
        ("logit_bias", len(params.logit_bias or ()), MAX_BIASES, "entries"),
        ("allowed_token_ids", len(params.allowed_token_ids or ()), MAX_ALLOWED_TOKENS, "entries"),
    ):
        if size > most:
            raise InvalidRequest(f"{field}: must hold at most {most} {unit}, not {size}", field)


def _check_repetition(params: SamplingParams) -> None:
    repetition = params.repetition_detection
    if repetition is None:
        return
    pattern, count = repetition.max_pattern_size, repetition.min_count
    for what, size, most in (
        ("max_pattern_size", pattern, MAX_PATTERN_TOKENS),
        ("max_pattern_size times min_count", pattern * count, MAX_REPEATED_TOKENS),
    ):
        if size > most:
            raise InvalidRequest(
                f"repetition_detection: {what} must be at most {most}, not {size}",
                "repetition_detection",
            )
