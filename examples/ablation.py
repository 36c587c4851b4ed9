"""What is each ingredient worth? Train the network with and without it, several times, and put the results in a table.

    python examples/ablation.py --seeds 1 --data sample --epochs 2 --batch-size 50        a smoke test
    python examples/ablation.py --study report                                            the whole study, for a GPU
    python examples/ablation.py --study fast --variants fast "no cutout" --seeds 5        a part of another
    python examples/ablation.py --study recipes                                           what each recipe reaches

All other options go to train_cifar.py, for every variant that does not set them itself. Each run has a folder of its
own, OUT/VARIANT/seed-N. A run that is there is not made again: the study can be stopped at any time (after Ctrl-C and
SIGTERM the current run writes a checkpoint) and resumed by the same command, and with more seeds or variants it takes
over what it has. OUT/table.md and, with matplotlib, OUT/ablation.png are made anew after each run, of all the runs of
the study that are there.

Exit codes: those of train_cifar.py, 1 if a run did not end well.

Compare variants by their validation accuracy; the test accuracy is what to report for the one that was chosen. The
recipes themselves have nothing left to choose: all but the report's train on all images, and their result is the test
accuracy.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np

from minires.console import note
from minires.training import UsageError
from minires.training.arguments import at_least, folder
from minires.training.folder import RESULT, SETTINGS, read_settings
from minires.training.output import draw
from minires.training.script import run_script
from minires.training.signals import ending_signals
from minires.training.storage import write_atomically

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for recipes.py, also under python -m and PYTHONSAFEPATH
import recipes

TRAIN = pathlib.Path(__file__).parent / "train_cifar.py"
HOUR = ["--recipe", "hour", "--no-full-train"]
FAST = ["--recipe", "fast", "--no-full-train"]  # a fifth of the training images is kept for validation
SGD = ["--optimizer", "sgd", "--lr", "0.1", "--weight-decay", "5e-4"]  # Zagoruyko and Komodakis 2016
STUDIES = {
    "report": {  # the story of the report's method section, one step away from its network and its recipe
        "report": [],
        "blocks 1 1 1 1": ["--blocks", "1", "1", "1", "1"],
        "plain, without shortcuts": ["--no-shortcut"],
        "no BatchNorm": ["--no-batch-norm"],
        "no dropout": ["--dropout", "0"],
        "no augmentation": ["--crop", "0", "--flip", "none"],
        "crop only": ["--flip", "none"],
        "flip only": ["--crop", "0"],
        "cosine schedule": ["--schedule", "cosine"],
        "SGD": SGD,
        "SGD, cosine": [*SGD, "--schedule", "cosine"],
    },
    "hour": {  # the recipe for two CPU cores without each of its ingredients
        "hour": HOUR,
        "SGD": [*HOUR, "--optimizer", "sgd"],
        "images of 32x32 throughout": [*HOUR, "--early-size", "0"],
        "biases at the common rate": [*HOUR, "--bias-lr", "1"],
        "label smoothing 0.1": [*HOUR, "--label-smoothing", "0.1"],
        "crop 4": [*HOUR, "--crop", "4"],
        "cutout 8": [*HOUR, "--cutout", "8"],
        "no average": [*HOUR, "--ema", "0"],
    },
    "fast": {  # the fast recipe without each of its ingredients
        "fast": FAST,
        "Adam at 0.001": [*FAST, "--optimizer", "adam", "--lr", "1e-3", "--weight-decay", "0"],
        "momentum without Nesterov": [*FAST, "--no-nesterov"],
        "one-cycle schedule": [*FAST, "--schedule", "one-cycle"],
        "constant rate": [*FAST, "--schedule", "constant"],
        "no weight decay": [*FAST, "--weight-decay", "0"],
        "decay on vectors": [*FAST, "--decay-vectors"],
        "no label smoothing": [*FAST, "--label-smoothing", "0"],
        "no cutout": [*FAST, "--cutout", "0"],
        "random flip": [*FAST, "--flip", "random"],
        "TrivialAugment": [*FAST, "--trivial-augment"],
        "no average": [*FAST, "--ema", "0"],
        "dropout 0.5": [*FAST, "--dropout", "0.5"],
    },
    "recipes": {name: ["--recipe", name, "--tta"] for name in recipes.RECIPES},
}
COLUMNS = ("validation_accuracy", "validation_loss", "test_accuracy", "test_accuracy_tta", "test_loss", "seconds")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Train variants of a recipe and compare them; unknown options go to train_cifar.py.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--study", choices=list(STUDIES), default="report", help="default report")
    names = "; ".join(f"{study}: {', '.join(map(repr, variants))}" for study, variants in STUDIES.items())
    add("--variants", nargs="+", metavar="NAME", help=f"only these of the study; {names}")
    add("--seeds", type=at_least(1), default=3, metavar="N", help="runs of each variant, with seeds from 0; default 3")
    add("--out", type=folder, metavar="DIR", help="the folder of the study, default runs/ablation-STUDY")
    args, args.shared = parser.parse_known_args()
    unknown = [name for name in args.variants or [] if name not in STUDIES[args.study]]
    if unknown:
        parser.error(
            f"--variants: {unknown[0]!r} is not in the study {args.study}, which has " + "; ".join(STUDIES[args.study])
        )
    for flag in ("--recipe", "--full-train", "--seed", "--resume"):
        if any(option.partition("=")[0] == flag for option in args.shared):
            parser.error(f"{flag} is for train_cifar.py: a study has a recipe and seeds of its own (--seeds)")
    args.out = args.out or pathlib.Path("runs", f"ablation-{args.study}")
    return args


def main():
    args = parse_arguments()
    runs = [(variant, seed) for seed in range(args.seeds) for variant in args.variants or STUDIES[args.study]]
    for variant, seed in runs:  # once each variant, then each again
        recipes.parse_arguments(options_of(args, variant, seed))
    complete_runs(args)  # what train_cifar.py or an earlier run does not agree with is told before anything begins
    failed = False
    for i, (variant, seed) in enumerate(runs, start=1):
        if not os.path.exists(folder_of(args, variant, seed) / RESULT):
            print(f"run {i} of {len(runs)}: {variant}, seed {seed}", flush=True)
            code = train(args, variant, seed)
            if code > 1 or (code and not os.path.exists(folder_of(args, variant, seed) / SETTINGS)):  # it never began
                return code
            if code == 1:  # a loss that is not finite says something about the variant: the others go on
                note(f"{variant}, seed {seed}, did not end well, and is left out of the table")
                failed = True
        write_table(args)
    print((args.out / "table.md").read_text("utf-8"), end="")
    return int(failed)


def folder_of(args, variant, seed):
    return args.out / variant.replace(",", "").replace(" ", "-") / f"seed-{seed}"


def seeds_of(args, variant):
    """Return the seeds of the runs that are there, complete or not."""
    names = [folder.name.removeprefix("seed-") for folder in folder_of(args, variant, 0).parent.glob("seed-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def options_of(args, variant, seed):
    """Return the words for train_cifar.py: a variant is what it says, whatever all of them are given."""
    return [*args.shared, *STUDIES[args.study][variant], "--seed", str(seed)]


def complete_runs(args):
    """Return the folders of the runs that have come to their end, by variant.

    Raises      UsageError for a run of the study that was begun with other settings than are asked for now
    """
    complete = {}
    for variant in STUDIES[args.study]:
        for seed in seeds_of(args, variant):
            folder = folder_of(args, variant, seed)
            if os.path.exists(folder / SETTINGS):
                check_settings(folder, recipes.parse_arguments(options_of(args, variant, seed))[0])
                if os.path.exists(folder / RESULT):
                    complete.setdefault(variant, []).append(folder)
    return complete


def check_settings(folder, asked):
    config = recipes.checked(read_settings(folder), folder)
    different = [
        f"--{name.replace('_', '-')} is {config.get(name)} there and {value} now"
        for name, value in vars(asked).items()
        if name not in recipes.FREE_IN_A_RESUMED_RUN
        and value != config.get(name)
        and (name, value) != ("precision", None)
    ]
    if "sample" in (asked.data, config.get("data")) and asked.data != config.get("data"):  # any folder holds the same
        different.append(f"--data is {config.get('data')} there and {asked.data} now")
    if different:
        raise UsageError(f"{folder} was made with other settings: {'; '.join(different)}. Name another --out")


def train(args, variant, seed):
    """Make a run; one that was cut off is resumed. Return its exit code."""
    folder, options = folder_of(args, variant, seed), options_of(args, variant, seed)
    if not os.path.exists(folder / SETTINGS):
        return call([sys.executable, TRAIN, *options, "--out", folder])
    _, given = recipes.parse_arguments(options)
    free = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in given.items()
        if name in recipes.FREE_IN_A_RESUMED_RUN
    ]
    return call([sys.executable, TRAIN, "--resume", folder, *free])


def call(command):
    """Run a command to its end and return its exit code. A signal to end is passed on to it, and ends the study too.

    The command has a session of its own, so that a Ctrl-C in the terminal reaches it once, from here; a second one
    would have it end without a checkpoint.
    """
    arrived, waiting, process = [], [], None

    def pass_on(number, _):
        arrived.append(number)
        if process is None:
            waiting.append(number)
        elif os.name == "posix":  # elsewhere there are no such sessions, and a Ctrl-C reaches it by itself
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in ending_signals()}
    try:
        process = subprocess.Popen(command, start_new_session=True)
        for number in waiting:
            pass_on(number, None)
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if arrived:
        return 128 + arrived[0]
    return code if code >= 0 else 128 - code  # as shells count a process that a signal has ended


def result_of(folder):
    """Read what a run has written at its end.

    Raises      UsageError for a file that is damaged
    """
    path = folder / RESULT
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"got {str(content)[:40]}")
        return content
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({error}): remove {folder}, and the run is made anew") from error


def write_table(args):
    """Write the table, a row for each variant with a complete run, and draw the picture."""
    rows = []
    for variant, folders in complete_runs(args).items():
        results = [result_of(folder) for folder in folders]
        parameters = read_settings(folders[0]).get("parameters", 0)
        rows.append((variant, parameters, {name: [result.get(name) for result in results] for name in COLUMNS}))
    lines = [
        "| variant | parameters | runs | validation accuracy | validation loss | test accuracy | with mirror images "
        "| test loss | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, parameters, results in rows:
        cells = [
            spread(results["validation_accuracy"], 100, " %"),
            spread(results["validation_loss"], 1, "", digits=4),
            spread(results["test_accuracy"], 100, " %"),
            spread(results["test_accuracy_tta"], 100, " %"),
            spread(results["test_loss"], 1, "", digits=4),
            f"{np.mean(results['seconds']):.0f}",
        ]
        lines.append(f"| {name} | {parameters:,} | {len(results['seconds'])} | " + " | ".join(cells) + " |")
    write_atomically(args.out / "table.md", ("\n".join(lines) + "\n").encode())
    part = "test" if args.study == "recipes" else "validation"
    accuracies = {name: [100 * value for value in results[f"{part}_accuracy"]] for name, _, results in rows}
    draw("plot_runs", accuracies, f"{part} accuracy, %", args.out / "ablation.png")


def spread(values, scale, unit, digits=2):
    """Write the mean of some runs and, of more than one, their standard deviation; nothing if it was not measured."""
    if None in values:
        return ""
    values = scale * np.array(values)
    text = f"{values.mean():.{digits}f}"
    return (text if len(values) == 1 else f"{text} ± {values.std(ddof=1):.{digits}f}") + unit


if __name__ == "__main__":
    run_script(main)
