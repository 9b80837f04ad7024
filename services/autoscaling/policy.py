"""The application's autoscaling policy: lives in Serve's controller, sizes three pools at once.

A deployment file names it at the level of the application, with the same `args`:
`autoscaling_policy: {policy_function: "specprefill.autoscaling.policy:SloPolicy",
policy_kwargs: {args: ...}}`. Serve calls it about ten times a second.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ray.serve.config import AutoscalingContext

from ..config import AppConfig
from ..control.scaling.decide import decide
from ..control.scaling.values import Decision, Memory, Observation, Pool, ScalingPolicy
from .gauges import PolicyGauges
from .observing import ClusterObserver, LatestSignals, PoolView, application_name, pool_views
from .targets import scaling_policy

logger = logging.getLogger("ray.serve")

DECIDE_S = 0.5  # between two decisions

Core = Callable[[Observation, ScalingPolicy, Memory], tuple[Decision, Memory]]
Contexts = Mapping[Any, AutoscalingContext]


class SloPolicy:
    """Never raises: a policy that does stops every application of the cluster."""

    def __init__(self, args: Mapping[str, Any], core: Core = decide) -> None:
        self._args = args
        self._core = core
        self._gauges = PolicyGauges()
        self._memory = Memory()
        self._observer: ClusterObserver | None = None
        self._policy: ScalingPolicy | None = None
        self._decided_s = 0.0
        self._targets: dict[Pool, int] = {}
        self._wishes: dict[Pool, int] = {}
        self._advisory = False

    def __call__(self, contexts: Contexts) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Return targets by deployment id. A pool without a decision keeps its target."""
        views = pool_views(contexts)
        application = application_name(contexts)
        try:
            self._refresh(application, contexts, views)
        except Exception as error:  # noqa: BLE001  # other applications must keep scaling
            self._give_up(application, error, views)
        return {
            views[pool].key: max(target, views[pool].minimum)
            for pool, target in self._targets.items()
            if pool in views
        }, {}

    def _refresh(
        self, application: str, contexts: Contexts, views: Mapping[Pool, PoolView]
    ) -> None:
        now_s = max(context.current_time for context in contexts.values())
        if now_s - self._decided_s < DECIDE_S:
            return
        self._decided_s = now_s
        if self._observer is None or self._policy is None:
            config = AppConfig.model_validate(self._args)
            self._policy = scaling_policy(config)
            self._advisory = config.scaling.advisory
            self._observer = ClusterObserver(self._policy.window_s, config.decode.max_num_seqs)
        seen = self._observer.observe(now_s, LatestSignals.read(contexts, now_s), views)
        decision, self._memory = self._core(seen, self._policy, self._memory)
        self._report(application, decision)
        self._targets = (
            {pool: view.target for pool, view in views.items()} if self._advisory else self._wishes
        )

    def _report(self, application: str, decision: Decision) -> None:
        """Log what has changed since the last decision, and record all of it."""
        for pool, decided in decision.pools.items():
            if self._wishes.get(pool) != decided.replicas:
                logger.info(
                    "autoscaling: pool=%s replicas=%d wanted=%d reason=%s advisory=%s",
                    pool, decided.replicas, decided.wanted, decided.reason, self._advisory,
                )  # fmt: skip
        self._wishes = {pool: decided.replicas for pool, decided in decision.pools.items()}
        self._gauges.record_decision(application, decision, advisory=self._advisory)

    def _give_up(self, application: str, error: Exception, views: Mapping[Pool, PoolView]) -> None:
        """Hold every pool until a decision succeeds."""
        self._targets = {pool: view.target for pool, view in views.items()}
        reason = type(error).__name__
        logger.error("autoscaling: targets held: reason=%s error=%s", reason, error)
        self._gauges.record_failure(application, reason)
