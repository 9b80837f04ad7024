"""The proof's own logic: what it runs, when it stops, and what it makes of what it finds."""

import asyncio
import fcntl
import json
import subprocess
import sys
import threading
import time

import pytest
import torch

from loadtest.bench import gap
from loadtest.bench.proof import latency, summary
from loadtest.bench.proof.__main__ import main
from loadtest.bench.proof.findings import ProofFinding, Sheet, read
from loadtest.bench.proof.itl import steady_itl_s
from loadtest.bench.proof.jobs import CPU_PLAN, GPU_PLAN, SHORT_PLAN, ProofJob, jobs_named
from loadtest.bench.proof.machine import ProofMachine, device_to_itself, lock_file
from loadtest.bench.proof.models import MODELS, model_folder
from loadtest.bench.proof.parity import VARIANTS
from loadtest.bench.proof.prompts import CASES, every_other, jobs
from loadtest.bench.proof.reference import GreedyAnswer, Reference, compare
from loadtest.bench.proof.running import Runner, Running
from specprefill.core.types import PlanKind, Reason, Report


def test_findings_are_on_disk_at_once(tmp_path):
    sheet = Sheet(tmp_path, "parity:cpu-v1")
    sheet.measure("engine started", start_s=1.23456)
    sheet.check("alone equals transformers", ok=False, logit_gap=5.0)
    started, wrong = read(tmp_path)
    assert (started.ok, started.values) == (None, {"start_s": 1.23456})
    assert (wrong.part, wrong.ok) == ("parity:cpu-v1", False)
    lines = (tmp_path / "results.txt").read_text().splitlines()
    assert lines[0] == "     parity:cpu-v1: engine started: start_s=1.235"
    assert lines[1] == "FAIL parity:cpu-v1: alone equals transformers: logit_gap=5"
    assert summary.failed_checks(read(tmp_path)) == [wrong]


def test_the_gpu_plan_has_every_runner_kernel_and_graph_mode():
    names = [job.name for wave in GPU_PLAN for job in wave]
    assert len(names) == len(set(names))
    parity = [VARIANTS[job.variant] for wave in GPU_PLAN for job in wave if job.part == "parity"]
    found = {(one.v2, one.backend, one.graphs) for one in parity}
    assert {
        (v2, "FLASH_ATTN", graphs) for v2 in (True, False) for graphs in ("full", "default")
    } < found
    assert {(v2, "TRITON_ATTN", "eager") for v2 in (True, False)} < found
    assert {"handover:grpc", "handover:nixl", "latency", "itl:ours", "itl:plain"} < set(names)


def test_the_cpu_plan_has_every_part_of_the_gpu_plan():
    def parts(plan):
        return {job.part for wave in plan for job in wave}

    assert parts(CPU_PLAN) == parts(GPU_PLAN)
    assert parts(SHORT_PLAN) < parts(CPU_PLAN)


def test_an_unknown_part_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match="--parts: 'handoff' is none of handover:grpc, "):
        jobs_named(["handoff"], cpu=True)


def test_a_part_that_takes_too_long_is_ended_and_reported(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
    )
    Running(ProofJob("latency"), process, time.monotonic()).finish(Sheet(tmp_path, "latency"))
    assert process.returncode == -9
    (finding,) = read(tmp_path)
    assert (finding.what, finding.ok) == ("ran out of time", False)


def test_what_does_not_fit_the_budget_is_left_out_and_reported(tmp_path):
    Runner(ProofMachine(cpu=True), tmp_path).run(SHORT_PLAN, budget_s=1.0)
    findings = read(tmp_path)
    assert [one.part for one in findings] == ["parity:cpu-v1", "latency:short"]
    assert {(one.what, one.ok) for one in findings} == {("left out, no time", False)}


def test_a_timed_part_waits_for_those_beside_it(tmp_path):
    measuring = threading.Event()

    def measure():
        with device_to_itself(tmp_path):
            measuring.set()

    with lock_file(tmp_path).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        thread = threading.Thread(target=measure)
        thread.start()
        assert not measuring.wait(0.1)
    thread.join(10.0)
    assert measuring.is_set()


def test_a_part_that_cannot_run_exits_with_its_error(tmp_path):
    command = [sys.executable, "-m", "loadtest.bench.proof", "--cpu", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--part", "parity", "--variant", "none"], capture_output=True, check=False
    )
    assert done.returncode == 1
    (finding,) = read(tmp_path)
    assert (finding.what, finding.values["error"]) == ("raised", "KeyError: 'none'")


def test_a_run_with_failed_checks_exits_with_1_and_writes_everything(tmp_path, capsys):
    assert main(["--cpu", "--parts", "kernels", "--budget", "1", "--out", str(tmp_path)]) == 1
    written = json.loads((tmp_path / "prove-gpu.json").read_text())
    assert [one["what"] for one in written["findings"]] == ["left out, no time", "ended"]
    assert "1 checks failed" in capsys.readouterr().out


def test_steady_time_is_while_every_request_decodes():
    early = [0.0, 1.0, 2.0, 3.0, 4.0]  # alone until 2.0, and 2.0 - 4.0 is beside the other
    late = [2.0, 2.5, 3.0, 3.5, 4.5]
    assert steady_itl_s([early, late]) == pytest.approx((1.0 + 0.5) / 2)
    with pytest.raises(ValueError, match="never decoded all at once"):
        steady_itl_s([[0.0, 1.0], [2.0, 3.0]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loadtest.bench.proof.models._FOLDER", tmp_path_factory.mktemp("models"))
        return model_folder("tiny", "float32", 8192, weights=True)


def test_every_token_of_a_random_model_has_a_text(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == MODELS["tiny"].vocabulary
    assert tokenizer.decode([17, 2047]) == "w17 w2047"


def test_the_reference_knows_right_answers_from_wrong_positions(folder, tmp_path):
    reference = Reference(folder, "cpu")
    (job,) = jobs(0, MODELS["tiny"].vocabulary, ("gaps",))
    tokens: list[int] = []
    for _ in range(4):  # greedy, token by token
        logits = reference._logits(job, [*tokens, 0], contiguous=False)
        tokens.append(int(logits[-1].argmax()))
    logprobs = reference._logits(job, tokens, contiguous=False).log_softmax(dim=1)
    steps = [{token: float(row[token])} for token, row in zip(tokens, logprobs, strict=True)]
    right = GreedyAnswer(job, tokens, steps)
    assert reference.distance(right).is_within(1e-4)
    assert not reference.distance(right, contiguous=True).is_within(1.0)
    wrong = GreedyAnswer(job, [tokens[0], int(torch.argmin(logprobs[1])), *tokens[2:]], [])
    sheet = Sheet(tmp_path, "parity")
    compare(sheet, "alone", reference, [right], "float32")
    compare(sheet, "mixed", reference, [wrong], "float32")
    assert [one.ok for one in read(tmp_path)] == [True, False, False]


def test_half_of_a_prompt_is_kept_in_runs():
    selection = every_other(256, 32)
    assert selection.kept_tokens == 128
    assert [run.start for run in selection.runs] == [0, 64, 128, 192]
    assert all(runs[-1].stop <= length for length, runs in CASES.values())


def run_of(first_s, gap_s=0.01, recomputed=False, transfer_s=0.5):
    report = Report(
        plan=PlanKind.PRUNE, reason=Reason.ASKED, prompt_tokens=1024, kept_tokens=256,
        keep_rate=0.25, queue_s=0.0, speculate_s=0.1, prefill_s=first_s - 0.15,
        transfer_s=transfer_s, first_decode_s=0.0, ttft_s=first_s, recomputed=recomputed,
    )  # fmt: skip
    return gap.GapRun("early", (first_s, first_s + gap_s, first_s + 2 * gap_s), report)


class SlowBench:
    """A `Bench` without engines: `seconds` a round pass on a clock of its own."""

    machine, sizes = ProofMachine(cpu=True), latency.CPU

    def __init__(self, seconds):
        self.seconds, self.now_s = seconds, 0.0

    async def run(self, length, seed, into):
        self.now_s += self.seconds
        into.one_engine_s.append(1.0)
        into.late.append(run_of(1.1, gap_s=0.6))
        for name in latency.PLANS:
            first_s = 1.0 if name == "dense" else 0.4
            into.plans.setdefault(name, []).append(run_of(first_s))


def cells(table, row):
    """The cells of a table's row, counted from 1."""
    return [cell.strip() for cell in table.splitlines()[row + 1].split("|")[1:-1]]


@pytest.fixture
def bench(monkeypatch):
    slow = SlowBench(10.0)
    monkeypatch.setattr(latency.time, "monotonic", lambda: slow.now_s)
    return slow


def test_a_length_that_does_not_fit_is_left_out_and_reported(tmp_path, bench):
    asyncio.run(
        latency._every_length(Sheet(tmp_path, "latency"), bench, lambda: 30.0 - bench.now_s)
    )
    failed = summary.failed_checks(read(tmp_path))
    assert [one.what for one in failed] == ["2048 tokens: left out, no time"]


def test_the_tables_show_first_tokens_the_hand_over_and_itl(tmp_path, bench):
    asyncio.run(latency._every_length(Sheet(tmp_path, "latency"), bench, lambda: 1e9))
    for part, itl_ms in (("itl:ours", 5.5), ("itl:plain", 5.0)):
        Sheet(tmp_path, part).measure("batch 32", batch=32, itl_ms=itl_ms)
    findings = read(tmp_path)
    assert not summary.failed_checks(findings)
    row = next(one.values for one in findings if one.what == "1024 tokens, 0.3")
    assert row["speed_up"] == pytest.approx(2.5)
    assert row["ceiling"] == pytest.approx(1 / (0.25 + 0.1))
    assert row["overhead_s"] == pytest.approx(0.05)
    assert cells(summary.first_token_table(findings), 3)[:4] == [
        "1024 tokens, 0.3", "256", "400.0 ms", "2.50x",
    ]  # fmt: skip
    late = next(one.values for one in findings if one.what == "1024 tokens, pulled late")
    assert late["gb_per_s"] == pytest.approx(1024 * 2 * 6 * 4 * 64 * 4 / 1e9 / 0.5)
    assert cells(summary.hand_over_table(findings), 1)[3:5] == ["600.0 ms", "10.0 ms"]
    assert cells(summary.itl_table(findings), 1) == ["32", "5.50 ms", "5.00 ms", "1.10"]


def test_a_recomputed_prompt_fails_the_run(tmp_path, bench):
    found = latency.Round()
    asyncio.run(bench.run(1024, 0, found))
    found.plans["0.1"] = [run_of(0.4, recomputed=True)]
    latency.report(Sheet(tmp_path, "latency"), bench, 1024, found)
    assert [one.values["recomputed"] for one in summary.failed_checks(read(tmp_path))] == [1]


def test_tables_of_a_run_without_measurements_are_empty():
    nothing = [ProofFinding("kernels", "done", None, 0.0)]
    tables = (summary.first_token_table, summary.hand_over_table, summary.itl_table)
    assert [table(nothing) for table in tables] == ["", "", ""]
