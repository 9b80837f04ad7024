"""pyproject.toml, the folders, the import contracts and the architecture page agree."""

import importlib
import re
import subprocess
import sys
import tomllib

import pytest

from specprefill.cli.exit_codes import FAILED
from specprefill.cli.main import main
from specprefill.lab.reporting import charts


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


def test_the_version_comes_from_the_package(project):
    assert project["project"]["dynamic"] == ["version"]
    (attribute,) = project["tool"]["setuptools"]["dynamic"]["version"].values()
    assert attribute == "specprefill.__version__"


@pytest.mark.parametrize("command", ["eval", "simulate"])
def test_a_command_without_its_extra_names_it_before_it_works(command, monkeypatch, capsys):
    monkeypatch.setattr(charts, "is_installed", lambda: False)
    assert main([command]) == FAILED
    assert "specprefill[lab]" in capsys.readouterr().err


def test_a_node_that_serves_needs_no_extra():
    code = (
        "import sys; sys.modules['matplotlib'] = None;"  # as if it were not installed
        "from specprefill.cli.main import parser; parser()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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
        f"import sys, specprefill.core.{module};"
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


@pytest.fixture(scope="module")
def layers(project):
    contracts = project["tool"]["importlinter"]["contracts"]
    lines = next(each["layers"] for each in contracts if each["type"] == "layers")
    return [[name.removeprefix("specprefill.") for name in line.split(" | ")] for line in lines]


@pytest.fixture(scope="module")
def architecture(root):
    return (root / "docs" / "architecture.md").read_text()


def test_the_architecture_page_names_every_folder_once(architecture, project):
    named = re.findall(r"^\| `([a-z_/]+)/` \|", architecture, re.MULTILINE)
    packages = project["tool"]["setuptools"]["packages"]
    folders = {"/".join(name.split(".")[1:]) for name in packages} - {""}
    assert sorted(named) == sorted(folders)


def test_every_folder_stands_on_one_layer(root, layers):
    placed = [name for line in layers for name in line]
    services = root / "services"
    folders = {path.parent.name for path in services.glob("*/__init__.py")}
    modules = {path.stem for path in services.glob("*.py")} - {"__init__"}
    assert sorted(placed) == sorted(folders | modules)


def test_the_architecture_page_shows_the_layers(architecture, layers):
    shown = re.search(r"```text\n(.*?)```", architecture, re.DOTALL)[1]
    assert [line.split(" | ") for line in shown.splitlines()] == layers
