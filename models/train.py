"""Trains the demo pair from nothing, on text that the project generates.

Without arguments: the tokenizer, then both models. A stopped training goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import replicas
import samples
import tokenizer as tokenizer_recipe
import torch
from curriculum import MAX_TOKENS, TrainingBatch, TrainingProgress, draw_batch, rate_share
from finding import finding_loss
from growth import carry_over, grow
from induction import start_with_induction
from samples import Sampler
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

HERE = Path(__file__).parent
CHECKPOINTS = HERE.parent / "out" / "models"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
HEAD_DIM, MAX_POSITIONS, ROPE_THETA = 32, 16384, 1e6
BETAS, WEIGHT_DECAY, MAX_GRADIENT = (0.9, 0.98), 0.01, 1.0
PLAIN_WEIGHT, PLAIN_SHARE = 0.1, 0.25  # of the tokens that are no answers
FINDING_WEIGHT = 0.8
GROWTH_NOISE = 0.02  # lets the copies part in further training
RESUMED_TOKENS = 256  # the longest prompts at first, of a model that could answer before
SAVE_EVERY_S = 120.0
REPORT_EVERY_STEPS = 25


@dataclass(frozen=True, slots=True)
class Recipe:
    """The size of a model, and its training."""

    folder: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    learning_rate: float
    steps: int
    grown_from: str | None = None  # the recipe whose trained model this one starts as


RECIPES = {
    "speculator": Recipe("demo-speculator", 128, 256, 4, 4, 4, learning_rate=1.5e-3, steps=1000),
    "main": Recipe(
        "demo-main", 256, 768, 6, 8, 4, learning_rate=5e-4, steps=0, grown_from="speculator"
    ),
}


@dataclass(frozen=True, slots=True)
class BatchLosses:
    """The losses of one batch; the accuracy is of answer tokens."""

    answer_loss: torch.Tensor
    plain_loss: torch.Tensor
    finding_loss: torch.Tensor
    accuracy: float

    @property
    def loss(self) -> torch.Tensor:
        return (
            self.answer_loss + PLAIN_WEIGHT * self.plain_loss + FINDING_WEIGHT * self.finding_loss
        )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Make a Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def forward(model: LlamaForCausalLM, batch: TrainingBatch) -> BatchLosses:
    """Return cross-entropy of all answer tokens and of a random quarter of the others."""
    device = model.device
    with torch.autocast(device.type, dtype=torch.bfloat16):
        # The mask of ones keeps transformers from reading gaps as borders of packed sequences.
        output = model.model(
            input_ids=batch.ids.to(device),
            position_ids=batch.positions.to(device),
            attention_mask=torch.ones_like(batch.ids, device=device),
            use_cache=False,
            output_hidden_states=True,
        )
        finding = finding_loss(model, output.hidden_states[-2], batch)
        kinds = batch.kinds[:, 1:]
        plain = (kinds == samples.PLAIN) & (torch.rand(kinds.shape) < PLAIN_SHARE)
        picked = plain | (kinds == samples.ANSWER)
        logits = model.lm_head(output.last_hidden_state[:, :-1][picked.to(device)]).float()
    targets, kinds = batch.ids[:, 1:][picked].to(device), kinds[picked].to(device)
    losses = functional.cross_entropy(logits, targets, reduction="none")
    answers = kinds == samples.ANSWER
    return BatchLosses(
        answer_loss=losses[answers].mean(),
        plain_loss=losses[kinds == samples.PLAIN].mean(),
        finding_loss=finding,
        accuracy=(logits.argmax(-1) == targets)[answers].float().mean().item(),
    )


@dataclass(frozen=True, slots=True)
class Training:
    """One model in training."""

    model: LlamaForCausalLM
    optimizer: torch.optim.Optimizer
    sampler: Sampler
    recipe: Recipe
    progress: TrainingProgress
    seed: int
    replica: int

    def step(self) -> tuple[TrainingBatch, BatchLosses]:
        """Draw a batch and learn from it."""
        started_s = time.monotonic()
        share = rate_share(self.progress.step, self.recipe.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * share
        # Seeded by the step: going on from a checkpoint draws what an unbroken run would.
        name = f"{self.seed}/{self.progress.step}"
        shape, rng = random.Random(name), random.Random(f"{name}/{self.replica}")
        batch = draw_batch(shape, rng, self.sampler, self.progress.length)
        outcome = forward(self.model, batch)
        self.optimizer.zero_grad()
        outcome.loss.backward()
        accuracy = replicas.average(self.model, outcome.accuracy)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT)
        self.optimizer.step()
        self.progress.advance(batch, accuracy)
        self.progress.seconds += time.monotonic() - started_s
        return batch, outcome

    def save(self, path: Path) -> None:
        """Save everything that resuming needs, replaced in one move."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)


def start(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folders: Path, earlier: Path | None
) -> tuple[LlamaForCausalLM, TrainingProgress]:
    """Start from an earlier model, an induction circuit, or a smaller model at full length."""
    model = build_model(recipe, tokenizer)
    generator = torch.Generator().manual_seed(0)
    if earlier is not None:
        source = LlamaForCausalLM.from_pretrained(earlier, dtype=torch.float32)
        tokens = AutoTokenizer.from_pretrained(earlier).get_vocab()
        carry_over(source, tokens, model, tokenizer.get_vocab(), generator)
        return model, TrainingProgress(length=RESUMED_TOKENS)
    if recipe.grown_from is None:
        start_with_induction(model, generator)
        return model, TrainingProgress()
    folder = folders / RECIPES[recipe.grown_from].folder
    noise = GROWTH_NOISE if recipe.steps > 0 else 0.0
    grow(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), model, generator, noise)
    return model, TrainingProgress(length=MAX_TOKENS)


def load_or_start(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path,
    folders: Path,
    earlier: Path | None,
    device: torch.device,
    seed: int,
    replica: int,
) -> Training:
    """Go on from the checkpoint where there is one, else from the start."""
    torch.manual_seed(seed)
    model, progress = start(recipe, tokenizer, folders, earlier)
    model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY
    )
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        progress = TrainingProgress(**state["progress"])
    return Training(model, optimizer, Sampler(tokenizer), recipe, progress, seed, replica)


def run(training: Training, checkpoint: Path, output: Path) -> None:
    """Train to the recipe's last step, saving on the way."""
    saved_s = training.progress.seconds
    while training.progress.step < training.recipe.steps:
        batch, outcome = training.step()
        if training.replica != 0:
            continue
        if training.progress.step % REPORT_EVERY_STEPS == 0:
            report(training.progress, batch, outcome)
        if training.progress.seconds - saved_s > SAVE_EVERY_S:
            saved_s = training.progress.seconds
            save(training, checkpoint, output)
    if training.replica == 0:
        save(training, checkpoint, output)


def save(training: Training, checkpoint: Path, output: Path) -> None:
    """Save the checkpoint, and the model folder in which the weights are shipped."""
    training.save(checkpoint)
    save_folder(training.model, HERE / training.recipe.folder, output)


def save_folder(model: LlamaForCausalLM, tokenizer_folder: Path, output: Path) -> None:
    """Write a complete model folder in bfloat16; each file is replaced in one move."""
    staging = output.with_name(output.name + ".new")
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
    )
    copy.save_pretrained(staging)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_folder / name, staging / name)
    output.mkdir(parents=True, exist_ok=True)
    for file in staging.iterdir():
        file.chmod(0o644)
        file.replace(output / file.name)
    staging.rmdir()


def report(progress: TrainingProgress, batch: TrainingBatch, outcome: BatchLosses) -> None:
    """Print one key=value line."""
    print(
        f"step={progress.step} length={progress.length} accuracy={progress.accuracy:.3f}"
        f" batch={tuple(batch.ids.shape)} drawn={batch.length}"
        f" batch_accuracy={outcome.accuracy:.3f}"
        f" answer_loss={outcome.answer_loss.item():.3f}"
        f" plain_loss={outcome.plain_loss.item():.3f}"
        f" finding_loss={outcome.finding_loss.item():.3f}"
        f" tokens={progress.tokens} seconds={progress.seconds:.0f}",
        flush=True,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "models", nargs="*", help=f"models to train: {', '.join(RECIPES)} (default: all)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="steps, in place of the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS)
    parser.add_argument("--earlier", type=Path, help="folder of the model to continue from")
    parser.add_argument("--output", type=Path, default=HERE, help="parent of the models' folders")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    replica = replicas.join()
    if not arguments.models:
        tokenizer_recipe.write([HERE / recipe.folder for recipe in RECIPES.values()])
    for name in arguments.models or RECIPES:
        recipe = RECIPES[name]
        if arguments.steps is not None:
            recipe = replace(recipe, steps=arguments.steps)
        checkpoint = arguments.checkpoints / f"{name}.pt"
        training = load_or_start(
            recipe,
            AutoTokenizer.from_pretrained(HERE / recipe.folder),
            checkpoint,
            arguments.output,
            arguments.earlier,
            torch.device(arguments.device),
            arguments.seed,
            replica,
        )
        weights = sum(weight.numel() for weight in training.model.parameters())
        print(f"{name}: {weights} parameters, from step {training.progress.step}", flush=True)
        run(training, checkpoint, arguments.output / recipe.folder)


if __name__ == "__main__":
    main()
