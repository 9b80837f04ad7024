"""The script behind `make readability` counts what it should."""

import importlib.util
import sys

import pytest


@pytest.fixture(scope="module")
def readability(root):
    spec = importlib.util.spec_from_file_location("readability", root / ".ci" / "readability.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["readability"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["readability"]


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "package"
    (folder / "kv").mkdir(parents=True)
    (folder / "kv" / "__init__.py").write_text("")
    (folder / "kv" / "pull.py").write_text('"""Pulls a lease."""\nclass Pull: ...\n')
    (folder / "pull.py").write_text(
        '"""What a pull is."""\nclass Pull: ...\ndef _told(): ...  # what it said\ndef run(): ...\n'
    )
    return folder


@pytest.mark.parametrize("name", ["_told", "held", "_parsed", "ended", "__begun"])
def test_a_bare_participle_is_counted(readability, name):
    assert readability.is_participle(name)


@pytest.mark.parametrize("name", ["is_finished", "feed", "run", "report_failure", "embed", "_shed"])
def test_verbs_and_longer_names_are_not(readability, name):
    assert not readability.is_participle(name)


def test_a_question_words_clause_is_no_sentence(readability):
    assert readability.is_wh_clause("What a gateway reports.")
    assert readability.is_wh_clause("Where the KV lies.")
    assert not readability.is_wh_clause("Where a lease ends early, the decode engine recomputes.")
    assert not readability.is_wh_clause("Returns what a gateway reports.")


def test_a_package_is_measured(readability, package):
    values = {each.name: each.value for each in readability.measure(package)}
    assert values["functions named by one participle"] == 50.0
    assert values["class names used more than once"] == 1
    assert values["file names used more than once"] == 1
    assert values["tell/say per 10,000 words of prose"] == pytest.approx(1e4 / 10)
    assert values["docstrings that are a wh-clause"] == 50.0
    assert values["files flat in package/"] == 1


def test_a_limit_that_is_exceeded_fails_unless_only_reported(readability, package, capsys):
    assert readability.main([str(package)]) == 1
    assert "too high" in capsys.readouterr().out
    assert readability.main([str(package), "--report"]) == 0
