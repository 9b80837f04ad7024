"""Checks the GPUs that a deployment file gives to the pools with engines. Pure.

Serve replaces `ray_actor_options` as a whole: one that names only CPUs drops the GPUs of `app.py`,
and replicas of a node then share its first ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..config import AppConfig, EngineConfig

CPU_SWITCH = "SPECPREFILL_CPU_ENGINE"  # an environment variable: "1" asks for no GPUs


def gpu_fault(
    args: AppConfig,
    pool: str,
    num_gpus: float | None,
    bundles: Sequence[Mapping[str, float]] | None,
    *,
    has_options: bool,
) -> str | None:
    """Return why these options of a pool do not suit its engine, or None.

    Without `has_options`, those of `app.py` hold, with their GPUs.
    An explicit 0 is right for Prefill where a model's KV is not handed over, which cannot be known
    without the model.
    """
    workers = _workers(args, pool)
    if workers == 0 or (bundles is None and _has_own_bundles(args, pool)):
        return None
    if pool == "Prefill" and bundles is None and num_gpus == 0:
        return None
    if not _takes_bundles(args, pool):
        if not has_options:
            return None
        bundles = None
    given = num_gpus if bundles is None else sum(each.get("GPU", 0.0) for each in bundles)
    if given == workers or (workers == 1 and given):
        return None
    key = "ray_actor_options.num_gpus" if bundles is None else "GPUs in placement_group_bundles"
    shown = "not set" if given is None else f"{given:g}"
    section = f"args.{pool.lower()}"
    needed = "above 0"
    if workers > 1:
        needed = f"{workers} ({section}.tensor_parallel_size times pipeline_parallel_size)"
    remedy = f'set runtime_env.env_vars.{CPU_SWITCH} to "1" for engines on CPUs'
    if pool == "Speculator":
        remedy = f"set {section}.device to cpu, or {remedy}"
    return f"{key} of {pool} ({shown}) must be {needed}; {remedy}"


def _workers(args: AppConfig, pool: str) -> int:
    """Return how many GPUs a replica's engine uses."""
    if pool == "Speculator":
        return int(args.speculator.reads_with_model and args.speculator.device != "cpu")
    engine = _engine(args, pool)
    return 0 if engine is None else engine.tensor_parallel_size * engine.pipeline_parallel_size


def _has_own_bundles(args: AppConfig, pool: str) -> bool:
    """Return True where `app.py` places the workers in bundles, which options do not replace."""
    engine = _engine(args, pool)
    if engine is None or _workers(args, pool) == 1:
        return False
    return engine.executor == "ray" or (
        engine.executor == "auto" and engine.pipeline_parallel_size > 1
    )


def _takes_bundles(args: AppConfig, pool: str) -> bool:
    """Return True where the workers are Ray's: others get no GPUs but those of their replica."""
    engine = _engine(args, pool)
    return engine is not None and _workers(args, pool) > 1 and engine.executor in ("auto", "ray")


def _engine(args: AppConfig, pool: str) -> EngineConfig | None:
    return {"Prefill": args.prefill, "Decode": args.decode}.get(pool)
