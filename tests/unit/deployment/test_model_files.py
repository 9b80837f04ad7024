"""The search for a deployment's models, and the finding for a missing one."""

from __future__ import annotations

from pathlib import Path

import pytest

from specprefill.core.findings import Finding, Severity
from specprefill.deployment.model_files import locate_model


def found(path: str, *, offline: bool = False) -> Path | Finding:
    return locate_model("speculator.path", path, None, offline=offline)


def test_the_shipped_models_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert found("models/demo-speculator") == root / "models" / "demo-speculator"
    assert found(str(root / "models" / "demo-main")) == root / "models" / "demo-main"


@pytest.mark.parametrize("path", ["/no/such/folder", "./draft", "a/b/c", "models/demo-speculatr"])
def test_a_path_that_does_not_exist_is_an_error(path: str) -> None:
    missing = found(path)
    assert isinstance(missing, Finding)
    assert missing.line() == f"error: speculator.path: {path} does not exist"


def test_a_folder_without_a_configuration_is_an_error(tmp_path: Path) -> None:
    missing = found(str(tmp_path))
    assert isinstance(missing, Finding)
    assert missing.message == f"{tmp_path} has no config.json"


@pytest.mark.parametrize("name", ["somebody/some-model", "gpt2"])
def test_a_hub_name_may_be_elsewhere_unless_the_deployment_is_offline(name: str) -> None:
    online, offline = found(name), found(name, offline=True)
    assert isinstance(online, Finding)
    assert isinstance(offline, Finding)
    assert (online.severity, offline.severity) == (Severity.NOTE, Severity.ERROR)
    assert "HF_HUB_OFFLINE" in offline.message
