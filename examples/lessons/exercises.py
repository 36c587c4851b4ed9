"""Write the backward yourself, and train with it: exercises that are taken from minires's own source.

    python examples/lessons/exercises.py new mine.py                     a file to fill in (--hints: formulas left in)
    python examples/lessons/exercises.py watch mine.py                   checks one exercise whenever you save
    python examples/lessons/exercises.py check mine.py                   checks all, or those that are named
    python examples/lessons/exercises.py hint mine.py conv2d_backward    the next of three hints
    python examples/lessons/exercises.py list mine.py                    how far you are
    python examples/lessons/exercises.py reset mine.py conv2d_backward   the blank again; the old text stays beside it
    python examples/lessons/exercises.py train mine.py                   trains a network with what is yours

check ends with 0 if all that it was asked is right, else with 1. What stands behind the commands is in course/.
"""

import argparse
import ast
import json
import os
import pathlib
import re
import sys
import textwrap
import time
from collections import Counter

from course.catalog import COURSE, EXERCISES
from course.learner import (
    LIMIT,
    NOT_CHECKED,
    RIGHT,
    WRONG,
    BrokenFileError,
    check_file,
    how_it_ended,
    read,
    run_process,
    usable,
)
from course.source import hints, piece, whole_file
from course.training import SECONDS_FOR_A_STEP

from minires.training.arguments import at_least, positive
from minires.training.folder import UsageError
from minires.training.script import run_script

WIDTH = max(map(len, EXERCISES)) + 2
SECONDS_BETWEEN_LOOKS = 0.2
OUTSIDE_OF_TRAINING = 600.0  # a limit for the file to be run and the network to be built


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show where an error of this program came from")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("new", "watch", "check", "hint", "list", "reset", "train"):
        command = commands.add_parser(name)
        command.add_argument("file", type=pathlib.Path)
        if name == "new":
            command.add_argument("--hints", action="store_true", help="leave Backward and Why in the docstrings")
        if name in ("hint", "reset"):
            command.add_argument("exercise", help="as in list")
        if name == "hint":
            command.add_argument("--number", type=int, choices=(1, 2, 3), help="this hint, not the next one")
        if name == "check":
            command.add_argument("exercises", nargs="*", help="names or topics, as in list; without, all")
        if name == "watch":
            command.add_argument("exercise", nargs="?", help="the one to begin with; without, the first not right yet")
        if name in ("check", "watch", "list"):
            command.add_argument("--limit", type=positive, default=LIMIT, help="seconds for one exercise")
        if name == "train":
            command.add_argument("--anyway", action="store_true", help="also take what is written and wrong")
            command.add_argument("--steps", type=at_least(1), default=40)
            command.add_argument("--optimizer", choices=("adam", "sgd"), default="adam")
    return parser.parse_args()


def main():
    args = parse_arguments()
    try:
        return {
            "new": new,
            "watch": watch,
            "check": check,
            "hint": hint,
            "list": show_list,
            "reset": reset,
            "train": train,
        }[args.command](args)
    except BrokenFileError as error:
        if not args.file.is_file():
            raise UsageError(f"{args.file}: {error}; `new {args.file}` makes one") from None
        print(f"{args.file} does not run, so nothing in it can be checked.")
        say(str(error))
        return 1


def new(args):
    text = whole_file(args.file.name, "blank_with_hints" if args.hints else "blank")
    try:
        with open(args.file, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{args.file} is there already, and is left as it is") from None
    print(f"{args.file} has {len(COURSE)} exercises. `watch {args.file}` checks one whenever you save, from the first.")
    return 0


def check(args):
    names = chosen(args.exercises)
    results = check_file(args.file, names, args.limit)
    for name in names:
        print_result(name, *results[name])
        if len(names) == 1 and results[name][0] == RIGHT:
            say(comparison(name), wrap=False)
    if len(names) > 1:
        print(progress(results))
    return 0 if all(status == RIGHT for status, _ in results.values()) else 1


def show_list(args):
    results = check_file(args.file, limit=args.limit)
    topic = None
    for exercise in COURSE:
        shown = "" if exercise.topic == topic else exercise.topic
        topic = exercise.topic
        print(f"{shown:13} {exercise.name:{WIDTH}} {results[exercise.name][0]:12} {exercise.title}")
    print(progress(results))
    return 0


def watch(args):
    """Stay with one exercise until it is right, say so, and go on. What is wrong with the next comes after a save."""
    seen = stamp(args.file)
    results = check_file(args.file, limit=args.limit)
    current = one(args.exercise) if args.exercise else next_of(results)
    print(progress(results))
    if current:
        announce(args.file, current)
        print_result(current, *results[current])
    while current:
        sys.stdout.flush()
        seen = wait_for_save(args.file, seen)
        try:
            results |= check_file(args.file, [current], args.limit)
        except BrokenFileError as error:
            results[current] = WRONG, f"The file does not run. {error}"
        print_result(current, *results[current])
        if results[current][0] == RIGHT:
            say(comparison(current), wrap=False)
            results |= check_file(args.file, limit=args.limit)
            print(progress(results))
            if current := next_of(results):
                announce(args.file, current)
    print(f"Nothing is left to do. `train {args.file}` trains a network with what is right.")
    return 0


def announce(path, name):
    print(f"\nNow: {name} ({EXERCISES[name].title}), {place(path, name)}")


def wait_for_save(path, seen):
    while (now := stamp(path)) in (seen, None):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return now


def next_of(results):
    return next((e.name for e in COURSE if results[e.name][0] not in (RIGHT, NOT_CHECKED)), None)


def stamp(path):
    """What changes when a file is saved; None while it is not there, as some editors replace it."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def place(path, name):
    lines = read(path).split("\n")
    found = [i for i, line in enumerate(lines, 1) if re.match(rf"(def|class) {name}\b|{name} = ", line)]
    return f"{path}:{found[-1]}" if found else f"not in {path}: reset puts its blank back"


def hint(args):
    """Show the next hint. How many were shown is kept in a file beside the learner's."""
    name, notes = one(args.exercise), args.file.with_suffix(".hints.json")
    read(args.file)
    try:
        shown = json.loads(notes.read_text())
        last = min(max(int(shown.get(name, 0)), 0), 3)
    except (OSError, ValueError, AttributeError, TypeError):
        shown, last = {}, 0
    number = args.number or min(last + 1, 3)
    following = "The same command shows the next one."
    try:
        notes.write_text(json.dumps(shown | {name: max(number, last)}, indent=1))
    except OSError:
        following = f"How many were shown cannot be kept in {notes}: --number 2 or 3 shows the next one."
    print(f"{name}, hint {number} of 3" + (": the derivation" if number == 3 else ""))
    say(hints(name)[number - 1], wrap=number < 3)
    if number < 3 and not args.number:
        print(following)
    return 0


def reset(args):
    """Put the blank of an exercise back where its text is; what was there goes into a file beside it."""
    name = one(args.exercise)
    text = read(args.file)
    start, end = region(text, name)
    blank = piece(name).blank.rstrip("\n")
    lines = text.split("\n")  # as `ast` counts them
    if start == end:
        before, after = text.rstrip() + "\n" * 3, ""
    else:
        kept = kept_name(args.file, name)
        with open(kept, "x", encoding="utf-8") as file:
            file.write("\n".join(lines[start:end]) + "\n")
        print(f"The old text is in {kept}.")
        before, after = "".join(f"{line}\n" for line in lines[:start]), "\n".join(lines[end:])
    beside = args.file.with_name(f".{args.file.name}.new")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(before + blank + "\n" + after)
    os.replace(beside, args.file)
    print(f"{name} is blank again: {place(args.file, name)}")
    return 0


def region(text, name):
    """Return (start, end) of the lines of an exercise, also in a file that is no Python now; equal if not there."""
    lines = text.split("\n")
    try:
        for node in reversed(ast.parse(text).body):  # of two definitions Python takes the last
            target = getattr(node, "targets", [None])[0]
            if name in (getattr(node, "name", None), getattr(target, "id", None)):
                decorators = [d.lineno for d in getattr(node, "decorator_list", [])]
                return min([node.lineno, *decorators]) - 1, node.end_lineno
        return 0, 0
    except (SyntaxError, ValueError):
        pass
    starts = [i for i, line in enumerate(lines) if re.match(rf"(def|class)\s+{name}\b|{name}\s*=", line)]
    if not starts:
        return 0, 0
    following = (
        i for i, line in enumerate(lines) if i > starts[-1] and re.match(r"def |class |@|# \d+  |[A-Z_]+ = ", line)
    )
    end = next(following, len(lines))
    while not lines[end - 1].strip():
        end -= 1
    return starts[-1], end


def kept_name(path, name):
    number = 1
    while (kept := path.with_name(f"{path.stem}.{name}.{number}.py")).exists():
        number += 1
    return kept


def train(args):
    """Train with what is right in a file, in a process of its own, beside minires."""
    results = check_file(args.file)
    names = usable(results, args.anyway)
    print(progress(results))
    wrong = [name for name, (status, _) in results.items() if status == WRONG]
    if wrong and not args.anyway:
        print(f"minires's in place of what is wrong: {', '.join(wrong)}. --anyway takes yours.")
    lines, code, stack = run_process("train", args.file, [str(args.steps), args.optimizer, *names], OUTSIDE_OF_TRAINING)
    for line in lines:
        if "sentences" in line:
            raise BrokenFileError(line["sentences"])
    if "Timeout" in stack or code < 0:
        say(how_it_ended(code, stack, read(args.file), SECONDS_FOR_A_STEP))
    return 1 if code else 0


def chosen(words):
    """Return the names of exercises that are meant: names and topics; all without words."""
    known = [e.name for e in COURSE] + [e.topic for e in COURSE]
    for word in words:
        if word not in known:
            raise UsageError(f"there is no exercise {word!r}; they are {', '.join(EXERCISES)}")
    return [e.name for e in COURSE if not words or e.name in words or e.topic in words]


def one(word):
    names = chosen([word])
    if len(names) > 1:
        raise UsageError(f"{word} is a topic: which of {', '.join(names)}?")
    return names[0]


def print_result(name, status, sentences):
    print(f"{name:{WIDTH}} {status}")
    if sentences:
        say(sentences)


def say(text, wrap=True):
    """Print sentences, indented; lines that begin with a space (code) stay as they are."""
    for line in text.split("\n"):
        if wrap and not line.startswith(" "):
            print(textwrap.fill(line, 110, initial_indent="    ", subsequent_indent="    ", break_long_words=False))
        else:
            print(f"    {line}".rstrip())


def comparison(name):
    """Show how minires does it, and why."""
    found = piece(name)
    why = [text for heading, text in found.sections if heading in ("Backward", "Why")]
    return "\n\n".join([f"In minires it is (minires/{found.where}):", textwrap.indent(found.code, "    "), *why]) + "\n"


def progress(results):
    counts = Counter(status for status, _ in results.values())
    return ", ".join(f"{counts[status]} {status}" for status in (RIGHT, WRONG, "to do", NOT_CHECKED) if counts[status])


if __name__ == "__main__":
    run_script(main)
