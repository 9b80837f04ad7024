"""Our lines stand in the replica's own log, and refusals are one line."""

import asyncio
import json
import logging
import logging.config
import logging.handlers

import grpc
import pytest
from ray._common.formatters import JSONFormatter  # what Serve's encoding JSON uses

from specprefill.core.replica_logging import OURS, SERVES, log_call, log_pairs, log_with_serve
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
    level = ours.level
    kept = Lines()
    serves.handlers = [kept]
    serves.setLevel(logging.INFO)
    yield kept.lines
    serves.setLevel(before[0])
    serves.handlers, serves.filters, ours.handlers = before[1:]
    ours.setLevel(level)
    ours.propagate = True


def test_our_lines_are_written_where_serve_writes(lines):
    log_with_serve()
    logging.getLogger("specprefill.gateway.openai.client").info("request_id=1 outcome=finished")
    assert lines == ["INFO request_id=1 outcome=finished"]


def test_pairs_are_an_object_where_serve_logs_json(lines):
    handlers = logging.getLogger(SERVES).handlers
    (handler,) = [each for each in handlers if isinstance(each, Lines)]
    handler.setFormatter(JSONFormatter())
    log_with_serve()
    log_pairs(logging.getLogger(f"{OURS}.x"), {"request_id": "r", "ttft_s": 0.25, "key": None})
    record = json.loads(lines[0].removeprefix("INFO "))
    assert record["specprefill"] == {"request_id": "r", "ttft_s": 0.25, "key": None}
    assert record["message"] == "request_id=r ttft_s=0.2500 key=None"


def test_a_pair_with_a_space_is_quoted(lines):
    log_with_serve()
    log_pairs(logging.getLogger(f"{OURS}.x"), {"error": "the pool is full", "n": 1})
    assert lines == ["INFO error='the pool is full' n=1"]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(None, "finished"), (KeyError("x"), "KeyError"), (asyncio.CancelledError(), "cancelled")],
)
def test_a_pools_part_is_one_line_with_its_outcome(lines, error, outcome):
    log_with_serve()
    try:
        with log_call(logging.getLogger(f"{OURS}.x"), "prefill", "r") as pairs:
            pairs["kept_tokens"] = 3
            if error is not None:
                raise error
    except (KeyError, asyncio.CancelledError):
        pass
    (line,) = lines
    assert line.startswith(
        f"INFO request_id=r pool=prefill kept_tokens=3 outcome={outcome} seconds="
    )


def test_a_stream_that_is_closed_after_its_end_has_finished(lines):
    log_with_serve()

    def stream():
        with log_call(logging.getLogger(f"{OURS}.x"), "decode", "r") as pairs:
            pairs["outcome"] = "finished"
            yield

    one = stream()
    next(one)
    one.close()
    assert "outcome=finished" in lines[0]


def test_lines_below_serves_level_are_not_written(lines):
    logging.getLogger(SERVES).setLevel(logging.WARNING)
    log_with_serve()
    log_pairs(logging.getLogger(f"{OURS}.x"), {"request_id": "r"})
    assert lines == []


def test_a_library_that_configures_logging_closes_no_file_of_ours(lines, tmp_path):
    file = logging.FileHandler(tmp_path / "replica.log")
    buffer = logging.handlers.MemoryHandler(1, target=file)
    logging.getLogger(SERVES).handlers = [buffer]
    log = log_with_serve()
    ours = logging.getLogger(f"{OURS}.x")
    ours.info("before")
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
    ours.info("meanwhile")
    assert (tmp_path / "replica.log").read_text() == "before\n"
    log.reopen()
    ours.info("after")
    file.close()
    assert (tmp_path / "replica.log").read_text() == "before\nmeanwhile\nafter\n"


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
