"""The backend in this process: a speculator and a main model on transformers.

It knows every arm: controls and the ceiling need positions of their own choice, which no endpoint
takes. Spans, selection and scoring are the product's; only the answers come from transformers.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

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
from ...core.words import word_scores
from ...gateway.openai.text_writer import PromptTextWriter
from ...speculator.chunking import Chunker
from ...speculator.jobs import Rating
from ...speculator.method import PAPER
from ...speculator.scorer import Scorer, load_scorer
from ...speculator.words_service import CERTAINTY
from ..families.task import Task
from .arms import AUTOMATIC, CONTROLS, Arm, Chooser, control_scores
from .greedy import greedy_answers
from .outcomes import ArmAnswer
from .prompts import RenderedTask, Renderer, gold_kept

ORACLE_TOKENS = 32  # of the right answer
Ratings = Mapping[Chooser, Rating | Reason]


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
    chunker: Chunker
    automatic: Plan
    speculator: Scorer | None  # None: prompts are chosen by words
    answerer: MainModelAnswerer | None  # None: gold survival only
    paper: Scorer | None  # None: the speculator's readings serve the paper's scorer as well
    paper_policy: SelectionPolicy  # with the default settings of the automatic rate
    own_scorer: Scorer | None  # the main model as its own speculator; None: no ceiling
    oracle: Scorer | None  # the same with room for an answer
    texts: PromptTextWriter

    def answers(
        self, task: Task, arms: Sequence[Arm], rng: random.Random, *, with_text: bool
    ) -> list[ArmAnswer]:
        """Answer for each arm; equal selections are answered once. `before` makes no difference."""
        prompt = self.renderer.prompt(task)
        selections = [dense_selection(len(prompt.ids), Reason.KEEP_IS_ONE)] * len(arms)
        if not all(arm.is_dense for arm in arms):
            answer = self.renderer.answer_ids(task)
            ratings = self._ratings(prompt, {arm.chooser for arm in arms}, answer)
            selections = [self._selection(arm, prompt, ratings, rng) for arm in arms]
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

    def _ratings(
        self, prompt: RenderedTask, choosers: Collection[Chooser], answer: Sequence[int]
    ) -> Ratings:
        """Score the prompt in every way that the arms need.

        Raises ValueError for a ceiling without a scorer of its own.
        """
        ratings: dict[Chooser, Rating | Reason] = {}
        ours, papers = self._rate(prompt)
        if self.paper is not None and {Chooser.PAPER, Chooser.PAPER_AUTOMATIC} & {*choosers}:
            papers, _ = rate_prompt(self.paper, prompt)
        for chooser in (Chooser.SPECULATOR, Chooser.TEXT, Chooser.AUTOMATIC):
            ratings[chooser] = ours
        for chooser in (Chooser.PAPER, Chooser.PAPER_AUTOMATIC):
            ratings[chooser] = papers
        if {Chooser.MAIN_MODEL, Chooser.ORACLE} & {*choosers}:
            if self.own_scorer is None or self.oracle is None:
                raise ValueError("the ceiling needs the main model as a scorer")
            ratings[Chooser.MAIN_MODEL], _ = rate_prompt(self.own_scorer, prompt)
            ratings[Chooser.ORACLE], _ = rate_prompt(self.oracle, prompt, answer)
        return ratings

    def _rate(self, prompt: RenderedTask) -> tuple[Rating | Reason, Rating | Reason]:
        """Return the deployment's rating and the paper's; by words there is one."""
        if self.speculator is not None:
            return rate_prompt(self.speculator, prompt)
        chunks, tail_tokens = self.chunker.chunks(prompt.ids), self.policy.tail_tokens
        scores = word_scores(prompt.ids, prompt.asked, prompt.protected, tail_tokens, chunks)
        rating = Rating(scores, CERTAINTY)
        return rating, rating

    def _selection(
        self, arm: Arm, prompt: RenderedTask, ratings: Ratings, rng: random.Random
    ) -> Selection:
        """Return what the arm keeps: as the service, all of a prompt that is refused."""
        if arm.is_dense:
            return dense_selection(len(prompt.ids), Reason.KEEP_IS_ONE)
        chunks = self.chunker.chunks(prompt.ids)
        plan = Plan(PlanKind.PRUNE, Reason.ASKED, arm.keep)
        if arm.chooser in AUTOMATIC:
            plan = self.automatic
        if arm.chooser in CONTROLS:
            scores = control_scores(arm.chooser, chunks, rng)
            rating: Rating | Reason = Rating(scores, 1.0)
        else:
            rating = ratings[arm.chooser]
        if isinstance(rating, Reason):
            return dense_selection(len(prompt.ids), rating)
        policy = self.paper_policy if arm.chooser is Chooser.PAPER_AUTOMATIC else self.policy
        selection = select(rating.scores, plan, prompt.protected, policy, rating.certainty, chunks)
        if arm.chooser is not Chooser.TEXT or selection.mode is PromptMode.DENSE:
            return selection
        return self.texts.written(prompt.ids, prompt.protected, selection)


def rate_prompt(
    scorer: Scorer, prompt: RenderedTask, answer: Sequence[int] | None = None
) -> tuple[Rating | Reason, Rating | Reason]:
    """Score a prompt in the main model's tokens, by the scorer's method and by the paper's.

    Where the draft refuses it, both are the reason. A scorer that does not look ahead gives its own
    scores twice. With `answer`, its tokens are fed instead of generated ones.
    """
    read_as = scorer.translate(prompt.ids)
    refusal = scorer.refusal(len(read_as.prompt))
    if refusal is not None:
        return refusal, refusal
    echo = scorer.echo_of(read_as, prompt.asked) if answer is None else ()  # the answer asks
    with scorer.open_readings([read_as.prompt], echoes=[echo]) as (reading,):
        scorer.read([reading])
        if answer is None:
            scorer.look_ahead([reading])
        else:
            scorer.follow(reading, answer)
        scores = read_as.scores(scorer.rate(reading))
        ours = Rating(scores, reading.certainty)
        if not scorer.method.looks_ahead or scorer.method == PAPER:
            return ours, ours
        by_paper = read_as.scores(scorer.rate(reading, PAPER))
        return ours, Rating(by_paper, reading.certainty)


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
    by_paper = {"score_heads": None, "score_reduction": "maximum", "score_queries": "look_ahead"}
    own = speculator.model_copy(
        update={**by_paper, "path": model, "revision": None, "score_by": "draft"}
    )
    scorer = None
    if speculator.reads_with_model:
        scorer = load_scorer(speculator, selection.pool_tokens, model)
    own_scorer = load_scorer(own, selection.pool_tokens) if ceiling else None
    paper = None
    if scorer is not None and not scorer.method.looks_ahead:
        paper = load_scorer(speculator.model_copy(update=by_paper), selection.pool_tokens, model)
    policy = selection_policy(selection)
    usual = SelectionConfig()
    auto = replace(policy.auto, least_certainty=usual.least_certainty, setting=usual.peak_share)
    return Pair(
        renderer=Renderer(tokenizer, selection.tail_tokens),
        policy=policy,
        chunker=Chunker.of(selection, tokenizer),
        automatic=Plan(
            PlanKind.PRUNE, Reason.AUTO, within=KeepRange(selection.floor, selection.ceiling)
        ),
        speculator=scorer,
        answerer=load_answerer(model, speculator, tokenizer) if answered else None,
        paper=paper,
        paper_policy=replace(policy, auto=auto),
        own_scorer=own_scorer,
        oracle=None if own_scorer is None else _oracle(own_scorer),
        texts=PromptTextWriter(tokenizer, selection.gap_mark),
    )


def _oracle(own: Scorer) -> Scorer:
    """Return a scorer of the same model with room for an answer."""
    return Scorer(
        own.draft,
        ORACLE_TOKENS + 1,
        own.prefill_chunk_tokens,
        own.pool_tokens,
        own.memory_bytes,
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
