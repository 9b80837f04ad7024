"""Measures the demo pair on needle prompts.

Answers of the main model: from the whole prompt, from the chunks that the speculator's scores keep,
and from as many random chunks. And whether the kept chunks hold all of the needle.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from specprefill.config import SpeculatorConfig
from specprefill.selection import SelectionPolicy, select
from specprefill.speculator.scorer import Scorer, load_scorer
from specprefill.synthetic.needles import NeedlePrompt, gold_span, needle_prompt, render
from specprefill.types import Plan, PlanKind, Reason

HERE = Path(__file__).parent
LENGTHS = (256, 1024, 2048, 4096)
ANSWER_TOKENS = 10
POOL_TOKENS = 13
CHUNK_TOKENS = 32
# The paper's: nothing is protected.
POLICY = SelectionPolicy(chunk_tokens=CHUNK_TOKENS, min_kept_tokens=0, sink_tokens=0, tail_tokens=0)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A needle prompt as tokens, with the positions of its needle."""

    ids: list[int]
    gold: range
    answer: str


@dataclass(frozen=True, slots=True)
class Result:
    """What one prompt gave."""

    dense_right: bool
    pruned_right: bool
    random_right: bool
    needle_kept: bool
    needle_kept_by_random: bool


def encode(prompt: NeedlePrompt, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Tokenize the rendered chat, and find the needle by character offset."""
    text = render(prompt.messages, tokenizer)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    start, stop = gold_span(prompt, tokenizer)
    offsets = enumerate(encoding["offset_mapping"])
    inside = [index for index, (first, last) in offsets if first < stop and last > start]
    return Encoded(encoding["input_ids"], range(inside[0], inside[-1] + 1), prompt.answer)


def greedy(model: PreTrainedModel, prompt: list[int], kept: list[int]) -> list[int]:
    """The answer from the kept positions of the prompt; it begins at the prompt's full length."""
    cache = DynamicCache()
    tokens, positions = [prompt[position] for position in kept], kept
    answer: list[int] = []
    for step in range(ANSWER_TOKENS):
        output = model(
            input_ids=torch.tensor([tokens]),
            position_ids=torch.tensor([positions]),
            attention_mask=torch.ones(1, len(kept) + step, dtype=torch.long),
            past_key_values=cache,
            logits_to_keep=1,
        )
        token = int(output.logits[0, -1].argmax())
        if token == model.config.eos_token_id:
            break
        answer.append(token)
        tokens, positions = [token], [len(prompt) + step]
    return answer


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The loaded pair and how much it keeps."""

    main: PreTrainedModel
    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    keep: float
    seed: int

    def results(self, prompt_tokens: int, prompts: int) -> Iterator[Result]:
        for index in range(prompts):
            rng = random.Random(f"{self.seed}/{prompt_tokens}/{index}")
            prompt = needle_prompt(rng, prompt_tokens, self.tokenizer)
            yield self.measure(encode(prompt, self.tokenizer), rng)

    def measure(self, prompt: Encoded, rng: random.Random) -> Result:
        chosen = self.chosen(prompt.ids)
        lot = random_chunks(rng, len(prompt.ids), len(chosen) // CHUNK_TOKENS)
        return Result(
            dense_right=self.is_right(prompt, range(len(prompt.ids))),
            pruned_right=self.is_right(prompt, chosen),
            random_right=self.is_right(prompt, lot),
            needle_kept=set(prompt.gold) <= set(chosen),
            needle_kept_by_random=set(prompt.gold) <= set(lot),
        )

    def chosen(self, ids: list[int]) -> list[int]:
        """The positions that the speculator keeps."""
        scores = self.scorer.score([tuple(ids)])[0]
        plan = Plan(PlanKind.PRUNE, Reason.ASKED, self.keep)
        return [
            p for run in select(scores, plan, (), POLICY).runs for p in range(run.start, run.stop)
        ]

    def is_right(self, prompt: Encoded, kept: Iterable[int]) -> bool:
        reply = greedy(self.main, prompt.ids, list(kept))
        return prompt.answer in str(self.tokenizer.decode(reply))


def random_chunks(rng: random.Random, prompt_tokens: int, count: int) -> list[int]:
    """The positions of the last chunk, which holds the question, and of others up to `count`."""
    last = (prompt_tokens - 1) // CHUNK_TOKENS
    chunks = sorted({*rng.sample(range(last), max(0, count - 1)), last})
    starts = [chunk * CHUNK_TOKENS for chunk in chunks]
    return [p for start in starts for p in range(start, min(prompt_tokens, start + CHUNK_TOKENS))]


def share(results: list[Result], name: str) -> float:
    """How often this was true."""
    return sum(getattr(result, name) for result in results) / len(results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--main", type=Path, default=HERE / "demo-main")
    parser.add_argument("--speculator", type=Path, default=HERE / "demo-speculator")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--prompts", type=int, default=100, help="of each length")
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    config = SpeculatorConfig(
        path=str(arguments.speculator), dtype=arguments.dtype, threads=arguments.threads
    )
    evaluation = Evaluation(
        main=AutoModelForCausalLM.from_pretrained(arguments.main, dtype=arguments.dtype).eval(),
        scorer=load_scorer(config, POOL_TOKENS, str(arguments.main)),
        tokenizer=AutoTokenizer.from_pretrained(arguments.main),
        keep=arguments.keep,
        seed=arguments.seed,
    )
    for tokens in arguments.lengths:
        with torch.inference_mode():
            results = list(evaluation.results(tokens, arguments.prompts))
        shares = " ".join(f"{name}={share(results, name):.3f}" for name in Result.__slots__)
        print(f"tokens={tokens} prompts={len(results)} keep={arguments.keep} {shares}", flush=True)


if __name__ == "__main__":
    main()
