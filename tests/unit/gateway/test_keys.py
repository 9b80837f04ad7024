"""API keys: where they come from, and who sees them."""

import pytest

from specprefill.config import ApiKey, GatewayConfig, key_digest
from specprefill.core.errors import InvalidConfiguration
from specprefill.gateway.openai.keys import RELOAD_S, KeyFile, KeyRing, read_keys


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


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "team.key"
    path.write_text("old\n")
    return path


@pytest.fixture
def accepted(key_file, clock):
    """The names of keys, a moment after the file was last looked at."""
    file = KeyFile("team", key_file)
    file.read()
    ring = KeyRing({"fixed": key_digest("fixed")}, [file], clock)

    def names(*keys):
        clock.now_s += RELOAD_S
        return [ring.name_of({"x-api-key": key}) for key in keys]

    return names


def test_a_changed_file_replaces_its_keys(key_file, accepted):
    assert accepted("old", "new") == ["team", None]
    key_file.write_text("new\n")
    assert accepted("old", "new", "fixed") == [None, "team", "fixed"]


def test_a_file_may_hold_the_old_key_beside_the_new_one(key_file, accepted):
    key_file.write_text("old\nnew\n")
    assert accepted("old", "new", "") == ["team", "team", None]


def test_a_file_that_is_replaced_by_a_renamed_one_is_noticed(key_file, accepted, tmp_path):
    other = tmp_path / "other"
    other.write_text("new\n")  # as long as the old one
    other.rename(key_file)
    assert accepted("old", "new") == [None, "team"]


def test_a_removed_file_revokes_its_keys_and_opens_nothing(key_file, accepted):
    key_file.unlink()
    assert accepted("old", "", "anything", "fixed") == [None, None, None, "fixed"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe"], ids=["empty", "not_text"])
def test_a_half_written_file_changes_nothing_until_it_is_whole(key_file, accepted, caplog, content):
    key_file.write_bytes(content)
    assert accepted("old") == ["team"]
    assert "name=team kept as it was" in caplog.text
    key_file.write_text("new\n")
    assert accepted("old", "new") == [None, "team"]


def test_files_are_looked_at_once_a_second(key_file, clock):
    file = KeyFile("team", key_file)
    file.read()
    ring = KeyRing({}, [file], clock)
    key_file.unlink()
    assert ring.name_of({"x-api-key": "old"}) == "team"
    clock.now_s += RELOAD_S
    assert ring.name_of({"x-api-key": "old"}) is None
    assert len(ring) == 1  # a ring that is empty would accept everybody
