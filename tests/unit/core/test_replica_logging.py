"""Our lines stand in the replica's own log, and refusals are one line."""

import logging

import grpc
import pytest

from specprefill.core.replica_logging import OURS, SERVES, log_with_serve
from specprefill.gateway.grpc.failed_calls import log_refusals_in_one_line
from specprefill.gateway.openai.failures import RpcFailed


class Lines(logging.Handler):
    """Keeps what is logged, formatted."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(f"{record.levelname} {self.format(record)}")


@pytest.fixture
def lines():
    serves, ours = logging.getLogger(SERVES), logging.getLogger(OURS)
    before = (serves.level, list(serves.handlers), list(serves.filters), list(ours.handlers))
    kept = Lines()
    serves.handlers = [kept]
    serves.setLevel(logging.INFO)
    yield kept.lines
    serves.setLevel(before[0])
    serves.handlers, serves.filters, ours.handlers = before[1:]
    ours.setLevel(logging.NOTSET)
    ours.propagate = True


def test_our_lines_are_written_where_serve_writes(lines):
    log_with_serve()
    logging.getLogger("specprefill.gateway.openai.client").info("request_id=1 outcome=finished")
    assert lines == ["INFO request_id=1 outcome=finished"]


def test_a_refused_call_is_one_line_without_a_traceback(lines):
    log_refusals_in_one_line()
    try:
        try:
            raise RpcFailed(grpc.StatusCode.INVALID_ARGUMENT, "keep: must be ...")
        except RpcFailed as error:
            raise RuntimeError("as Serve wraps it") from error
    except RuntimeError:
        logging.getLogger(SERVES).exception("Request failed.")
    assert lines == ["INFO gRPC call refused: INVALID_ARGUMENT"]


def test_other_failures_keep_their_traceback(lines):
    log_refusals_in_one_line()
    try:
        raise KeyError("unforeseen")
    except KeyError:
        logging.getLogger(SERVES).exception("Request failed.")
    (line,) = lines
    assert line.startswith("ERROR Request failed.\nTraceback")
