"""Where a trained network's knowledge ends: pictures that are not like those it has learned from.

    python examples/lessons/photographs.py              500 test images, altered; colours and noise; what the network's
                                                        confidence is worth
    python examples/lessons/photographs.py --full       the last two alone, with all 10,000 test images
    python examples/lessons/photographs.py FILE...      the last two alone, with pictures of yours in place of colours

The network is the one that comes with minires. Its confidence in an answer is the largest of its ten probabilities.

Source      Guo, Pleiss, Sun, Weinberger 2017, "On calibration of modern neural networks": calibration error, section 2;
            temperature, section 4.2
"""

import argparse
import pathlib
import sys

import numpy as np

from minires import cifar10
from minires.augment import resize
from minires.training import UsageError
from minires.training.arguments import at_least, read_data
from minires.training.script import run_script
from minires.training.weights import load_or_published, logits_of

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from predict import SIDE, TOP, PictureError, read_image

SKY, GREY = (135, 190, 235), (128, 128, 128)
COLOURS = {"sky": SKY, "grass": (70, 130, 50), "grey": GREY}
SURE = 0.9
NOISE = 25  # standard deviation, of values from 0 to 255
THRESHOLDS = 0.5, 0.6, 0.7, 0.8, SURE
TEMPERATURES = np.arange(0.3, 2.0, 0.01)
BINS = 10  # of confidence


def main():
    parser = argparse.ArgumentParser(description="Show where a network's knowledge ends.", allow_abbrev=False)
    parser.add_argument("files", nargs="*", metavar="FILE", type=pathlib.Path, help="pictures of none of the classes")
    parser.add_argument("--full", action="store_true", help="all test images, downloaded where they are not there")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the noise")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    args = parser.parse_args()
    try:
        strangers = {path: read_image(path) for path in args.files}  # what none of the classes is
    except PictureError as error:
        raise UsageError(str(error)) from None
    images, labels = read_data(None if args.full else "sample")[2:]  # for testing
    model, weights = load_or_published()
    rng = np.random.default_rng(args.seed)
    if not strangers:
        strangers = {f"nothing but {name}": np.full((SIDE, SIDE, 3), c, np.uint8) for name, c in COLOURS.items()}
        strangers["nothing but noise"] = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)

    if not (args.full or args.files):
        for how, altered in views(images, rng):
            probabilities = softmax(logits_of(model, np.ascontiguousarray(altered), weights))
            answers = probabilities.argmax(axis=1)
            most = np.bincount(answers).argmax()
            print(f"images {how}: {(answers == labels).mean():.1%} are right, ", end="")
            print(f"{(answers == most).sum()} of {len(answers)} are taken for {cifar10.CLASSES[most]}, ", end="")
            print(f"confidence is at least {SURE:.0%} in {(probabilities.max(axis=1) >= SURE).mean():.1%}")
    logits = logits_of(model, np.stack(list(strangers.values())), weights)
    for name, row in zip(strangers, softmax(logits), strict=True):
        best = [(cifar10.CLASSES[k], f"{row[k]:.1%}") for k in row.argsort()[::-1][:TOP]]
        print(f"{name}, taken for {best[0][0]}: {best[0][1]}", *(f"{of} {p}" for of, p in best[1:]), sep=", ")
    tell_confidence(logits_of(model, images, weights), labels, logits)
    return 0


def views(images, rng):
    """Yield (what is done to the images, what comes out), all (N, 32, 32, 3) uint8."""

    def on(ground, part, start):  # from the pixel (start, start) to the right and down
        out = np.full(images.shape, ground, np.uint8)
        out[:, start : start + part.shape[1], start : start + part.shape[2]] = part
        return out

    half, quarter = resize(images, SIDE // 2), resize(images, SIDE // 4)
    yield "as they are", images
    yield "upside down", images[:, ::-1, ::-1]
    yield "half as large on grey", on(GREY, half, SIDE // 4)
    yield "half as large in the sky", on(SKY, half, SIDE // 4)
    yield "a quarter as large in a corner of the sky", on(SKY, quarter, 0)
    yield "of 16x16 pixels, scaled smoothly", resize(half, SIDE)
    yield "of 16x16 pixels, each a square of four", half.repeat(2, axis=1).repeat(2, axis=2)
    yield "with noise", np.clip(images + rng.normal(0, NOISE, images.shape), 0, 255).astype(np.uint8)


def softmax(logits, temperature=1.0):
    """Return probabilities. A temperature below 1 makes the largest larger, and leaves the order of the classes."""
    exp = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    return exp / exp.sum(axis=1, keepdims=True)


def tell_confidence(logits, labels, strangers):
    """Print how often answers of each confidence are right, and what a threshold lets pass, with and without a
    temperature. It is fitted to every second image, and its lines are measured on the others.

    Shapes      logits (N, 10) and labels (N,) of test images, strangers (M, 10): logits of pictures of no class
    """

    def loss(temperature):
        return -np.log(softmax(logits[::2], temperature)[np.arange(len(labels[::2])), labels[::2]]).mean()

    fitted = min(TEMPERATURES, key=loss)
    print(f"temperature: {fitted:.2f}")
    for name, temperature, part in (("as trained", 1.0, slice(None)), ("calibrated", fitted, slice(1, None, 2))):
        probabilities = softmax(logits[part], temperature)
        confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels[part]
        bins, error = np.minimum((confidence * BINS).astype(int), BINS - 1), 0.0
        for k in np.unique(bins):
            inside = bins == k
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
            print(f"{name}, confidence {k / BINS:.0%} to {(k + 1) / BINS:.0%}: {right[inside].mean():.1%} ", end="")
            print(f"of {inside.sum():,} are right, mean confidence {confidence[inside].mean():.1%}")
        print(f"{name}, mean confidence: {confidence.mean():.1%}, and {right.mean():.1%} are right")
        print(f"{name}, calibration error: {error:.1%}")
        for threshold in THRESHOLDS:
            passing = confidence >= threshold
            good = f"{right[passing].mean():.1%}" if passing.any() else "none"
            others = (softmax(strangers, temperature).max(axis=1) >= threshold).sum()
            print(f"{name}, at least {threshold:.0%}: {passing.mean():.1%} of the test images pass, ", end="")
            print(f"{good} of them right; {others} of {len(strangers)} strangers pass")


if __name__ == "__main__":
    run_script(main)
