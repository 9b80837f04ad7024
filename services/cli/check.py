"""Checks both models of a deployment where they are on this machine.

Loads no weights and uses no network. Importing vLLM takes seconds.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

from ..config import AppConfig, local_path
from ..core.errors import InvalidConfiguration
from ..core.findings import Finding, error, note, warning
from ..deployment.file import Application, DeploymentFile
from ..deployment.model_files import hub_cache, locate_model
from ..deployment.weight_files import check_weights
from ..tracing.environment import tracer_for
from .model_report import MainModelReport, gain_lines


def check(file: DeploymentFile, *, served_here: bool = True) -> Iterator[Finding]:
    """Yield the faults that the replicas of every application would report.

    With `served_here` False, a model that is missing here may still be on the cluster's nodes.
    """
    for number, application in enumerate(file.applications):
        place = f"applications[{number}]"
        for finding in _check_application(application, served_here=served_here):
            yield finding.with_key_prefix(f"{place}.args")
        for finding in _check_tracing(application):
            yield finding.with_key_prefix(place)


def _check_application(application: Application, *, served_here: bool) -> Iterator[Finding]:
    config = application.args
    env_vars = application.runtime_env.env_vars
    offline, cache = env_vars.get("HF_HUB_OFFLINE") == "1", hub_cache(env_vars)
    model, speculator = config.model, config.speculator
    main = locate_model("model.path", model.path, model.revision, offline=offline, cache=cache)
    draft: Path | Finding | None = None
    if speculator.reads_with_model:
        key, path = "speculator.path", speculator.path
        draft = locate_model(key, path, speculator.revision, offline=offline, cache=cache)
    missing = [found for found in (main, draft) if isinstance(found, Finding)]
    yield from (found if served_here else note(found.key, found.message) for found in missing)
    if model.load_format != "dummy":
        yield from _weights("model.path", model.path, main)
    if draft is not None and not speculator.random_weights:
        yield from _weights("speculator.path", speculator.path, draft)
    longest = model.max_model_len
    if isinstance(main, Path):
        from ..engine.model_check import MainModelCheck

        checked = MainModelCheck(config, main)
        yield from checked.findings()
        yield from _gateway(config, main)
        longest = None if checked.model is None else checked.model.max_model_len
    if isinstance(draft, Path):
        from ..speculator.draft_check import check_speculator

        main_folder = main if isinstance(main, Path) else None
        yield from check_speculator(speculator, draft, main_folder, longest)
    yield from _check_automatic_rate(config)
    yield from _check_decode_sequences(config)


def _check_automatic_rate(config: AppConfig) -> Iterator[Finding]:
    """Yield a note where the scores choose the rate by settings of another draft model."""
    found = {"least_certainty", "peak_share"} & config.selection.model_fields_set
    speculator = config.speculator
    if config.selection.keep != "auto" or found or not speculator.reads_with_model:
        return
    if not speculator.random_weights:
        yield note(
            "selection.keep",
            "auto, with a draft that is not calibrated: most prompts may go dense; "
            "`specprefill calibrate FILE --write` finds the settings",
        )


def _check_decode_sequences(config: AppConfig) -> Iterator[Finding]:
    """Yield a warning where admission cannot count decode's free sequences."""
    slo = config.slo
    if slo is None or config.gateway.admission is None or config.decode.max_num_seqs is not None:
        return
    yield warning(
        "decode.max_num_seqs",
        f"not set: slo.gap_s ({slo.gap_s:g}) sizes the decode pool, but gateway.admission does "
        "not know how many answers a decode replica runs at once, and admits requests without it",
    )


def _check_tracing(application: Application) -> Iterator[Finding]:
    """Yield faults of OpenTelemetry's variables, and the extra that they need."""
    try:
        tracer_for("check", application.runtime_env.env_vars)
    except InvalidConfiguration as invalid:
        yield error("runtime_env.env_vars", str(invalid))


def describe(file: DeploymentFile) -> Iterator[str]:
    """Yield how each application's main model is served, and the gain expected of pruning it.

    Of models that are on this machine, in a deployment without faults.
    """
    for application in file.applications:
        config = application.args
        paths = (config.model.path, config.speculator.path)
        main, draft = (Path(local_path(path)) for path in paths)
        if not main.is_dir():
            continue
        has_draft = config.speculator.reads_with_model and draft.is_dir()
        report = MainModelReport.of(config.model, config.prefill)
        keep = config.selection.keep
        gains = gain_lines(main, draft, keep) if has_draft and keep != "auto" else ()
        for name, sentence in (*report.lines(), *gains):
            yield f"{application.name}: {name}: {sentence}"


def _weights(key: str, path: str, found: Path | Finding) -> Iterator[Finding]:
    """Yield faults of the weights; those of a hub's model may still be downloaded."""
    if isinstance(found, Path):
        yield from check_weights(key, found, is_complete=Path(local_path(path)).is_dir())


def _gateway(config: AppConfig, folder: Path) -> Iterator[Finding]:
    """Yield the faults in vLLM's arguments; its parser alone would end the process."""
    from ..gateway.openai.server import server_args

    printed = io.StringIO()
    model = config.model.model_copy(update={"path": str(folder)})
    try:
        with contextlib.redirect_stderr(printed):
            server_args(config.model_copy(update={"model": model}))
    except SystemExit:
        yield error("gateway.vllm_args", printed.getvalue().strip().rpartition("error: ")[2])
    except (ValueError, TypeError) as refused:
        yield error("gateway.vllm_args", str(refused))
