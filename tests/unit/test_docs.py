"""What the documentation refers to exists: files, anchors, keys, metrics, code."""

import importlib.util
import re
import sys
from urllib.parse import unquote

import pytest
import yaml

from specprefill.config import AppConfig
from specprefill.control.scaling.values import ScalingReason
from specprefill.core.types import Reason
from specprefill.deployment import file as deployment_file

FENCE = re.compile(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *#*$", re.MULTILINE)
METRICS_IMPORT = re.compile(r"from ray\.serve import metrics|from ray\.util import metrics")


@pytest.fixture(scope="module")
def pages(root):
    files = [root / "README.md", root / "CONTRIBUTING.md", root / "CHANGELOG.md"]
    return {path: path.read_text() for path in files + sorted((root / "docs").glob("*.md"))}


def script(root, name):
    """A script of `.ci`, as a module."""
    spec = importlib.util.spec_from_file_location(name, root / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference(root):
    yield script(root, "config_reference")
    del sys.modules["config_reference"]


@pytest.fixture(scope="module")
def metrics(root):
    yield script(root, "metrics_reference")
    del sys.modules["metrics_reference"]


def prose(text):
    """A page without its code, where brackets mean something else."""
    return CODE_SPAN.sub("", FENCE.sub("", text))


def anchors(text):
    """Every heading's anchor, as GitHub and mkdocs both make it."""
    headings = HEADING.findall(FENCE.sub("", text))
    plain = [LINK.sub(lambda link: link[0][1:].partition("]")[0], each) for each in headings]
    return {re.sub(r"[^\w\s-]", "", each).strip().lower().replace(" ", "-") for each in plain}


def blocks(pages, language):
    for path, text in pages.items():
        for found in FENCE.finditer(text):
            if found[2] == language:
                yield path.name, found[3]


def test_every_relative_link_leads_somewhere(pages):
    broken = []
    for path, text in pages.items():
        for link in LINK.findall(prose(text)):
            name, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            target = path.parent / unquote(name) if name else path
            there = target.exists() and (not anchor or anchor in anchors(target.read_text()))
            if not there:
                broken.append(f"{path.name}: {link}")
    assert broken == []


def test_pages_of_the_site_link_to_nothing_outside_it(root, pages):
    # mkdocs shows docs/ alone: what lies elsewhere is named, not linked.
    outside = [
        f"{path.name}: {link}"
        for path, text in pages.items()
        if path.parent.name == "docs"
        for link in LINK.findall(prose(text))
        if link.startswith("../")
    ]
    assert outside == []


def test_every_path_that_a_page_names_exists(root, pages):
    path_in_prose = re.compile(
        r"`((?:services|tests|loadtest|cluster|models|proto|docs|\.ci)/[\w./-]*)`"
    )
    gone = [
        f"{page.name}: {named}"
        for page, text in pages.items()
        for named in path_in_prose.findall(text)
        if not (root / named).exists()
    ]
    assert gone == []


def test_every_page_is_in_the_sites_navigation(root):
    # Material's emoji settings name Python functions, which no safe loader reads.
    text = re.sub(r"!!python/name:\S+", "", (root / "mkdocs.yml").read_text())
    listed = re.findall(r"[\w-]+\.md", str(yaml.safe_load(text)["nav"]))
    assert sorted(listed) == sorted(path.name for path in (root / "docs").glob("*.md"))


def test_every_yaml_block_fits_a_deployment_file(pages, root):
    example = yaml.safe_load((root / "cluster" / "local.yaml").read_text())
    checked = 0
    for page, block in blocks(pages, "yaml"):
        given = yaml.safe_load(block)
        assert isinstance(given, dict), page
        given = given.get("args", given)
        if "applications" in given:
            deployment_file.parse(block, page)
        elif given.keys() <= AppConfig.model_fields.keys():
            args = {**example["applications"][0]["args"], **given}
            AppConfig.model_validate(args)
        else:
            continue  # another tool's YAML
        checked += 1
    assert checked >= 3


def test_every_python_block_compiles(pages):
    found = [compile(code, page, "exec") for page, code in blocks(pages, "python")]
    assert found


def test_the_readme_is_short(root):
    lines = (root / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert all(line.count("|") <= 7 for line in lines if line.startswith("|"))


def test_the_configuration_page_is_up_to_date(reference):
    assert reference.PAGE.read_text() == reference.page(), "run `make docs-config`"


def test_every_key_of_args_has_a_meaning(reference):
    without_comment, without_meaning = reference.undescribed()
    assert without_meaning == set(), "comment the field in services/config.py"
    assert set(reference.MEANINGS) <= without_comment, "the field's comment is its meaning"


def test_the_metrics_page_is_up_to_date(metrics):
    assert metrics.PAGE.read_text() == metrics.page(), "run `make docs-metrics`"


def test_every_metric_is_named_by_its_kind_and_explained(metrics):
    made = [metric for group in metrics.GROUPS for metric in group.metrics()]
    assert len({metric.name for metric in made}) == len(made)
    for metric in made:
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric
        assert len(metric.meaning.split()) > 2, metric


def test_every_condition_names_a_metric_of_its_group(metrics):
    for group in metrics.GROUPS:
        names = {each.name.removeprefix("ray_specprefill_") for each in group.metrics()}
        assert group.conditions.keys() <= names


@pytest.mark.parametrize(
    "name",
    [
        "metrics.md", "observability.md", "security.md", "scaling.md", "selection.md",
        "deployment.md", "models.md", "sizing.md",
    ],
)  # fmt: skip
def test_pages_name_no_metric_that_is_not_there(root, metrics, name):
    made = {metric.name for group in metrics.GROUPS for metric in group.metrics()}
    page = (root / "docs" / name).read_text()
    named = set(re.findall(r"`((?:ray_)?specprefill_[a-z0-9_]+)(?:\{[^`]*\})?`", page))
    assert named <= made | {metrics.NODES}


@pytest.mark.parametrize(("name", "reasons"), [("api.md", Reason), ("metrics.md", ScalingReason)])
def test_every_reason_is_explained(root, name, reasons):
    page = (root / "docs" / name).read_text()
    assert [each for each in reasons if f"`{each.value}`" not in page] == []


def test_every_module_that_makes_metrics_is_on_the_page(root, metrics):
    services = root / "services"
    found = {
        str(path.relative_to(services))
        for path in services.rglob("*.py")
        if METRICS_IMPORT.search(path.read_text()) and "make: Any = metrics" in path.read_text()
    }
    assert found == {group.module for group in metrics.GROUPS}
