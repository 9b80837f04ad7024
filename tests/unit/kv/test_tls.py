"""Files for mutual TLS are tried out before anything listens, and named when they are wrong."""

from pathlib import Path

import pytest

from specprefill.core.errors import InvalidConfiguration
from specprefill.kv.tls import RELOAD_S, RenewedTls, read_tls
from tests.certificates import Authority


@pytest.fixture
def authority(tmp_path) -> Authority:
    return Authority(tmp_path / "authority")


def test_absent_means_plaintext():
    assert read_tls(None) is None


def test_good_files_are_read(authority):
    files = authority.files()
    tls = read_tls(files)
    assert tls is not None
    assert tls.certificate == Path(files.certificate).read_bytes()
    assert tls.key == Path(files.key).read_bytes()
    assert tls.authority == Path(files.authority).read_bytes()
    assert tls.name == "specprefill"


@pytest.mark.parametrize("field", ["certificate", "key", "authority"])
def test_a_missing_file_is_named(authority, field):
    files = authority.files().model_copy(update={field: "/nowhere/it.pem"})
    with pytest.raises(
        InvalidConfiguration, match=rf"kv\.tls\.{field}: /nowhere/it\.pem: No such file"
    ):
        read_tls(files)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("certificate", "kv.tls.certificate, kv.tls.key: not a PEM"),
        ("key", "kv.tls.certificate, kv.tls.key: not a PEM"),
        ("authority", "kv.tls.authority: not a PEM"),
    ],
)
def test_a_file_of_something_else_is_named(authority, field, said):
    files = authority.files()
    Path(files.model_dump()[field]).write_text("not a certificate")
    with pytest.raises(InvalidConfiguration, match=said):
        read_tls(files)


def test_another_certificates_key_is_refused(authority, tmp_path):
    other = Authority(tmp_path / "other").files()
    files = authority.files().model_copy(update={"key": other.key})
    with pytest.raises(InvalidConfiguration, match=r"kv\.tls\.key: not .* mismatch"):
        read_tls(files)


def test_a_locked_key_is_refused_without_a_question(authority):
    with pytest.raises(InvalidConfiguration, match="without a password"):
        read_tls(authority.files(password=b"secret"))


def test_a_certificate_of_another_authority_is_refused(authority, tmp_path):
    other = Authority(tmp_path / "other").files()
    files = authority.files().model_copy(update={"authority": other.authority})
    with pytest.raises(InvalidConfiguration, match=r"peers would refuse it: .*signature"):
        read_tls(files)


def test_a_certificate_for_another_name_is_refused(authority):
    with pytest.raises(InvalidConfiguration, match="peers would refuse it: Hostname mismatch"):
        read_tls(authority.files(name="gateway.example"))


def test_an_old_certificate_is_refused(authority):
    with pytest.raises(InvalidConfiguration, match=r"peers would refuse it: .*expired"):
        read_tls(authority.files(days=-1))


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def renewed(authority, clock):
    files = authority.files()
    return RenewedTls(files, read_tls(files), clock)


def test_renewed_files_are_used_from_the_next_look_on(authority, renewed, clock):
    before = renewed.current()
    files = authority.files()  # the same paths, another certificate
    assert renewed.current() is before
    clock.now_s += RELOAD_S
    assert renewed.current() == read_tls(files) != before
    assert renewed.current() is renewed.current()


def test_unchanged_files_are_the_same_value(renewed, clock):
    before = renewed.current()
    clock.now_s += RELOAD_S
    assert renewed.current() is before


def test_a_certificate_without_its_key_yet_changes_nothing(authority, renewed, clock, caplog):
    before = renewed.current()
    key = Path(authority.files().key)
    right = key.read_bytes()
    key.write_bytes(before.key)
    for _ in range(3):
        clock.now_s += RELOAD_S
        assert renewed.current() is before
    assert caplog.text.count("kept as it was") == 1
    key.write_bytes(right)
    clock.now_s += RELOAD_S
    assert renewed.current().key == right


def test_a_file_that_vanishes_changes_nothing(authority, renewed, clock):
    before = renewed.current()
    Path(authority.folder / "authority.pem").unlink()
    clock.now_s += RELOAD_S
    assert renewed.current() is before
