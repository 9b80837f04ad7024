"""The gRPC messages of an answer."""

from collections.abc import Callable

from specprefill.core.types import Chunk
from specprefill.gateway.grpc.messages import AnswerBuilder
from tests.linear_cost import assert_linear


def test_the_samples_texts_are_joined_in_order():
    answer = AnswerBuilder(3, samples=2)
    for index, text in ((0, "a"), (1, "x"), (0, ""), (0, "b\u2028"), (1, "y")):
        answer.add(Chunk(index, (1,), text))
    for index in range(2):
        answer.add(Chunk(index, (2,), "!", finish_reason="stop"))
    assert answer.is_finished
    message = answer.message()
    assert [each.text for each in message.outputs] == ["ab\u2028!", "xy!"]
    assert message.usage.completion_tokens == 7


def test_collecting_an_answer_costs_what_its_length_does():
    def make(size: int) -> Callable[[], object]:
        chunks = [Chunk(0, (7,), "word" * 50) for _ in range(size)]

        def collect() -> object:
            answer = AnswerBuilder(1, samples=1)
            for chunk in chunks:
                answer.add(chunk)
            return answer.message()

        return collect

    assert_linear(make, 500)
