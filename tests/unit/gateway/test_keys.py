"""API keys: where they come from, and who sees them."""

import pytest

from specprefill.config import ApiKey, GatewayConfig, key_digest
from specprefill.core.errors import InvalidConfiguration
from specprefill.gateway.openai.keys import read_keys


def test_keys_come_from_the_file_the_environment_and_other_files(tmp_path):
    path = tmp_path / "key"
    path.write_text("from-file\n")
    config = GatewayConfig.model_validate(
        {
            "api_keys": [
                "plain",
                {"name": "team-a", "key": "in-yaml"},
                {"name": "team-b", "env": "TEAM_B"},
                {"name": "team-c", "file": str(path)},
                {"name": "team-d", "sha256": key_digest("hashed")},
            ]
        }
    )
    ring = read_keys(config.api_keys, {"TEAM_B": "from-env"})
    names = [
        ring.name_of({"authorization": f"Bearer {key}"})
        for key in ("plain", "in-yaml", "from-env", "from-file", "hashed", "unknown", "")
    ]
    assert names == ["key-1", "team-a", "team-b", "team-c", "team-d", None, None]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "a", "env": "NOT_SET"}, r"api_keys\[0\]\.env: NOT_SET is not set"),
        ({"name": "a", "file": "/no/such/file"}, r"api_keys\[0\]\.file: /no/such/file: No such"),
    ],
)
def test_a_key_that_cannot_be_read_stops_the_start_and_names_its_field(entry, message):
    with pytest.raises(InvalidConfiguration, match=message):
        read_keys([ApiKey.model_validate(entry)], {})


def test_two_keys_of_one_name_are_refused_without_showing_them():
    entries = [ApiKey(name="a", key="secret-1"), ApiKey(name="a", key="secret-2")]
    with pytest.raises(InvalidConfiguration) as caught:
        read_keys(entries, {})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "a"},
        {"name": "a", "key": "k", "env": "E"},
        {"name": "with space", "key": "k"},
        {"name": "a", "key": ""},
        "",
    ],
)
def test_entries_that_cannot_be_right_are_refused(entry):
    with pytest.raises(ValueError, match="api_keys"):
        GatewayConfig.model_validate({"api_keys": [entry]})


def test_a_key_does_not_show_in_the_configuration_as_text():
    config = GatewayConfig.model_validate({"api_keys": [{"name": "a", "key": "secret"}]})
    assert "secret" not in repr(config.api_keys)


def test_vllms_own_list_of_keys_is_refused():
    with pytest.raises(ValueError, match=r"gateway\.api_keys"):
        GatewayConfig(vllm_args=("--api-key=k",))
