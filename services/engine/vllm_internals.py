"""vLLM's private names that the engines depend on, and checks of each.

vLLM may change them in any release without notice, and some changes would go unseen: a method
that is overridden here and no longer called there means wrong positions, not an error. A worker
therefore checks them all before it uses one (`check_v1_runner`, `check_v2_runner`), from vLLM's
source as it is installed, and refuses to start with what differs.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from multiprocessing.context import BaseContext
from typing import Any

import torch
from vllm import _custom_ops as custom_ops
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, hash_block_tokens
from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput
from vllm.v1.engine import utils as engine_utils
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.request import Request
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.version import __version__ as vllm_version

from ..core.errors import IncompatibleVllm

Difference = str
_POSITIONS_FIELD = 2  # of what the V1 runner's _preprocess returns


def step_positions(preprocessed: Sequence[Any]) -> torch.Tensor:
    """Return the buffer of a step's positions, `[..., tokens]`, from V1's `_preprocess`."""
    positions: torch.Tensor = preprocessed[_POSITIONS_FIELD]
    return positions


def cpu_attention_isa(dtype: torch.dtype, block_size: int, head_size: int) -> str:
    """Return the instruction set that vLLM's CPU attention packs keys for."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa: str = _get_attn_isa(dtype, block_size, head_size)
    return isa


def block_hasher(request: Request) -> Callable[[Request], list[Any]] | None:
    """Return the hasher of the request's full blocks; None without a prefix cache."""
    hasher: Callable[[Request], list[Any]] | None = request._block_hasher
    return hasher


def replace_block_hasher(request: Request, hasher: Callable[[Request], list[Any]]) -> None:
    """Hash the request's blocks from now on with `hasher`."""
    request._block_hasher = hasher


def take_every_logits_processor(runner: Any, *ours: type) -> None:
    """Give a V1 runner that speculates vLLM's built-in logits processors, and `ours`.

    vLLM leaves all but one of them out, because it applies none to a proposed token. They are
    right for rows without proposals.
    """
    plain = copy(runner.vllm_config)
    plain.speculative_config = None
    runner.input_batch.logitsprocs = build_logitsprocs(
        plain, runner.device, runner.device.type != "cpu", runner.is_pooling_model, ours
    )
    runner.input_batch.logitsprocs_need_output_token_ids = True


def accept_every_sampling_parameter(llm: Any) -> None:
    """Let an engine that speculates take `min_p` and `logit_bias`, which its runner handles."""
    llm.input_processor.speculative_config = None


@contextmanager
def engine_process_context(context: BaseContext) -> Iterator[None]:
    """Let vLLM start the processes of engines, not those of their workers, in `context`.

    Raises IncompatibleVllm unless vLLM asks for a context as it is given one here.
    """
    _refuse(list(_engine_process_differences()))
    asked = engine_utils.get_mp_context

    def given() -> BaseContext:
        asked()  # writes what the children need to the environment
        return context

    engine_utils.get_mp_context = given
    try:
        yield
    finally:
        engine_utils.get_mp_context = asked


def check_v1_speculation(runner: type) -> None:
    """Raise IncompatibleVllm unless V1's n-gram proposer is used as it is replaced here."""
    _refuse(list(_v1_speculation_differences(runner)))


def check_expanded_parameters(device: torch.device) -> None:
    """Raise IncompatibleVllm unless a temperature reaches every proposed token of its request."""
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    given, ends = (torch.tensor(values, device=device) for values in ([0.5, 0.25], [2, 3]))
    found = expand_batch_to_tokens(given, ends, 3).tolist()
    if found != [0.5, 0.5, 0.25]:
        _refuse(["sampling parameters are lost with proposals; engines on CPUs need "
                 "SPECPREFILL_CPU_ENGINE=1"])  # fmt: skip


def check_v2_speculation(runner: type, states: type, speculator: type) -> None:
    """Check V2's request states and its n-gram speculator likewise."""
    _refuse(list(_v2_speculation_differences(runner, states, speculator)))


def check_v1_runner(runner: type) -> None:
    """Raise IncompatibleVllm unless `runner`, a V1 model runner, is as it is used here."""
    _refuse([*_v1_differences(runner), *_shared_differences()])


def check_v2_runner(runner: type, model_state: type, batch: type, context: type) -> None:
    """Check the V2 runner, its default model state, its batch and its logits context likewise."""
    _refuse([*_v2_differences(runner, model_state, batch, context), *_shared_differences()])


def check_cpu_caches() -> None:
    """Raise IncompatibleVllm unless CPU pages are written as they are here."""
    from vllm.v1.attention.backends import cpu_attn

    write = ("key", "value", "key_cache", "value_cache", "slot_mapping", "isa")
    _refuse(
        [
            *_signature_differences(cpu_attn, "_get_attn_isa", "dtype", "block_size", "head_size"),
            *_signature_differences(custom_ops, "cpu_attn_reshape_and_cache", *write),
        ]
    )


def _refuse(differences: Sequence[Difference]) -> None:
    if differences:
        raise IncompatibleVllm(
            f"vLLM {vllm_version} differs from what the engines are written for: "
            f"{'; '.join(differences)}"
        )


def _v1_differences(runner: type) -> Iterator[Difference]:
    wanted = ("self", "scheduler_output", "num_input_tokens", "intermediate_tensors")
    yield from _signature_differences(runner, "_preprocess", *wanted)
    yield from _signature_differences(runner, "_sample", "self", "logits", "spec_decode_metadata")
    yield from _signature_differences(runner, "_bookkeeping_sync", "self", "scheduler_output")
    if not _calls(runner, "execute_model", "self._preprocess"):
        yield f"{runner.__name__}.execute_model does not call _preprocess"
    for method in ("_sample", "_bookkeeping_sync"):
        if not _calls(runner, "sample_tokens", f"self.{method}"):
            yield f"{runner.__name__}.sample_tokens does not call {method}"
    returned = _returned_names(runner, "_preprocess")
    if not returned or any(names[_POSITIONS_FIELD : _POSITIONS_FIELD + 1] != ["positions"]
                           for names in returned):  # fmt: skip
        yield f"{runner.__name__}._preprocess does not return positions in the third place"
    if not _takes_view(runner, "_preprocess", "positions", "self.positions"):
        yield f"{runner.__name__}._preprocess does not return a view of its positions buffer"


def _v2_differences(
    runner: type, model_state: type, batch: type, context: type
) -> Iterator[Difference]:
    methods = {
        "__init__": ("vllm_config", "model", "encoder_cache", "device"),
        "add_request": ("req_index", "new_req_data"),
        "prepare_inputs": ("input_batch", "req_states"),
        "prepare_dummy_inputs": ("num_reqs", "num_tokens"),
    }
    for method, parameters in methods.items():
        yield from _signature_differences(model_state, method, "self", *parameters, exactly=True)
    if not _assigns(runner, "load_model", "self.model_state"):
        yield f"{runner.__name__}.load_model does not make a model_state"
    if not _overrides_positions(runner):
        yield f"{runner.__name__}.execute_model does not take positions from its model_state"
    yield from _field_differences(
        batch,
        *("num_tokens_after_padding", "num_tokens", "num_reqs", "positions", "idx_mapping"),
        *("idx_mapping_np", "query_start_loc", "query_start_loc_np", "num_computed_tokens_np"),
    )
    yield from _field_differences(
        context, "idx_mapping_np", "seq_lens_upper_bound_np", "expanded_idx_mapping", "pos"
    )


def _v1_speculation_differences(runner: type) -> Iterator[Difference]:
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer  # imports numba: see runner_v1

    for name in ("drafter", "num_spec_tokens", "effective_drafter_max_model_len", "input_batch"):
        if not _assigns(runner, "__init__", f"self.{name}"):
            yield f"{runner.__name__} has no {name}"
    for method, callee in (
        ("propose_draft_token_ids", "self.drafter.propose"),
        ("_input_fits_in_drafter", None),
        ("sample_tokens", "self._input_fits_in_drafter"),
    ):
        if not hasattr(runner, method):
            yield f"{runner.__name__} has no {method}"
        elif callee is not None and not _calls(runner, method, callee):
            yield f"{runner.__name__}.{method} does not call {callee.removeprefix('self.')}"
    yield from _field_differences(SpecDecodeMetadata, "num_draft_tokens")
    tokens = ("num_tokens_no_spec", "token_ids_cpu")
    proposed = ("self", "num_speculative_tokens", "sampled_token_ids", *tokens)
    yield from _signature_differences(NgramProposer, "propose", *proposed)
    searched = ("self", "num_requests", "valid_ngram_requests", *tokens, "k")
    yield from _signature_differences(NgramProposer, "batch_propose", *searched, exactly=True)
    built = ("vllm_config", "device", "is_pin_memory", "is_pooling_model", "custom_logitsprocs")
    yield from _parameter_differences(build_logitsprocs, *built, exactly=True)
    yield from _speculation_differences()


def _v2_speculation_differences(
    runner: type, states: type, speculator: type
) -> Iterator[Difference]:
    if not _assigns(runner, "__init__", "self.speculator"):
        yield f"{runner.__name__} has no speculator"
    wanted = ("self", "vllm_config", "device", "req_states")
    yield from _signature_differences(speculator, "__init__", *wanted, exactly=True)
    yield from _signature_differences(speculator, "propose", "self", "input_batch")
    for name in ("all_token_ids", "total_len", "prompt_len", "max_num_reqs", "max_model_len"):
        if not _assigns(states, "__init__", f"self.{name}"):
            yield f"{states.__name__} has no {name}"
    read = _attributes_of(speculator, "propose", "req_states")
    if read != {"all_token_ids", "total_len"}:
        yield f"{speculator.__name__}.propose reads {', '.join(sorted(read))} of its states"
    yield from _speculation_differences()


def _engine_process_differences() -> Iterator[Difference]:
    manager = engine_utils.CoreEngineProcManager
    for callee in ("get_mp_context", "context.Process"):
        if not _calls(manager, "__init__", callee):
            yield f"CoreEngineProcManager does not call {callee}"


def _speculation_differences() -> Iterator[Difference]:
    if not _assigns(InputProcessor, "__init__", "self.speculative_config"):
        yield "InputProcessor has no speculative_config"


def _shared_differences() -> Iterator[Difference]:
    """Yield differences that the scheduler's side and the prefix cache depend on."""
    if not _assigns(Request, "__init__", "self._block_hasher"):
        yield "Request has no _block_hasher"
    if not _calls(Request, "update_block_hashes", "self._block_hasher"):
        yield "Request.update_block_hashes does not call _block_hasher"
    for name in ("_kv_transfer_config", "_kv_cache_manager"):
        if not _assigns(KVConnectorBase_V1, "__init__", f"self.{name}"):
            yield f"KVConnectorBase_V1 has no {name}"
    yield from _field_differences(SchedulerOutput, "kv_connector_block_state")
    yield from _signature_differences(KVConnectorBlockState, "get_block_ids", "self", "req_id")
    keys = ("request", "start_token_idx", "end_token_idx", "start_mm_idx")
    yield from _parameter_differences(generate_block_hash_extra_keys, *keys)
    tokens = ("hash_function", "parent_block_hash", "curr_block_token_ids", "extra_keys")
    yield from _parameter_differences(hash_block_tokens, *tokens)


def _signature_differences(
    owner: Any, name: str, *wanted: str, exactly: bool = False
) -> Iterator[Difference]:
    """Yield a difference unless `owner.name` takes `wanted` as its first, or only, parameters."""
    function = getattr(owner, name, None)
    if function is None:
        yield f"{owner.__name__} has no {name}"
    else:
        yield from _parameter_differences(function, *wanted, exactly=exactly)


def _parameter_differences(
    function: Any, *wanted: str, exactly: bool = False
) -> Iterator[Difference]:
    found = tuple(inspect.signature(function).parameters)
    if found[: None if exactly else len(wanted)] != wanted:
        yield (
            f"{function.__qualname__} takes ({', '.join(found)}) instead of ({', '.join(wanted)})"
        )


def _field_differences(owner: type, *wanted: str) -> Iterator[Difference]:
    missing = [name for name in wanted if name not in inspect.get_annotations(owner)]
    if missing:
        yield f"{owner.__name__} has no {', '.join(missing)}"


def _syntax_nodes(owner: type, method: str) -> Iterator[ast.AST]:
    """Yield the syntax of `owner.method`, and of what it overrides if it calls that."""
    for ancestor in owner.__mro__:
        function = vars(ancestor).get(method)
        if inspect.isfunction(function):
            source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
            yield from ast.walk(ast.parse(source))
            if f"super().{method}(" not in source:
                return


def _attributes_of(owner: type, method: str, name: str) -> set[str]:
    """Return the attributes that `owner.method` reads of the variable `name`."""
    return {
        node.attr
        for node in _syntax_nodes(owner, method)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == name
    }


def _calls(owner: type, method: str, callee: str) -> bool:
    return any(
        isinstance(node, ast.Call) and ast.unparse(node.func) == callee
        for node in _syntax_nodes(owner, method)
    )


def _assigns(owner: type, method: str, target: str) -> bool:
    for node in _syntax_nodes(owner, method):
        targets: Sequence[ast.expr] = ()
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = (node.target,)
        if any(ast.unparse(each) == target for each in targets):
            return True
    return False


def _takes_view(owner: type, method: str, target: str, buffer: str) -> bool:
    """Return True if `target` is assigned a slice of `buffer`, not a copy."""
    return any(
        isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == target
        and isinstance(node.value, ast.Subscript)
        and ast.unparse(node.value.value) == buffer
        for node in _syntax_nodes(owner, method)
    )


def _returned_names(owner: type, method: str) -> list[list[str]]:
    """Return the parts of each `return` of the method, by name."""
    return [
        [ast.unparse(part) for part in node.value.elts]
        for node in _syntax_nodes(owner, method)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple)
    ]


def _overrides_positions(runner: type) -> bool:
    """Return True if the model's inputs hold `positions` before `prepare_inputs`' return."""
    for node in _syntax_nodes(runner, "execute_model"):
        if isinstance(node, ast.Dict):
            parts = ["**" if key is None else ast.unparse(key) for key in node.keys]
            calls = [ast.unparse(value).partition("(")[0] for value in node.values]
            if "'positions'" in parts and "self.model_state.prepare_inputs" in calls:
                return calls.index("self.model_state.prepare_inputs") > parts.index("'positions'")
    return False
