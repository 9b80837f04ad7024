"""Estimates whether pruning gives the first token sooner. Pure: no clock, no I/O.

Pruning wins when reading the prompt with the draft model and computing the kept tokens takes less
time than computing all tokens that are not cached (Speculative Prefill, arXiv 2502.02789, names the
ceiling 1 / (keep + ratio of the models); a warm prefix cache lowers the bar for the dense plan).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core.plan import is_asked
from ..core.prefix_digests import digests_of
from ..core.selection import SelectionPolicy, expected_kept, leading_tokens
from ..core.types import UNSCORED, PlanKind, PromptMode, Reason, Report, Request, TtftEstimate
from .decode_caches import DecodeCaches
from .prefixes import CacheForecast, Turn, TurnMemory
from .stages import Curve, StageModel, StageModels

REMEMBERED_TURNS = 1 << 14
SMOOTHING = 0.1  # weight of the newest prompt in what the scores choose
TYPICAL_KEEP = 0.3  # what the scores choose, before any prompt was scored
FORGETTING = 0.02  # per unscored prompt: how fast bad experience with pruning is forgotten
RETRY_AFTER, RETRY_AFTER_MOST = 16, 1024  # prompts without a gain until pruning is tried again
SCORED = (Reason.AUTO, Reason.UNCERTAIN, Reason.SPREAD_SCORES)
OVERHEAD = Curve(base_s=0.002)  # before the first report: calls between the pools
DRIFT = 1e-7  # seconds a token that overheads may grow with, before anything is known


class NetGain:
    """A deployment's learnt speed, and the expected contents of its prefix caches."""

    def __init__(
        self,
        models: StageModels,
        prefill_cache: CacheForecast,
        draft_cache: CacheForecast,
        policy: SelectionPolicy,
        decode_caches: DecodeCaches | None = None,
    ) -> None:
        self.models = models
        self._prefill_cache = prefill_cache
        self._draft_cache = draft_cache
        self._policy = policy
        self._decode_caches = decode_caches
        self._turns = TurnMemory(REMEMBERED_TURNS)
        self._typical_keep = TYPICAL_KEEP
        self._unsure_share = 0.0  # of pruned prompts: those prefilled again, dense
        self._retry_after = RETRY_AFTER
        self._dense_since = 0  # prompts that went dense since pruning was last tried
        self._trial_is_due = False
        self._trial: str | None = None  # the id of the request that tries
        self._overhead = {
            kind: StageModel(Curve(base_s=OVERHEAD.base_s * calls, token_s=DRIFT))
            for kind, calls in ((PlanKind.DENSE, 1), (PlanKind.PRUNE, 2))
        }

    def estimate(self, request: Request, keep: float | None) -> TtftEstimate:
        """Estimate the seconds to the first token of either plan in empty queues.

        `keep` None: as much as the scores have been choosing, counting what they sent dense. Once
        many prompts went dense for want of a gain, one is a trial: none is measured otherwise.
        """
        tokens = len(request.prompt)
        keep = self._typical_keep if keep is None else keep
        kept = expected_kept(tokens, keep, request.protected, self._policy)
        digests = digests_of(request)
        cached = self._cached_tokens(digests, tokens)
        shared = min(cached, leading_tokens(request.protected), kept - 1)
        turn = self._turns.last_turn(digests, tokens) if self._policy.carry_over else None
        if turn is not None and tokens - turn.tokens <= self._policy.whole_turn_tokens:
            kept, shared = turn.kept + tokens - turn.tokens, turn.kept
        read = self._draft_cache.cached_tokens(digests, tokens)
        speculate_s = self._draft_cache.seconds(self.models.speculate.curve, tokens, read)
        dense_s = self._prefill_s(tokens, cached) + self._overhead_s(PlanKind.DENSE, tokens)
        return TtftEstimate(
            dense_s=dense_s,
            prune_s=speculate_s
            + self._prefill_s(kept, shared)
            + self._overhead_s(PlanKind.PRUNE, tokens)
            + self._unsure_share * dense_s,
            is_trial=self._begin_trial(request),
            remembered_tokens=self._draft_cache.expected_tokens(read),
            dense_cached_tokens=self._prefill_cache.expected_tokens(cached),
            prune_cached_tokens=self._prefill_cache.expected_tokens(max(0, shared)),
        )

    def learn(self, request: Request, report: Report) -> None:
        """Learn from the report of a finished request."""
        scored = report.speculate_s > 0 and report.reason not in UNSCORED
        is_trial = scored and request.request_id == self._trial
        if is_trial:
            self._trial = None
            self._forget_before(report)
        self.models.observe(report)
        if self.models.is_usual(report):
            self._learn_overhead(report)
        self._learn_keep(report)
        digests, tokens = digests_of(request), len(request.prompt)
        self._recover(report, scored=scored, is_trial=is_trial)
        if scored:
            self._draft_cache.learn(digests, tokens, report.remembered_tokens)
        if report.plan is PlanKind.PRUNE and report.mode is PromptMode.POSITIONS:
            self._turns.remember(digests, Turn(tokens, report.kept_tokens))
        if not self.models.is_usual(report):
            return  # the prefill pool's caches know nothing of it
        if report.plan is PlanKind.PRUNE:
            tokens = leading_tokens(request.protected)
        self._prefill_cache.learn(digests, tokens, report.cached_tokens)

    def learn_unscored(self, request: Request, speculate_s: float) -> None:
        """Learn from a prompt that was shed after `speculate_s` of scoring."""
        self.models.speculate.observe_at_least(len(request.prompt), speculate_s)

    def _recover(self, report: Report, *, scored: bool, is_trial: bool) -> None:
        """Try to prune again, once enough prompts went dense for want of a gain.

        Each try doubles the number of prompts until the next one, unless others are pruned.
        """
        if scored and not is_trial:
            self._retry_after, self._dense_since = RETRY_AFTER, 0
        elif report.reason is Reason.NO_GAIN:
            self._dense_since += 1
            if self._dense_since >= self._retry_after:
                self._dense_since = 0
                self._retry_after = min(2 * self._retry_after, RETRY_AFTER_MOST)
                self._trial_is_due = not self.models.speculate.has_given_up
                self.models.speculate.forget_given_up()

    def _begin_trial(self, request: Request) -> bool:
        """Return True for one request that nobody asks to be pruned, where a trial is due."""
        if not self._trial_is_due or is_asked(request.controls):
            return False
        self._trial_is_due, self._trial = False, request.request_id
        return True

    def _forget_before(self, report: Report) -> None:
        """Let a trial stand for its length: what was measured before may be out of date."""
        unread = report.prompt_tokens - report.remembered_tokens
        self.models.speculate.forget(unread, report.remembered_tokens)
        self._overhead[PlanKind.PRUNE].forget(report.prompt_tokens)

    def _cached_tokens(self, digests: Sequence[int], tokens: int) -> int:
        """Return how many tokens of a dense prompt the engine that computes it should have."""
        cached = self._prefill_cache.cached_tokens(digests, tokens)
        if self._decode_caches is None:
            return cached
        return max(cached, self._decode_caches.dense_tokens(digests, tokens))

    def _prefill_s(self, tokens: int, cached: int) -> float:
        return self._prefill_cache.seconds(self.models.prefill.curve, tokens, cached)

    def _overhead_s(self, kind: PlanKind, tokens: int) -> float:
        return self._overhead[kind].seconds(tokens)

    def _learn_overhead(self, report: Report) -> None:
        staged_s = report.queue_s + report.speculate_s + report.prefill_s + report.discarded_s
        # A prompt that was scored paid for the call to the speculator, whatever was sent.
        kind = PlanKind.PRUNE if report.speculate_s > 0 else report.plan
        self._overhead[kind].observe(report.prompt_tokens, report.ttft_s - staged_s)

    def _learn_keep(self, report: Report) -> None:
        is_unsure = report.reason is Reason.UNSURE_ANSWER
        if is_unsure or report.plan is PlanKind.PRUNE:
            self._unsure_share += SMOOTHING * (is_unsure - self._unsure_share)
        if report.reason in SCORED:
            self._typical_keep += SMOOTHING * (report.keep_rate - self._typical_keep)
        elif report.reason is Reason.NO_GAIN:
            self._typical_keep += FORGETTING * (TYPICAL_KEEP - self._typical_keep)
            self._unsure_share -= FORGETTING * self._unsure_share
