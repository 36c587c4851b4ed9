"""Where a trained network's knowledge ends: pictures that are not like those it has learned from.

    python examples/lessons/photographs.py              a cat and 500 test images, altered; pictures drawn here; what
                                                        the network's confidence is worth
    python examples/lessons/photographs.py --full       the last alone, measured on all 10,000 test images
    python examples/lessons/photographs.py FILE...      the last alone, with pictures of yours in place of drawn ones

The network is the one that comes with minires. Its confidence in an answer is the largest of its ten probabilities.

Source      Guo, Pleiss, Sun, Weinberger 2017, "On calibration of modern neural networks": calibration error, section 2;
            temperature, section 4.2
"""

import argparse
import pathlib
import sys

import numpy as np

from minires import cifar10
from minires.training import UsageError
from minires.training.arguments import at_least, read_data
from minires.training.script import run_script
from minires.training.weights import load_or_published, logits_of

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from predict import SIDE, TOP, PictureError, read_image

CAT = pathlib.Path(__file__).parent.parent / "cat.jpg"
SKY, SEA, GRASS, WHITE, GREY = (135, 190, 235), (40, 90, 140), (70, 130, 50), (255, 255, 255), (128, 128, 128)
DARK, RED = (20, 20, 20), (200, 40, 40)
PLACES = {"on the sea": (SKY, SEA), "in the sky": (SKY, SKY), "on a meadow": (GRASS, GRASS)}
THINGS = {  # from back to front, on 128x128 pixels: the corners of polygons, x and y in turn, and their colours
    "ship": [
        ((24, 84, 116, 84, 104, 104, 36, 104), DARK),
        ((48, 64, 92, 64, 92, 84, 48, 84), WHITE),
        ((64, 44, 76, 44, 76, 64, 64, 64), RED),
    ],
    "airplane": [
        ((8, 60, 24, 54, 100, 54, 122, 64, 100, 72, 24, 72), WHITE),
        ((8, 60, 8, 32, 20, 32, 32, 56), RED),
        ((48, 64, 76, 64, 52, 100, 40, 100), GREY),
    ],
    "truck": [
        ((10, 40, 82, 40, 82, 88, 10, 88), WHITE),
        ((86, 56, 104, 56, 116, 72, 116, 88, 86, 88), RED),
        *(((x - 9, 89, x - 5, 82, x + 5, 82, x + 9, 89, x + 5, 97, x - 5, 97), DARK) for x in (24, 44, 98)),
    ],
}
THRESHOLDS = 0.5, 0.6, 0.7, 0.8, 0.9
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
        cat, *own = (read_image(path) for path in (CAT, *args.files))
    except PictureError as error:
        raise UsageError(str(error)) from None
    images, labels = read_data(None if args.full else "sample")[2:]  # for testing
    model, weights = load_or_published()
    rng = np.random.default_rng(args.seed)

    strangers = {f"nothing {place}": draw([], *PLACES[place]) for place in PLACES}
    strangers |= {"a white page": draw([], WHITE, WHITE), "noise": rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)}
    strangers = dict(zip(args.files, own, strict=True)) or strangers  # what none of the classes is

    def classify(images):
        return logits_of(model, np.ascontiguousarray(images), weights)  # (N, 10)

    if not (args.full or args.files):
        for how, altered in views(np.concatenate([cat[np.newaxis], images]), rng):
            logits = classify(altered)
            answers = logits[1:].argmax(axis=1)
            most = np.bincount(answers).argmax()
            print(f"images {how}: {(answers == labels).mean():.1%} are right, ", end="")
            print(f"{(answers == most).sum()} of {len(answers)} are taken for {cifar10.CLASSES[most]}")
            tell([f"cat {how}"], logits[:1])
        print()
        drawn = {f"{name} {place}": draw(THINGS[name], *PLACES[place]) for name in THINGS for place in PLACES}
        tell(drawn, classify(list(drawn.values())))

    print()
    logits = classify(list(strangers.values()))
    tell(strangers, logits)
    print()
    tell_confidence(classify(images), labels, logits)
    return 0


def views(images, rng):
    """Yield (what is done to the images, what comes out), all (N, 32, 32, 3) uint8."""

    def smaller(factor):  # the mean of each square of pixels
        squares = images.reshape(len(images), SIDE // factor, factor, SIDE // factor, factor, 3)
        return squares.mean(axis=(2, 4)).round().astype(np.uint8)

    def on(ground, part, start):  # from the pixel (start, start) to the right and down
        out = np.full(images.shape, ground, np.uint8)
        out[:, start : start + part.shape[1], start : start + part.shape[2]] = part
        return out

    yield "as they are", images
    yield "mirrored", images[:, :, ::-1]
    yield "upside down", images[:, ::-1, ::-1]
    yield "without colour", images.mean(axis=3, keepdims=True).round().astype(np.uint8).repeat(3, axis=3)
    yield "moved by a quarter", on(GREY, images[:, :-8, :-8], 8)
    yield "half as large on grass", on(GRASS, smaller(2), 8)
    yield "half as large in the sky", on(SKY, smaller(2), 8)
    yield "a quarter as large in a corner", on(GREY, smaller(4), 0)
    yield "cut to the middle", images[:, 8:24, 8:24].repeat(2, axis=1).repeat(2, axis=2)
    yield "in squares of 4 pixels", smaller(4).repeat(4, axis=1).repeat(4, axis=2)
    yield "with noise", np.clip(images + rng.normal(0, 25, images.shape), 0, 255).astype(np.uint8)


def draw(polygons, above, below):
    """Return polygons on a ground of two colours: (32, 32, 3) uint8."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (128, 128), above)
    pen = ImageDraw.Draw(image)
    for corners, colour in [((0, 80, 128, 80, 128, 128, 0, 128), below), *polygons]:
        pen.polygon(corners, fill=colour)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def tell(names, logits):
    """Print the most probable classes of each picture, the first of them before the colon."""
    for name, row in zip(names, softmax(logits), strict=True):
        best = [(cifar10.CLASSES[k], f"{row[k]:.1%}") for k in row.argsort()[::-1][:TOP]]
        print(f"{name}, taken for {best[0][0]}: {best[0][1]}", *(f"{of} {p}" for of, p in best[1:]), sep=", ")


def softmax(logits, temperature=1.0):
    """Return probabilities. A temperature below 1 makes the largest larger, and leaves the order of the classes."""
    exp = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    return exp / exp.sum(axis=1, keepdims=True)


def tell_confidence(logits, labels, strangers):
    """Print how often answers of each confidence are right, and what a threshold lets pass, with and without a
    temperature. It is fitted to every second image, and its line measured on the others.

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
