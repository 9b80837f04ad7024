"""What a streamed token costs is counted while all streams run."""

import pytest

from loadtest.bench.gateway import BEGUN, STREAM_TOKENS, Streaming


class Server:
    name = "fake"
    spent_s = 0.0

    def cpu_s(self):
        return self.spent_s


def test_tokens_count_from_the_last_streams_first_to_the_first_streams_last():
    server = Server()
    streaming = Streaming(server, 2)
    for place in range(BEGUN + 10):
        streaming.note(place, 1)  # while the other is not admitted
    for place in range(BEGUN):
        server.spent_s = 5.0  # of admissions
        streaming.note(place, 1)
    for place in range(BEGUN + 10, STREAM_TOKENS - 1):
        server.spent_s += 0.002
        streaming.note(place, 1)
        streaming.note(place - 10, 1)
    spent_s, tokens = server.spent_s - 5.0, 2 * (STREAM_TOKENS - BEGUN - 11) - 1
    server.spent_s += 9.0  # of a request's end
    assert streaming.token_s() == pytest.approx(spent_s / tokens)


def test_streams_that_do_not_overlap_measure_nothing():
    streaming = Streaming(Server(), 2)
    for place in range(STREAM_TOKENS):
        streaming.note(place, 1)
    with pytest.raises(RuntimeError, match="a stream ended before all had begun"):
        streaming.token_s()
