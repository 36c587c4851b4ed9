"""What a report's numbers can carry: 14 of 16 images, dropout on the logits, images that are not normalised.

    python examples/lessons/audit.py                            the kept runs, and what needs no long training
    python examples/lessons/audit.py --full --kept mine.csv     makes such runs: 5,000 images, 10 or 20 epochs, 3 seeds

The report is "Residual Network Design" by Shamooun, Deshmukh and Alamuru, from which minires's network comes.
9_report.md says what its text describes and what its script does instead.

Source      Clopper and Pearson 1934, "The use of confidence or fiducial limits illustrated in the case of the
            binomial"; Wilson 1927, "Probable inference, the law of succession, and statistical inference"
"""

import argparse
import csv
import math
import pathlib

import numpy as np
from ingredients import SMALL, read, train
from recipes import parse_arguments

import minires
from minires import cifar10
from minires.augment import normalize
from minires.kernels.reference import dropout_mask
from minires.training.arguments import at_least, folder
from minires.training.script import run_script

KEPT = pathlib.Path(__file__).with_name("audit.csv")
REPORT = ["--recipe", "report", *SMALL]
COMPARED = (6, 8, 10)  # epochs whose mean accuracy is compared: with a constant rate, single ones jump up and down
Z = 1.959964  # 95 % of a normal distribution lie within so many deviations
VARIANTS = {  # epochs, from one look at the test images to the next, options
    "as described": (20, 1, []),
    "dropout on the logits": (10, 2, ["--dropout", "0"]),
    "images not normalised": (10, 2, []),
}


class NotNormalised(minires.Module):
    """Takes the normalisation of images back: values from 0 to 1, as they are without it."""

    def forward(self, x):
        return x * np.array(cifar10.STD, x.dtype) + np.array(cifar10.MEAN, x.dtype)

    def backward(self, dout):
        return dout * np.array(cifar10.STD, dout.dtype)


def make_model(variant, args):
    model = minires.ResNet(args.blocks, args.channels, dropout=args.dropout, seed=args.seed)
    if variant == "dropout on the logits":
        return minires.Sequential(model, minires.Dropout(0.5, rng=args.seed))
    return minires.Sequential(NotNormalised(), model) if variant == "images not normalised" else model


def make_runs(path, seeds):
    """Append the runs that are not in the file yet."""
    data = cifar10.load(or_download=True)
    data = data._replace(train_images=data.train_images[:5000], train_labels=data.train_labels[:5000])
    have = {(row["variant"], int(row["seed"])) for row in read(path)} if path.exists() else ()
    for seed, (variant, (epochs, every, options)) in ((s, v) for s in range(seeds) for v in VARIANTS.items()):
        if (variant, seed) in have:
            continue
        args, _ = parse_arguments([*REPORT, "--epochs", str(epochs), *options, "--seed", str(seed)])
        model, rows = make_model(variant, args), []
        for epoch, loss, _, logits in train(args, data, model, every):
            right = logits.argmax(axis=1) == data.test_labels
            rows.append([variant, seed, epoch, f"{loss:.4f}", f"{right.mean():.4f}", right[-16:].sum(), ""])
        rows[-1][-1] = f"{accuracy_in_training_mode(model, data.test_images, data.test_labels):.4f}"
        print(*rows[-1], flush=True)
        names = ["variant", "seed", "epoch", "loss", "all", "last_16", "training_mode"]
        with open(path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows if file.tell() else [names, *rows])


def accuracy_in_training_mode(model, images, labels, batch_size=128):
    """The accuracy of a network that is not told that training is over: it drops, and normalises by the test batch."""
    images = normalize(images, cifar10.MEAN, cifar10.STD)
    model.train()
    right = 0
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        right += int((model(images[part]).argmax(axis=1) == labels[part]).sum())
    return right / len(images)


def exact_interval(right, count):
    """The accuracies for which `right` of `count` is no surprise (Clopper and Pearson).

    With the lowest, so many or more are right in 2.5 % of all cases; with the highest, so many or fewer.
    """

    def at_least(k, p):
        return sum(math.comb(count, i) * p**i * (1 - p) ** (count - i) for i in range(k, count + 1))

    def solve(k, chance):  # at_least grows with p: halve the interval in which it passes `chance`
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if at_least(k, middle) < chance else (low, middle)
        return low

    return solve(right, 0.025), solve(right + 1, 0.975)


def wilson_interval(right, count):
    """The accuracies p from which right / count is less than Z deviations sqrt(p (1 - p) / count) away."""
    share, w = right / count, Z**2 / count
    middle = (share + w / 2) / (1 + w)
    half = Z * math.sqrt(share * (1 - share) / count + w / (4 * count)) / (1 + w)
    return middle - half, middle + half


def loss_with_dropout(model, data, masks=20):
    """The loss of a trained network on the test images: as it is, with dropout on the features, and on the logits; and
    the logits.
    """
    features = normalize(data.test_images, cifar10.MEAN, cifar10.STD)
    *layers, _, linear = model.eval().layers()  # the last two are dropout and linear
    for layer in layers:
        features = layer(features)
    loss, logits = minires.SoftmaxCrossEntropy(), linear(features)
    on_features = [loss(linear(features * dropout_mask(features, 0.5, 0, i)), data.test_labels) for i in range(masks)]
    on_logits = [loss(logits * dropout_mask(logits, 0.5, 0, i), data.test_labels) for i in range(masks)]
    return loss(logits, data.test_labels), np.mean(on_features), np.mean(on_logits), logits


def memorised(variant, data, seed, steps=120):
    """Train on 32 images; return the mean loss of the last 40 steps."""
    args, _ = parse_arguments([*REPORT, *VARIANTS[variant][2], "--seed", str(seed)])
    model, loss, losses = make_model(variant, args), minires.SoftmaxCrossEntropy(), []
    optimizer = minires.Adam(model.parameters(), 3e-3)
    images, labels = normalize(data.train_images[:32], cifar10.MEAN, cifar10.STD), data.train_labels[:32]
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(loss(model(images), labels))
        model.backward(loss.backward())
        optimizer.step()
    return np.mean(losses[-40:])


def print_table(rows):
    described = [row for row in rows if row["variant"] == "as described"]
    print("as described: percent right of all 10,000 test images | of the last 16, after each of 20 epochs")
    apart = []
    for seed in sorted({row["seed"] for row in described}):
        both = [(100 * float(row["all"]), 100 * int(row["last_16"]) / 16) for row in described if row["seed"] == seed]
        apart += [last - whole for whole, last in both]
        print(f"    seed {seed}:", " ".join(f"{whole:.0f}|{last:.0f}" for whole, last in both))
    print(f"the last 16 less all, mean: {np.mean(apart):+.1f} points")
    print(f"the last 16 less all, deviation: {np.std(apart):.1f} points")
    for variant in VARIANTS:
        of_variant = [row for row in rows if row["variant"] == variant]
        by_seed = {row["seed"]: [] for row in of_variant}
        for row in of_variant:
            if int(row["epoch"]) in COMPARED:
                by_seed[row["seed"]].append(100 * float(row["all"]))
        means = [np.mean(accuracies) for accuracies in by_seed.values()]
        loss = np.mean([float(row["loss"]) for row in of_variant if int(row["epoch"]) == COMPARED[-1]])
        mode = np.mean([100 * float(row["training_mode"]) for row in of_variant if row["training_mode"]])
        print(
            f"{variant}, accuracy: {np.mean(means):.1f} % ({', '.join(f'{mean:.1f}' for mean in means)}); "
            f"training loss {loss:.2f}; at the end, left in training mode, {mode:.1f} %"
        )


def main():
    parser = argparse.ArgumentParser(description="What a report's numbers can carry.", allow_abbrev=False)
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

    for name, interval in (("exact", exact_interval), ("Wilson", wilson_interval)):
        low, high = interval(14, 16)
        print(f"14 of 16, {name}, lowest: {low:.1%}")
        print(f"14 of 16, {name}, highest: {high:.1%}")
    low, high = wilson_interval(8750, 10_000)
    print(f"8,750 of 10,000, Wilson: {low:.1%} to {high:.1%}")

    data = cifar10.load_sample()
    plain, on_features, on_logits, logits = loss_with_dropout(minires.pretrained(), data)
    right = (logits.argmax(axis=1) == data.test_labels)[:496].reshape(31, 16).sum(axis=1)
    print(f"the weights that come with minires, 31 times 16 test images, all: {right.sum() / 496:.1%}")
    print(f"16 images, the worst: {right.min() / 16:.1%}")
    print(f"16 images, deviation in points: {100 * (right / 16).std():.1f}")
    print(f"loss as it is: {plain:.2f}")
    print(f"loss with dropout on the features: {on_features:.2f}")
    print(f"loss with dropout on the logits: {on_logits:.2f}")
    least = sum(math.comb(9, k) / 2**9 * math.log(1 + k) for k in range(10)) / 2
    print(f"least possible loss with dropout on the logits: {least:.3f}")
    most = (1 + sum(math.comb(9, k) / 2**9 / (1 + k) for k in range(10))) / 2
    print(f"most that can be right with dropout on the logits: {most:.1%}")
    for variant in ("as described", "dropout on the logits"):
        print(f"32 images memorised, {variant}, loss: {memorised(variant, data, args.seed):.2f}", flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
