"""The exercises: a blank is to do, minires's own source is right, and each mistake that students make is called wrong.

A checker that says "right" whatever comes is the trap of such courses. So every exercise has mistakes here that it must
refuse, with a sentence that names the cause, and solutions that look different and must pass.
"""

import hashlib
import os
import pathlib
import subprocess
import sys
import time

import cuda_emulator
import exercises
import pytest
from course import source
from course.catalog import COURSE, EXERCISES
from course.kernels import KERNELS
from course.learner import NOT_CHECKED, RIGHT, TO_DO, WRONG, BrokenFileError, Learner, usable
from student_mistakes import DIFFERENT, MISTAKES, MISTAKES_IN_CUDA, with_body

from minires.training.folder import UsageError

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "lessons" / "exercises.py"
SOLVED = source.whole_file(kind="solution")


def judge(name, text):
    return Learner(f"{source.HEADER}{source.imports_of_solutions()}\n\n{text}").judge(name)


@pytest.fixture(scope="module")
def blank():
    return Learner(source.whole_file())


@pytest.fixture(scope="module")
def solved():
    return Learner(SOLVED)


def test_a_blank_is_all_to_do(blank):
    assert {name: blank.judge(name) for name in EXERCISES} == dict.fromkeys(EXERCISES, (TO_DO, ""))
    with_hints = Learner(source.whole_file(kind="blank_with_hints"))
    assert {with_hints.judge(name)[0] for name in EXERCISES} == {TO_DO}


def test_miniress_own_source_is_all_right(solved):
    for name in EXERCISES:
        status, sentences = solved.judge(name)
        assert status == RIGHT or (name, status) == ("SGD_CUDA", NOT_CHECKED), (name, sentences)


@pytest.mark.parametrize("mistake", MISTAKES + MISTAKES_IN_CUDA, ids=lambda m: f"{m.name}: {m.words}")
def test_what_students_get_wrong_is_called_wrong_and_the_cause_is_named(mistake):
    text = mistake.text()
    status, sentences = judge(mistake.name, text)
    if status == NOT_CHECKED:
        pytest.skip(sentences)
    assert status == WRONG
    assert mistake.words in sentences


def test_every_exercise_has_mistakes_that_it_refuses():
    assert {mistake.name for mistake in MISTAKES + MISTAKES_IN_CUDA} == set(EXERCISES)


@pytest.mark.parametrize(("name", "body"), DIFFERENT, ids=[name for name, _ in DIFFERENT])
def test_a_solution_may_look_different(name, body):
    assert judge(name, with_body(name, body)) == (RIGHT, "")


WRAPPED = """
import functools
from course.source import reference
_right = reference().{name}
@functools.wraps(_right)
def {name}(*args, **kwargs):
    {body}
"""
RESULTS = "result = _right(*args, **kwargs)\n    results = result if isinstance(result, tuple) else (result,)"


FUNCTIONS = [name for name in EXERCISES if name not in ("BasicBlock", "SGD_CUDA")]
UPDATES = [name for name in KERNELS if KERNELS[name].writes]
EACH = "    all = tuple(r if r is None else {} for r in results)\n    return all if len(all) > 1 else all[0]"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_check_says_right_whatever_comes(name):
    """Nothing at all, 0, half as much again, another dtype, another shape, and inputs that are written to."""
    spoilt = {"nothing": "return None", "0": "return 0.0"}
    if name not in UPDATES:
        spoilt["half as much again"] = f"{RESULTS}\n{EACH.format('r * 1.5')}"
    if name not in ("half_cosine", "winograd_matrices", "winograd_tile", *UPDATES):
        spoilt["float64"] = f"{RESULTS}\n{EACH.format('np.float64(r)')}"
        spoilt["shape"] = f"{RESULTS}\n{EACH.format('r[None]')}"
    if name not in ("half_cosine", "he_weight", "winograd_matrices", *UPDATES):
        change = "next(a for a in kwargs.values() if hasattr(a, 'shape'))[...] += 1"
        spoilt["writes to"] = f"{RESULTS}\n    {change}\n    return result"
    for mistake, body in spoilt.items():
        status, sentences = judge(name, WRAPPED.format(name=name, body=body))
        assert status == WRONG, mistake
        assert mistake not in ("float64", "shape", "writes to") or mistake in sentences, (mistake, sentences)


def test_one_mistake_shows_once():
    """conv2d_backward calls col2im and im2col: with those wrong or blank it is right all the same."""
    blank_im2col, wrong = source.piece("im2col").blank, with_body("col2im", "return np.zeros(x_shape)")
    learner = Learner(f"{SOLVED}\n\n{blank_im2col}\n\n{wrong}")
    statuses = {n: learner.judge(n)[0] for n in ("im2col", "col2im", "columns_conv2d_backward", "conv2d_backward")}
    assert list(statuses.values()) == [TO_DO, WRONG, RIGHT, RIGHT]


def test_a_blank_leaves_out_what_is_to_be_found():
    for exercise in COURSE:
        found = source.piece(exercise.name)
        assert "\nBackward  " not in found.blank.replace("    Backward", "\nBackward") or exercise.name == "SGD_CUDA"
        assert "    Why  " not in found.blank
    text = source.piece("linear_backward")
    assert "Shapes" in text.blank
    assert "dweight = x.T @ dout" in text.blank_with_hints
    assert all(len(source.hints(name)) == 3 and all(source.hints(name)) for name in EXERCISES)


def test_dropout_is_used_whole_or_not_at_all():
    results = {name: (RIGHT, "") for name in EXERCISES} | {"dropout_forward": (WRONG, "")}
    assert "dropout_mask" not in usable(results)
    assert "dropout_mask" in usable(results, anyway=True)


def test_a_mask_of_ones_own_that_is_written_twice_is_right():
    draw = "(np.random.default_rng([key, step]).random({0}.shape) >= p).astype({0}.dtype) / (1 - p)"
    bodies = {
        "dropout_mask": f"return {draw.format('x')}",
        "dropout_forward": "return x * dropout_mask(x, p, key, step)",
        "dropout_backward": f"return dout * {draw.format('dout')}",
    }
    text = "\n\n\n".join(with_body(name, body) for name, body in bodies.items())
    learner = Learner(f"{source.HEADER}{source.imports_of_solutions()}\n\n{text}")
    assert {name: learner.judge(name) for name in bodies} == dict.fromkeys(bodies, (RIGHT, ""))


def test_a_file_with_a_mark_at_its_beginning_is_read(mine, command):
    mine.write_bytes(b"\xef\xbb\xbf" + mine.read_bytes())
    assert command("list", mine).splitlines()[-1] == "33 to do"


def test_of_two_definitions_the_last_is_reset(mine, command):
    blank = mine.read_text()
    mine.write_text(f"{blank}\n\ndef relu_forward(x):\n    return x\n")
    command("reset", mine, "relu_forward")
    assert mine.read_text().startswith(blank)
    assert "return x\n" not in mine.read_text()


def test_without_a_compiler_the_cuda_kernel_is_not_checked_and_one_line_says_so(solved, monkeypatch):
    monkeypatch.setattr(cuda_emulator, "COMPILER", None)
    status, sentence = solved.judge("SGD_CUDA")
    assert status in (RIGHT, NOT_CHECKED)  # right where there is a GPU
    assert status == RIGHT or sentence == "needs a GPU, or g++ on Linux for the emulator, and neither is here"


# The script, as people run it


def run(*args, **kwargs):
    """Return (exit code, standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, timeout=120, check=False, **kwargs
    )
    return done.returncode, done.stdout, done.stderr


def edit(path, name, body):
    path.write_text(path.read_text().replace(source.piece(name).blank, with_body(name, body)))


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(source.whole_file())
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command of the script in this process; return what it prints."""

    def run_here(*args, code=0):
        monkeypatch.setattr(sys, "argv", ["exercises.py", *map(str, args)])
        assert exercises.main() == code
        return capsys.readouterr().out

    return run_here


def test_new_overwrites_nothing(tmp_path, command):
    path = tmp_path / "mine.py"
    command("new", path, "--hints")
    assert path.read_text() == source.whole_file(kind="blank_with_hints")
    with pytest.raises(UsageError, match=r"mine.py is there already, and is left as it is"):
        command("new", path)


@pytest.mark.slow
def test_an_exercise_that_ends_the_process_without_an_error_is_wrong(mine):
    edit(mine, "relu_forward", "import os\nos._exit(0)")
    code, out, err = run("check", mine, "relu_forward", "linear_forward")
    assert (code, err) == (1, "")
    assert "ended with code 0 in the middle of it" in out
    assert out.splitlines()[-1] == "1 wrong, 1 to do"


@pytest.mark.slow
def test_check_judges_reads_and_never_writes(mine):
    edit(mine, "relu_forward", "return np.maximum(x, 0)")
    edit(mine, "relu_backward", "return dout / 0 * np.nan if None else undefined")
    edit(mine, "linear_forward", "while True:\n    x = x + 1")
    edit(mine, "global_avg_pool2d_forward", "raise SystemExit(0)")
    edit(mine, "max_pool2d_forward", "import os\nos._exit(7)")
    before = hashlib.sha256(mine.read_bytes()).digest(), mine.stat().st_mtime_ns, os.listdir(mine.parent)
    code, out, err = run("check", mine, "relu", "linear_forward", "average_pool", "max_pool", "--limit", "1.5")
    assert (code, err) == (1, "")
    assert "1 right, 4 wrong, 2 to do" in out
    assert "NameError: name 'undefined' is not defined\n" in out
    assert "in relu_backward:  return dout / 0" in out
    assert "stopped after 1.5 seconds: is there a loop that does not end?" in out
    assert ":  x = x + 1" in out
    assert "It ends the program" in out
    assert "ended with code 7 in the middle of it" in out
    assert "Traceback" not in out
    assert "course" not in out  # nothing of what called it
    assert (hashlib.sha256(mine.read_bytes()).digest(), mine.stat().st_mtime_ns, os.listdir(mine.parent)) == before
    code, out, _ = run("check", mine, "relu_forward")
    assert code == 0
    assert "In minires it is (minires/kernels/reference.py:" in out


def test_a_file_that_does_not_run_is_told_in_the_learners_lines(mine, command):
    for text, words in (
        ("def relu_forward(x)\n    return x\n", "SyntaxError in line 1"),
        ("\n\nx = np.no_such_name\n", "line 3:  x = np.no_such_name"),
        ("x = '\0'\n", "null byte"),
    ):
        with pytest.raises(BrokenFileError) as wrong:
            Learner(f"import numpy as np; {text}" if "np" in text else text)
        assert words in str(wrong.value)
    mine.write_text("while True:\n    pass\n")
    assert "stopped after 1 seconds" in command("check", mine, "--limit", "1", code=1)


def test_a_wrong_name_is_told_with_the_right_ones(mine, command):
    code, _, err = run("check", mine.with_name("none.py"))
    assert code == 2
    assert "No such file or directory; `new " in err
    with pytest.raises(UsageError, match=r"no exercise 'no_exercise'; they are linear_forward, "):
        command("check", mine, "no_exercise")
    with pytest.raises(UsageError, match=r"conv2d is a topic: which of columns_conv2d_forward, "):
        command("hint", mine, "conv2d")


def test_hints_come_one_after_the_other_and_the_last_is_the_derivation(mine, command):
    shown = [command("hint", mine, "linear_backward") for _ in range(4)]
    for number, text in zip((1, 2, 3, 3), shown, strict=True):
        assert text.startswith(f"linear_backward, hint {number} of 3")
    assert "Each sum is one matrix product." in shown[2]
    assert "hint 1 of 3" in command("hint", mine, "relu_backward")
    assert "hint 2 of 3" in command("hint", mine, "linear_backward", "--number", "2")


def test_reset_puts_the_blank_back_and_keeps_the_old_text(mine, command):
    blank = mine.read_text()
    edit(mine, "linear_backward", "return 1, 2, 3")
    command("reset", mine, "linear_backward")
    assert mine.read_text() == blank
    assert "return 1, 2, 3" in (mine.parent / "mine.linear_backward.1.py").read_text()
    edit(mine, "relu_forward", "return ((")
    command("reset", mine, "relu_forward")  # the file was no Python any more
    assert mine.read_text() == blank
    mine.write_text(blank.replace(source.piece("SGD_CUDA").blank, ""))
    command("reset", mine, "SGD_CUDA")  # and it was not there
    assert mine.read_text() == blank
    mine.write_text(f"# a form feed is no new line\f\n{blank}")
    edit(mine, "relu_forward", "return x")
    command("reset", mine, "relu_forward")
    assert mine.read_text() == f"# a form feed is no new line\f\n{blank}"


def test_the_list_has_a_line_for_each(mine, command):
    edit(mine, "relu_forward", "return np.maximum(x, 0)")
    lines = command("list", mine).splitlines()
    assert len(lines) == len(EXERCISES) + 1
    assert next(line for line in lines if "relu_forward" in line).split() == ["relu", "relu_forward", "right", "ReLU"]
    assert lines[-1] == "1 right, 32 to do"


@pytest.mark.slow
def test_watch_stays_with_one_exercise_and_says_right_before_it_goes_on(mine):
    process = subprocess.Popen([sys.executable, SCRIPT, "watch", mine], stdout=subprocess.PIPE, text=True)

    def read_to(words):
        lines = []
        for line in process.stdout:
            lines.append(line)
            if words in line:
                return "".join(lines)
        raise AssertionError("".join(lines))

    try:
        read_to("Now: linear_forward (linear layer)")
        read_to("linear_forward                   to do")
        time.sleep(0.3)
        edit(mine, "linear_forward", "return x @ weight")
        assert "wrong" in read_to("The bias is missing.")
        text = mine.read_text().replace("return x @ weight\n", "return x @ weight + (0 if bias is None else bias)\n")
        mine.write_text(text)
        assert "to do" not in read_to("linear_forward                   right")
        told = read_to("Now: linear_backward")
        assert "In minires it is" in told
        assert "1 right, 32 to do" in told
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_training_with_what_is_right_says_what_is_the_learners(mine):
    edit(mine, "relu_forward", "return np.maximum(x, 0)")
    edit(mine, "linear_backward", "return dout @ weight.T, dout.T @ x, dout.sum(0)")
    code, out, err = run("train", mine, "--steps", "1")
    assert (code, err) == (0, "")
    assert "minires's in place of what is wrong: linear_backward. --anyway takes yours." in out
    losses = next(line.split() for line in out.splitlines() if line.startswith("     1 "))
    assert losses[1] == losses[2]
    assert "how often it was called: relu_forward (" in out
    code, out, err = run("train", mine, "--steps", "1", "--anyway")
    assert code == 1
    assert "after linear_backward of yours: " in out
