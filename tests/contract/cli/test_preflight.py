"""`specprefill check` opens both models, and reports in the file's own keys what would go wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from specprefill.cli import main as cli


@pytest.fixture
def check(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Check the shipped file with some of its `args` changed: exit code and printed lines."""

    def run(**changed: Any) -> tuple[int, str]:
        raw = yaml.safe_load((root / "cluster" / "local.yaml").read_text())
        args = raw["applications"][0]["args"]
        for section, values in changed.items():
            args[section] = {**args[section], **values}
        file = tmp_path / "changed.yaml"
        file.write_text(yaml.safe_dump(raw))
        code = cli.main(["check", str(file)])
        return code, capsys.readouterr().out.replace(f"{file}: ", "")

    return run


def test_the_shipped_file_is_fine(check: Callable[..., Any]) -> None:
    code, printed = check()
    assert code == 0
    *described, fine = printed.splitlines()
    assert fine == "fine (specprefill)"
    assert described[:3] == [
        "specprefill: mode: exact",
        "specprefill: kv hand-over: yes",
        "specprefill: kv bytes per token: 6144 in each worker",
    ]
    assert [line.split(": ")[1] for line in described[3:]] == [
        f"expected gain at {tokens}k tokens" for tokens in (8, 32, 128)
    ]


@pytest.mark.parametrize(
    ("changed", "finding"),
    [
        ({"speculator": {"path": "models/none"}}, "speculator.path: models/none does not exist"),
        ({"model": {"path": "/none"}}, "model.path: /none does not exist"),
        (
            {"prefill": {"kv_cache_memory_bytes": 4 << 20}},
            "prefill.kv_cache_memory_bytes: 4194304 bytes hold the KV of 672 tokens; one request "
            "of model.max_model_len (8192) needs 50331648",
        ),
        (
            {"decode": {"kv_cache_memory_bytes": 50331647}},
            "decode.kv_cache_memory_bytes: 50331647 bytes hold the KV of 8160 tokens",
        ),
        ({"model": {"max_model_len": 99_999}}, "model: User-specified max_model_len (99999)"),
        ({"prefill": {"engine_args": {"max_sequences": 3}}}, "prefill.engine_args: "),
        ({"gateway": {"vllm_args": ["--no-such-thing"]}}, "gateway.vllm_args: "),
        ({"speculator": {"score_heads": {99: [0]}}}, "score_heads: there is no layer 99"),
    ],
)
def test_what_would_not_start_is_an_error_that_names_its_key(
    check: Callable[..., Any], changed: dict[str, Any], finding: str
) -> None:
    code, printed = check(**changed)
    assert code == 2
    (line,) = printed.splitlines()
    assert line.startswith("error: applications[0].args.")
    assert finding in line


def test_an_adapter_that_vllm_refuses_is_an_error_that_names_it(
    check: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    code, printed = check(model={"adapters": {"doctor": str(tmp_path)}})
    assert code == 2
    assert "args.model.adapters.doctor: vLLM does not yet support DoRA." in printed


@pytest.mark.parametrize(
    ("changed", "finding"),
    [
        (
            {"speculator": {"kv_memory_bytes": 1 << 20}},
            "speculator.kv_memory_bytes: 1048576 bytes hold",
        ),
        ({"kv": {"max_held_bytes": 1 << 20}}, "kv.max_held_bytes: 1048576 bytes hold the KV of"),
    ],
)
def test_what_starts_and_serves_worse_is_a_warning(
    check: Callable[..., Any], changed: dict[str, Any], finding: str
) -> None:
    code, printed = check(**changed)
    assert code == 0
    warning, *_described, fine = printed.splitlines()
    assert warning.startswith("warning: applications[0].args.")
    assert finding in warning
    assert fine == "fine (specprefill)"


def test_an_slo_of_second_tokens_that_admission_cannot_keep_is_a_warning(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = yaml.safe_load((root / "cluster" / "local-slo.yaml").read_text())
    args = raw["applications"][0]["args"]
    file = tmp_path / "changed.yaml"
    for sequences in (16, None):
        args["decode"] = {**args["decode"], "max_num_seqs": sequences}
        raw["applications"][0]["autoscaling_policy"]["policy_kwargs"]["args"] = args
        file.write_text(yaml.safe_dump(raw))
        assert cli.main(["check", str(file)]) == 0
        printed = capsys.readouterr().out
        message = "warning: applications[0].args.decode.max_num_seqs: not set: slo.gap_s (1)"
        assert (message in printed) is (sequences is None)


def test_a_model_that_is_not_supported_is_refused_with_the_engines_own_words(
    check: Callable[..., Any], tmp_path: Path, root: Path
) -> None:
    kind = '"model_type": "bert", "architectures": ["BertModel"]'
    folder = model_folder(tmp_path, root, f'{kind}, "max_position_embeddings": 65536')
    code, printed = check(model={"path": str(folder)})
    assert code == 2
    assert f"error: applications[0].args.model.path: {folder}: " in printed
    assert "the model writes no text" in printed


MAMBA = '"model_type": "mamba", "architectures": ["MambaForCausalLM"], "state_size": 16'


def test_a_model_without_positions_is_served_as_text(
    check: Callable[..., Any], tmp_path: Path, root: Path
) -> None:
    folder = model_folder(tmp_path, root, MAMBA)
    save_file({"weight": np.zeros(1, dtype=np.float32)}, folder / "model.safetensors")
    code, printed = check(model={"path": str(folder)})
    assert code == 0
    assert (
        f"note: applications[0].args.model.path: {folder}: text: no layer has positions" in printed
    )
    assert "text: KV is not handed over: " in printed


def test_a_mode_that_the_model_cannot_have_is_an_error(
    check: Callable[..., Any], tmp_path: Path, root: Path
) -> None:
    folder = model_folder(tmp_path, root, MAMBA)
    code, printed = check(model={"path": str(folder)}, selection={"mode": "positions"})
    assert code == 2
    assert (
        "error: applications[0].args.selection.mode: the model cannot have 'positions': "
        "no layer has positions to keep: all are recurrent" in printed
    )


def model_folder(tmp_path: Path, root: Path, kind: str) -> Path:
    """A model's folder without weights, with the demo model's tokenizer."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (root / "models" / "demo-main").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(
        f'{{{kind}, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, '
        '"vocab_size": 2533}'
    )
    return folder


@pytest.mark.parametrize("name", ["gpu-8b-70b.yaml", "gpu-8b-70b-slo.yaml"])
def test_a_model_that_is_elsewhere_is_no_fault(root: Path, capsys: Any, name: str) -> None:
    assert cli.main(["check", str(root / "cluster" / name)]) == 0
    notes = capsys.readouterr().out.splitlines()[:-1]
    assert [line.partition(": ")[2][:6] for line in notes] == ["note: ", "note: "]


def test_a_model_in_the_cache_that_the_file_names_is_found(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    for name in ("demo-main", "demo-speculator"):
        repository = home / "hub" / f"models--somebody--{name}"
        (repository / "snapshots").mkdir(parents=True)
        (repository / "snapshots" / "a1").symlink_to(root / "models" / name)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a1")
    raw = yaml.safe_load((root / "cluster" / "local.yaml").read_text())
    (application,) = raw["applications"]
    application["args"]["model"]["path"] = "somebody/demo-main"
    application["args"]["speculator"]["path"] = "somebody/demo-speculator"
    env_vars = application["runtime_env"]["env_vars"]
    env_vars |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    file = tmp_path / "changed.yaml"
    file.write_text(yaml.safe_dump(raw))
    assert cli.main(["check", str(file)]) == 0, capsys.readouterr().out
    env_vars["HF_HOME"] = str(tmp_path)
    file.write_text(yaml.safe_dump(raw))
    assert cli.main(["check", str(file)]) == 2
    assert "model in the Hugging Face cache" in capsys.readouterr().out


def test_a_tracing_variable_of_no_meaning_is_an_error(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = yaml.safe_load((root / "cluster" / "local.yaml").read_text())
    raw["applications"][0]["runtime_env"]["env_vars"] |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json",
    }
    file = tmp_path / "changed.yaml"
    file.write_text(yaml.safe_dump(raw))
    assert cli.main(["check", str(file)]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert "applications[0].runtime_env.env_vars: OTEL_EXPORTER_OTLP_PROTOCOL (http/json)" in line


def test_an_automatic_rate_without_calibration_is_noted(check: Callable[..., Any]) -> None:
    code, printed = check(selection={"keep": "auto"})
    assert code == 0
    assert "note: applications[0].args.selection.keep: auto, with a draft that is not" in printed
    for found in ({"keep": 0.3}, {"keep": "auto", "peak_share": 0.2}):
        assert "calibrate" not in check(selection=found)[1]
