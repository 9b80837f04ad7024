"""The shipped demo pair: the speculator finds what the main model needs, and both answer right."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
import pytest_asyncio

from specprefill.config import (
    EngineConfig,
    KvConfig,
    MainModel,
    SelectionConfig,
    SpeculatorConfig,
)
from specprefill.core.selection import select
from specprefill.core.types import Plan, PlanKind, Reason, Selection, Span
from specprefill.lab.evaluation.arms import DENSE, Arm, Chooser
from specprefill.lab.families.catalog import generate
from specprefill.lab.families.judging import score
from specprefill.synthetic.needles import needle_prompt, render

from ..policies import PAPER, SHIPPED
from .conftest import MODELS, kept

pytestmark = pytest.mark.integration

KEEP = 0.1
PLAN = Plan(PlanKind.PRUNE, Reason.ASKED, KEEP)
# The paper's selection: nothing is protected, the rate alone decides.
BARE = replace(PAPER, min_kept_tokens=1, sink_tokens=0, tail_tokens=0)
LENGTHS = (1024, 1536, 2048)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODELS / "demo-main")


@pytest.fixture(scope="module")
def scorer():
    from specprefill.speculator.scorer import load_scorer

    path = str(MODELS / "demo-speculator")
    return load_scorer(SpeculatorConfig(path=path, dtype="float32"), 13, str(MODELS / "demo-main"))


class Needle:
    """A prompt, its tokens, and those of them that hold the answer."""

    def __init__(self, seed, length, tokenizer):
        self.prompt = needle_prompt(seed, length, tokenizer)
        text = render(self.prompt.messages, tokenizer)
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        self.ids = tuple(encoding["input_ids"])
        start = text.index(self.prompt.gold)
        stop = start + len(self.prompt.gold)
        self.gold = {
            token
            for token, (first, last) in enumerate(encoding["offset_mapping"])
            if first < stop and last > start
        }

    def survives(self, selection: Selection) -> bool:
        kept_tokens = {token for run in selection.runs for token in range(run.start, run.stop)}
        return self.gold <= kept_tokens


def random_chunks(selection: Selection, rng: random.Random) -> Selection:
    """Return as many tokens in random chunks: the control."""
    length, size = selection.prompt_tokens, BARE.chunk_tokens
    starts = list(range(0, length, size))
    chosen = sorted(rng.sample(starts, round(len(starts) * KEEP)))
    return kept(length, *(Span(start, min(start + size, length)) for start in chosen))


def test_the_needle_survives_a_keep_rate_of_a_tenth(scorer, tokenizer):
    rng = random.Random(0)
    found = {"paper": 0, "shipped": 0, "random": 0}
    for seed in range(200):
        needle = Needle(seed, rng.choice(LENGTHS), tokenizer)
        scores = scorer.score([needle.ids])[0]
        chosen = select(scores, PLAN, (), BARE)
        found["paper"] += needle.survives(chosen)
        found["shipped"] += needle.survives(select(scores, PLAN, (), SHIPPED))
        found["random"] += needle.survives(random_chunks(chosen, rng))
    assert found["paper"] >= 196, found
    assert found["shipped"] >= 196, found
    assert found["random"] <= 40, f"{found}: random chunks do as well, the test proves nothing"


def test_the_needle_survives_for_a_main_model_with_another_tokenizer(scorer, tokenizer):
    """The main model's tokens are bytes here: about four of them make one of the draft's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from specprefill.speculator.scorer import Scorer
    from specprefill.speculator.translation import Translator

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    main = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    main.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    main.decoder = decoders.ByteLevel()
    draft = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    translating = Scorer(scorer.draft, 8, 2048, 13, translator=Translator(main, draft, None))
    policy = replace(PAPER, chunk_tokens=128, min_kept_tokens=1, sink_tokens=0, tail_tokens=0)
    found = 0
    for seed in range(50):
        prompt = needle_prompt(3000 + seed, 1024, tokenizer)
        text = render(prompt.messages, tokenizer)
        ids = tuple(main.encode(text).ids)
        assert len(ids) == len(text)
        selection = select(translating.score([ids])[0], PLAN, (), policy)
        found += prompt.gold in main.decode(selection.engine_prompt(ids))
    assert found >= 48


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def main_engine():
    from specprefill.engine.args import Role, engine_args
    from specprefill.engine.engine import Engine

    model = MainModel(path=str(MODELS / "demo-main"), dtype="float32", max_model_len=8192)
    config = EngineConfig(block_size=64, kv_cache_memory_bytes=128 << 20, enforce_eager=True)
    args = engine_args(model, config, KvConfig(host="127.0.0.1"), Role.PREFILL)
    async with Engine(args) as engine:
        yield engine


async def answered(engine, needle, selection, name) -> bool:
    from vllm import SamplingParams

    from specprefill.core.positions import PositionMap
    from specprefill.engine.params import POSITIONS

    mapping = PositionMap.from_runs(selection.runs, selection.prompt_tokens)
    extra = None if mapping.is_identity else {POSITIONS: mapping.to_wire()}
    params = SamplingParams(temperature=0.0, max_tokens=16, extra_args=extra)
    async for output in engine.generate(selection.engine_prompt(needle.ids), params, name):
        text = output.outputs[0].text
    return needle.prompt.answer in text


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize(
    ("length", "count", "wanted"),
    [(2048, 20, 0.95), pytest.param(4096, 20, 0.90, marks=pytest.mark.thorough)],
)
async def test_dense_answers_are_right(main_engine, tokenizer, length, count, wanted):
    needles = [Needle(1000 + seed, length, tokenizer) for seed in range(count)]
    whole = [kept(len(needle.ids), Span(0, len(needle.ids))) for needle in needles]
    right = await asyncio.gather(
        *(
            answered(main_engine, needle, selection, f"dense-{length}-{number}")
            for number, (needle, selection) in enumerate(zip(needles, whole, strict=True))
        )
    )
    assert sum(right) / len(right) >= wanted


@pytest.mark.asyncio(loop_scope="session")
async def test_pruned_answers_are_right(main_engine, scorer, tokenizer):
    needles = [Needle(2000 + seed, 2048, tokenizer) for seed in range(40)]
    selections = [select(scorer.score([needle.ids])[0], PLAN, (), SHIPPED) for needle in needles]
    right = await asyncio.gather(
        *(
            answered(main_engine, needle, selection, f"pruned-{number}")
            for number, (needle, selection) in enumerate(zip(needles, selections, strict=True))
        )
    )
    assert sum(right) / len(right) >= 0.95


# What is held of each family at 1536 tokens: score of dense answers, score and gold survival of
# pruned ones. What the pair reaches is in models/README.md.
FAMILY_FLOORS = {
    "niah_single_2": (0.8, 0.8, 0.8),
    "niah_multikey_1": (0.7, 0.7, 0.8),
    "niah_multikey_2": (0.5, 0.5, 0.6),
    "niah_multikey_3": (0.5, 0.0, 0.0),
    "niah_multiquery": (0.75, 0.6, 0.8),
    "vt": (0.75, 0.6, 0.6),
}
FAMILY_PROMPTS, FAMILY_TOKENS = 4, 1536


@pytest.fixture(scope="module")
def pair(tokenizer):
    from specprefill.lab.evaluation.pair import load_pair

    speculator = SpeculatorConfig(path=str(MODELS / "demo-speculator"), dtype="float32")
    main = str(MODELS / "demo-main")
    return load_pair(main, speculator, SelectionConfig(), tokenizer, answered=True, ceiling=False)


@pytest.mark.parametrize("family", FAMILY_FLOORS)
def test_the_pair_knows_the_quality_suites_families(pair, tokenizer, family):
    sums = [0.0, 0.0, 0.0]
    for seed in range(FAMILY_PROMPTS):
        task = generate(family, 5000 + seed, FAMILY_TOKENS, tokenizer)
        arms = (DENSE, Arm(Chooser.SPECULATOR, KEEP))
        dense, pruned = pair.answers(task, arms, random.Random(seed), with_text=True)
        sums[0] += score(task, dense.text)
        sums[1] += score(task, pruned.text)
        sums[2] += pruned.gold_kept
    means = tuple(total / FAMILY_PROMPTS for total in sums)
    assert all(mean >= floor for mean, floor in zip(means, FAMILY_FLOORS[family], strict=True)), (
        means
    )
