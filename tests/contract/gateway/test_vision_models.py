"""A vision-language model is served for prompts of text; images are refused by request."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import yaml

from specprefill.config import AppConfig
from specprefill.core.errors import InvalidRequest
from tests.contract import model_folders
from tests.no_vision import vision_modules


@pytest.fixture
def config(root, tmp_path, monkeypatch) -> AppConfig:
    """The shipped deployment with a vision-language model."""
    from vllm.model_executor.models import registry

    for name, module in vision_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    raw = yaml.safe_load((root / "cluster" / "local.yaml").read_text())
    args = raw["applications"][0]["args"]
    args["model"] = {"path": str(model_folders.write("qwen2-vl", tmp_path))}
    return AppConfig.model_validate(args)


def test_the_gateway_accepts_no_image(config):
    from specprefill.gateway.openai.server import front_config

    model = front_config(config).model_config
    assert model.multimodal_config.get_limit_per_prompt("image") == 0
    assert model.multimodal_config.get_limit_per_prompt("video") == 0


def test_no_engine_loads_the_tower(config):
    from specprefill.engine.args import plain_args

    model = plain_args(config.model, config.prefill).create_model_config()
    assert model.multimodal_config.language_model_only


def test_an_image_that_is_let_through_is_refused_before_it_is_planned():
    """Its tokens alone would be answered as if they were text."""
    from specprefill.gateway.openai.client import _refuse_unsupported
    from specprefill.gateway.openai.controls import Controls

    admitted = SimpleNamespace(
        mm_features=[object()],
        cache_salt=None,
        sampling_params=SimpleNamespace(prompt_logprobs=None),
    )
    with pytest.raises(InvalidRequest, match="only text") as refused:
        _refuse_unsupported(admitted, Controls())
    assert refused.value.field == "messages"
