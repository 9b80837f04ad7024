"""A closed loop: clients that wait for their answers."""

import asyncio
import contextlib
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from specprefill.lab.loadtest import results, runner, session
from specprefill.lab.loadtest.outcome import RequestEnding
from specprefill.lab.loadtest.prompt_source import Source
from specprefill.lab.loadtest.recorder import RequestRefused
from specprefill.lab.loadtest.runner import RunProgress
from specprefill.lab.loadtest.scenario import Scenario
from specprefill.lab.reporting.tables import provenance

CLIENTS = 3


class Service:
    """Answers at once, but for the requests of these numbers."""

    def __init__(self, *refused):
        self.asked, self.waiting, self.most = [], 0, 0
        self._refused = refused

    @contextlib.asynccontextmanager
    async def open(self):
        yield

    async def stream(self, prompt, timeout_s, recorder):
        self.asked.append(prompt)
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        await asyncio.sleep(0)
        self.waiting -= 1
        if len(self.asked) in self._refused:
            raise RequestRefused(RequestEnding.SHED, "429")
        recorder.text("answer")


def scenario(**fields) -> Scenario:
    return Scenario.model_validate({
        "target": {"model": "demo"},
        "tokenizer": "models/demo-main",
        "prompts": [{"family": "needles", "prompt_tokens": 400}],
        "arrivals": {"kind": "concurrency", "clients": CLIENTS},
        "warm_up": 0,
        **fields,
    })  # fmt: skip


async def outcomes_of(asked: Scenario, service, tokenizer, monkeypatch):
    monkeypatch.setattr(session, "caller_of", lambda _target: service)
    run = await session.measure(asked, Source(tokenizer, asked.seed), lambda _progress: None)
    return run.outcomes


@pytest.mark.parametrize("requests", [2, 40])
async def test_no_more_requests_than_clients_are_under_way(demo_tokenizer, monkeypatch, requests):
    service = Service()
    asked = scenario(length={"requests": requests})
    outcomes = await outcomes_of(asked, service, demo_tokenizer, monkeypatch)
    assert len(service.asked) == len(outcomes) == requests
    assert service.most <= CLIENTS
    assert [each.index for each in outcomes] == list(range(requests))
    sent = [each.scheduled_s for each in outcomes]
    assert sent == sorted(sent)
    texts = {str(each.messages) for each in service.asked}
    assert len(texts) == requests


async def test_a_refusal_makes_room_for_the_next_request(demo_tokenizer, monkeypatch):
    outcomes = await outcomes_of(
        scenario(length={"requests": 6}), Service(2, 3), demo_tokenizer, monkeypatch
    )
    endings = [each.stream.ending for each in outcomes]
    assert endings.count(RequestEnding.SHED) == 2
    assert endings.count(RequestEnding.ANSWERED) == 4


async def test_a_client_goes_through_its_conversation_before_it_begins_another(
    demo_tokenizer, monkeypatch
):
    service = Service()
    asked = scenario(
        length={"requests": 4},
        arrivals={"kind": "concurrency", "clients": 1},
        conversation={"turns": 3, "growth_tokens": 50, "think_s": 0},
    )
    outcomes = await outcomes_of(asked, service, demo_tokenizer, monkeypatch)
    turns = [sum(each["role"] == "user" for each in prompt.messages) for prompt in service.asked]
    assert turns == [1, 2, 3] * 4
    assert [each.variant[-6:] for each in outcomes[:3]] == ["turn 1", "turn 2", "turn 3"]


async def test_nothing_is_begun_once_the_time_is_over(demo_tokenizer):
    clock = itertools.count()
    progress = RunProgress()
    source = Source(demo_tokenizer, 0)
    kinds = scenario(length={"seconds": 1}).prompts
    prompts = (source.draw(kinds, 1, np.random.default_rng(0))[0] for _ in itertools.count())
    requests = (runner.PlannedRequest(0, 0.0, prompt) for prompt in prompts)
    service = Service()
    outcomes = await runner.run_clients(
        requests, 1, 100.0, service, 5.0, progress, now=lambda: float(next(clock))
    )
    assert 0 < len(outcomes) == len(service.asked) < 100
    assert max(each.scheduled_s for each in outcomes) < 100.0 + 2.0
    assert (progress.total, progress.sent, progress.in_flight) == (*[len(outcomes)] * 2, 0)


async def test_no_turn_is_begun_once_the_time_is_over(demo_tokenizer):
    """Every look at the clock takes a second: the time is over in the first conversation."""
    clock = itertools.count()
    progress, service, source = RunProgress(), Service(), Source(demo_tokenizer, 0)
    asked = scenario(
        length={"seconds": 1}, conversation={"turns": 50, "growth_tokens": 20, "think_s": 0}
    )
    (prompt,) = source.draw(asked.prompts, 1, np.random.default_rng(0))
    (turns,) = source.conversations(asked.conversation, 1)
    requests = iter([runner.PlannedRequest(0, 0.0, prompt, turns=turns)])
    outcomes = await runner.run_clients(
        requests, 1, 60.0, service, 5.0, progress, now=lambda: float(next(clock))
    )
    assert 1 < len(outcomes) < 50
    assert (progress.total, progress.sent) == (len(outcomes), len(outcomes))


def test_a_search_needs_a_rate():
    with pytest.raises(ValueError, match="not concurrency"):
        scenario(
            length={"seconds": 1},
            search={"kind": "max_qps", "low": 1, "high": 2},
            slo={"ttft_s": 1.0},
        )


def test_the_command_line_sets_the_number_of_clients():
    from specprefill.cli.loadtest import _override

    args = SimpleNamespace(
        address=None, model=None, qps=None, clients=7, requests=None, seed=None, processes=3
    )
    raw = {"arrivals": {"kind": "concurrency", "clients": 2}}
    changed = _override(raw, args)
    assert changed["arrivals"] == {"kind": "concurrency", "clients": 7}
    assert changed["processes"] == 3


SWEEP = {"search": {"kind": "sweep", "clients": [1, 3]}, "length": {"requests": 4}}


async def test_a_sweep_runs_each_number_of_clients(demo_tokenizer, monkeypatch):
    service = Service(5)
    monkeypatch.setattr(session, "caller_of", lambda _target: service)
    measure = session.measure_here(Source(demo_tokenizer, 0), lambda _progress: None)
    found = await session.find(scenario(**SWEEP), measure)
    assert [trial.load for trial in found.trials] == [1.0, 3.0]
    assert [trial.held for trial in found.trials] == [True, False]
    assert [len(run.outcomes) for run in found.runs] == [4, 4]


async def test_a_sweep_is_told_per_gpu(demo_tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(session, "caller_of", lambda _target: Service())
    one = scenario(**SWEEP)
    two = scenario(**SWEEP, target={"model": "demo", "gpus": 2})
    measure = session.measure_here(Source(demo_tokenizer, 0), lambda _progress: None)
    found = await session.find(one, measure)
    rows = [results.sweep_table(found.trials, each.target.gpus).splitlines() for each in (one, two)]
    assert "tokens/s per GPU" in rows[1][0]
    assert "per GPU" not in rows[0][0]
    goodput = [float(each[2].split("|")[3]) for each in rows]
    assert goodput[1] == pytest.approx(goodput[0] / 2, abs=0.01)
    paths = results.write(tmp_path, "sweep", provenance(0), two, found.runs, found.trials)
    written = json.loads(paths[0].read_text())
    assert [trial["clients"] for trial in written["trials"]] == [1.0, 3.0]
    assert "highest_qps" not in written
    page = paths[2].read_text()
    assert "Goodput and latency" in page
    assert "3 clients" in page


@pytest.mark.parametrize(
    ("clients", "arrivals", "message"),
    [
        ([2, 1], {"kind": "concurrency", "clients": 1}, "clients: must ascend"),
        ([1], {"kind": "concurrency", "clients": 1}, "at least 2"),
        ([1, 2], {"kind": "poisson", "qps": 1}, "must be concurrency, not poisson"),
    ],
)
def test_a_sweep_is_of_rising_numbers_of_clients(clients, arrivals, message):
    with pytest.raises(ValueError, match=message):
        scenario(
            length={"requests": 4}, arrivals=arrivals, search={"kind": "sweep", "clients": clients}
        )
