"""A learner's file: read, run and judged.

`check_file` starts this module as a process of its own and gives it a time limit, so that an endless loop, a crash or
an exit() in the file ends nothing else. The file is only ever read: it is compiled from its text, and nothing is
written beside it, not even bytecode. What an exercise calls of other exercises is minires's while it is checked, so
that one mistake shows once; dropout's backward alone is checked with the learner's own mask and forward.
"""

import ast
import faulthandler
import inspect
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import traceback
import types
import unittest.mock

from course.catalog import COURSE, EXERCISES
from course.checks import MistakeError, check_kernel
from course.kernels import KERNELS
from course.source import SOLUTIONS, piece, reference
from course.special import SPECIAL, NotCheckedError

RIGHT, TO_DO, WRONG, NOT_CHECKED = "right", "to do", "wrong", "not checked"
LIMIT = 10.0  # seconds for one exercise
SLOW = {"SGD_CUDA": 60.0}  # a compiler runs as well
YOURS = "<yours>"  # the learner's file in tracebacks
EXPLAINED = {  # what NumPy says in its own words
    "truth value of an array": "Python's if, and, or, max and min want one truth value, and an array has many. To ask "
    "for None, write `is None`; element by element there are np.maximum, np.where and masks, such as x > 0.",
    "matmul: ": "In a product (n, k) @ (k, m), the inner sizes have to agree: is a .T missing, or the order wrong?",
    "broadcast": "Shapes are compared from the last axis on: each pair must be equal, or one of the two 1. "
    "keepdims=True keeps an axis that is summed over, with length 1.",
    "cannot reshape": "A reshape keeps the number of elements.",
    "is read-only": "The array is a view that must not be written to: copy() makes one of your own.",
    "NoneType": "Something is None here: is it an argument that may be left out, such as the bias?",
}
LOADING = "(the file)"  # what is under way while the file itself runs


class BrokenFileError(Exception):
    """The file cannot be read, or does not run: why."""


class Learner:
    """The names that a learner's file defines, and its text."""

    def __init__(self, text, name="mine.py", folder=None):
        self.text = text
        try:
            self.tree = ast.parse(text, YOURS)
            code = compile(self.tree, YOURS, "exec")
        except SyntaxError as error:
            shown = f"\n    {error.text.strip()}" if error.text else ""
            raise BrokenFileError(f"{type(error).__name__} in line {error.lineno}: {error.msg}{shown}") from None
        except ValueError as error:  # a null byte
            raise BrokenFileError(str(error)) from None
        module = types.ModuleType(pathlib.PurePath(name).stem)
        sys.modules.setdefault(module.__name__, module)
        if folder is not None:
            sys.path.insert(0, str(folder))
        self.names = vars(module)
        try:
            exec(code, self.names)
        except (Exception, SystemExit) as error:
            raise BrokenFileError(self.excuse(error)) from None
        self.own = {name: self.names[name] for name in EXERCISES if name in self.names}

    def excuse(self, error):
        """Tell an exception by the learner's line, and nothing of what called it."""
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == YOURS]
        said = re.sub(r", with gufunc signature \S+", "", str(error))
        words = f"{type(error).__name__}: {said}" if said else type(error).__name__
        if isinstance(error, SystemExit):
            words = "It ends the program: leave exit() to the shell"
        if frames:
            line = frames[-1].lineno
            inside = "" if frames[-1].name == "<module>" else f", in {frames[-1].name}"
            words += f"\n    line {line}{inside}:  {text_of(self.text, line)}"
        if arguments := getattr(error, "arguments", ""):
            words += f"\n    called with {arguments}"
        if called := deepest_exercise(error):
            shapes = dict(piece(called).sections).get("Shapes", "").removeprefix("Shapes").split()
            words += f"\nIt came up in {called}, minires's own, which takes {' '.join(shapes)}." if shapes else ""
        return words + "".join(f"\n{meaning}" for sign, meaning in EXPLAINED.items() if sign in str(error))

    def use(self, functions):
        """Let the learner's functions call these for the exercises: an object that has them all."""
        for name in EXERCISES:
            self.names[name] = getattr(functions, name)

    def judge(self, name, own_mask=False):
        """Return (status, sentences) for an exercise; own_mask: with the learner's dropout_mask, not minires's."""
        if name not in self.own:
            return TO_DO, "It is not in the file. reset puts its blank back."
        if self.untouched(name):
            return TO_DO, ""
        mine = types.SimpleNamespace(**{**vars(reference()), name: self.own[name]})
        if name == "dropout_backward" and "dropout_forward" in self.own:
            mine.dropout_forward = self.own["dropout_forward"]
        if own_mask:
            mine.dropout_mask = self.own["dropout_mask"]
        self.use(mine)
        try:
            self.require_signature(name)
            if name in KERNELS:
                with unittest.mock.patch("minires.kernels.reference.COLUMN_BYTES", 1):  # as many parts as images
                    check_kernel(name, self.own[name], KERNELS[name])
            else:
                SPECIAL[name](mine)
        except MistakeError as wrong:
            if name == "dropout_backward" and not own_mask and self.judge("dropout_mask")[0] == RIGHT:
                return self.judge(name, own_mask=True)
            return WRONG, str(wrong)
        except NotCheckedError as missing:
            return NOT_CHECKED, str(missing)
        except NotImplementedError as error:
            return TO_DO, self.excuse(error)
        except (Exception, SystemExit) as error:
            return WRONG, self.excuse(error)
        return RIGHT, ""

    def untouched(self, name):
        """Whether a blank is still one: there is nothing in it but the docstring and what stands for a body."""
        if name == "SGD_CUDA":
            text = re.sub(r"//[^\n]*", "", str(self.own[name]))
            return not text[text.find("{") + 1 : text.rfind("}")].strip()
        nodes = [node for node in self.tree.body if getattr(node, "name", None) == name]
        if not nodes:
            return False  # it is defined in another way
        if isinstance(nodes[-1], ast.ClassDef):
            return all(is_blank(n) for n in nodes[-1].body if getattr(n, "name", "") in ("forward", "backward"))
        return is_blank(nodes[-1])

    def require_signature(self, name):
        ours, theirs = getattr(reference(), name), self.own[name]
        if name == "SGD_CUDA":
            if not isinstance(theirs, str):
                raise MistakeError(
                    f"SGD_CUDA should be a string, the text of a kernel, and is a {type(theirs).__name__}."
                )
            return
        if not callable(theirs):
            raise MistakeError(f"{name} should be a function, and is a {type(theirs).__name__}.")
        if inspect.isclass(ours):
            return
        if list(inspect.signature(ours).parameters) != list(inspect.signature(theirs).parameters):
            raise MistakeError(f"Its arguments should be {inspect.signature(ours)}, as in the blank.")


def deepest_exercise(error):
    """Return the exercise whose solution was called by the learner's code and stumbled, if any."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [i for i, frame in enumerate(frames) if frame.filename == YOURS]
    inside = [frame.name for frame in frames[lines[-1] + 1 :] if frame.filename == SOLUTIONS] if lines else []
    return next((name for name in inside if name in EXERCISES), None)


def is_blank(node):
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return all(
        isinstance(statement, ast.Pass)
        or (isinstance(statement, ast.Raise) and "NotImplementedError" in ast.unparse(statement))
        or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        for statement in body
    )


def read(path):
    """Return the text of a file of Python.

    Raises      BrokenFileError if there is none, or no text in it
    """
    try:
        return pathlib.Path(path).read_text(encoding="utf-8-sig")  # Windows editors may begin a file with a mark
    except UnicodeDecodeError as error:
        raise BrokenFileError(f"it is no text in UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise BrokenFileError(error.strerror or str(error)) from None


def check_file(path, names=(), limit=LIMIT):
    """Return {name: (status, sentences)} of the exercises in a file, checked in processes of their own.

    Raises      BrokenFileError for a file that cannot be read or does not run
    """
    read(path)
    names = list(names or EXERCISES)
    results = {}
    while remaining := [name for name in names if name not in results]:
        lines, ending, stuck = run_process("check", path, remaining, limit)
        under_way = LOADING
        for line in lines:
            if line["name"] == LOADING and "sentences" in line:
                raise BrokenFileError(line["sentences"])
            if "status" in line:
                results[line["name"]] = line["status"], line["sentences"]
            under_way = None if "status" in line else line["name"]
        if under_way:
            sentence = how_it_ended(ending, stuck, read(path), SLOW.get(under_way, limit))
            if under_way == LOADING:
                raise BrokenFileError(sentence)
            results[under_way] = WRONG, sentence
    return results


def run_process(task, path, arguments, limit):
    """Run this module on a file. Return what it reported, its exit code, and the stack of a time limit that ran out."""
    lessons = str(pathlib.Path(__file__).parent.parent)
    minires = str(pathlib.Path(sys.modules["minires"].__file__).parent.parent)
    paths = os.pathsep.join(filter(None, [lessons, minires, os.environ.get("PYTHONPATH")]))
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as folder:
        reports, stack = pathlib.Path(folder, "reports"), pathlib.Path(folder, "stack")
        process = subprocess.Popen(
            [
                sys.executable,
                "-B",
                "-m",
                "course.learner",
                task,
                str(path),
                str(limit),
                str(reports),
                str(stack),
                *arguments,
            ],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
        )
        try:
            process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        lines = reports.read_text(encoding="utf-8").splitlines() if reports.exists() else []
        told = stack.read_text(encoding="utf-8", errors="replace") if stack.exists() else ""
    whole = [line for line in lines if line.endswith("}")]
    return [json.loads(line) for line in whole], process.returncode, told


def text_of(text, line):
    """Return a line by its number, as Python counts them: `str.splitlines` also cuts at a form feed and the like."""
    return text.split("\n")[line - 1].strip()


def how_it_ended(code, stack, text, limit):
    """Tell why a process ended in the middle, with the learner's line where it is known."""
    if "Timeout" in stack:
        words = f"It was stopped after {limit:g} seconds: is there a loop that does not end?"
        found = re.search(rf'File "{YOURS}", line (\d+)', stack)
        if found:
            line = int(found[1])
            words += f"\n    line {line}:  {text_of(text, line)}"
        return words
    if code < 0:
        words = signal.strsignal(-code) or f"signal {-code}"
        return f"The program crashed: {words}. In a CUDA kernel: an index out of range, or a null pointer (velocity)?"
    return f"The program ended with code {code} in the middle of it."


def main(task, path, limit, reports, stack, *arguments):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word
    limit = float(limit)
    path = pathlib.Path(path).absolute()
    with open(reports, "w", encoding="utf-8") as report, open(stack, "w", encoding="utf-8") as stack_file:

        def tell(**line):
            report.write(json.dumps(line) + "\n")
            report.flush()

        def give(seconds):
            faulthandler.dump_traceback_later(seconds, exit=True, file=stack_file)

        tell(name=LOADING)
        give(limit)
        try:
            learner = Learner(read(path), path.name, path.parent)
        except BrokenFileError as error:
            tell(name=LOADING, sentences=str(error))
            return 0
        if task == "train":
            from course.training import train

            return train(learner, give, *arguments)
        for name in arguments:
            tell(name=name)
            give(SLOW.get(name, limit))
            status, sentences = learner.judge(name)
            sys.stdout.flush()
            tell(name=name, status=status, sentences=sentences)
        faulthandler.cancel_dump_traceback_later()
    return 0


def usable(results, anyway=False):
    """Return the names whose functions a training takes: what is right, or with anyway all that is written.

    Dropout goes whole or not at all: a forward and a backward of two authors would draw different masks.
    """
    names = [e.name for e in COURSE if results[e.name][0] == RIGHT or (anyway and results[e.name][0] == WRONG)]
    dropout = [e.name for e in COURSE if e.topic == "dropout"]
    whole = set(dropout) <= set(names)
    return [name for name in names if whole or name not in dropout]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
