"""The benchmark's arithmetic and its tables."""

import json
from dataclasses import replace

import pytest

from loadtest.bench import gap, ttft
from specprefill.core.types import PlanKind, Reason, Report
from specprefill.lab.reporting import tables as report


def run(tokens, keep, ttft_s):
    kept = tokens if keep is None else int(tokens * keep)
    made = Report(
        plan=PlanKind.DENSE if keep is None else PlanKind.PRUNE,
        reason=Reason.ASKED,
        prompt_tokens=tokens,
        kept_tokens=kept,
        keep_rate=kept / tokens,
        queue_s=0.0,
        speculate_s=0.1 * ttft_s,
        prefill_s=0.8 * ttft_s,
        transfer_s=0.01,
        first_decode_s=0.02,
        ttft_s=ttft_s,
    )
    return ttft.TtftRun(tokens, keep, made)


def test_parameters_are_those_of_the_matrices():
    shape = ttft.Shape(hidden=4, intermediate=8, layers=2, heads=2, kv_heads=1, head_dim=2)
    # q 4x4, k 4x2, v 4x2, o 4x4; gate, up and down 4x8 each
    assert shape.matrix_parameters() == 2 * (16 + 8 + 8 + 16 + 3 * 32)
    # 2 per parameter and token; causal QK and AV: n^2 per head dimension each
    assert shape.prefill_flops(10) == 2 * shape.matrix_parameters() * 10 + 2 * 100 * 4 * 2


def test_the_models_are_as_far_apart_as_the_benchmark_requires():
    assert ttft.MAIN.matrix_parameters() > 25e6
    for tokens in ttft.LENGTHS:
        share = ttft.SPECULATOR.prefill_flops(tokens) / ttft.MAIN.prefill_flops(tokens)
        assert share <= ttft.MAX_FLOPS_SHARE


def test_a_speculator_that_costs_too_much_is_refused():
    with pytest.raises(ValueError, match="100"):
        ttft.flops_lines([1024], draft=ttft.MAIN)


def test_medians_of_each_variant_dense_first():
    runs = [run(1024, keep, t) for keep, t in [(0.1, 1), (None, 9), (0.1, 3), (None, 4), (0.1, 2)]]
    rows = ttft.summary([*runs, run(1024, None, 5)])
    assert [(row["variant"], row["ttft_s"], row["runs"]) for row in rows] == [
        ("dense", 5, 3),
        ("keep 0.1", 2, 3),
    ]


def test_the_table_compares_with_dense_and_shares_the_time():
    text = ttft.table(ttft.summary([run(1024, None, 4.0), run(1024, 0.1, 1.0)]))
    pruned = [cell.strip() for cell in text.splitlines()[3].split("|")[1:-1]]
    assert pruned == [
        "1024", "keep 0.1", "102", "1.000 s", "4.00x", "0.0%", "10.0%", "80.0%", "10.0%", "10 ms",
        "20 ms",
    ]  # fmt: skip


def test_a_markdown_table_lines_up():
    assert report.markdown(("a", "long"), [("1", "2")]) == (
        "| a | long |\n| - | ---- |\n| 1 | 2    |"
    )


def test_json_holds_how_it_was_measured(tmp_path):
    path = tmp_path / "deep" / "r.json"
    report.write_json(path, report.provenance(3), {"rows": [1]})
    written = json.loads(path.read_text())
    assert written["rows"] == [1]
    assert written["measured"]["seed"] == 3
    assert written["measured"]["versions"]["ray"]
    assert written["measured"]["hardware"]["cores"] >= 1


def test_a_model_folder_has_the_shape_and_the_shipped_tokenizer(root, tmp_path):
    ttft.write_model(tmp_path / "m", ttft.MAIN, root / "models" / "demo-main", 9000)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["hidden_size"] == ttft.MAIN.hidden
    assert config["max_position_embeddings"] == 9000
    assert (tmp_path / "m" / "tokenizer.json").exists()
    assert not list((tmp_path / "m").glob("*.safetensors"))


def test_the_gap_is_measured_in_later_gaps_and_beside_the_late_way():
    base = run(8192, 0.1, 1.0).report
    runs = [
        gap.GapRun("late", (1.0, 1.05, 1.06, 1.07, 1.08), replace(base, transfer_s=0.02)),
        gap.GapRun("early", (1.0, 1.015, 1.025, 1.035, 1.045), replace(base, transfer_s=0.005)),
    ]
    late, early = gap.summary(runs)
    assert (late["way"], late["hidden"]) == ("late", 0.0)
    assert late["gap_itl"] == pytest.approx(5.0)
    assert early["gap_itl"] == pytest.approx(1.5)
    assert early["hidden"] == pytest.approx(0.75)
    assert "| 1.50   |" in gap.table([late, early])
