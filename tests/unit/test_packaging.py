"""pyproject.toml describes the package as the folders hold it."""

import fnmatch
import importlib
import re
import subprocess
import sys
import tomllib

import pytest

GENERATED = ("_pb2.py", "_pb2_grpc.py")


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())


def test_every_folder_with_code_is_listed_as_a_package(root, project):
    services = root / "services"
    folders = {path.parent for path in services.rglob("*.py")}
    names = {".".join(("specprefill", *folder.relative_to(services).parts)) for folder in folders}
    assert names == set(project["tool"]["setuptools"]["packages"])


def test_every_package_has_an_init(root, project):
    for name in project["tool"]["setuptools"]["packages"]:
        folder = root.joinpath("services", *name.split(".")[1:])
        assert (folder / "__init__.py").exists(), name


def test_the_version_is_defined_once(project):
    import specprefill

    assert project["project"]["version"] == specprefill.__version__


def test_the_console_script_exists(project):
    module, _, function = project["project"]["scripts"]["specprefill"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_vllm_plug_in_is_inert_unless_switched_on(project, monkeypatch):
    entry = project["project"]["entry-points"]["vllm.platform_plugins"]["specprefill_cpu"]
    module, _, function = entry.partition(":")
    register = getattr(importlib.import_module(module), function)
    monkeypatch.delenv("SPECPREFILL_CPU_ENGINE", raising=False)
    assert register() is None
    monkeypatch.setenv("SPECPREFILL_CPU_ENGINE", "1")
    assert register() == "specprefill.engine.cpu.platform.CpuEnginePlatform"


def test_the_proto_folder_is_no_package(root):
    # ray[serve] brings proto-plus, which owns the import name `proto`.
    assert not list((root / "proto").rglob("__init__.py"))


def test_the_package_refuses_a_second_name(root):
    code = "import services"
    outcome = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 1
    assert "import this package as 'specprefill'" in outcome.stderr


@pytest.mark.parametrize(
    "module", ["types", "errors", "ports", "pipeline", "plan", "selection", "positions", "wire"]
)
def test_pure_modules_import_no_framework(module):
    code = (
        f"import sys, specprefill.{module};"
        "print([m for m in ('torch', 'ray', 'grpc', 'vllm', 'transformers') if m in sys.modules])"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert outcome.stdout.strip() == "[]"


def test_make_help_lists_every_target_of_the_readme(root):
    readme = (root / "README.md").read_text()
    help_text = subprocess.run(
        ["make", "help"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    for target in ("demo", "test", "check", "models", "bench-ttft"):
        assert f"make {target}" in readme
        assert f"make {target}" in help_text


def test_the_architecture_page_names_every_module(root):
    page = (root / "docs" / "architecture.md").read_text()
    named = re.findall(r"`([a-z0-9_*/]+)`", page)
    services = root / "services"
    modules = {
        str(path.relative_to(services).with_suffix(""))
        for path in services.rglob("*.py")
        if path.name != "__init__.py" and not path.name.endswith(GENERATED)
    }
    missing = {m for m in modules if not any(fnmatch.fnmatch(m, name) for name in named)}
    assert missing == set()
    gone = {name for name in named if name[:-1].count("/") and not fnmatch.filter(modules, name)}
    assert gone == set()
