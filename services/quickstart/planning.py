"""Plans a deployment for a main model on this machine: finds the draft, the sizes, the file."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..core.errors import InvalidConfiguration, UnsupportedModel
from .cpu_sizes import cpu_sizes, cpu_speed
from .document import GRPC_PORT, HOST, PORT, Choices, document
from .gpu_sizes import GPU_SPEED, gpu_sizes
from .known_drafts import families, known_draft
from .local_machine import LocalMachine
from .local_models import find_model
from .shapes import NO_DRAFT, ModelShape, read_shape
from .sizes import PoolSizes, Timeouts, gib

WORDS = "words"  # in place of a draft model


@dataclass(frozen=True, slots=True)
class Wish:
    """The caller's wishes; None: chosen here."""

    model: str
    speculator: str | None = None  # a model, or WORDS
    name: str | None = None
    keep: float | str | None = None
    longest: int | None = None
    gpus: int | None = None
    host: str | None = None
    port: int | None = None
    grpc_port: int | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """A deployment file that is not written yet."""

    name: str  # that clients use
    text: str


def plan(wish: Wish, machine: LocalMachine, show: Callable[[str], None]) -> Planned:
    """Return the deployment file for a wish; `show` reports each choice.

    Raises UnsupportedModel or InvalidConfiguration with what is needed.
    """
    machine = with_gpus(machine, wish.gpus)
    by_words = wish.speculator == WORDS
    draft_name = wish.speculator or _draft_for(wish.model, show)
    main = find_model("MODEL", wish.model, show)
    draft = None if by_words else find_model("--speculator", draft_name, show)
    show("reading the models' configurations")
    main_shape = read_shape(main.folder)
    draft_shape = NO_DRAFT if draft is None else read_shape(draft.folder)
    pools, times = fit(machine, main_shape, draft_shape, wish.longest)
    for line in _describe(main_shape, pools):
        show(line)
    choices = Choices(
        model=main.path,
        speculator=None if draft is None else draft.path,
        name=wish.name or main.name,
        keep=wish.keep,
        host=wish.host or HOST,
        port=wish.port or PORT,
        grpc_port=wish.grpc_port or GRPC_PORT,
    )
    return Planned(choices.name, document(choices, pools, times))


def with_gpus(machine: LocalMachine, count: int | None) -> LocalMachine:
    """Return the machine with `count` of its GPUs; None: all that vLLM's build can use.

    Raises InvalidConfiguration where there are fewer.
    """
    found = len(machine.gpus)
    if count is None:
        return machine if _has_cuda_build() else replace(machine, gpus=())
    if count > found:
        raise InvalidConfiguration(f"--gpus ({count}) must not exceed the {found} GPUs found here")
    if count and not _has_cuda_build():
        raise InvalidConfiguration(
            f"--gpus ({count}) needs vLLM's CUDA build, and the CPU build is installed: "
            "make setup EXTRA=gpu VENV=.venv-gpu"
        )
    return replace(machine, gpus=machine.gpus[:count])


def fit(
    machine: LocalMachine, main: ModelShape, draft: ModelShape, longest: int | None
) -> tuple[PoolSizes, Timeouts]:
    """Return sizes and time-outs for a pair. Raises InvalidConfiguration."""
    if longest is not None and main.positions is not None and longest > main.positions:
        raise InvalidConfiguration(
            f"--max-model-len ({longest}) must not exceed the model's {main.positions} positions"
        )
    on_gpu = bool(machine.gpus)
    pools = (gpu_sizes if on_gpu else cpu_sizes)(machine, main, draft, longest)
    speed = GPU_SPEED if on_gpu else cpu_speed(machine)
    return pools, Timeouts.of(main, draft, pools, speed)


def _has_cuda_build() -> bool:
    """Return True if the installed vLLM is the CUDA build: the CPU build has another name."""
    try:
        importlib.metadata.distribution("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _draft_for(model: str, show: Callable[[str], None]) -> str:
    draft = known_draft(model)
    if draft is None:
        raise UnsupportedModel(
            f"{model} needs a draft model, and none is known for it (known: {families()}): name "
            "one with --speculator, a folder, a GGUF file or a hub name. It should be several "
            "times smaller than MODEL; a small one of the same family, with the same tokenizer, "
            "is best, but any causal language model with plain attention can score; or "
            "--speculator words: prompts are then chosen by the question's words alone"
        )
    show(f"draft: {draft}, which has the same tokenizer (--speculator names another)")
    return draft


def _describe(main: ModelShape, pools: PoolSizes) -> tuple[str, ...]:
    limit = "" if main.positions in (None, pools.tokens) else f" of the model's {main.positions}"
    if not pools.decode.gpus:
        place = f"{pools.dtype} on the CPU, threads of each pool: {pools.prefill.threads}"
    else:
        place = f"on GPUs: {pools.prefill.gpus:g} for prefill, {pools.decode.gpus:g} for decode, "
        place += f"{pools.draft.gpus:g} for the draft"
    kv = pools.prefill.kv_bytes
    caches = "" if kv is None else f", {gib(kv)} of KV in each engine"
    return (f"sizes: {pools.tokens} tokens{limit}, {place}{caches}",)
