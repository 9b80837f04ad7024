"""Rules that choose a keep rate from the scores, beside fixed rates: `make bench-keep-rates`.

Every family's prompts are scored once by the speculator; then every rule at every setting selects
from those scores, as the service does, and what is counted is how much of what the answer needs
survives (gold survival), and how many tokens that takes. Where no part of a prompt is gold, because
the answer needs all of it, the kept share of the prompt counts. A prompt that goes dense survives
whole, at the price of all of its tokens.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from specprefill.config import SelectionConfig, SpeculatorConfig
from specprefill.control.from_config import selection_policy
from specprefill.core.chunks import Chunks
from specprefill.core.keep_rate import AutoKeep
from specprefill.core.prefix_digests import BLOCK_TOKENS
from specprefill.core.selection import Scores, SelectionPolicy, select
from specprefill.core.types import KeepRange, Plan, PlanKind, Reason, Selection, Span
from specprefill.lab.evaluation.gold import survival
from specprefill.lab.families.catalog import FAMILIES, generate
from specprefill.lab.reporting.tables import markdown, provenance, write_json

from .keep_rate_rules import RULES, RuleName

OUT = Path("out")
FIXED = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
SETTINGS = {
    RuleName.MASS: (0.3, 0.5, 0.6, 0.7, 0.8, 0.9),
    RuleName.EXCESS: (0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    RuleName.KNEE: (0.5, 1.0, 1.5, 2.0),
    RuleName.SUPPORT: (0.25, 0.5, 0.75, 1.0),
    RuleName.PEAKS: (0.03, 0.05, 0.1, 0.15, 0.2, 0.3),
    RuleName.BACKGROUND: (1.5, 2.0, 3.0, 4.0, 6.0),
}
NEXT_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
NEXT_SHARES_KEEP = 0.1
CHUNKING_KEEPS = (0.3, 0.2, 0.1, 0.05)
EQUAL_TOKENS, EQUAL_NEXT_SHARE = 32, 0.3  # the paper's chunks, and the best share for them
FLOOR = SelectionConfig().floor
ENOUGH = 0.95  # of dense, in every family


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """One prompt, as the selection sees it, and the spans that its answer needs."""

    family: str
    scores: Scores  # [N]
    certainty: float
    protected: tuple[Span, ...]
    gold: tuple[Span, ...]  # empty: all of the prompt
    chunks: Chunks | None = None  # None: of equal lengths


@dataclass(frozen=True, slots=True)
class RuleVariant:
    """One way to choose the kept share."""

    name: str
    plan: Plan
    policy: SelectionPolicy
    equal: bool = False  # chunks of equal lengths, not those that follow the text


@dataclass(frozen=True, slots=True)
class FamilyResult:
    """One variant on one family. Means over its prompts."""

    survival: float
    kept: float  # share of the prompt's tokens
    dense: float  # share of the prompts


@dataclass(frozen=True, slots=True)
class Result:
    """One variant on all families. Every family weighs the same."""

    variant: str
    families: dict[str, FamilyResult]

    @property
    def kept(self) -> float:
        """Mean kept share of the tokens."""
        return statistics.fmean(each.kept for each in self.families.values())

    @property
    def worst_family(self) -> str:
        """The family that loses most."""
        return min(self.families, key=lambda name: self.families[name].survival)

    @property
    def lost_families(self) -> int:
        """Number of families that do not keep enough of what they need."""
        return sum(each.survival < ENOUGH for each in self.families.values())


def variants(policy: SelectionPolicy) -> Iterator[RuleVariant]:
    """Return the fixed rates, and every rule: as it is, dense for the unsure, careful with them."""
    for keep in FIXED:
        yield RuleVariant(f"keep {keep:g}", Plan(PlanKind.PRUNE, Reason.ASKED, keep), policy)
    automatic = Plan(PlanKind.PRUNE, Reason.AUTO, within=KeepRange(FLOOR, 1.0))
    for guard, unsure_share in _guards(policy.auto):
        for rule, settings in SETTINGS.items():
            for setting in settings:
                auto = AutoKeep(guard, RULES[rule], setting, unsure_share, policy.auto.most_chunks)
                yield RuleVariant(name_of(auto), automatic, replace(policy, auto=auto))


def chunkings(policy: SelectionPolicy) -> Iterator[RuleVariant]:
    """Return equal chunks at their best share for the next one, and those that follow the text.

    At fixed rates without an absolute floor, and at the automatic one.
    """
    equal = replace(policy, chunk_tokens=EQUAL_TOKENS, next_chunk_share=EQUAL_NEXT_SHARE)
    for name, each, is_equal in (("equal", equal, True), ("text", policy, False)):
        for keep in CHUNKING_KEEPS:
            plan = Plan(PlanKind.PRUNE, Reason.ASKED, keep)
            fixed = replace(each, min_kept_tokens=0)
            yield RuleVariant(f"{name}, keep {keep:g}", plan, fixed, is_equal)
        automatic = Plan(PlanKind.PRUNE, Reason.AUTO, within=KeepRange(FLOOR, 1.0))
        yield RuleVariant(f"{name}, automatic", automatic, each, is_equal)


def next_shares(policy: SelectionPolicy) -> Iterator[RuleVariant]:
    """Return the share of a chunk's score for the chunk behind it, at a low fixed rate."""
    plan = Plan(PlanKind.PRUNE, Reason.ASKED, NEXT_SHARES_KEEP)
    for share in NEXT_SHARES:
        name = f"keep {NEXT_SHARES_KEEP:g}, next {share:g}"
        yield RuleVariant(name, plan, replace(policy, next_chunk_share=share))


def _guards(auto: AutoKeep) -> tuple[tuple[float, float], ...]:
    """Return the least certainty, and the share of the peak that counts below it."""
    return (0.0, 0.0), (auto.least_certainty, 0.0), (auto.least_certainty, auto.unsure_share)


def _rule_name(auto: AutoKeep) -> RuleName:
    (name,) = (name for name, rule in RULES.items() if rule is auto.rule)
    return name


def name_of(auto: AutoKeep) -> str:
    """Return the name for the tables."""
    rule = f"{_rule_name(auto)} {auto.setting:g}"
    if auto.least_certainty == 0.0:
        return rule
    unsure = f"peaks {auto.unsure_share:g}" if auto.unsure_share > 0 else "dense"
    return f"{rule}, unsure: {unsure}"


def measure_variant(variant: RuleVariant, prompts: Sequence[ScoredPrompt]) -> Result:
    """Measure how much of each family's gold is left."""
    families: dict[str, list[tuple[float, Selection]]] = {}
    for prompt in prompts:
        chosen = select(
            prompt.scores,
            variant.plan,
            prompt.protected,
            variant.policy,
            prompt.certainty,
            None if variant.equal else prompt.chunks,
        )
        families.setdefault(prompt.family, []).append((survival(prompt.gold, chosen), chosen))
    return Result(variant.name, {name: _family(found) for name, found in families.items()})


def _family(found: Sequence[tuple[float, Selection]]) -> FamilyResult:
    return FamilyResult(
        survival=statistics.fmean(share for share, _ in found),
        kept=statistics.fmean(chosen.keep_rate for _, chosen in found),
        dense=statistics.fmean(chosen.keep_rate == 1.0 for _, chosen in found),
    )


def best_of_each_rule(results: Sequence[Result]) -> list[Result]:
    """Return per rule and guard the setting that loses the fewest families, then fewest tokens."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        key = (result.variant.split()[0], result.variant.partition(",")[2])
        groups.setdefault(key, []).append(result)
    return [_best_result(group) for group in groups.values()]


def _best_result(group: Sequence[Result]) -> Result:
    return min(group, key=_rank_key)


def _rank_key(result: Result) -> tuple[int, float]:
    return result.lost_families, result.kept


def overview(results: Sequence[Result]) -> str:
    """Return one line per variant; those that lose the fewest families first, then by tokens."""
    least = _best_result([result for result in results if result.variant.startswith("keep ")])
    ordered = sorted(results, key=_rank_key)
    return markdown(
        ("variant", "families lost", "worst family", "its survival", "kept", f"of {least.variant}"),
        [
            (
                result.variant,
                str(result.lost_families),
                result.worst_family,
                f"{result.families[result.worst_family].survival:.0%}",
                f"{result.kept:.1%}",
                f"{result.kept / least.kept:.2f}",
            )
            for result in ordered
        ],
    )


def by_family(results: Sequence[Result]) -> str:
    """Return survival and kept share, one line per family."""
    headers = ["family", *(result.variant for result in results)]
    rows = [
        [name, *(_cell(result.families[name]) for result in results)]
        for name in results[0].families
    ]
    return markdown(headers, rows)


def by_chunking(results: Sequence[Result]) -> str:
    """Return the means over the families, one line per variant."""
    rows = []
    for result in results:
        survivals = [each.survival for each in result.families.values()]
        rows.append([
            result.variant,
            f"{statistics.fmean(survivals):.1%}",
            f"{result.families[result.worst_family].survival:.0%} {result.worst_family}",
            f"{result.kept:.1%}",
            f"{statistics.fmean(each.dense for each in result.families.values()):.0%}",
        ])  # fmt: skip
    return markdown(("chunks, rate", "gold, mean", "worst family", "kept", "dense"), rows)


def _cell(found: FamilyResult) -> str:
    return f"{found.survival:.0%} of gold at {found.kept:.0%}"


def score_prompts(
    speculator: str, families: Sequence[str], seeds: Sequence[int], lengths: Sequence[int]
) -> list[ScoredPrompt]:
    """Score every family's prompts by the speculator, as the gateway and the service do it."""
    from .scored_prompts import TaskScorer

    scoring = TaskScorer.load(SpeculatorConfig(path=speculator, dtype="float32"))
    prompts: list[ScoredPrompt] = []
    for family, length in itertools.product(families, lengths):
        tasks = (generate(family, seed, length, scoring.tokenizer) for seed in seeds)
        prompts.extend(map(scoring.score_task, tasks))
        print(f"scored: {family}, {length} tokens", flush=True)
    return prompts


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.bench.keep_rates", description=__doc__
    )
    parser.add_argument("--speculator", default="models/demo-speculator")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--seeds", type=int, default=10, help="prompts per family and length")
    parser.add_argument(
        "--first-seed",
        type=int,
        default=0,
        help="first seed; choose settings on some seeds, confirm them on others",
    )
    parser.add_argument("--out", type=Path, default=OUT / "bench-keep-rates.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Score, compare, print, write."""
    args = options(argv)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    prompts = score_prompts(args.speculator, args.families, seeds, args.lengths)
    policy = selection_policy(SelectionConfig(), BLOCK_TOKENS)
    results = [measure_variant(variant, prompts) for variant in variants(policy)]
    shipped = next(result for result in results if result.variant == name_of(policy.auto))
    fixed = [result for result in results if result.variant in {"keep 0.1", "keep 0.3"}]
    compared = [*results[: len(FIXED)], *best_of_each_rule(results[len(FIXED) :])]
    print(f"\n{overview(compared if shipped in compared else [*compared, shipped])}")
    print(f"\n{by_family([shipped, *fixed])}")
    shares = [measure_variant(variant, prompts) for variant in next_shares(policy)]
    print(f"\n{by_family(shares)}")
    chunked = [measure_variant(variant, prompts) for variant in chunkings(policy)]
    print(f"\n{by_chunking(chunked)}")
    print(f"\n{by_family(chunked)}")
    found = {
        "results": list(map(asdict, results)),
        "next_shares": list(map(asdict, shares)),
        "chunks": list(map(asdict, chunked)),
    }
    write_json(args.out, provenance(args.first_seed), found)
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
