"""Is an exercise right? If not: which result is wrong, for which input, how far off, and what it looks like.

Two ways to be sure. `diagnose` compares with the solution in float64, then looks which of the usual mistakes gives just
the numbers that came. And every gradient is compared with what the forward does when its input moves a little, but at
ties, as in minires/gradcheck.py; dout is random, as a dout of ones hides mistakes.

A check must refuse what is wrong, and must not care how it is written: it looks at results, never at the code.
tests/test_exercises.py plants mistakes in every exercise.
"""

import copy
import inspect
import math
import types
from typing import NamedTuple

import numpy as np

from course.source import reference

TOLERANCE = {"float64": 1e-7, "float32": 2e-4}  # relative norms; the largest tells mistakes from rounding
STEP = 1e-5  # of central differences, which are then right to about 1e-9


class MistakeError(Exception):
    """What is wrong with an exercise, as sentences for its author; named: whether they say what is the cause."""

    def __init__(self, sentences, named=True):
        super().__init__(sentences.strip())
        self.named = named


class Check(NamedTuple):
    """How a function is checked.

    results: names of what it returns; cases: rng -> argument dicts (further entries serve loss and suspects; kink is
        True where moving an input tells nothing, as at a tie);
    suspects: (case, expected results) -> (name, sentence, what the mistake would give), and so on;
    sizes: case -> {name: number} by which a result is often multiplied or divided by mistake;
    overflow: what to say where a result is not finite;
    loss: (solutions, case) -> the number whose derivatives the results are, by the inputs in `of`;
    writes: the arguments that the function is there to write to, which are then its results
    """

    results: str
    cases: object
    suspects: object = lambda a, e: ()
    sizes: object = lambda a: {}
    loss: object = None
    of: str = ""
    writes: str = ""
    overflow: str = "Somewhere a number overflows, or is divided by 0."


def check_kernel(name, function, rules):
    """Raise MistakeError unless a function returns in every case what the solution does, in float64 and in float32."""
    solution = getattr(reference(), name)
    cases = list(rules.cases(np.random.default_rng([*name.encode()])))
    solved = [results_of(name, solution, case, rules) for case in cases]
    for case, expected in zip(cases, solved, strict=True):
        a = types.SimpleNamespace(**case)
        yours, complaints = results_of(name, function, case, rules), []
        for result, value in expected.items():
            try:
                diagnose(result, yours[result], value, a, rules, name)
            except MistakeError as wrong:
                complaints.append(wrong)
        if complaints:
            raise max(complaints, key=lambda wrong: wrong.named)  # the first whose cause is known, else the first
        if rules.loss:
            compare_with_differences(name, yours, a, rules)
    for case, expected in zip(cases, solved, strict=True):
        check_float32(name, function, case, rules, expected)


def results_of(name, function, case, rules):
    """Call the function with copies of the arguments that it takes; return its results by name.

    Raises      MistakeError if it changes what it must not, or returns another number of results
    """
    names = [n for n in inspect.signature(getattr(reference(), name)).parameters if n in case]
    arguments = {n: copy.deepcopy(case[n]) for n in names}
    returned = call(function, arguments)
    for n in names:
        if n not in rules.writes.split() and not same(arguments[n], case[n]):
            raise MistakeError(f"It writes to {n}, which belongs to the caller and has other readers: work on a copy.")
    results = rules.results.split()
    if rules.writes:
        if all(same(arguments[n], case[n]) for n in results if arguments[n] is not None):
            raise MistakeError(
                f"Nothing has changed in {' and '.join(results)}. `{results[0]} = ...` makes a new array that nobody "
                f"else sees; `{results[0]} -= ...` or `{results[0]}[...] = ...` writes into the one that was given."
            )
        return {n: arguments[n] for n in results}
    if returned is None:
        raise MistakeError("It returns nothing: is a return missing?")
    if len(results) == 1:
        returned = (returned,)
    if not isinstance(returned, tuple | list) or len(returned) != len(results):
        count = len(returned) if isinstance(returned, tuple | list) else 1
        raise MistakeError(f"It should return {len(results)} results, {', '.join(results)}, and returns {count}.")
    return dict(zip(results, returned, strict=True))


def call(function, arguments):
    """Call with keyword arguments; an exception is given the shapes of the arguments, which say most about it."""
    try:
        with np.errstate(all="ignore"):
            return function(**arguments)
    except Exception as error:
        error.arguments = describe(arguments)
        raise


def same(a, b):
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return a is b or a == b


def describe(arguments):
    words = (f"{n} {v.shape}" if isinstance(v, np.ndarray) and v.ndim else f"{n}={v!r}" for n, v in arguments.items())
    return ", ".join(words)


def diagnose(name, yours, expected, a, rules, exercise):
    """Raise MistakeError if a result is not what was expected, with the most that can be said about it."""
    if expected is None:
        if yours is not None:
            raise MistakeError(f"{name} should be None {given(a, exercise)}: nobody asks for it.")
        return
    if yours is None:
        raise MistakeError(f"{name} is None {given(a, exercise)}; an array of shape {np.shape(expected)} was expected.")
    if isinstance(yours, list) or not isinstance(yours, np.ndarray | np.generic | float | int):
        raise MistakeError(f"{name} is a {type(yours).__name__}; an array of shape {np.shape(expected)} was expected.")
    expected = np.asarray(expected)
    value = np.asarray(yours, np.float64)
    if close(value, expected):
        return
    with np.errstate(all="ignore"):
        found = (sentence for n, sentence, what in rules.suspects(a, expected) if n == name and equals(value, what))
        suspect = next(found, "")
        looks = suspect or pattern(name, value, expected, rules.sizes(a), a, rules, exercise)
    if value.shape != expected.shape:
        words = f"has shape {value.shape}, expected {expected.shape} {given(a, exercise)}"
    else:
        words = f"is wrong {given(a, exercise)}: {how_far(name, value, expected, a, rules)}"
    raise MistakeError(f"{name} {words}.\n{looks}", named=bool(suspect))


def given(a, exercise):
    names = [n for n in inspect.signature(getattr(reference(), exercise)).parameters if n in vars(a)]
    return "for " + describe({n: getattr(a, n) for n in names})


def how_far(name, value, expected, a, rules):
    """Tell the worst number of a result, and what a little step in the input does there, if it is a gradient."""
    if not np.isfinite(value).all():
        return f"it holds {'NaN' if np.isnan(value).any() else 'infinity'}"
    error = np.abs(value - expected)
    worst = np.unravel_index(np.argmax(error), error.shape)
    at = f"{name}[{', '.join(map(str, worst))}]" if worst else name
    wrong = int((error > 1e-6 * max(np.abs(expected).max(), 1e-3)).sum())
    share = f", {wrong} of {error.size} numbers are wrong" if error.size > 1 else ""
    text = f"{at} is {value[worst]:.5g} and should be {expected[worst]:.5g}"
    if rules.loss and name in rules.results.split() and not getattr(a, "kink", False):
        moved = dict(zip(rules.results.split(), rules.of.split(), strict=True))[name]
        if moved in vars(a):
            index = f"{moved}[{', '.join(map(str, worst))}]" if worst else moved
            direction = np.zeros(expected.shape)
            direction[worst] = 1
            slope = difference(a, rules, moved, direction)
            text = f"{at} is {value[worst]:.5g}, but moving {index} by h moves the loss by {slope:.5g} h"
    return text + share


def close(value, expected, tolerance=TOLERANCE["float64"]):
    if value.shape != expected.shape:
        return False
    difference = np.linalg.norm(value - expected)
    return bool(difference <= tolerance * max(np.linalg.norm(expected), 1e-3))


def equals(value, what):
    """Whether a result is what a mistake would give; some cannot be made with the shapes at hand."""
    try:
        what = np.asarray(what() if callable(what) else what, np.float64)
    except (ValueError, IndexError, TypeError):  # the last for what is None here
        return False
    return close(value, what, 1e-6) and np.isfinite(what).all()


def pattern(name, value, expected, sizes, a, rules, exercise):
    """Return a sentence on what the numbers look like, whatever the function; "" if they look like nothing known."""
    if value.shape != expected.shape:
        if value.shape == expected.shape[::-1] and value.ndim > 1:
            same_numbers = close(value.T, expected)
            return "It is transposed." if same_numbers else "The shape is transposed: is a .T on the wrong factor?"
        if value.size == expected.size:
            return "The number of elements is right: a reshape or a transpose is missing at the end."
        if value.ndim > expected.ndim:
            return "It has too many axes: over which of them should have been summed?"
        if value.ndim < expected.ndim:
            return "It has too few axes: too much is summed."
        if value.ndim == 1:
            names = {number: f"{size} = {number}" for size, number in sizes.items()}
            got, want = (names.get(v.size, str(v.size)) for v in (value, expected))
            return f"A number is expected for each of {want}, and there are {got}: is it summed over the wrong axis?"
        return ""
    if not np.isfinite(value).all():
        return rules.overflow
    if not value.any():
        return "All of it is 0."
    used = np.abs(expected) > 1e-12
    ratio = value[used] / expected[used]
    factor = float(np.median(ratio)) if ratio.size else 0.0
    if used.any() and close(value, factor * expected, 1e-6) and abs(factor) > 1e-12:
        return factor_sentence(factor, sizes, value.size)
    if "dout" in vars(a) and name.startswith("d"):
        ones = dict(vars(a), dout=np.ones_like(a.dout))
        if exercise.startswith("batch_norm_backward") and "dweight" in ones:
            return last_resort(value, expected)
        solved = results_of(exercise, getattr(reference(), exercise), ones, rules)
        if solved.get(name) is not None and close(value, np.asarray(solved[name]), 1e-6):
            return "It is what comes out if dout is all ones: dout is not used."
    return last_resort(value, expected)


def last_resort(value, expected):
    if close(np.sort(value.ravel()), np.sort(expected.ravel())):
        return "The numbers are right, but stand at other positions: an order of axes, or a reshape for a transpose?"
    shift = value - expected
    if shift.size > 1 and close(shift, np.full_like(shift, shift.mean()), 1e-6):
        return f"All numbers are off by the same {shift.mean():.4g}."
    if value.ndim == 4 and min(value.shape[1:3]) > 2:
        inside = (slice(None), slice(1, -1), slice(1, -1))
        if close(value[inside], expected[inside]):
            return "Only the border of the images is wrong: look at the padding."
    if value.ndim > 1 and len(value) > 1:
        wrong = [i for i in range(len(value)) if not close(value[i], expected[i])]
        if len(wrong) < len(value):
            return f"Only index {', '.join(map(str, wrong))} of the first axis is wrong."
    return ""


def factor_sentence(factor, sizes, count):
    every = "Every number is" if count > 1 else "It is"
    if math.isclose(factor, -1, rel_tol=1e-6):
        return "The sign is the other way round."
    for size, number in sizes.items():
        if math.isclose(factor, number, rel_tol=1e-5) and number != 1:
            return (
                f"{every} {size} = {number:g} times too large: you summed where the mean was taken; divide by {size}."
            )
        if math.isclose(factor * number, 1, rel_tol=1e-5) and number != 1:
            return f"{every} {size} = {number:g} times too small: you took the mean where the sum belongs."
    return f"Every number is {factor:.5g} times what it should be." if count > 1 else ""


def difference(a, rules, name, direction):
    """The derivative of the loss along a direction in one input, by central differences."""
    ends = []
    for step in (STEP, -STEP):
        moved = types.SimpleNamespace(**vars(a))
        setattr(moved, name, getattr(a, name) + step * direction)
        ends.append(float(rules.loss(reference(), moved)))
    return (ends[0] - ends[1]) / (2 * STEP)


def compare_with_differences(exercise, yours, a, rules):
    rng = np.random.default_rng(7)
    for result, name in zip(rules.results.split(), rules.of.split(), strict=True):
        if yours[result] is None or getattr(a, name, None) is None or getattr(a, "kink", False):
            continue
        direction = rng.standard_normal(getattr(a, name).shape)
        claim, truth = float(np.sum(yours[result] * direction)), difference(a, rules, name, direction)
        if abs(claim - truth) > 1e-5 * max(abs(claim), abs(truth), np.linalg.norm(yours[result])):
            raise MistakeError(
                f"{result} is not the gradient of {name} {given(a, exercise)}: along a random direction it says "
                f"{claim:.5g}, and the forward does {truth:.5g}."
            )


def check_float32(name, function, case, rules, expected):
    """float32 in, float32 out: NumPy 2 makes float64 of float32 times a NumPy number."""
    narrow = {n: v.astype(np.float32) if is_float(v) else v for n, v in case.items()}
    yours = results_of(name, function, narrow, rules)
    solved = results_of(name, getattr(reference(), name), narrow, rules)
    for result, value in yours.items():
        if expected[result] is None:
            continue
        dtype = getattr(solved[result], "dtype", None)
        if dtype == np.float32 and getattr(value, "dtype", None) != np.float32:
            raise MistakeError(
                f"{result} is {getattr(value, 'dtype', type(value).__name__)} where all inputs are float32. Usual "
                "causes: np.zeros without dtype, a mask / (1 - p) or np.sqrt of a Python number, which are float64."
            )
        if np.asarray(value).shape != np.shape(solved[result]) or not close(
            np.asarray(value, np.float64), np.asarray(expected[result], np.float64), TOLERANCE["float32"]
        ):
            raise MistakeError(
                f"{result} is right in float64, and far off in float32 {given(types.SimpleNamespace(**case), name)}: "
                "it loses digits. Do two large numbers cancel (the mean of x^2 less mean^2)?"
            )


def is_float(value):
    return isinstance(value, np.ndarray) and value.dtype == np.float64
