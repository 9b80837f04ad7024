"""The end of a request, as an engine reports it."""

import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from specprefill.core.errors import InvalidRequest, PrefillUnavailable
from specprefill.engine.outputs import check_ended_well

FREE = SamplingParams()
CONSTRAINED = SamplingParams(structured_outputs=StructuredOutputsParams(json='{"$ref": "#"}'))
LOST = PrefillUnavailable("lost")


@pytest.mark.parametrize("reason", [None, "stop", "length"])
@pytest.mark.parametrize("params", [FREE, CONSTRAINED])
def test_an_answer_that_ended_well_raises_nothing(params, reason):
    check_ended_well(params, reason, LOST)


def test_a_constraint_that_nothing_satisfies_is_the_callers_fault():
    with pytest.raises(InvalidRequest) as refused:
        check_ended_well(CONSTRAINED, "error", LOST)
    assert refused.value.field == "structured_outputs"


@pytest.mark.parametrize(
    ("params", "reason"), [(FREE, "error"), (FREE, "abort"), (CONSTRAINED, "abort")]
)
def test_an_engine_that_gave_up_is_not(params, reason):
    with pytest.raises(PrefillUnavailable):
        check_ended_well(params, reason, LOST)
