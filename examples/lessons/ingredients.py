"""What is each ingredient of a recipe worth? A small network is trained with all of them, and without each.

    python examples/lessons/ingredients.py                            the kept runs; two short trainings, to compare
    python examples/lessons/ingredients.py --full --kept mine.csv     makes such runs: eight variants, three seeds each

The recipe is `fast` of recipes.py for a network with an eighth of the channels and for the 1,000 training images of the
sample: 40 epochs take a minute. So it shows how to ask the question, and what is large and what is small here; for
40,000 images, 30 epochs and the whole network, examples/ablation.py asks it again.
"""

import argparse
import csv
import functools
import math
import pathlib
import sys

import numpy as np

import minires
from minires import cifar10
from minires.augment import normalize
from minires.evaluation import averaged_weights, predict_logits
from minires.training.arguments import at_least, folder
from minires.training.script import run_script

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # for train_cifar.py and recipes.py
import train_cifar
from recipes import SCHEDULES, parse_arguments

KEPT = pathlib.Path(__file__).with_name("ingredients.csv")
SMALL = ["--channels", "8", "16", "32", "64", "--blocks", "1", "1", "1", "1"]
RECIPE = ["--recipe", "fast", *SMALL, "--batch-size", "50", "--lr", "0.1", "--ema", "0.98"]
EPOCHS, EVERY, SHORT = 40, 5, 6  # of a kept run; from one look at the test images to the next; of a short training
VARIANTS = {
    "the recipe": [],
    "no augmentation": ["--no-augment"],
    "constant rate": ["--schedule", "constant"],
    "Adam at 0.003": ["--optimizer", "adam", "--lr", "0.003", "--weight-decay", "0"],
    "no weight decay": ["--weight-decay", "0"],
    "no label smoothing": ["--label-smoothing", "0"],
    "no average": ["--ema", "0"],
    "constant rate, no average": ["--schedule", "constant", "--ema", "0"],
}
CURVES = ("the recipe", "no augmentation", "constant rate")  # of the others only the end is kept


def train(args, data, model=None, every=1):
    """Train as train_cifar.py does, and yield (epoch, training loss, training accuracy, logits of the test images).

    Args        model: by default what args ask for; every: epochs from one look at the test images to the next
    """
    model = model or train_cifar.make_model(args)
    loss_function = minires.SoftmaxCrossEntropy(args.label_smoothing)
    optimizer = train_cifar.make_optimizer(args, model)
    average = minires.WeightAverage(optimizer, args.ema) if args.ema else None
    count = len(data.train_images)
    steps = math.ceil(count / args.batch_size)
    for epoch in range(1, args.epochs + 1):
        order = np.random.default_rng([args.seed, epoch]).permutation(count)
        transform = functools.partial(train_cifar.transform, args, epoch, "float32")
        batches = minires.Batches(data.train_images, data.train_labels, order, args.batch_size, transform)
        loss = right = 0
        for step, (images, labels) in enumerate(batches, steps * (epoch - 1)):
            optimizer.lr = SCHEDULES[args.schedule](step, steps * args.epochs, args.lr)
            optimizer.zero_grad()
            logits = model(images)
            loss += float(loss_function(logits, labels)) * len(labels)
            right += int((logits.argmax(axis=1) == labels).sum())
            model.backward(loss_function.backward())
            optimizer.step()
            if average:
                average.update()
        if epoch % every == 0 or epoch == args.epochs:
            first = normalize(data.train_images[order[:500]], cifar10.MEAN, cifar10.STD)
            with averaged_weights(average, model, [first]):
                logits = predict_logits(model, data.test_images, cifar10.MEAN, cifar10.STD)
            yield epoch, loss / count, right / count, logits


def settings(variant, epochs, seed):
    return parse_arguments([*RECIPE, *VARIANTS[variant], "--epochs", str(epochs), "--seed", str(seed)])[0]


def make_runs(path, seeds):
    """Append the curves of the runs that are not in the file yet. All of CIFAR-10's test images are looked at."""
    data = cifar10.load_sample()
    whole = cifar10.load(or_download=True)
    data = data._replace(test_images=whole.test_images, test_labels=whole.test_labels)
    have = {(row["variant"], int(row["seed"])) for row in read(path)} if path.exists() else ()
    for seed, variant in ((seed, variant) for seed in range(seeds) for variant in VARIANTS):
        if (variant, seed) in have:
            continue
        rows, args = [], settings(variant, EPOCHS, seed)
        for epoch, _, train_accuracy, logits in train(args, data, every=EVERY if variant in CURVES else EPOCHS):
            test_accuracy = (logits.argmax(axis=1) == data.test_labels).mean()
            rows.append([variant, seed, epoch, f"{train_accuracy:.4f}", f"{test_accuracy:.4f}"])
        print(*rows[-1], flush=True)
        names = ["variant", "seed", "epoch", "train", "test"]
        with open(path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows if file.tell() else [names, *rows])


def read(path=KEPT):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def at_the_end(rows, column="test"):
    """Return {variant: {seed: accuracy after the last epoch, in percent}}, from the rows of a file."""
    found = {variant: {} for variant in VARIANTS}
    for row in rows:
        if int(row["epoch"]) == EPOCHS:
            found[row["variant"]][row["seed"]] = 100 * float(row[column])
    return found


def differences(found, variant):
    """Return how much better the recipe is than a variant of it, in points, for each seed that both have."""
    recipe = found["the recipe"]
    return np.array([recipe[seed] - accuracy for seed, accuracy in found[variant].items() if seed in recipe])


def print_table(rows):
    test, training = at_the_end(rows), at_the_end(rows, "train")
    for variant in VARIANTS:
        found = np.array(list(test[variant].values()))
        seen = np.mean(list(training[variant].values()))
        deviation = f"deviation {found.std(ddof=1):.1f}" if len(found) > 1 else "one run"
        tested = f"{found.mean():.1f} % on the test images ({deviation})"
        print(f"{variant}: {tested}, {seen:.1f} % in training")
    for variant in VARIANTS:
        if variant != "the recipe":
            points = differences(test, variant)
            print(f"better than {variant} by: {points.mean():+.1f} points ({', '.join(f'{p:+.1f}' for p in points)})")


def main():
    parser = argparse.ArgumentParser(description="What each ingredient of a recipe is worth.", allow_abbrev=False)
    parser.add_argument("--full", action="store_true", help="make the runs that are not in the file yet")
    parser.add_argument("--seeds", type=at_least(1), default=3, metavar="N", help="with --full: of each variant; 3")
    parser.add_argument("--kept", type=folder, default=KEPT, metavar="FILE", help=f"the runs; default {KEPT.name}")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of the short trainings; default 0")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    args = parser.parse_args()
    if args.full:
        make_runs(args.kept, args.seeds)
    print_table(read(args.kept))
    if args.full:
        return 0
    data = cifar10.load_sample()
    for variant in ("the recipe", "no augmentation"):
        *_, (_, _, right, logits) = train(settings(variant, SHORT, args.seed), data, every=SHORT)
        test = (logits.argmax(axis=1) == data.test_labels).mean()
        print(f"{SHORT} epochs, {variant}, in training: {right:.1%}")
        print(f"{SHORT} epochs, {variant}, {len(data.test_labels)} test images: {test:.1%}", flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
