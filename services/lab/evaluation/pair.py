"""The backend in this process: a speculator and a main model on transformers.

It knows every arm: controls and the ceiling need positions of their own choice, which no endpoint
takes. Spans, selection and scoring are the product's; only the answers come from transformers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ...config import SelectionConfig, SpeculatorConfig, local_path
from ...control.from_config import selection_policy
from ...core.selection import SelectionPolicy, select
from ...core.types import (
    KeepRange,
    Plan,
    PlanKind,
    PromptMode,
    Reason,
    Selection,
    Span,
    dense_selection,
)
from ...gateway.openai.text_writer import PromptTextWriter
from ...speculator.jobs import Rating
from ...speculator.scorer import Scorer, load_scorer
from ..families.task import Task
from .arms import CONTROLS, Arm, Chooser, control_scores
from .greedy import greedy_answers
from .outcomes import ArmAnswer
from .prompts import RenderedTask, Renderer, gold_kept


@dataclass(frozen=True, slots=True)
class MainModelAnswerer:
    """The main model, answering by itself."""

    model: PreTrainedModel
    eos_ids: frozenset[int]
    tokenizer: PreTrainedTokenizerBase

    def texts(
        self, prompt: RenderedTask, kept: Sequence[tuple[Span, ...]], max_tokens: int
    ) -> dict[tuple[Span, ...], str]:
        """Return the answers to each of these parts of the prompt."""
        parts = list(dict.fromkeys(kept))
        positions = [_positions(runs) for runs in parts]
        return dict(zip(parts, self.answers(prompt.ids, positions, max_tokens), strict=True))

    def answers(
        self, prompt: Sequence[int], kept_sets: Sequence[Sequence[int]], max_tokens: int
    ) -> list[str]:
        """Return the answers to these positions of the prompt, in the order of their slots."""
        answers = greedy_answers(self.model, prompt, kept_sets, max_tokens, self.eos_ids)
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]

    def text_of(self, prompt: Sequence[int], max_tokens: int) -> str:
        """Return the answer to a prompt of its own."""
        whole = [range(len(prompt))]
        answer = greedy_answers(self.model, prompt, whole, max_tokens, self.eos_ids)[0]
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))


@dataclass(frozen=True, slots=True)
class Pair:
    """A speculator and a main model, which answers from what the deployment would keep."""

    renderer: Renderer
    policy: SelectionPolicy
    automatic: Plan
    speculator: Scorer
    answerer: MainModelAnswerer | None  # None: gold survival only
    own_scorer: Scorer | None  # the main model as its own speculator; None: no ceiling
    texts: PromptTextWriter

    def answers(
        self, task: Task, arms: Sequence[Arm], rng: random.Random, *, with_text: bool
    ) -> list[ArmAnswer]:
        """Answer for each arm; equal selections are answered once. `before` makes no difference."""
        prompt = self.renderer.prompt(task)
        selections = [dense_selection(len(prompt.ids), Reason.KEEP_IS_ONE)] * len(arms)
        if not all(arm.is_dense for arm in arms):
            rating = rate_prompt(self.speculator, prompt.ids)
            selections = [self._selection(arm, prompt, rating, rng) for arm in arms]
        answers: list[str | None] = [None] * len(arms)
        if with_text and self.answerer is not None:
            answers = [*self._texts(self.answerer, prompt, selections, task.max_tokens)]
        return [
            ArmAnswer(
                text=answer,
                prompt_tokens=len(prompt.ids),
                kept_tokens=selection.kept_tokens,
                reason=selection.plan.reason.value,
                gold_kept=gold_kept(prompt, selection),
                text_tokens=None if selection.text is None else len(selection.text),
            )
            for selection, answer in zip(selections, answers, strict=True)
        ]

    def _texts(
        self,
        answerer: MainModelAnswerer,
        prompt: RenderedTask,
        selections: Sequence[Selection],
        max_tokens: int,
    ) -> Iterator[str]:
        """Yield the answer of each selection."""
        kept = [selection.runs for selection in selections if selection.text is None]
        found = answerer.texts(prompt, kept, max_tokens)
        for selection in selections:
            if selection.text is None:
                yield found[selection.runs]
            else:
                yield answerer.text_of(selection.text, max_tokens)

    def _selection(
        self, arm: Arm, prompt: RenderedTask, rating: Rating | Reason, rng: random.Random
    ) -> Selection:
        """Return what the arm keeps: all of a prompt that its speculator refuses, as the service.

        Raises ValueError for a ceiling without a scorer of its own.
        """
        if arm.is_dense:
            return dense_selection(len(prompt.ids), Reason.KEEP_IS_ONE)
        plan = Plan(PlanKind.PRUNE, Reason.ASKED, arm.keep)
        if arm.chooser is Chooser.AUTOMATIC:
            plan = self.automatic
        elif arm.chooser in CONTROLS:
            chunk_tokens = self.policy.chunk_tokens
            rating = Rating(control_scores(arm.chooser, len(prompt.ids), chunk_tokens, rng), 1.0)
        elif arm.chooser is Chooser.MAIN_MODEL:
            if self.own_scorer is None:
                raise ValueError("the ceiling needs the main model as a scorer")
            rating = rate_prompt(self.own_scorer, prompt.ids)
        if isinstance(rating, Reason):
            return dense_selection(len(prompt.ids), rating)
        selection = select(rating.scores, plan, prompt.protected, self.policy, rating.certainty)
        if arm.chooser is not Chooser.TEXT or selection.mode is PromptMode.DENSE:
            return selection
        return self.texts.written(prompt.ids, prompt.protected, selection)


def rate_prompt(scorer: Scorer, prompt: tuple[int, ...]) -> Rating | Reason:
    """Score a prompt in the main model's tokens, or return why the draft cannot."""
    read_as = scorer.translate(prompt)
    refusal = scorer.refusal(len(read_as.prompt))
    if refusal is not None:
        return refusal
    with scorer.open_readings([read_as.prompt]) as readings:
        scorer.read(readings)
        scorer.look_ahead(readings)
        scores = read_as.scores(scorer.rate(readings[0]))
        return Rating(scores, readings[0].certainty)


def load_pair(
    model: str,
    speculator: SpeculatorConfig,
    selection: SelectionConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    answered: bool,
    ceiling: bool,
) -> Pair:
    """Load both models. The ceiling loads the main model once more, as a speculator.

    Raises UnsupportedModel where the models cannot work together.
    """
    own = speculator.model_copy(update={"path": model, "revision": None})
    scorer = load_scorer(speculator, selection.pool_tokens, model)
    return Pair(
        renderer=Renderer(tokenizer, selection.tail_tokens),
        policy=selection_policy(selection),
        automatic=Plan(
            PlanKind.PRUNE, Reason.AUTO, within=KeepRange(selection.floor, selection.ceiling)
        ),
        speculator=scorer,
        answerer=load_answerer(model, speculator, tokenizer) if answered else None,
        own_scorer=load_scorer(own, selection.pool_tokens) if ceiling else None,
        texts=PromptTextWriter(tokenizer, selection.gap_mark),
    )


def load_answerer(
    path: str, like: SpeculatorConfig, tokenizer: PreTrainedTokenizerBase
) -> MainModelAnswerer:
    """Load the main model on the speculator's device and in its dtype."""
    model = AutoModelForCausalLM.from_pretrained(local_path(path), dtype=like.dtype).eval()
    if like.device == "cuda":
        model = model.to("cuda")
    ids = model.generation_config.eos_token_id
    ids = model.config.eos_token_id if ids is None else ids
    eos_ids = frozenset(() if ids is None else [ids] if isinstance(ids, int) else ids)
    return MainModelAnswerer(model, eos_ids, tokenizer)


def _positions(runs: Sequence[Span]) -> list[int]:
    return [position for run in runs for position in range(run.start, run.stop)]
