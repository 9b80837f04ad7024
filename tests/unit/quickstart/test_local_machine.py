"""The machine is measured within the limits of a container."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from specprefill.quickstart import local_machine as measured


def test_this_machine_has_memory_and_cores() -> None:
    found = measured.read_machine()
    assert found.memory_bytes > 1 << 28
    assert 0 < found.cores <= len(os.sched_getaffinity(0))


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    (tmp_path / "memory.stat").write_text("file 350\ninactive_file 0\nactive_file 50\n")
    assert measured.container_memory(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert measured.container_memory(tmp_path) is None
    assert measured.container_memory(tmp_path / "none") is None


def test_files_that_were_read_take_no_memory_from_a_container(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("990\n")
    (tmp_path / "memory.stat").write_text("anon 100\nfile 890\ninactive_file 800\n")
    assert measured.container_memory(tmp_path) == 810


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("150000 100000", 2), ("200000 100000", 2), ("50000 100000", 1), ("max 100000", None)],
)
def test_a_containers_share_of_the_cores_is_rounded_up(
    tmp_path: Path, limit: str, cores: int | None
) -> None:
    assert measured.container_cores(tmp_path) is None
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert measured.container_cores(tmp_path) == cores


def test_a_machine_has_no_more_than_its_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "container_cores", lambda: 1)
    monkeypatch.setattr(measured, "container_memory", lambda: 5)
    found = measured.read_machine()
    assert (found.cores, found.memory_bytes) == (1, 5)


@pytest.mark.parametrize(
    ("visible", "sizes"),
    [
        (None, (81559, 24576)),
        ("1", (24576,)),
        ("", ()),
        ("GPU-1234", (81559,)),
        ("0,1", (81559, 24576)),
    ],
)
def test_gpus_are_those_that_cuda_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, sizes: tuple[int, ...]
) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nprintf '81559\\n24576\\n'\n")
    driver.chmod(driver.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert tuple(size >> 20 for size in measured.read_machine().gpus) == sizes


@pytest.mark.parametrize(
    ("flags", "fast"), [("fpu avx2", False), ("avx512f avx512_bf16", True), ("amx_bf16", True)]
)
def test_a_cpu_that_multiplies_bfloat16_is_known_by_its_flags(flags: str, fast: bool) -> None:
    assert measured.has_fast_bfloat16(f"processor\t: 0\nflags\t\t: {flags}\n") is fast
