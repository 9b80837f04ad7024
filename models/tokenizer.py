"""Trains the byte-level BPE tokenizer that both demo models share.

Every lexicon word with its leading space is one token; so is every digit, and the pairs of digits
in uuids and in numbers of seven digits (`pieces.py`). Any other text encodes as bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import families
import pieces
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from specprefill.synthetic import corpus

HERE = Path(__file__).parent
VOCABULARY_SIZE = 4096
FAMILY_TOKENS = 1024
MODEL_MAX_LENGTH = 16384
PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
SPECIAL_TOKENS = (PAD, BEGIN, END, *ROLES)
TOOL_SCHEMA = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Finds a record.",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string"}},
            "required": ["key"],
        },
    },
}
OTHER_TEXT = (
    "You are a helpful assistant. Answer the question with the text. Use the records above.",
    "hello how are you what is this that these those with have has had will would can could",
    "please summarize explain write list count sort code file function return import class",
    "speculative prefill keeps the prompt tokens that matter and drops the rest",
    json.dumps(TOOL_SCHEMA),
)


def training_text(rng: random.Random, documents: int) -> Iterator[str]:
    """Return the lexicon, filler, records and questions, and a little text of other kinds."""
    for _ in range(documents):
        facts = corpus.records(rng, 8)
        filler = corpus.filler_pool(rng, 24)
        yield corpus.join(filler, facts, [rng.randrange(25) for _ in facts])
        yield "\n".join(corpus.question(rng, fact) for fact in facts)
        yield "".join(f" {word}" for word in corpus.LEXICON)
        yield "".join(f"-{noun}" for noun in corpus.KEY_NOUNS)
        for family in families.WEIGHTS:
            yield "\n".join(turn.text for turn in family(rng, FAMILY_TOKENS).turns)
        yield "".join(f"\n{thing} =" for thing in corpus.THINGS)
        yield from OTHER_TEXT


def train(rng: random.Random, documents: int) -> Tokenizer:
    """Train a tokenizer with one token per lexicon word; raises ValueError if one has more."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces.pattern()), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(rng, documents), trainer)
    split = [word for word in corpus.LEXICON if len(tokenizer.encode(f" {word}").ids) != 1]
    if split:
        raise ValueError(f"these words are not one token each: {split}")
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=list(ROLES),
        model_max_length=MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (HERE / "chat_template.jinja").read_text().rstrip("\n")
    fast.save_pretrained(folder)


def write(folders: Sequence[Path], *, seed: int = 0, documents: int = 200) -> None:
    """Train one tokenizer and save it into every folder."""
    tokenizer = train(random.Random(seed), documents)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        save(tokenizer, folder)
        print(f"{folder}: {tokenizer.get_vocab_size()} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folders", nargs="*", type=Path, default=[HERE / "demo-main", HERE / "demo-speculator"]
    )
    arguments = parser.parse_args()
    write(arguments.folders)


if __name__ == "__main__":
    main()
