"""The lessons: their parts are there, what they name exists, their commands print the numbers that they promise, and
their pictures are those that the code draws.
"""

import ast
import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from course import source
from course.catalog import COURSE, EXERCISES
from lessons import bugs

import minires

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "lessons"
PAGES = [
    "1_linear.md",
    "2_backpropagation.md",
    "3_convolution.md",
    "4_batch_norm.md",
    "5_residual.md",
    "6_optimizers.md",
    "7_recipe.md",
    "8_made_fast.md",
    "9_report.md",
    "10_photographs.md",
]
PARTS = ["Read", "Do", "Run", "Answer"]
HEAD_OF_TABLE = "| it prints | expect | tolerance |\n|---|---|---|\n"
NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
LINES = 130  # one page
TIMEOUT = 600  # seconds, for a command that hangs

each_page = pytest.mark.parametrize("page", PAGES)


def text_of(page):
    return (FOLDER / page).read_text("utf-8")


def part_of(page, title):
    """The text between a heading and the next one."""
    return re.split(r"^## .*$", text_of(page), flags=re.MULTILINE)[PARTS.index(title) + 1]


def commands(text):
    """The command lines in the fenced blocks of a text, as lists of words."""
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


def promises(page):
    """Return [(words of a command, [(what it prints, number, tolerance), ...]), ...] of a page."""
    found = []
    for after in text_of(page).split("<!-- lesson -->\n")[1:]:
        block, _, rest = after.removeprefix("```\n").partition("\n```\n")
        assert HEAD_OF_TABLE in rest, f"{page}: no table after {block}"
        rows = rest.partition(HEAD_OF_TABLE)[2].partition("\n\n")[0].splitlines()
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
        found.append((shlex.split(block), [(what, number(expect), number(off)) for what, expect, off in cells]))
    return found


def number(text):
    found = re.search(NUMBER, text)
    assert found, f"no number in {text!r}"
    return float(found[0].replace(",", ""))


def test_the_path_is_whole():
    assert {path.name for path in FOLDER.glob("[0-9]*.md")} == set(PAGES)


@each_page
def test_a_lesson_has_its_parts_in_order_on_one_page(page):
    text = text_of(page)
    assert re.match(rf"# {page.partition('_')[0]}\. \S", text)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == PARTS
    assert len(text.splitlines()) <= LINES
    folded = re.findall(r"<details><summary>Answer</summary>\n\n.*?\n\n</details>", part_of(page, "Answer"), re.DOTALL)
    assert len(folded) == 2
    following = PAGES[PAGES.index(page) + 1 :][:1]
    assert re.findall(r"^Next: \[.*\]\((.*)\)", text, re.MULTILINE) == following


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_links_lead_to_files_and_to_what_they_name(page):
    links = re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", text_of(page))
    assert links
    for name, link in links:
        file = FOLDER / link.partition("#")[0]
        if "://" in link:
            continue
        assert file.exists(), link
        if file.suffix == ".py" and re.fullmatch(r"`[\w.]+`", name) and not name.endswith(".py`"):
            assert defines(file, name.strip("`")), f"{link} has no {name}"


def defines(file, dotted):
    """Whether a file defines a function, a class, a name or, with a dot, a method."""
    body = ast.parse(file.read_text("utf-8")).body
    for name in dotted.split("."):
        found = [node for node in body if name in names_of(node)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def names_of(node):
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [getattr(node, "name", None)]


def test_the_check_of_names_knows_what_is_not_there():
    assert defines(ROOT / "minires" / "resnet.py", "BasicBlock.backward")
    assert not defines(ROOT / "minires" / "resnet.py", "BasicBlock.sideways")
    assert not defines(ROOT / "minires" / "resnet.py", "Conv2d")  # imported, not defined


@each_page
def test_exercises_and_bugs_that_are_named_are_there(page):
    topics = {exercise.topic for exercise in COURSE}
    done = commands(part_of(page, "Do"))
    assert done
    for words in done:
        script, _, *rest = words[1:]
        if script.endswith("exercises.py"):
            named = [word for word in rest[1:] if re.match(r"[A-Za-z]", word)]
            assert set(named) <= topics | set(EXERCISES), words
        elif script.endswith("bugs.py"):
            assert not rest or 1 <= int(rest[0]) <= len(bugs.BUGS), words


@each_page
def test_a_lesson_promises_numbers(page):
    assert promises(page)
    for words, rows in promises(page):
        assert words[0] == "python"
        assert (ROOT / words[1]).exists()
        assert rows
        assert all(tolerance > 0 for _, _, tolerance in rows)


@pytest.fixture
def root_without_files(tmp_path):
    """A folder that looks like the project to a command of a lesson, and keeps what it writes."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "examples").symlink_to(ROOT / "examples")
    return project


def run(words, folder):
    """Run a command of a lesson there, and return (exit code, output)."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert "error: " not in done.stderr, done.stderr
    return done.returncode, done.stdout


def wrong_numbers(out, rows):
    """What of the promised numbers is not in the output of a command, or not within its tolerance."""
    wrong = []
    for what, expected, tolerance in rows:
        lines = [line.strip() for line in out.splitlines() if line.strip().startswith(f"{what}:")]
        if len(lines) != 1:
            wrong.append(f"{len(lines)} lines begin with {what!r}")
        elif not abs(number(lines[0].removeprefix(f"{what}:")) - expected) <= tolerance:
            wrong.append(f"{lines[0]}, expected {expected} within {tolerance}")
    return wrong


@pytest.mark.full
@each_page
def test_the_commands_print_the_numbers_that_the_lesson_promises(page, root_without_files):
    for words, rows in promises(page):
        code, out = run(words, root_without_files)
        assert code == 0
        assert not wrong_numbers(out, rows), out


def test_a_number_that_is_off_or_missing_is_told():
    rows = [("accuracy 1", 34.2, 2.0), ("loss", 1000.0, 1.0)]
    assert not wrong_numbers("accuracy 1: 36.1 %\nloss: 1,000.5 after 3 epochs", rows)
    assert wrong_numbers("accuracy 1: 36.3 %\nloss: 1,000.5", rows) == ["accuracy 1: 36.3 %, expected 34.2 within 2.0"]
    assert wrong_numbers("accuracy 1: 36.1 %\nlosses: 1", rows) == ["0 lines begin with 'loss'"]
    assert wrong_numbers("accuracy 1: 36.1 %\nloss: nan 1e9", rows) == ["loss: nan 1e9, expected 1000.0 within 1.0"]


def test_the_course_begins_with_a_file_that_no_lesson_makes_again(root_without_files):
    """`new` leaves a file that is there as it is, with an error: so nobody who goes in order may meet it twice."""
    made = [words for page in ["README.md", *PAGES] for words in commands(text_of(page)) if words[2:3] == ["new"]]
    assert len(made) == 1
    assert made == [words for words in commands(text_of("README.md")) if words[2:3] == ["new"]]
    code, out = run(made[0], root_without_files)
    assert code == 0, out
    assert (root_without_files / made[0][3]).exists()


@pytest.mark.full
@each_page
def test_what_there_is_to_do_can_be_done(page, root_without_files):
    """With the solutions filled in, each command of a lesson ends well: so the exercises that it names are there."""
    (root_without_files / "mine.py").write_text(source.whole_file(kind="solution"), "utf-8")
    for words in commands(part_of(page, "Do")):
        code, out = run(words, root_without_files)
        planted = words[1].endswith("bugs.py") and words[2] == "check"  # the bug is there still
        assert code == planted, (words, out)


# Pictures

NEIGHBOURS, OFF = 1, 0.2  # pixels; of the range from black to white
MARGIN = 0.08, 4  # around a text: of its width or height, and pixels


def differing_pixels(drawn, kept, compared):
    """Count the pixels of each picture that are darker or lighter than all that the other has around that place.

    Another version of matplotlib may draw a line half a pixel further, or softer. A stroke that only one of the
    pictures has stays a stroke.

    Shapes      drawn, kept (H, W, 3), from 0 to 1, compared (H, W): False where it does not matter
    """
    differing = np.zeros(drawn.shape[:2], bool)
    for one, other in ((drawn, kept), (kept, drawn)):
        padded = np.pad(other, ((NEIGHBOURS, NEIGHBOURS), (NEIGHBOURS, NEIGHBOURS), (0, 0)), mode="edge")
        around = [
            padded[y : y + len(one), x : x + one.shape[1]]
            for y in range(2 * NEIGHBOURS + 1)
            for x in range(2 * NEIGHBOURS + 1)
        ]
        low, high = np.min(around, axis=0) - OFF, np.max(around, axis=0) + OFF
        differing |= ((one < low) | (one > high)).any(axis=2)
    return int((differing & compared).sum())


def differences(pictures, figure, path, scratch):
    """What of a figure is not in a file: its words, and everything else by its pixels.

    The words themselves are compared, and their pixels are not: other versions of matplotlib set letters closer.
    """
    from matplotlib.image import imread
    from PIL import Image

    pictures.save(figure, scratch)
    drawn, kept = (imread(file)[:, :, :3] for file in (scratch, path))
    words, words_kept = (sorted(Image.open(file).text["Description"].split("\n")) for file in (scratch, path))
    if drawn.shape != kept.shape:
        return [f"{kept.shape} pixels where {drawn.shape} are drawn"]
    compared = np.ones(drawn.shape[:2], bool)
    for text in pictures.texts(figure):
        extent = text.get_window_extent()
        x, y = (MARGIN[0] * side + MARGIN[1] for side in (extent.width, extent.height))
        rows = slice(max(0, int(len(drawn) - extent.y1 - y)), max(0, int(len(drawn) - extent.y0 + y)))
        compared[rows, max(0, int(extent.x0 - x)) : max(0, int(extent.x1 + x))] = False
    found = [f"the words {sorted(set(words) ^ set(words_kept))}"] if words != words_kept else []
    pixels = differing_pixels(drawn, kept, compared)
    return found + [f"{pixels} pixels"] * (pixels > 0)


@pytest.fixture(scope="module")
def pictures():
    if not importlib.util.find_spec("matplotlib"):  # it is imported by `figure_class`, whatever MPLBACKEND says
        pytest.skip("matplotlib is not installed")
    from lessons import pictures

    return pictures


@pytest.fixture(scope="module")
def figures(pictures):
    return {name: pictures.draw(name) for name in pictures.PICTURES}


def test_the_pictures_are_those_that_the_code_draws(pictures, figures, tmp_path):
    assert {path.name for path in FOLDER.glob("*.png")} == set(figures)
    for name, figure in figures.items():
        assert not differences(pictures, figure, FOLDER / name, tmp_path / name), name


def test_a_picture_that_has_changed_is_not_the_same(pictures, figures, tmp_path):
    """Without the last of its words, lines, boxes or images, a picture is another one."""
    for name, figure in figures.items():
        for axes in figure.axes[:2]:
            for artists in (axes.texts, axes.lines, axes.patches, axes.images, axes.collections):
                for artist in list(artists)[-1:]:
                    artist.set_visible(False)
                    found = differences(pictures, figure, FOLDER / name, tmp_path / name)
                    artist.set_visible(True)
                    assert found, f"{name} without {artist}"


def test_the_lesson_on_convolution_counts_the_filters_that_are_left():
    model = minires.pretrained()
    filters = np.abs(model.conv1.weight.data).reshape(-1, 64).max(axis=0)
    gone = filters < 1e-6
    assert (np.abs(model.bn1.weight.data[gone]) < 1e-6).all()
    assert f"brought {gone.sum()} filters to 0" in text_of("3_convolution.md")
    assert f"The {(~gone).sum()} that are left" in text_of("3_convolution.md")


def test_every_picture_is_in_a_lesson(pictures):
    shown = re.findall(r"!\[[^\]]+\]\((\w+\.png)\)", "".join(text_of(page) for page in PAGES))
    assert sorted(shown) == sorted(pictures.PICTURES)


# The runs that are kept, as they take longer than a lesson


@pytest.mark.parametrize("script", ["ingredients", "audit"])
def test_every_variant_has_kept_runs_of_three_seeds(script):
    module = importlib.import_module(script)
    runs = {(row["variant"], row["seed"]) for row in module.read(module.KEPT)}
    assert runs == {(variant, seed) for variant in module.VARIANTS for seed in "012"}


@pytest.mark.full
@pytest.mark.parametrize("script", ["ingredients", "audit"])
def test_kept_runs_can_be_made_anew(script, tmp_path, monkeypatch):
    """Here two variants of one epoch, on the sample; those that are in the file are not made again."""
    module = importlib.import_module(script)
    two = dict(list(module.VARIANTS.items())[:2])
    if script == "audit":
        two = {name: (1, 1, options) for name, (*_, options) in two.items()}
    else:
        monkeypatch.setattr(module, "EPOCHS", 1)
    monkeypatch.setattr(module, "VARIANTS", two)
    monkeypatch.setattr(module.cifar10, "load", lambda or_download: module.cifar10.load_sample())
    for _ in range(2):
        module.make_runs(tmp_path / "kept.csv", seeds=1)
        made = module.read(tmp_path / "kept.csv")
        assert [row["variant"] for row in made] == list(two)
    assert list(made[0]) == list(module.read(module.KEPT)[0])
