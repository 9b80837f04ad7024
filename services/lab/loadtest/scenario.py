"""A load test as a YAML file: the target, the prompts, the rate, and the goals."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from ...config import Rate, Seconds, Strict
from ..families.catalog import FAMILIES, NEEDLES, TOOL_FAMILIES
from .arrivals import Concurrency, Length, Process, RecordedTrace
from .statistics import MOST_REPLICATES, RequestSlo

DASHBOARD_URL = "http://127.0.0.1:8265"


class Target(Strict):
    """The endpoint under load. HTTP may be any OpenAI-compatible server; gRPC is our own API."""

    protocol: Literal["http", "grpc"] = "http"
    address: str = "http://127.0.0.1:8000/v1"  # a base URL, or host:port for gRPC
    model: str
    api_key_variable: str = "OPENAI_API_KEY"  # environment variable; unset means no key
    gpus: PositiveInt | None = None  # of the service; a sweep then tells its throughput per GPU


class Prompts(Strict):
    """One kind of request; a run draws kinds by weight."""

    family: str = NEEDLES  # a family of the quality suite, so that answers can be checked
    prompt_tokens: PositiveInt = 4096
    keep: Rate | Literal["auto", "dense"] | None = None  # None: no pruning field is sent
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    max_tokens: PositiveInt | None = None  # None: what the family's answers need

    @field_validator("family")
    @classmethod
    def _check_family(cls, family: str) -> str:
        if family not in FAMILIES:
            raise ValueError(f"unknown family, expected one of {', '.join(FAMILIES)}")
        return family

    @property
    def variant(self) -> str:
        """Name of this kind of request in tables."""
        if self.keep is None:
            return "default"
        return self.keep if isinstance(self.keep, str) else f"keep {self.keep:g}"


class ConversationTurns(Strict):
    """Every request is the first turn of a conversation; a turn follows when one is answered."""

    turns: Annotated[int, Field(ge=2)]
    growth_tokens: PositiveInt = 200  # of a turn's new message, beside its fact and question
    think_s: NonNegativeFloat = 5.0  # from an answer to the next turn


class Cancel(Strict):
    """A share of the clients leaves early, at a moment drawn evenly from a range."""

    share: Rate
    after_s: tuple[NonNegativeFloat, NonNegativeFloat] = (0.0, 1.0)

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.after_s[0] > self.after_s[1]:
            raise ValueError("after_s: the first number must not exceed the second")
        return self


class Kill(Strict):
    """SIGKILL one replica of a pool, drawn at random, `at_s` seconds into the run."""

    at_s: NonNegativeFloat
    pool: Literal["Gateway", "Speculator", "Prefill", "Decode"]


class Chaos(Strict):
    """Faults on schedule. Replicas are found through Ray's dashboard, on this machine only."""

    dashboard: str = DASHBOARD_URL
    kills: tuple[Kill, ...]


class Goals(Strict):
    """The values that a run must reach for exit code 0."""

    attainment: Rate | None = None  # share of requests within the SLO
    error_rate: Annotated[float, Field(ge=0.0, le=1.0)] | None = None  # at most
    shed_rate: Annotated[float, Field(ge=0.0, le=1.0)] | None = None  # at most
    score: Rate | None = None  # mean score of the answers


class MaxQps(Strict):
    """Bisect for the highest rate whose SLO attainment holds."""

    kind: Literal["max_qps"]
    low: Annotated[float, Field(gt=0.0)]
    high: Annotated[float, Field(gt=0.0)]
    attainment: Rate = 0.95
    tolerance: Annotated[float, Field(gt=0.0)] = 0.1  # relative width at which the search ends

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self


class PaperProtocol(Strict):
    """The max-QPS protocol of Speculative Prefill (arXiv 2502.02789): a constant rate, raised
    step by step until more than `max_failures` requests exceed the end-to-end time-out.
    """

    kind: Literal["paper"]
    grid: Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], Field(min_length=1)]
    max_failures: NonNegativeInt = 4
    pause_s: NonNegativeFloat = 10.0  # between two rates

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if list(self.grid) != sorted(set(self.grid)):
            raise ValueError("grid: rates must ascend")
        return self


class Sweep(Strict):
    """A run with each number of clients of a closed loop: what latency costs in throughput."""

    kind: Literal["sweep"]
    clients: Annotated[tuple[PositiveInt, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if list(self.clients) != sorted(set(self.clients)):
            raise ValueError("clients: must ascend")
        return self


Search = Annotated[MaxQps | PaperProtocol | Sweep, Field(discriminator="kind")]


_ONE_RATE = ("constant", "poisson", "bursty")


class Scenario(Strict):
    """A whole file."""

    target: Target
    tokenizer: str  # of the model under load, to fit prompt lengths: a folder or a hub name
    prompts: Annotated[tuple[Prompts, ...], Field(min_length=1)]
    arrivals: Process
    length: Length
    timeout_s: Seconds = 60.0  # end to end; later, the client gives up
    warm_up: NonNegativeInt = 1  # requests of each kind before the clock starts, not counted
    slo: RequestSlo = RequestSlo()
    gate: Goals = Goals()
    conversation: ConversationTurns | None = None
    cancel: Cancel | None = None
    chaos: Chaos | None = None
    search: Search | None = None
    seed: int = 0
    # Client processes, each of which sends its part of the requests: one is bound by one core.
    processes: PositiveInt = 1
    # Runs with other prompts and send times, one after the other: more than one give intervals.
    replicates: Annotated[int, Field(ge=1, le=MOST_REPLICATES)] = 1

    @model_validator(mode="after")
    def _prompts_fit_the_protocol(self) -> Self:
        if self.target.protocol == "grpc":
            for each in self.prompts:
                if each.family in TOOL_FAMILIES:
                    raise ValueError(
                        f"prompts: {each.family} has tool calls, which gRPC messages cannot hold; "
                        "use target.protocol http"
                    )
        return self

    @model_validator(mode="after")
    def _search_varies_a_rate(self) -> Self:
        if isinstance(self.search, Sweep):
            if self.arrivals.kind != "concurrency":
                raise ValueError(
                    "search: a sweep varies the clients, so arrivals.kind must be concurrency, "
                    f"not {self.arrivals.kind}"
                )
        elif self.search is not None and self.arrivals.kind not in _ONE_RATE:
            raise ValueError(
                f"search: varies one rate, so arrivals.kind must be constant, poisson or bursty, "
                f"not {self.arrivals.kind}"
            )
        if self.search is not None and self.replicates > 1:
            raise ValueError("replicates: a search has its own runs; leave one of both out")
        if isinstance(self.search, MaxQps) and self.slo == RequestSlo():
            raise ValueError("search: max_qps needs a bound in slo")
        if self.processes > self._fewest_clients():
            raise ValueError(
                f"processes: {self.processes} processes need as many clients, "
                f"not {self._fewest_clients()}"
            )
        if isinstance(self.arrivals, RecordedTrace) and self.length.requests is None:
            raise ValueError("length: a trace is bounded by length.requests")
        return self

    def _fewest_clients(self) -> float:
        """Return the fewest clients of a closed loop; in an open one each request is a client."""
        if isinstance(self.search, Sweep):
            return min(self.search.clients)
        return self.arrivals.clients if isinstance(self.arrivals, Concurrency) else math.inf

    def at_load(self, load: float) -> Scenario:
        """Return the same at another rate or with as many clients, without its search."""
        is_sweep = isinstance(self.search, Sweep)
        changed = {"clients": int(load)} if is_sweep else {"qps": load}
        arrivals = self.arrivals.model_copy(update=changed)
        return self.model_copy(update={"arrivals": arrivals, "search": None})
