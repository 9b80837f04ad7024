"""`specprefill doctor` on this machine, which has no GPU."""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path

import pytest
import yaml

from specprefill.cli import main as cli
from specprefill.kv.announcements import Announcements
from specprefill.kv.leases import LeaseStore
from specprefill.kv.rpc import KvServer
from tests.contract import model_folders

ROOT = Path(__file__).resolve().parents[3]
MAIN, DRAFT = ROOT / "models" / "demo-main", ROOT / "models" / "demo-speculator"
LOCAL = ROOT / "cluster" / "local.yaml"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """The command sets the application's environment for its process: ours is put back."""
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    application = yaml.safe_load(LOCAL.read_text())["applications"][0]
    for name in ("VLLM_LOGGING_LEVEL", *application["runtime_env"]["env_vars"]):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def deployment(tmp_path):
    """Write cluster/local.yaml with other values of `args`; return its path."""

    def write(**args) -> str:
        raw = yaml.safe_load(LOCAL.read_text())
        application = raw["applications"][0]
        for key, values in args.items():
            application["args"][key] = {**application["args"].get(key, {}), **values}
        file = tmp_path / "deployment.yaml"
        file.write_text(yaml.safe_dump(raw))
        return str(file)

    return write


def report(capsys, *arguments: str) -> tuple[int, list[str]]:
    code = cli.main(["doctor", *arguments])
    return code, capsys.readouterr().out.splitlines()


def starting(lines: list[str], name: str) -> str:
    """The one line about `name`."""
    (found,) = [line for line in lines if line[6:].startswith(f"{name}: ")]
    return found


def test_the_node_alone(capsys):
    import torch
    from vllm.version import __version__

    code, lines = report(capsys)
    assert code == 0
    assert starting(lines, "vllm") == f"ok    vllm: {__version__} for cpu"
    assert torch.__version__ in starting(lines, "torch")
    assert "GiB" in starting(lines, "device 0")
    assert "UCX" in starting(lines, "nixl")
    assert starting(lines, "kv carrier") == "ok    kv carrier: nixl (kv.carrier: auto)"
    assert lines[-1] == "nothing found that would fail at start"


def test_a_deployment_that_can_run(capsys):
    code, lines = report(capsys, str(LOCAL))
    assert code == 0
    for pool in ("prefill", "decode"):
        assert starting(lines, pool) == f"ok    {pool}: models/demo-main: can run"
        assert starting(lines, f"{pool} model runner").endswith("V1")
        assert starting(lines, f"{pool} attention backend").endswith("CPU_ATTN")
        assert "512 tokens and 16 requests a step" in starting(lines, f"{pool} sizes")
    assert starting(lines, "speculator").endswith("can score")


def test_a_model_that_the_engines_would_refuse(capsys, deployment, tmp_path):
    from specprefill.config import EngineConfig, MainModel
    from specprefill.engine.support import engine_support

    folder = str(model_folders.write("bert", tmp_path))
    code, lines = report(capsys, deployment(model={"path": folder, "max_model_len": None}))
    support = engine_support(MainModel(path=folder), EngineConfig())
    (reason,) = support.reasons
    assert code == 1
    assert starting(lines, "prefill") == f"FAIL  prefill: {folder}: {reason}"
    assert starting(lines, "decode") == f"FAIL  decode: {folder}: {reason}"
    assert lines[-1] == "2 would fail at start"


def test_a_model_without_positions_runs_in_text_mode(capsys, deployment, tmp_path):
    folder = str(model_folders.write("bloom", tmp_path))
    code, lines = report(capsys, deployment(model={"path": folder, "max_model_len": 2048}))
    assert code == 0
    for pool in ("prefill", "decode"):
        assert starting(lines, pool) == f"ok    {pool}: {folder}: can run"
        assert starting(lines, f"{pool} mode").startswith(f"ok    {pool} mode: text; ALiBi")


def test_an_option_that_one_engine_alone_has(capsys, deployment):
    file = deployment(decode={"engine_args": {"kv_sharing_fast_prefill": True}})
    code, lines = report(capsys, file)
    assert code == 1
    assert starting(lines, "prefill").startswith("ok ")
    assert starting(lines, "decode") == (
        "FAIL  decode: models/demo-main: kv_sharing_fast_prefill skips layers of the prompt whose "
        "KV is handed over"
    )


def test_a_decode_engine_that_speculates(capsys, deployment):
    code, lines = report(capsys, deployment(decode={"speculation": {"tokens": 4}}))
    assert code == 0
    assert starting(lines, "decode speculation").endswith("up to 4 tokens a step")
    assert not [line for line in lines if "prefill speculation" in line]


def test_an_engine_argument_that_vllm_does_not_have(capsys, deployment):
    code, lines = report(capsys, deployment(prefill={"engine_args": {"no_such_thing": 1}}))
    assert code == 1
    assert "no_such_thing" in starting(lines, "prefill")


def test_a_speculator_that_would_refuse(capsys, deployment, tmp_path):
    folder = str(model_folders.write("mamba", tmp_path))
    code, lines = report(capsys, deployment(speculator={"path": folder}))
    assert code == 1
    assert starting(lines, "speculator").startswith(f"FAIL  speculator: {folder}: ")


def test_gpus_that_are_not_there(capsys, tmp_path):
    raw = yaml.safe_load(LOCAL.read_text())
    for pool in raw["applications"][0]["deployments"]:
        if pool["name"] == "Decode":
            pool["ray_actor_options"]["num_gpus"] = 4
    file = tmp_path / "gpus.yaml"
    file.write_text(yaml.safe_dump(raw))
    code, lines = report(capsys, str(file))
    assert code == 1
    assert starting(lines, "devices") == (
        "FAIL  devices: a replica asks for 4 GPUs, this node has 0"
    )


def test_peers(capsys):
    leases = LeaseStore(max_bytes=1 << 20, lease_s=30.0, now=time.monotonic)
    server = KvServer(leases, Announcements(), "layout", "127.0.0.1")
    with socket.socket() as mute, socket.socket() as closed:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        closed.bind(("127.0.0.1", 0))
        peer, silent, gone = (
            server.start(),
            *(f"127.0.0.1:{each.getsockname()[1]}" for each in (mute, closed)),
        )
        code, lines = report(capsys, "--peer", peer, "--peer", silent, "--peer", gone)
    server.stop()
    assert code == 1
    assert starting(lines, f"peer {peer}") == f"ok    peer {peer}: answers, 0 leases held"
    assert starting(lines, f"peer {silent}").endswith("it does not answer as a KV port")
    assert "Connection refused" in starting(lines, f"peer {gone}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--application", "x"], "--application needs a FILE"),
        ([str(LOCAL), "--application", "x"], "has no application x; it has specprefill"),
        (["no-such-file.yaml"], "no-such-file.yaml"),
    ],
)
def test_misuse(capsys, arguments, message):
    assert cli.main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("peer", ["host", "host:", ":80", "host:0", "host:65536", "host:http"])
def test_an_address_that_is_none(capsys, peer):
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--peer", peer])
    assert ended.value.code == 2
    assert "is not HOST:PORT" in capsys.readouterr().err


def test_a_pair_of_models_from_their_folders(capsys):
    code, lines = report(capsys, str(MAIN), str(DRAFT), "--keep", "0.25")
    assert code == 0
    assert starting(lines, "main mode") == "ok    main mode: exact"
    assert starting(lines, "main kv hand-over").endswith(": yes")
    assert starting(lines, "main kv bytes per token").endswith(": 3072 in each worker")
    assert starting(lines, "speculator").endswith("can score")
    for tokens in ("8k", "32k", "128k"):
        gain = starting(lines, f"expected gain at {tokens} tokens")
        speedup, kept, scoring = (float(each) for each in re.findall(r"\d+\.\d{2,3}", gain)[:3])
        assert speedup == pytest.approx(1 / (kept + scoring), rel=0.01)
        assert kept < 0.25
        assert 0.25 < scoring < 0.35


def test_a_windowed_model_has_its_mode_and_the_reason(capsys, tmp_path):
    code, lines = report(capsys, str(model_folders.write("gemma2", tmp_path)))
    assert code == 0
    assert starting(lines, "main mode").endswith(
        "main mode: windowed; a sliding window (64, max_model_len 8192) counts kept tokens"
    )


def test_a_model_that_no_mode_fits_is_refused_by_all_in_the_same_words(
    capsys, deployment, tmp_path, monkeypatch
):
    from specprefill.config import EngineConfig, KvConfig, MainModel
    from specprefill.core.errors import UnsupportedModel
    from specprefill.engine import engine as module
    from specprefill.engine.args import Role, engine_args

    folder = str(model_folders.write("bert", tmp_path))
    words = f"{folder}: the model writes no text"
    file = deployment(model={"path": folder, "max_model_len": None})
    for arguments in (["doctor", folder], ["doctor", file], ["check", file]):
        assert cli.main(arguments) != 0
        assert words in capsys.readouterr().out
    monkeypatch.setattr(module, "AsyncLLM", None)  # nothing is started
    args = engine_args(MainModel(path=folder), EngineConfig(), KvConfig(), Role.PREFILL)
    with pytest.raises(UnsupportedModel) as refused:
        module.Engine(args).start()
    assert str(refused.value) == words


def test_a_keep_rate_that_is_no_share_is_misused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["doctor", str(MAIN), "--keep", "3"])
    assert "3 must be above 0 and at most 1" in capsys.readouterr().err
