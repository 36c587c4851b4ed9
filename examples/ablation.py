"""What is each ingredient worth? Train the network with and without it, several times, and put the results in a table.

    python examples/ablation.py --seeds 1 --data sample --epochs 2 --batch-size 50        a smoke test
    python examples/ablation.py --study report                                            the whole study, for a GPU
    python examples/ablation.py --study fast --variants fast "no cutout" --seeds 5        a part of another
    python examples/ablation.py --study recipes                                           what each recipe reaches

All other options go to train_cifar.py as they are. Each run has a folder of its own, OUT/VARIANT/seed-N. A run that is
there is not made again: the study can be stopped at any time (after Ctrl-C and SIGTERM the run at hand writes a
checkpoint) and goes on with the same command, and with more seeds or variants it takes over what it has. OUT/table.md
and, with matplotlib, OUT/ablation.png are made anew after each run.

Compare variants by their validation accuracy; the test accuracy is what to report for the one that was chosen. The
recipes themselves have nothing left to choose: two of them train on all images, and the test accuracy is their result.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
from recipes import RECIPES, at_least
from run_folder import UsageError, ending_signals, run, write_json

from minires import plots
from minires.checkpoint import write_atomically

TRAIN = pathlib.Path(__file__).parent / "train_cifar.py"
FAST = ["--recipe", "fast", "--no-full-train"]  # a fifth of the training images is kept for validation
SGD = ["--optimizer", "sgd", "--lr", "0.1", "--weight-decay", "5e-4"]  # Zagoruyko and Komodakis 2016
STUDIES = {
    "report": {  # the story of the report's method section, one step away from its network and its recipe
        "report": [],
        "blocks 1 1 1 1": ["--blocks", "1", "1", "1", "1"],
        "plain, without sums": ["--no-shortcut"],
        "no BatchNorm": ["--no-batch-norm"],
        "no dropout": ["--dropout", "0"],
        "no augmentation": ["--no-augment"],
        "crop only": ["--flip", "none"],
        "flip only": ["--crop", "0"],
        "cosine schedule": ["--schedule", "cosine"],
        "SGD": SGD,
        "SGD, cosine": [*SGD, "--schedule", "cosine"],
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
    "recipes": {name: ["--recipe", name] for name in RECIPES},
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
    add("--out", type=pathlib.Path, metavar="DIR", help="the folder of the study, default runs/ablation-STUDY")
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
    variants = {name: STUDIES[args.study][name] for name in args.variants or STUDIES[args.study]}
    runs = [(name, seed) for seed in range(args.seeds) for name in variants]  # once all of them, then all again
    for i, (name, seed) in enumerate(runs, start=1):
        folder = folder_of(args.out, name) / f"seed-{seed}"
        options = [*variants[name], *args.shared, "--seed", str(seed)]
        if not is_made(folder, options):
            print(f"run {i} of {len(runs)}: {name}, seed {seed}", flush=True)
            code = train(folder, options)
            if code == 1:  # a loss that is not finite says something about the variant: the others go on
                print(f"{name}, seed {seed}, did not end well, and is left out of the table", file=sys.stderr)
            elif code:
                return code
        write_table(args, variants)
    print((args.out / "table.md").read_text("utf-8"), end="")
    return 0


def folder_of(out, variant):
    return out / variant.replace(",", "").replace(" ", "-")


def is_made(folder, options):
    """Tell whether a run is complete.

    Raises      UsageError for a run with other options than are asked for now, or of another making
    """
    if not folder.exists():
        return False
    settings = folder.parent / f"{folder.name}.json"
    if not settings.exists():
        raise UsageError(
            f"{folder} is no run of this study, for {settings} is missing: move it away, or name another --out"
        )
    made_with = read_json(settings, list)
    if without_free(made_with)[0] != without_free(options)[0]:
        raise UsageError(
            f"{folder} was made with the options {' '.join(map(str, made_with))}, and asked for are "
            f"{' '.join(options)}: name another --out"
        )
    return (folder / "result.json").exists()


def without_free(options):
    """Divide options into those that a result depends on, and those that may be others when a run goes on.

    All folders with the whole of CIFAR-10 hold the same images; the sample holds others.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    for flag in ("--device", "--data", "--checkpoint-every"):
        parser.add_argument(flag, nargs="?")  # one without its value is for train_cifar.py to refuse
    parser.add_argument("--debug", action="store_true")
    free, binding = parser.parse_known_args([str(option) for option in options])
    free = vars(free)
    if free.get("data") == "sample":
        binding += ["--data", free.pop("data")]
    return binding, [
        part
        for name, value in free.items()
        for part in (f"--{name.replace('_', '-')}", value)
        if part not in (True, None)
    ]


def train(folder, options):
    """Run train_cifar.py in a folder to be; its options are kept beside it, for `is_made`. What was cut off goes on."""
    if (folder / "config.json").exists():
        return call([sys.executable, TRAIN, "--resume", folder, *without_free(options)[1]])
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_json(folder.parent / f"{folder.name}.json", options)
    return call([sys.executable, TRAIN, *options, "--out", folder])


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


def read_json(path, kind):
    """Read what a run has written.

    Raises      UsageError for a file that is damaged
    """
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, kind):
            raise ValueError(f"got {str(content)[:40]}")
        return content
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is damaged ({error}): remove {path.with_suffix('')} and it, and the run is made anew"
            if kind is list
            else f"{path} is damaged ({error}): remove {path.parent}, and the run is made anew"
        ) from error


def write_table(args, variants):
    """Write the table, a row for each variant with a run, and draw the picture."""
    rows = []
    for name in variants:
        files = [folder_of(args.out, name) / f"seed-{seed}" / "result.json" for seed in range(args.seeds)]
        files = [file for file in files if file.exists()]
        if files:
            results = [read_json(file, dict) for file in files]
            parameters = read_json(files[0].parent / "config.json", dict).get("parameters", 0)
            rows.append((name, parameters, {column: [result.get(column) for result in results] for column in COLUMNS}))
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
    try:
        accuracies = {name: [100 * value for value in results[f"{part}_accuracy"]] for name, _, results in rows}
        plots.plot_runs(accuracies, f"{part} accuracy, %", args.out / "ablation.png")
    except ImportError as error:
        if getattr(error, "name", None) != "matplotlib":
            print(f"no picture {args.out / 'ablation.png'}: {error}", file=sys.stderr)


def spread(values, scale, unit, digits=2):
    """Write the mean of some runs and, of more than one, their standard deviation; nothing if it was not measured."""
    if None in values:
        return ""
    values = scale * np.array(values)
    text = f"{values.mean():.{digits}f}"
    return (text if len(values) == 1 else f"{text} ± {values.std(ddof=1):.{digits}f}") + unit


if __name__ == "__main__":
    run(main)
