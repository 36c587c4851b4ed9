"""The course of the exercises, and what each takes from minires: its blank, its solution, its hints.

Nothing is written down twice. Signatures, docstrings and solutions are read from minires's own files by `ast`, so they
change when these do. Three exercises have no function of their own there: their signature and docstring are here, and
the solution is put together from the lines that do it (the initial weights from Conv2d, the matrices from
winograd.py, the tile from its examples). The CUDA kernel is that of gpu.cu, with its comment.
"""

import ast
import functools
import importlib
import inspect
import pathlib
import re
import types
from typing import NamedTuple

import minires
from course.catalog import COURSE, EXERCISES

PACKAGE = pathlib.Path(minires.__file__).parent
SOLUTIONS = "<solutions>"  # their file in tracebacks
TO_DO = "raise NotImplementedError"
HIDDEN = ("Backward", "Why")  # sections of a docstring that a blank leaves out

HEADER = '''"""Exercises of minires: write each function so that it does what its docstring says.

    python examples/lessons/exercises.py watch {name}       checks it whenever you save
    python examples/lessons/exercises.py hint {name} linear_forward
    python examples/lessons/exercises.py train {name}       trains a network with what is yours

Each function gets arrays, returns new ones and leaves its arguments as they are (those called update write to them).
A backward is given dout, the derivative of the loss by the forward's output, and returns the derivative of the loss by
each input: ask through which outputs an element of the input influences the loss, and add up.
"""

import math
import numbers

import numpy as np

# Tools that you may use, and need not: what they do stands in minires/kernels/reference.py, rng.py and augment.py
from minires.augment import CUTOUT_STREAM, MEAN_COLOR, draw_below
from minires.backend import array_module
from minires.kernels import kernels_for
from minires.kernels.reference import image_chunks, output_size, pixels_of_tap, rsqrt, sum_over_rows
from minires.layers import BatchNorm2d, Bias2d, Conv2d
from minires.module import Module, Sequential
from minires.rng import random_words
'''


# What has no function of its own in minires: signature, docstring (without its Why) and what the solution returns
COMPOSED = {
    "he_weight": (
        "def he_weight(kernel_size, in_channels, out_channels, rng):",
        """Draw the initial weights of a convolution: normal, of mean 0, such that activations keep their scale.

        A ReLU stands before each convolution, and the variance of the outputs should be that of the outputs before.

        Args        rng: a NumPy Generator, or a seed
        Shapes      ->  weight (kernel_size, kernel_size, in_channels, out_channels), float32""",
        "return weight",
    ),
    "winograd_matrices": (
        "def winograd_matrices():",
        """Return matrices with which three taps on six inputs give four outputs by six multiplications.

        Forward     y = OUTPUT ((WEIGHT g) * (INPUT x)), with * element by element, is for every x and g
                    y[i] = x[i] g[0] + x[i + 1] g[1] + x[i + 2] g[2]

        Shapes      ->  INPUT (6, 6), WEIGHT (6, 3), OUTPUT (4, 6)""",
        "return INPUT, WEIGHT, OUTPUT",
    ),
    "winograd_tile": (
        "def winograd_tile(x, g, INPUT, WEIGHT, OUTPUT):",
        """Do in two dimensions what y = OUTPUT ((WEIGHT g) * (INPUT x)) does in one: along columns, then along rows.

        Shapes      x (6, 6), g (3, 3), matrices as in `winograd_matrices`  ->  out (4, 4)""",
        "return {}",
    ),
}


class Piece(NamedTuple):
    """An exercise as text. sections: of the docstring, (heading, text) in order; code: what solves it."""

    blank: str
    blank_with_hints: str
    solution: str
    sections: list
    code: str
    where: str


@functools.cache
def piece(name):
    """Read an exercise from minires's source."""
    file = EXERCISES[name].file
    text = (PACKAGE / file).read_text(encoding="utf-8")
    if file.endswith(".cu"):
        return cuda_piece(text, file)
    tree = ast.parse(text)
    if name in COMPOSED:
        head, docstring, ending = COMPOSED[name]
        code, line, why = composed_code(name, tree, text, ending)
        return python_piece(head, f"{inspect.cleandoc(docstring)}\n\n{why}", code, None, f"{file}:{line}")
    node = next(node for node in tree.body if getattr(node, "name", None) == name)
    head = lines_of(text, node.lineno, node.body[0].lineno - 1)
    docstring = inspect.cleandoc(ast.get_docstring(node, clean=False))
    code = lines_of(text, node.body[1].lineno, node.end_lineno)
    blank_code = class_blank(text, node) if isinstance(node, ast.ClassDef) else None
    if blank_code:
        parts = [part for part in node.body if getattr(part, "name", "") in ("forward", "backward")]
        shown = "\n\n".join(lines_of(text, part.lineno, part.end_lineno) for part in parts)
        found = python_piece(head, docstring, code, blank_code, f"{file}:{parts[0].lineno}")
        return found._replace(code=inspect.cleandoc("\n" + shown))
    return python_piece(head, docstring, code, None, f"{file}:{node.body[1].lineno}")


def python_piece(head, docstring, code, blank_code, where):
    sections = sections_of(docstring)
    shown = [(heading, text) for heading, text in sections if heading not in HIDDEN]
    blank_code = blank_code or f"    {TO_DO}"

    def assemble(sections, code):
        text = "\n\n".join(text for _, text in sections)
        text = "\n".join(f"    {line}".rstrip() for line in text.split("\n")).strip()
        closing = '\n    """' if "\n" in text else '"""'
        if head.startswith("class"):
            closing += "\n"
        return f'{head}\n    """{text}{closing}\n{code}\n'

    code_alone = inspect.cleandoc("\n" + code)
    return Piece(
        assemble(shown, blank_code),
        assemble(sections, blank_code),
        assemble(sections, code),
        sections,
        code_alone,
        where,
    )


def class_blank(text, node):
    """The body of a class without its docstring: the initialisation as it is, forward and backward to do."""
    parts = []
    for part in node.body[1:]:
        if part.name in ("forward", "backward"):
            parts.append(f"{lines_of(text, part.lineno, part.body[0].lineno - 1)}\n        {TO_DO}")
        else:
            parts.append(lines_of(text, part.lineno, part.end_lineno))
    return "\n\n".join(parts)


def composed_code(name, tree, text, ending):
    """Return the statements that solve an exercise without a function of its own, their line, and the Why."""
    if name == "he_weight":
        layer = next(node for node in tree.body if getattr(node, "name", "") == "Conv2d")
        init = next(node for node in layer.body if getattr(node, "name", "") == "__init__")
        docstring, found = ast.get_docstring(layer), assignments(init.body, ("shape", "deviation", "weight"))
    else:
        docstring, found = ast.get_docstring(tree), assignments(tree.body, ("INPUT", "WEIGHT", "OUTPUT"))
    why = dict(sections_of(docstring))["Why"]
    if name == "winograd_tile":
        example = next(line.strip() for line in docstring.split("\n") if ">>> (OUTPUT @" in line and "INPUT.T" in line)
        formula = ast.parse(example.removeprefix(">>> ")).body[0].value  # (product).round(3) + 0
        while not (isinstance(formula, ast.BinOp) and isinstance(formula.op, ast.MatMult)):
            formula = formula.left if isinstance(formula, ast.BinOp) else formula.func.value
        line = next(i for i, line in enumerate(text.split("\n"), 1) if example in line)
        return f"    {ending.format(ast.unparse(formula))}", line, why
    statements = [inspect.cleandoc("\n" + lines_of(text, node.lineno, node.end_lineno)) for node in found]
    code = "\n".join([*statements, ending])
    return "\n".join(f"    {line}".rstrip() for line in code.split("\n")), found[0].lineno, why


def assignments(body, names):
    return [node for node in body if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in names]


def cuda_piece(text, file):
    """The kernel sgd of gpu.cu: its comment and head, with and without its body."""
    found = re.search(r"((?://[^\n]*\n)*)(__global__ void sgd\([^{]*\{\n)(.*?)^\}\n", text, re.M | re.S)
    comment, head, body = found.groups()
    line = text[: found.start(3)].count("\n") + 1
    blank, solution = (f'SGD_CUDA = r"""\n{comment}{head}{code}}}\n"""\n' for code in ("    // to do\n", body))
    return Piece(blank, blank, solution, [], inspect.cleandoc("\n" + body), f"{file}:{line}")


def sections_of(docstring):
    """Cut a docstring into (heading, text): the first without a heading, examples under ">>>"."""
    sections = []
    for paragraph in re.split(r"\n\s*\n|\n(?=[A-Z][a-z]+  )", docstring):
        heading = re.match(r"([A-Z][a-z]+)  |(>>>) ", paragraph)
        heading = (heading and heading[1]) or (heading and heading[2]) or ""
        if not heading and sections and (sections[-1][0] and paragraph.startswith(" ")):
            heading, before = sections.pop()
            paragraph = f"{before}\n\n{paragraph}"
        sections.append((heading, paragraph.rstrip()))
    return sections


def lines_of(text, first, last):
    return "\n".join(text.split("\n")[first - 1 : last])


def whole_file(name="mine.py", kind="blank"):
    """Return the text of a file with all exercises; kind is a field of Piece: blank, blank_with_hints or solution."""
    parts, topic = [HEADER.replace("{name}", name) + (imports_of_solutions() if kind == "solution" else "")], None
    for exercise in COURSE:
        if exercise.topic != topic:
            topic = exercise.topic
            number = list(dict.fromkeys(e.topic for e in COURSE)).index(topic) + 1
            parts.append(f"# {number}  {topic}\n")
        parts.append(getattr(piece(exercise.name), kind))
    return "\n\n".join(parts)


@functools.cache
def imports_of_solutions():
    """Return import lines for what the solutions call and a learner does not need: checks of arguments and the like."""
    lines = set()
    for name, exercise in EXERCISES.items():
        if exercise.file.endswith(".py"):
            module = importlib.import_module("minires." + exercise.file.removesuffix(".py").replace("/", "."))
            nodes = [node for node in ast.walk(ast.parse(piece(name).solution)) if isinstance(node, ast.Name | ast.arg)]
            own = {
                getattr(node, "id", None) or node.arg
                for node in nodes
                if not isinstance(getattr(node, "ctx", None), ast.Load)
            }
            used = {node.id for node in nodes if isinstance(node, ast.Name)} - own - set(EXERCISES)
            found = {word for word in used if hasattr(module, word) and not re.search(rf"\b{word}\b", HEADER)}
            lines |= {f"from {module.__name__} import {word}\n" for word in found}
    return "".join(sorted(lines))


@functools.cache
def reference():
    """Return every solution, run from minires's source, as the attributes of an object."""
    return reference_with({})


def reference_with(own):
    """Return the solutions with some functions in place of theirs, which the others then call."""
    namespace = {"__name__": "solutions"}
    exec(compiled_solutions(), namespace)
    namespace.update(own)
    return types.SimpleNamespace(**namespace)


@functools.cache
def compiled_solutions():
    return compile(whole_file(kind="solution"), SOLUTIONS, "exec")


def hints(name):
    """Return the three hints of an exercise."""
    found = piece(name)
    words = [text for heading, text in found.sections if heading in HIDDEN]
    if not any(heading == "Why" for heading, _ in found.sections):  # where the definition says all: the way to write it
        words += ["In minires it is written so:\n\n" + found.code]
    return (*EXERCISES[name].hints, "\n\n".join(words))
