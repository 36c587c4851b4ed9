"""The bug hunt: each bug fits the code, makes its check fail, and is found by what is said to find it."""

import concurrent.futures
import filecmp
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from lessons import bugs

BUGS_PY = pathlib.Path(bugs.__file__)
NUMBERS = range(1, len(bugs.BUGS) + 1)
GRADIENT_CHECK = "gradients_are_right"
IN_SANITY = {bugs.STEP_0: "the loss at step 0", bugs.OVERFITTING: "32 images", bugs.FINITE: "zeroed inputs"}


def run_python(project, *args):
    """Run Python on the minires of a project, and return what `subprocess.run` does."""
    environment = os.environ | {"PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)


def run_checks(project, *names):
    """Return {check: what it said} of checks that are run on the minires of a project, "ok" for one that has passed."""
    done = run_python(project, bugs.CHECKS, *names)
    assert not done.stderr, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


def hunt(*args):
    done = run_python(bugs.ROOT, BUGS_PY, *args)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each bug's check and the gradient check say of a copy with that bug: {number: {check: text}}."""

    def of_bugs(project, numbers):
        texts = {}
        bugs.copy_project(project, bugs.NOT_PLANTED)
        for number in numbers:
            bug = bugs.BUGS[number - 1]
            (project / bug.file).write_text(bugs.planted(project, bug), "utf-8")
            texts[number] = run_checks(project, bug.check, GRADIENT_CHECK)
            shutil.copy2(bugs.ROOT / bug.file, project / bug.file)
        return texts

    projects = [tmp_path_factory.mktemp("hunt") for _ in range(2)]  # not in the threads: it is not safe there
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        odd, even = pool.map(of_bugs, projects, (NUMBERS[::2], NUMBERS[1::2]))
    return odd | even


def test_the_original_passes_every_check():
    names = [bug.check for bug in bugs.BUGS]
    assert len(set(names)) == len(names)
    assert run_checks(bugs.ROOT, *names, GRADIENT_CHECK) == dict.fromkeys([*names, GRADIENT_CHECK], "ok")


@pytest.mark.parametrize("number", NUMBERS)
def test_each_bug_fails_its_check_and_the_gradient_check_if_that_is_said_to_find_it(said, number):
    bug = bugs.BUGS[number - 1]
    assert said[number][bug.check] != "ok"
    assert (said[number][GRADIENT_CHECK] != "ok") == (bug.tool == bugs.GRADIENTS)


def test_there_are_twenty_or_more_and_most_are_out_of_reach_of_a_gradient_check():
    assert len(bugs.BUGS) >= 20
    assert 2 * sum(bug.tool != bugs.GRADIENTS for bug in bugs.BUGS) > len(bugs.BUGS)
    assert {bug.tool for bug in bugs.BUGS} >= {bugs.STEP_0, bugs.GRADIENTS, bugs.OVERFITTING, bugs.CURVES, bugs.FINITE}


@pytest.mark.full
@pytest.mark.parametrize(
    "number",
    [n for n in NUMBERS if bugs.BUGS[n - 1].tool in IN_SANITY and bugs.BUGS[n - 1].see != f"{bugs.SANITY} --full"],
)
def test_the_sanity_checks_find_what_they_are_said_to_find(tmp_path, number):
    bug = bugs.BUGS[number - 1]
    bugs.plant(bug, tmp_path)
    done = run_python(tmp_path, "-m", "examples.lessons.sanity")
    assert done.returncode == 1, done.stderr
    assert f"WRONG  {IN_SANITY[bug.tool]}" in done.stdout


@pytest.mark.parametrize("number", NUMBERS)
def test_a_bug_changes_one_line_or_exchanges_two(number):
    lines = bugs.changed_lines(bugs.ROOT, bugs.BUGS[number - 1])
    before, after = ([line[i].strip() for line in lines] for i in (1, 2))
    assert len(lines) == 1 or (len(lines) == 2 and before == after[::-1])


def test_only_the_file_of_the_bug_differs_and_nothing_that_tells_is_copied(tmp_path):
    project = tmp_path / "hunt"
    code, out, err = hunt("plant", 7, project)
    assert code == 0, err
    bug = bugs.BUGS[6]
    assert bug.symptom in out
    assert bug.what not in out
    files = [path.relative_to(project) for path in project.rglob("*") if path.is_file()]
    different = [path.as_posix() for path in files if not filecmp.cmp(project / path, bugs.ROOT / path, shallow=False)]
    assert different == [bug.file]
    names = {path.name for path in files}
    assert not {"bugs.py", "bug_checks.py", "test_bug_hunt.py"} & names
    assert {"first_training.py", "train_cifar.py", "gradcheck.py", "sanity.py", "setup.cfg"} <= names


def test_the_check_tells_whether_the_bug_has_gone(tmp_path):
    bug = bugs.BUGS[0]
    bugs.plant(bug, tmp_path)
    code, out, err = hunt("check", 1, tmp_path)
    assert (code, err) == (1, "")
    assert "still there: the loss w^2 began at 1" in out
    shutil.copy(bugs.ROOT / bug.file, tmp_path / bug.file)
    assert hunt("check", 1, tmp_path) == (0, "bug 1 has gone\n", "")


def test_a_copy_that_does_not_run_any_more_is_not_called_mended(tmp_path):
    bugs.plant(bugs.BUGS[0], tmp_path)
    (tmp_path / bugs.BUGS[0].file).write_text("import nothing_of_this_name\n")
    code, out, _ = hunt("check", 1, tmp_path)
    assert code == 1
    assert "No module named 'nothing_of_this_name'" in out


def test_only_an_empty_folder_outside_the_project_is_planted_in(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for folder, reason in ((tmp_path, "not an empty folder"), (bugs.ROOT / "hunt", "in the project itself")):
        code, _, err = hunt("plant", 1, folder)
        assert code == 2
        assert reason in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert not (bugs.ROOT / "hunt").exists()


def test_a_folder_without_minires_is_not_checked(tmp_path):
    code, _, err = hunt("check", 1, tmp_path)
    assert code == 2
    assert "holds no minires" in err


def test_the_list_has_the_symptoms_and_the_solution_the_line(tmp_path):
    code, listed, _ = hunt("list")
    assert code == 0
    assert [line.split()[0] for line in listed.splitlines() if not line.startswith("    ")] == list(map(str, NUMBERS))
    assert not any(bug.old in listed or bug.file in listed for bug in bugs.BUGS)
    code, solved, _ = hunt("solve", 1)
    assert code == 0
    bug = bugs.BUGS[0]
    assert f"- {bug.old}\n+ {bug.new}\n" in solved
    assert f"{bug.file}, line " in solved
    assert bug.tool in solved
    assert hunt("solve", len(bugs.BUGS) + 1)[0] == 2


def test_a_bug_that_no_longer_fits_is_refused(tmp_path):
    bug = bugs.BUGS[0]._replace(file="a.py", old="x = 1", new="x = 2")
    for text, count in (("", 0), ("x = 1\nx = 1\n", 2)):
        (tmp_path / "a.py").write_text(text)
        with pytest.raises(ValueError, match=f"stands {count} times in a.py, expected once: 'x = 1'"):
            bugs.planted(tmp_path, bug)
    (tmp_path / "a.py").write_text("x = 1\n")
    assert bugs.planted(tmp_path, bug) == "x = 2\n"
