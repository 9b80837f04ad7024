"""An engine that cannot start reports its own error."""

import pytest

from specprefill.config import EngineConfig, KvConfig, MainModel
from specprefill.core.errors import EngineStartFailed

pytestmark = pytest.mark.integration


def test_the_engine_process_own_error_is_raised(model_dir):
    from specprefill.engine.args import Role, engine_args
    from specprefill.engine.engine import Engine

    args = engine_args(
        MainModel(path=model_dir, dtype="float32", max_model_len=8192),
        EngineConfig(block_size=32, kv_cache_memory_bytes=1 << 20, enforce_eager=True),
        KvConfig(host="127.0.0.1"),
        Role.PREFILL,
    )
    engine = Engine(args)
    try:
        with pytest.raises(EngineStartFailed, match=r"ValueError: .*KV cache is needed"):
            engine.start()
    finally:
        engine.close()
