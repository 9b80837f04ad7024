"""vLLM's private names are as the engines use them, and a difference is found before use."""

from __future__ import annotations

import pytest

from specprefill.core.errors import IncompatibleVllm

pytestmark = pytest.mark.filterwarnings("ignore")


def v1_runner():
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    return GPUModelRunner


def check_v1(runner):
    from specprefill.engine.vllm_internals import check_v1_runner

    check_v1_runner(runner)


def v2_parts():
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext

    return [GPUModelRunner, DefaultModelState, InputBatch, LogitsContext]


def check_v2(*parts):
    from specprefill.engine.vllm_internals import check_v2_runner

    check_v2_runner(*parts)


def test_the_installed_vllm_is_as_the_engines_use_it():
    from specprefill.engine.vllm_internals import check_cpu_caches

    check_v1(v1_runner())
    check_v2(*v2_parts())
    check_cpu_caches()


def test_a_runner_that_inherits_is_fine():
    """vLLM's runners on other devices are subclasses."""

    class OnAnotherDevice(v1_runner()):
        def execute_model(self, *args, **kwargs):
            return super().execute_model(*args, **kwargs)

    check_v1(OnAnotherDevice)


class Positions:
    """Something like a V1 runner; each subclass differs in one place."""

    positions: list[int]

    def _preprocess(self, scheduler_output, num_input_tokens, intermediate_tensors=None):
        positions = self.positions[:num_input_tokens]
        return None, None, positions, intermediate_tensors

    def _sample(self, logits, spec_decode_metadata):
        pass

    def _bookkeeping_sync(self, scheduler_output):
        pass

    def execute_model(self, scheduler_output):
        self._preprocess(scheduler_output, 1)

    def sample_tokens(self):
        self._sample(None, None)
        self._bookkeeping_sync(None)


class AnotherPlace(Positions):
    def _preprocess(self, scheduler_output, num_input_tokens, intermediate_tensors=None):
        positions = self.positions[:num_input_tokens]
        return None, positions, None, intermediate_tensors


class ACopy(Positions):
    def _preprocess(self, scheduler_output, num_input_tokens, intermediate_tensors=None):
        positions = list(self.positions)
        return None, None, positions, intermediate_tensors


class AnotherParameter(Positions):
    def _sample(self, sampler_input):
        pass


class NotCalled:
    positions: list[int]
    _preprocess, _sample = Positions._preprocess, Positions._sample
    _bookkeeping_sync, sample_tokens = Positions._bookkeeping_sync, Positions.sample_tokens

    def execute_model(self, scheduler_output):
        pass


class Missing:
    _preprocess, execute_model = Positions._preprocess, Positions.execute_model


def test_the_stand_in_passes():
    check_v1(Positions)


@pytest.mark.parametrize(
    ("runner", "difference"),
    [
        (AnotherPlace, "AnotherPlace._preprocess does not return positions in the third place"),
        (ACopy, "does not return a view of its positions buffer"),
        (AnotherParameter, r"_sample takes \(self, sampler_input\) instead of \(self, logits, "),
        (NotCalled, "NotCalled.execute_model does not call _preprocess"),
        (Missing, "Missing has no _sample"),
    ],
)
def test_a_different_v1_runner_is_refused_with_vllm_s_version(runner, difference):
    from vllm.version import __version__

    with pytest.raises(IncompatibleVllm, match=difference) as refused:
        check_v1(runner)
    assert str(refused.value).startswith(f"vLLM {__version__} differs from what the engines are")


class V2WithoutPositions:
    def load_model(self):
        self.model_state = object()

    def execute_model(self):
        return {**self.model_state.prepare_inputs(), "positions": 1}  # ours would be overwritten


class V2WithoutState:
    def load_model(self):
        pass


class StateWithMore:
    def __init__(self, vllm_config, model, encoder_cache, device, lora):
        pass


class BatchWithout:
    num_reqs: int


@pytest.mark.parametrize(
    ("place", "part", "difference"),
    [
        (0, V2WithoutPositions, "execute_model does not take positions from its model_state"),
        (0, V2WithoutState, "load_model does not make a model_state"),
        (1, StateWithMore, r"__init__ takes \(.*, lora\) instead of"),
        (1, StateWithMore, "StateWithMore has no prepare_inputs"),
        (2, BatchWithout, "BatchWithout has no num_tokens_after_padding"),
        (3, BatchWithout, "BatchWithout has no idx_mapping_np, seq_lens_upper_bound_np"),
    ],
)
def test_a_different_v2_runner_is_refused(place, part, difference):
    parts = v2_parts()
    parts[place] = part
    with pytest.raises(IncompatibleVllm, match=difference):
        check_v2(*parts)


def test_a_different_scheduler_s_request_is_refused(monkeypatch):
    from specprefill.engine import vllm_internals

    monkeypatch.setattr(vllm_internals, "Request", Positions)
    with pytest.raises(IncompatibleVllm, match="Request has no _block_hasher"):
        check_v1(v1_runner())


def _isa_of_dtype(dtype):
    return str(dtype)


def test_different_cpu_pages_are_refused(monkeypatch):
    from vllm.v1.attention.backends import cpu_attn

    from specprefill.engine.vllm_internals import check_cpu_caches

    monkeypatch.setattr(cpu_attn, "_get_attn_isa", _isa_of_dtype)
    with pytest.raises(IncompatibleVllm, match=r"takes \(dtype\) instead of"):
        check_cpu_caches()


def check_v1_proposals(runner):
    from specprefill.engine.vllm_internals import check_v1_speculation

    check_v1_speculation(runner)


def v2_proposal_parts():
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator
    from vllm.v1.worker.gpu.states import RequestState

    return [GPUModelRunner, RequestState, NgramGPUSpeculator]


def check_v2_proposals(*parts):
    from specprefill.engine.vllm_internals import check_v2_speculation

    check_v2_speculation(*parts)


def test_the_installed_vllm_takes_other_proposers():
    check_v1_proposals(v1_runner())
    check_v2_proposals(*v2_proposal_parts())


class ProposesElsewhere:
    def __init__(self):
        self.drafter = self.num_spec_tokens = self.effective_drafter_max_model_len = 1
        self.input_batch = None

    def propose_draft_token_ids(self):
        pass


@pytest.mark.parametrize(
    "difference",
    [
        "propose_draft_token_ids does not call drafter.propose",
        "ProposesElsewhere has no _input_fits_in_drafter",
        "ProposesElsewhere has no sample_tokens",
    ],
)
def test_a_v1_runner_that_proposes_otherwise_is_refused(difference):
    with pytest.raises(IncompatibleVllm, match=difference):
        check_v1_proposals(ProposesElsewhere)


class ReadsMore:
    def __init__(self, vllm_config, device, req_states):
        pass

    def propose(self, input_batch):
        req_states = self.req_states
        return req_states.all_token_ids, req_states.total_len, req_states.draft_tokens


class NoStates:
    pass


@pytest.mark.parametrize(
    ("place", "part", "difference"),
    [
        (0, V2WithoutState, "has no speculator"),
        (1, NoStates, "NoStates has no total_len"),
        (2, ReadsMore, "propose reads all_token_ids, draft_tokens, total_len of its states"),
    ],
)
def test_a_v2_speculator_that_differs_is_refused(place, part, difference):
    parts = v2_proposal_parts()
    parts[place] = part
    with pytest.raises(IncompatibleVllm, match=difference):
        check_v2_proposals(*parts)
