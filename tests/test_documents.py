"""What the documents say of the project is there: files, sections, options and the recipes' values."""

import pathlib
import re

import pytest
import recipes

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = ["README.md", "examples/README.md", "examples/RESULTS.md", "examples/DISTRIBUTED.md"]
each_document = pytest.mark.parametrize("document", DOCUMENTS)


def sections(path):
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_to_files_and_sections_that_are_there(document):
    path = ROOT / document
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8"))
    assert links
    for link in links:
        file, _, section = link.partition("#")
        if "://" not in file:
            target = path.parent / file if file else path
            assert target.exists(), link
            assert not section or section in sections(target), link


@each_document
def test_files_that_are_named_are_there(document):
    for name in re.findall(r"(?<![\w/])(?:tests|examples|minires)/[\w/]+\.\w+", (ROOT / document).read_text("utf-8")):
        assert (ROOT / name).exists(), name


@each_document
def test_options_of_the_training_are_those_it_has(document):
    known = {option for action in recipes.make_parser()._actions for option in action.option_strings}
    for command in re.findall(r"train_cifar\.py (--[^`\n#]*)", (ROOT / document).read_text("utf-8")):
        assert set(re.findall(r"--[\w-]+", command)) <= known, command


def test_the_table_of_ingredients_has_the_values_of_the_recipes():
    rows = re.findall(
        r"^\| `--([\w-]+)` \| .* \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$",
        (ROOT / "examples/README.md").read_text("utf-8"),
        re.MULTILINE,
    )
    words = {"yes": True, "no": False, "none": None}
    listed = {
        name.replace("-", "_"): [
            words[value] if value in words else float(value) if value[0].isdecimal() else value for value in values
        ]
        for name, *values in rows
    }
    report = recipes.RECIPES["report"]
    assert listed == {name: [(report | recipe)[name] for recipe in recipes.RECIPES.values()] for name in report}
