"""Write a page about a run, to look at: report.html in its folder, one file that needs no network and runs no script.

    python examples/report.py runs/my-run
    python examples/report.py runs/my-run --data DIR --out page.html

train_cifar.py writes it at the end of each run; this makes it anew, and also for a run that was stopped. The test
images are looked at once, when a run has ended, and so a page made before says nothing of them.
"""

import argparse
import csv
import datetime
import json
import math
import pathlib
import sys
from html import escape

import numpy as np

from minires import cifar10
from minires.backend import choose_device
from minires.evaluation import confusion_matrix
from minires.summary import layer_rows
from minires.training import UsageError, load_model
from minires.training.arguments import data_folder, read_data
from minires.training.folder import LOG, RESULT, read_settings
from minires.training.run import best_of
from minires.training.script import run_script
from minires.training.storage import write_atomically
from minires.training.weights import WEIGHTS, logits_of

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for page.py, also under python -m and PYTHONSAFEPATH
from page import chart, definitions, document, picture, show, table

REPORT = "report.html"
MISTAKES, TOP = 30, 3
LOG_FORMATS = {  # of each column
    "epoch": ".0f",
    "lr": ".2e",
    "train_loss": ".4f",
    "train_accuracy": ".2%",
    "validation_loss": ".4f",
    "validation_accuracy": ".2%",
    "seconds": ".1f",
}


def main():
    parser = argparse.ArgumentParser(description="Write a page about a run, to look at.", allow_abbrev=False)
    parser.add_argument("run", type=pathlib.Path, help="the folder of a run")
    parser.add_argument(
        "--data", type=data_folder, metavar="sample|DIR", help="default: the folder that the run has trained on"
    )
    parser.add_argument("--out", type=pathlib.Path, help=f"default: {REPORT} in the folder of the run")
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    args = parser.parse_args()

    settings, path, test = read_settings(args.run), args.run / WEIGHTS, ()
    if (args.run / RESULT).exists() and path.exists():
        model = load_model(path)[0].to(choose_device(args.device))
        try:
            data = read_data(args.data or settings.get("data"))
        except cifar10.DataError as error:
            raise cifar10.DataError(f"{error}; or name the data of the run by --data") from error
        sha256 = data.sha256()
        if settings.get("data_sha256", sha256) != sha256:
            raise UsageError(f"the images are not those that the run in {args.run} began with: name its data by --data")
        limit = settings["limit_batches"] * settings["batch_size"] if settings.get("limit_batches") else None
        images, labels = data.test_images[:limit], data.test_labels[:limit]
        test = images, labels, logits_of(model, images, path)
    out = args.out or args.run / REPORT
    try:
        write_report(args.run, *test, out=out)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}; name another place by --out") from error
    print(out)
    return 0


def write_report(folder, images=None, labels=None, logits=None, out=None, classes=cifar10.CLASSES):
    """Write the page about the run in a folder.

    Shapes      images (N, 32, 32, 3) uint8, labels (N,), logits (N, K): the test, and what the kept weights say of it;
                None for a run that has not ended
    Args        out: where the page goes; by default into the folder
    Raises      UsageError or CheckpointError for a file of the run that is damaged; OSError
    """
    settings = read_settings(folder)
    history, result = read(folder / LOG, parse_log, []), read(folder / RESULT, parse_result, {})
    model = load_model(folder / WEIGHTS)[0] if (folder / WEIGHTS).exists() else None
    best = best_of(history) if history else {}

    sections, notes = {}, []
    if history:
        sections["Curves"] = curves(history, best)
    if logits is not None:
        matrix = confusion_matrix(labels, logits.argmax(axis=1), len(classes))
        sections["Accuracy by class"] = accuracies(matrix, classes)
        sections["Confusion matrix"] = confusion(matrix, classes)
        sections["Mistakes"] = mistakes(images, labels, logits, classes)
    if model:
        sections["First-layer filters"] = filters(model.conv1.weight.data)
        sections["Layers"] = layers(model)
    else:
        notes.append(f"There is no {WEIGHTS} in the folder, so nothing is said of the network and its answers.")
    if result:
        sections["Result"] = definitions(result)
    else:
        notes.append("The run has not ended. The test images are looked at once, at its end, so none is here.")
    sections["Settings"] = definitions(settings)

    name = escape(folder.resolve().name)
    origin = " · ".join(f"{key} {settings[key]}" for key in ("recipe", "device", "started") if key in settings)
    header = f"<p>A run of minires</p>\n<h1>{name}</h1>\n<p>{escape(origin)}</p>\n"
    header += figures(settings, history, result, best) + "".join(f'\n<p class="note">{note}</p>' for note in notes)
    page = document(f"{name}, a run of minires", header, sections)
    write_atomically(out or folder / REPORT, page.encode("utf-8", "backslashreplace"))


def read(path, parse, absent):
    """Return what a file of the run says, or what stands for a file that is not there.

    Raises      UsageError for one that is damaged
    """
    try:
        return parse(path.read_text("utf-8"))
    except FileNotFoundError:
        return absent
    except (OSError, ValueError, TypeError, csv.Error, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({error}): bring back what the run has written, or remove it") from error


def parse_log(text):
    """Return the rows of log.csv as a Run keeps them: numbers, and None where there was no validation."""
    table = csv.DictReader(text.splitlines())
    if missing := [name for name in LOG_FORMATS if name not in (table.fieldnames or ())]:
        raise ValueError(f"no column {missing[0]}")
    return [{name: float(value) if value else None for name, value in row.items()} for row in table]


def parse_result(text):
    result = json.loads(text)
    if not isinstance(result, dict):
        raise ValueError(f"expected an object, got {text[:40]}")
    for name, highest in (("test_accuracy", 1), ("test_images", 1e12), ("seconds", 1e12)):  # that are computed with
        value = 0 if result.get(name) is None else result[name]
        if not isinstance(value, int | float) or not 0 <= value <= highest:
            raise ValueError(f"{name} is {value!r}, expected a number from 0 to {highest:g}")
    return result


def figures(settings, history, result, best):
    """The few numbers that one looks for first."""
    accuracy, count, seconds = (result.get(name) for name in ("test_accuracy", "test_images", "seconds"))
    interval = ""
    if accuracy is not None and count:
        interval = "{:,} images; 95% interval {:.1%} to {:.1%}".format(count, *wilson(accuracy, count))
    shown = [
        ("test accuracy", accuracy, ".2%", interval),
        ("with mirror images", result.get("test_accuracy_tta"), ".2%", "mean of the logits of both"),
        ("test loss", result.get("test_loss"), ".4f", ""),
        ("validation accuracy", best.get("validation_accuracy"), ".2%", "of the weights that are kept"),
        ("epochs", len(history), "", f"of {show(settings['epochs'])}" if "epochs" in settings else ""),
        ("time", seconds and str(datetime.timedelta(seconds=round(seconds))), "", "h:mm:ss"),
        ("parameters", settings.get("parameters"), ",", ""),
    ]
    items = "".join(
        f"<div><dt>{label}</dt><dd><b>{show(value, form)}</b><span>{note}</span></dd></div>\n"
        for label, value, form, note in shown
        if value is not None
    )
    return f'<dl class="figures">\n{items}</dl>'


def wilson(share, count, z=1.96):
    """Return the bounds between which the true share lies in 95 of 100 cases where `share` of `count` was seen."""
    centre, spread = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (centre - spread) / (1 + z**2 / count), (centre + spread) / (1 + z**2 / count)


def curves(history, best):
    kept, charts = history.index(best) + 1, ""
    for title, names, scale in (
        ("loss", {"train_loss": "training", "validation_loss": "validation"}, 1),
        ("accuracy, %", {"train_accuracy": "training", "validation_accuracy": "validation"}, 100),
        ("learning rate", {"lr": ""}, 1),
    ):
        lines = {}
        for name, label in names.items():
            lines[label] = [math.nan if row[name] is None else scale * row[name] for row in history]
        charts += chart(title, lines, kept)
    rows = [[show(row[name], form) for name, form in LOG_FORMATS.items()] for row in history]
    return (
        f"<p>Over the epochs. The dashed line is at the one whose weights are kept, {kept}. Training is the mean over "
        "an epoch, of images as they are changed for training and with dropout; validation is after it, without both, "
        'and so can be better.</p>\n<div class="charts">\n'
        f"{charts}</div>\n<details><summary>The log, row by row</summary>\n"
        f"{table('log', [name.replace('_', ' ') for name in LOG_FORMATS], rows)}</details>"
    )


def accuracies(matrix, classes):
    """What became of the images of each class, and how far the network can be believed where it says so."""
    rows = []
    for k, name in enumerate(classes):
        wrong = np.where(np.arange(len(classes)) == k, 0, matrix[k])
        often = f"{escape(classes[wrong.argmax()])} ({wrong.max():,})" if wrong.any() else "&ndash;"
        of, called, right = matrix[k].sum(), matrix[:, k].sum(), matrix[k, k]
        rows.append([escape(name), bar(right, of), f"{right:,}", f"{of:,}", bar(right, called), often])
    return (
        "<p>Accuracy: how many of a class are recognised. Precision: of those taken for it, how many are of it.</p>\n"
        + table("classes", ["class", "accuracy", "right", "images", "precision", "most often taken for"], rows)
    )


def bar(part, whole):
    return f'<span class="bar" style="--s:{part / whole:.4f}">{part / whole:.1%}</span>' if whole else "&ndash;"


def confusion(matrix, classes):
    worst = max((matrix - np.diag(matrix.diagonal())).max(), 1)
    rows = []
    for k, name in enumerate(classes):
        rows.append([escape(name)])
        for j, count in enumerate(matrix[k]):
            kind, share = ("right", count / max(matrix[k].sum(), 1)) if j == k else ("wrong", count / worst)
            about = f"{escape(name)}, taken for {escape(classes[j])}"
            rows[-1].append(
                f'<span class="{kind if count else ""}" style="--s:{share:.3f}" title="{about}">{count}</span>'
            )
    return (
        f"<p>{matrix.trace():,} of {matrix.sum():,} test images are right, {matrix.trace() / matrix.sum():.2%}. A row "
        "for what an image is, a column for what it was taken for.</p>\n"
        + table("confusion", ["class", *map(escape, classes)], rows)
    )


def mistakes(images, labels, logits, classes):
    """The images about which the network was most certain, and wrong."""
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exp / exp.sum(axis=1, keepdims=True)  # (N, K)
    wrong = np.flatnonzero(logits.argmax(axis=1) != labels)
    if not len(wrong):
        return f"<p>There is none: all {len(labels):,} test images are right.</p>"
    shown = wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")][:MISTAKES]
    cards = ""
    for n in shown:
        best = np.argsort(-probabilities[n], kind="stable")[:TOP]
        label, answers = escape(classes[labels[n]]), ""
        for k in best:
            kind = ' class="label"' if k == labels[n] else ""
            answers += f"<li{kind}>{escape(classes[k])} <span>{probabilities[n, k]:.1%}</span></li>"
        alt = f"test image {n}: {label}, taken for {escape(classes[best[0]])}"
        cards += f"<figure>{picture(images[n], alt)}<figcaption><b>{label}</b> <small>{n}</small>"
        cards += f"<ol>{answers}</ol></figcaption></figure>\n"
    return (
        f"<p>Of {len(wrong):,} images that were taken for something else, the {len(shown)} with the most confidence. "
        f"Each with what it is, its place among the test images, and the {TOP} most probable classes, the right one, "
        "if among them, in bold.</p>\n"
        f'<div class="mistakes">\n{cards}</div>'
    )


def filters(weight):
    """The filters of the first layer as images, the strongest first.

    Shapes      weight (kh, kw, 3, O)
    """
    weight = weight.transpose(3, 0, 1, 2)  # (O, kh, kw, 3)
    order = np.argsort(-(weight**2).sum(axis=(1, 2, 3)), kind="stable")
    images = np.round(127.5 + 127.5 * weight[order] / (np.abs(weight).max() or 1)).astype(np.uint8)
    return (
        f"<p>The weights that meet the image itself: {len(images)} filters of 3x3 pixels in red, green and blue, the "
        'strongest first. Grey is 0, and all have one scale.</p>\n<div class="filters" role="img" '
        f'aria-label="{len(images)} filters">{"".join(picture(image, "") for image in images)}</div>'
    )


def layers(model):
    rows = [[name, " &times; ".join(map(str, shape)), f"{own:,}"] for name, shape, own in layer_rows(model)]
    rows.append(["all", "", f"{model.num_parameters():,}"])
    return (
        "<p>An image is 3 &times; 32 &times; 32: channels, height and width. A BasicBlock follows its layers, and has "
        "no parameters but theirs.</p>\n" + table("layers", ["layer", "output", "parameters"], rows)
    )


if __name__ == "__main__":
    run_script(main)
