"""The search for a deployment's models, and the finding for a missing one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from specprefill.core.findings import Finding, Severity
from specprefill.deployment.model_files import hub_cache, locate_model


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


def test_a_hub_name_is_no_path_where_a_package_has_its_first_part(
    tmp_path: Path, root: Path
) -> None:
    site = tmp_path / "site"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "services", site / "specprefill", ignore=ignored)
    (site / "google").mkdir()
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "from specprefill import config\n"
        "from specprefill.deployment.model_files import locate_model\n"
        "name = 'google/gemma-3-27b-it'\n"
        "print(config.__file__, config.local_path('google'))\n"
        "print(locate_model('model.path', name, None, offline=False).line())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        f"{site}/specprefill/config.py google",
        "note: model.path: google/gemma-3-27b-it is not on this machine, so the model is not "
        "checked",
    ]


@pytest.mark.parametrize(
    ("env_vars", "folder"),
    [
        ({}, None),
        ({"HF_HOME": "/a"}, "/a/hub"),
        ({"HF_HOME": "/a", "HF_HUB_CACHE": "/b"}, "/b"),
        ({"HF_HOME": "/a", "HUGGINGFACE_HUB_CACHE": "/c"}, "/c"),
        ({"HF_HOME": "$BASE/a"}, "/base/a/hub"),
    ],
)
def test_the_hub_cache_is_that_of_the_replicas(
    env_vars: dict[str, str], folder: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BASE", "/base")
    assert hub_cache(env_vars) == (None if folder is None else Path(folder))
