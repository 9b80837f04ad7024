"""The table of docs/models.md is of the catalogue as it is."""

import re

from tests.integration.tiny_architectures import BY_NAME, CATALOGUE


def table(root):
    page = (root / "docs" / "models.md").read_text()
    between = page.partition("<!-- models: begin -->")[2].partition("<!-- models: end -->")[0]
    rows = [
        line.strip("| ").split(" | ") for line in between.splitlines() if line.startswith("| `")
    ]
    return {row[0].strip("`"): [cell.strip() for cell in row[1:]] for row in rows}


def test_every_architecture_of_the_catalogue_is_in_the_table_and_no_other(root):
    rows = table(root)
    assert list(rows) == list(BY_NAME), "run `make models-matrix`"
    assert len(rows) >= 30


def test_the_table_names_the_mode_of_every_architecture(root):
    assert {name: row[1] for name, row in table(root).items()} == {
        each.name: each.mode.value for each in CATALOGUE
    }


def test_no_architecture_differs_from_transformers(root):
    assert [name for name, row in table(root).items() if re.search("differs", str(row))] == []
