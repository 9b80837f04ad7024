"""The written file fits our own schema, and holds what was chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from specprefill.core.errors import UnsupportedModel
from specprefill.deployment.file import parse
from specprefill.quickstart.document import Choices, document
from specprefill.quickstart.local_machine import LocalMachine
from specprefill.quickstart.planning import Wish, fit, plan
from specprefill.quickstart.shapes import NO_DRAFT

from .test_sizes import BIG, LAPTOP, MIDDLE, SMALL, TINY, h100s


@pytest.mark.parametrize(
    ("machine", "main", "draft"),
    [
        (LAPTOP, TINY, TINY),
        (h100s(1), MIDDLE, SMALL),
        (h100s(2), MIDDLE, SMALL),
        (h100s(5), BIG, SMALL),
    ],
    ids=["cpu", "one GPU", "two GPUs", "five GPUs"],
)
def test_the_file_holds_what_was_chosen(machine: LocalMachine, main, draft) -> None:
    pools, times = fit(machine, main, draft, None)
    choices = Choices("/models/my main: 1", "org/draft", "mine", "auto", "0.0.0.0", 8123, 9123)
    text = document(choices, pools, times)
    file = parse(text, "written").file
    (application,) = file.applications
    args = application.args
    assert (args.model.path, args.model.name) == ("/models/my main: 1", "mine")
    assert args.model.max_model_len == pools.tokens
    assert args.speculator.path == "org/draft"
    assert args.speculator.kv_memory_bytes == pools.draft.kv_bytes
    assert args.speculator.timeout_token_s == times.scoring_token_s
    assert args.selection.keep == "auto"
    assert args.prefill.kv_cache_memory_bytes == pools.prefill.kv_bytes
    assert args.decode.tensor_parallel_size == pools.decode.tensor_parallel
    assert args.kv.max_held_bytes == pools.held_bytes
    assert (file.http_options.host, file.http_options.port) == ("0.0.0.0", 8123)
    assert file.grpc_options.port == 9123
    options = {each.name: each.ray_actor_options for each in application.deployments}
    assert (options["Prefill"].num_gpus or 0) == pools.prefill.gpus
    on_cpu = application.runtime_env.env_vars.get("SPECPREFILL_CPU_ENGINE") == "1"
    assert on_cpu == (not machine.gpus)
    threads = options["Decode"].runtime_env.env_vars.get("OMP_NUM_THREADS")
    assert threads == (str(LAPTOP.cores // 2) if on_cpu else None)


@pytest.mark.parametrize("machine", [LAPTOP, h100s(1), h100s(2)], ids=["cpu", "one", "two"])
def test_without_a_draft_prompts_are_chosen_by_words(machine: LocalMachine) -> None:
    pools, times = fit(machine, MIDDLE if machine.gpus else TINY, NO_DRAFT, None)
    file = parse(document(Choices("main", None, "main"), pools, times), "written").file
    (application,) = file.applications
    assert application.args.speculator.score_by == "words"
    options = {each.name: each.ray_actor_options for each in application.deployments}
    assert not options["Speculator"].num_gpus
    assert pools.decode.gpus == len(machine.gpus) - pools.prefill.gpus or len(machine.gpus) < 2


def test_the_head_names_both_models_and_the_length() -> None:
    pools, times = fit(LAPTOP, TINY, TINY, None)
    text = document(Choices("main", "draft", "main"), pools, times)
    assert text.startswith("# main, pruned by draft: sizes for this machine (CPU).\n")
    assert f"has {pools.tokens} tokens" in text
    assert parse(text, "written").file.applications[0].args.selection.keep == 0.3


def test_words_take_the_place_of_a_draft(root: Path) -> None:
    shown: list[str] = []
    wish = Wish(model=str(root / "models" / "demo-main"), speculator="words", gpus=0)
    planned = plan(wish, LAPTOP, shown.append)
    args = parse(planned.text, "written").file.applications[0].args
    assert not args.speculator.reads_with_model
    assert planned.text.startswith(f"# {wish.model}, pruned by the words of questions: ")
    assert not any("draft" in line for line in shown)
    with pytest.raises(UnsupportedModel, match="--speculator words"):
        plan(replace(wish, speculator=None), LAPTOP, shown.append)
