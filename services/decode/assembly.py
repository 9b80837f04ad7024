"""A decode replica's service with its engine, from the deployment's configuration."""

from __future__ import annotations

import os

from ..config import EnginesConfig
from ..engine.args import Role, engine_args
from ..engine.engine import Engine
from ..engine.ray_metrics import ray_stat_loggers
from ..engine.support import hands_over
from ..tracing.environment import tracer_for
from .pull_metrics import PullMetrics
from .service import DecodeService


def assemble(config: EnginesConfig) -> DecodeService:
    """Return an engine's service. It computes prompts itself where KV cannot be handed over."""
    args = engine_args(
        config.model,
        config.decode,
        config.kv,
        Role.DECODE,
        peer=config.prefill,
        hands_over=hands_over(config.model, config.prefill, config.decode),
    )
    engine = Engine(
        args,
        cpu_threads=config.decode.cpu_threads,
        adapters=config.model.adapters,
        stat_loggers=ray_stat_loggers(),
        forks=config.decode.fork_engine,
    )
    tracer = tracer_for("decode", os.environ)
    return DecodeService(engine, tracer, PullMetrics().record)
