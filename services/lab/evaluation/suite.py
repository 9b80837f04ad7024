"""Runs tasks through a backend: every family, length and seed, all arms on the same prompt."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from typing import Protocol

from ..families.catalog import generate
from ..families.fitting import TaskTokenizer
from ..families.task import Task
from .arms import DENSE, Arm
from .journal import Journal
from .outcomes import ArmAnswer, ArmOutcome, judge_answer

PROBED_ITEMS = 6  # answered dense, to see whether a family is beyond the model


class Backend(Protocol):
    """Something that answers tasks."""

    def answers(
        self, task: Task, arms: Sequence[Arm], rng: random.Random, *, with_text: bool
    ) -> list[ArmAnswer]:
        """Return one answer per arm, in order; without text, only the kept share is set."""
        ...


@dataclass(frozen=True, slots=True)
class Suite:
    """The settings of an evaluation."""

    families: tuple[str, ...]
    lengths: tuple[int, ...]  # nominal prompt tokens
    items: int  # prompts per family and length
    arms: tuple[Arm, ...]
    seed: int
    # A family whose mean dense score is below it after PROBED_ITEMS is beyond the model: its
    # other prompts are not answered, only their gold survival is measured.
    least_dense: float
    answered: bool = True  # False: gold survival only
    gold_known: bool = True  # False: the backend does not return which tokens were kept

    @property
    def prompts(self) -> int:
        return len(self.families) * len(self.lengths) * self.items


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """The results of a suite."""

    outcomes: tuple[ArmOutcome, ...]
    too_short: tuple[tuple[str, int], ...]  # family and length that cannot hold its facts
    beyond_model: tuple[tuple[str, int], ...]  # answered for PROBED_ITEMS prompts only


ReportProgress = Callable[[int, str], None]  # prompts done, and of which family and length


def measure(
    suite: Suite,
    backend: Backend,
    tokenizer: TaskTokenizer,
    workers: int,
    on_progress: ReportProgress,
    journal: Journal,
) -> SuiteResult:
    """Run the whole suite, `workers` prompts at a time, except those that the journal has."""
    outcomes: list[ArmOutcome] = []
    too_short: list[tuple[str, int]] = []
    beyond: list[tuple[str, int]] = []
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        for family, length in product(suite.families, suite.lengths):
            place = _Place(suite, backend, tokenizer, journal, family, length)
            found: list[ArmOutcome] = []
            try:
                with closing(place.run(pool)) as prompts:  # interrupted: the rest is not asked
                    for item, some in enumerate(prompts, start=1):
                        journal.add(some)
                        found += some
                        on_progress(done + item, f"{family} {length}")
            except TooShort:
                too_short.append((family, length))
            if suite.answered and _is_beyond(found, suite.least_dense):
                beyond.append((family, length))
            outcomes += found
            done += suite.items
            on_progress(done, f"{family} {length}")
    return SuiteResult(tuple(outcomes), tuple(too_short), tuple(beyond))


class TooShort(Exception):
    """The length cannot hold the family's facts."""


@dataclass(frozen=True, slots=True)
class _Place:
    """One family at one length."""

    suite: Suite
    backend: Backend
    tokenizer: TaskTokenizer
    journal: Journal
    family: str
    length: int

    def run(self, pool: ThreadPoolExecutor) -> Generator[list[ArmOutcome]]:
        """Yield the outcomes of one prompt after the other. Raises TooShort."""
        probed = self._probe_first(pool) if self.suite.answered else {}
        answered = self.suite.answered and not _is_beyond(
            [*probed.values()], self.suite.least_dense
        )
        items = range(self.suite.items)
        yield from pool.map(lambda item: self._run_prompt(item, probed, answered=answered), items)

    def _probe_first(self, pool: ThreadPoolExecutor) -> dict[int, ArmOutcome]:
        """Ask the dense arm for the first prompts; return outcomes by seed."""
        items = range(min(PROBED_ITEMS, self.suite.items))
        return {one.seed: one for one in pool.map(self._probe, items)}

    def _probe(self, item: int) -> ArmOutcome:
        """Ask the dense arm for one prompt."""
        for outcome in self._find_in_journal(item):
            if outcome.arm == DENSE and outcome.score is not None:
                return outcome
        return self._ask_arms(item, (DENSE,), answered=True)[0]

    def _find_in_journal(self, item: int) -> list[ArmOutcome]:
        return self.journal.find((self.family, self.length, self._seed(item))) or []

    def _run_prompt(
        self, item: int, probed: Mapping[int, ArmOutcome], *, answered: bool
    ) -> list[ArmOutcome]:
        """Ask all arms, except those that the journal has or the probe has answered."""
        done = self._find_in_journal(item)
        if done and not (answered and any(one.score is None for one in done)):
            return done
        known = probed.get(self._seed(item))
        if known is None:
            return self._ask_arms(item, self.suite.arms, answered=answered)
        others = tuple(arm for arm in self.suite.arms if arm != DENSE)
        return [known, *self._ask_arms(item, others, answered=answered)]

    def _seed(self, item: int) -> int:
        return self.suite.seed * 1_000_000 + item

    def _ask_arms(self, item: int, arms: tuple[Arm, ...], *, answered: bool) -> list[ArmOutcome]:
        """Ask for some arms. Raises TooShort."""
        seed = self._seed(item)
        try:
            task = generate(self.family, seed, self.length, self.tokenizer)
        except ValueError as error:
            raise TooShort(str(error)) from error
        rng = random.Random(f"{self.family}/{self.length}/{seed}")
        answers = self.backend.answers(task, arms, rng, with_text=answered)
        return [
            judge_answer(task, self.length, seed, arm, answer)
            for arm, answer in zip(arms, answers, strict=True)
        ]


def _is_beyond(outcomes: Sequence[ArmOutcome], least_dense: float) -> bool:
    """Return True if the dense answers are too poor for pruning to lose anything."""
    dense = [each.score for each in outcomes if each.arm == DENSE and each.score is not None]
    return len(dense) > 0 and sum(dense) / len(dense) < least_dense
