"""A prefill replica's service with its engine, from the deployment's configuration."""

from __future__ import annotations

import os

from ..config import EnginesConfig
from ..engine.args import Role, engine_args
from ..engine.engine import Engine
from ..engine.ray_metrics import ray_stat_loggers
from ..engine.support import hands_over
from ..kv.tls import TlsSource
from ..tracing.environment import tracer_for
from .idle import IdlePrefill
from .service import PrefillService


def assemble(config: EnginesConfig, tls: TlsSource | None) -> PrefillService | IdlePrefill:
    """Return an engine's service; an idle one where the decode engines do all the work."""
    if not hands_over(config.model, config.prefill, config.decode):
        return IdlePrefill()
    args = engine_args(config.model, config.prefill, config.kv, Role.PREFILL, peer=config.decode)
    engine = Engine(
        args,
        cpu_threads=config.prefill.cpu_threads,
        adapters=config.model.adapters,
        stat_loggers=ray_stat_loggers(),
        forks=config.prefill.fork_engine,
    )
    tracer = tracer_for("prefill", os.environ)
    return PrefillService(engine, tls, config.kv.max_held_bytes, tracer)
