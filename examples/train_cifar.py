"""Train the residual network on CIFAR-10.

    python examples/train_cifar.py --data sample --epochs 10 --batch-size 50     the built-in sample, a first look
    python examples/train_cifar.py --data DIR                                    the whole data set, on CPU or GPU
    python examples/train_cifar.py --recipe fast                                 better in 30 epochs; best takes 200

The defaults are the recipe of the report "Residual Network Design": Adam at 0.001, batches of 128, 20 epochs, four
fifths of the training images to train on and one fifth to validate, random crop and flip, dropout before the last
layer, the weights with the lowest validation loss kept. RECIPES below lists it and two others; each ingredient is an
option of its own, which overrides the recipe. The test images are looked at once, at the end.

The run folder holds config.json, log.csv (a row per epoch), best.safetensors (the weights; PyTorch reads them too),
result.json, and with matplotlib curves.png and images.png. Ctrl-C ends the run after the step at hand, and keeps what
has been learned in last.safetensors.
"""

import argparse
import concurrent.futures
import csv
import itertools
import json
import math
import os
import pathlib
import platform
import re
import signal
import sys
import time
import warnings

import numpy as np
from tqdm import tqdm

import minires
from minires import cifar10, plots
from minires.augment import alternating_flip, cutout, normalize, random_crop, random_flip, trivial_augment
from minires.backend import GPUError, array_module, choose_device, to_device
from minires.checkpoint import load_model, save_weights
from minires.evaluate import evaluate, measure_statistics

SCHEDULES = {
    "constant": minires.constant,
    "cosine": minires.cosine,
    "one-cycle": minires.one_cycle,
    "triangular": minires.triangular,
}
FLIPS = ("none", "random", "alternating")
RECIPES = {
    "report": {  # Shamooun, Deshmukh and Alamuru, "Residual Network Design"
        "epochs": 20,
        "batch_size": 128,
        "optimizer": "adam",
        "lr": 1e-3,
        "schedule": "constant",
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.0,
        "decay_vectors": True,
        "clip": None,
        "label_smoothing": 0.0,
        "dropout": 0.5,
        "crop": 4,
        "flip": "random",
        "cutout": 0,
        "trivial_augment": False,
        "ema": 0.0,
        "tta": False,
        "full_train": False,
    },
    "fast": {
        # Page 2018, "How to train your ResNet": the rate (0.4 for batches of 512), the weight decay, the shape of the
        # schedule, cutout of 8. He et al. 2019, "Bag of tricks": smoothing, no decay on vectors.
        # Jordan 2024, "94% on CIFAR-10 in 3.29 seconds": alternating flip, mirrored test images. The average is over
        # about half an epoch.
        "epochs": 30,
        "optimizer": "sgd",
        "lr": 0.1,
        "schedule": "triangular",
        "weight_decay": 5e-4,
        "decay_vectors": False,
        "label_smoothing": 0.1,
        "dropout": 0.0,
        "flip": "alternating",
        "cutout": 8,
        "ema": 0.995,
        "tta": True,
        "full_train": True,
    },
    "best": {
        # Müller and Hutter 2021, "TrivialAugment": optimizer, rate, weight decay, schedule, epochs, augmentation with
        # cutout of 16. The rest as in fast, with an average over two and a half epochs.
        "epochs": 200,
        "optimizer": "sgd",
        "lr": 0.1,
        "schedule": "cosine",
        "weight_decay": 5e-4,
        "decay_vectors": False,
        "label_smoothing": 0.1,
        "dropout": 0.0,
        "cutout": 16,
        "trivial_augment": True,
        "ema": 0.999,
        "tta": True,
        "full_train": True,
    },
}
BAR = "{desc} |{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
SECONDS_BETWEEN_LINES = 30  # where the output is no terminal
STEPS_BETWEEN_READINGS = {"cpu": 1, "gpu": 10}  # reading the loss waits for the GPU
BATCHES_AT_ONCE = {"cpu": 1, "gpu": 40}  # that are augmented together: on a GPU, many small launches take longer
STATISTICS_IMAGES = 5000  # with which BatchNorm's statistics are measured for averaged weights, one in eight or ten


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train the residual network on CIFAR-10.", allow_abbrev=False)
    add = parser.add_argument
    add("--device", choices=["auto", "cpu", "gpu"], default="auto", help="auto, the default: a GPU where there is one")
    add("--data", metavar="sample|DIR", help="the built-in sample or a folder; default $MINIRES_DATA, ~/.cache/minires")
    add(
        "--seed",
        type=at_least(0, below=2**64),
        default=0,
        metavar="N",
        help="of weights, split, order, augmentation and dropout",
    )
    add("--out", type=pathlib.Path, metavar="DIR", help="the run folder (default: runs/ and the time)")
    add("--limit-batches", type=at_least(1), metavar="N", help="use only the first N batches of every pass, for a try")
    add("--blocks", type=at_least(1), nargs=4, default=[2, 1, 1, 1], metavar="N", help="of each stage, default 2 1 1 1")
    add("--no-shortcut", action="store_true", help="the plain network, without the sums")
    add("--no-batch-norm", action="store_true", help="the network without normalisation")
    add("--no-augment", action="store_true", help="no crop, flip, cutout and TrivialAugment")
    add("--recipe", choices=list(RECIPES), default="report", help="sets all that follows; default report")

    group = parser.add_argument_group("ingredients of a recipe", "; ".join(RECIPES) + ": in this order below")

    def ingredient(flag, help, **settings):
        name = flag[2:].replace("-", "_")
        values = [str((RECIPES["report"] | recipe)[name]) for recipe in RECIPES.values()]
        if "choices" not in settings and "action" not in settings:
            settings.setdefault("metavar", "N")
        group.add_argument(flag, help=f"{help} ({', '.join(values)})", **settings)

    switch = argparse.BooleanOptionalAction
    ingredient("--epochs", "passes over the training images", type=at_least(1))
    ingredient("--batch-size", "images in a step", type=at_least(2))
    ingredient("--optimizer", "how the weights move", choices=["adam", "sgd"])
    ingredient("--lr", "learning rate, the highest of the schedule", type=positive, metavar="RATE")
    ingredient("--schedule", "of the learning rate", choices=list(SCHEDULES))
    ingredient("--momentum", "of sgd", type=probability, metavar="M")
    ingredient("--nesterov", "momentum in Nesterov's form, of sgd", action=switch)
    ingredient("--weight-decay", "added to the gradient, times the weight", type=not_negative, metavar="W")
    ingredient("--decay-vectors", "weight decay on biases and BatchNorm too", action=switch)
    ingredient("--clip", "shorten gradients whose norm is larger", type=positive, metavar="NORM")
    ingredient("--label-smoothing", "share of the target spread over all classes", type=probability, metavar="S")
    ingredient("--dropout", "before the last layer", type=probability, metavar="P")
    ingredient("--crop", "move images by up to N pixels each way", type=at_least(0))
    ingredient("--flip", "mirror images", choices=FLIPS)
    ingredient("--cutout", "cover a square of N x N pixels", type=at_least(0))
    ingredient("--trivial-augment", "one random operation for each image", action=switch)
    ingredient("--ema", "average the weights with this decay; 0: do not", type=probability, metavar="DECAY")
    ingredient("--tta", "measure on mirrored test images as well", action=switch)
    ingredient("--full-train", "train on all training images; the last weights are kept", action=switch)

    recipe = RECIPES[parser.parse_args().recipe]
    parser.set_defaults(**RECIPES["report"] | recipe)
    args = parser.parse_args()
    if args.no_augment:
        args.crop, args.flip, args.cutout, args.trivial_augment = 0, "none", 0, False
    if args.optimizer == "sgd" and args.nesterov and not args.momentum:
        parser.error("--momentum 0 has no Nesterov form: add --no-nesterov")
    return args


def at_least(least, below=math.inf):
    def whole_number(text):
        if not re.fullmatch("-?[0-9]+", text) or not least <= int(text) < below:
            limit = "" if below == math.inf else f" and below {below}"
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}{limit}, got {text}")
        return int(text)

    return whole_number


def number(expected, valid):
    def real_number(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not valid(value):
            raise argparse.ArgumentTypeError(f"expected a number {expected}, got {text}")
        return value

    return real_number


positive = number("above 0", lambda value: 0 < value < math.inf)
not_negative = number("of at least 0", lambda value: 0 <= value < math.inf)
probability = number("from 0 to below 1", lambda value: 0 <= value < 1)


def main():
    args = parse_arguments()

    # Data: one split, images as bytes on the device
    device = choose_device(args.device)
    data = cifar10.load_sample() if args.data == "sample" else cifar10.load(args.data)
    train_index, validation_index = cifar10.split(len(data.train_images), seed=args.seed)
    if args.full_train:
        train_index, validation_index = np.arange(len(data.train_images)), np.arange(0)
    train_images = to_device(data.train_images[train_index], device)
    train_labels = to_device(data.train_labels[train_index], device)
    validation = data.train_images[validation_index], data.train_labels[validation_index]
    test = data.test_images, data.test_labels
    if args.limit_batches:
        limit = args.limit_batches * args.batch_size
        validation, test = ([part[:limit] for part in pair] for pair in (validation, test))
    batches_per_epoch = min(math.ceil(len(train_images) / args.batch_size), args.limit_batches or math.inf)
    total_steps = args.epochs * batches_per_epoch

    # Model, loss, optimizer
    network = {"dropout": args.dropout, "shortcut": not args.no_shortcut, "batch_norm": not args.no_batch_norm}
    model = minires.ResNet(args.blocks, seed=args.seed, **network).to(device)
    loss_function = minires.SoftmaxCrossEntropy(args.label_smoothing)
    settings = {
        "weight_decay": args.weight_decay,
        "decay_vectors": args.decay_vectors,
        "max_norm": args.clip or math.inf,
    }
    if args.optimizer == "adam":
        optimizer = minires.Adam(model.parameters(), args.lr, **settings)
    else:
        optimizer = minires.SGD(model.parameters(), args.lr, args.momentum, args.nesterov, **settings)
    average = minires.WeightAverage(optimizer, args.ema) if args.ema else None
    schedule = SCHEDULES[args.schedule]

    out = run_folder(args.out)
    config = {**vars(args), "out": str(out), "device": device, "parameters": model.num_parameters()} | versions()
    write_json(out / "config.json", config)
    print(
        f"{model.num_parameters():,} parameters, {len(train_images):,} training, {len(validation[0]):,} validation and "
        f"{len(test[0]):,} test images, device {device}, run folder {out}",
        flush=True,
    )
    titles = [cifar10.CLASSES[label] for label in data.train_labels[:50]]
    draw("plot_images", data.train_images[:50], titles, out / "images.png")

    # The loop
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # a loss that is not finite ends the run with more grace
    interrupted = interrupts()
    xp = array_module(train_images)
    history, best_loss, step, started = [], math.inf, 0, time.monotonic()
    for epoch in range(1, args.epochs + 1):
        epoch_started = time.monotonic()
        order = np.random.default_rng([args.seed, epoch]).permutation(len(train_images))
        loss_sum, correct, seen = xp.zeros((), xp.float64), xp.zeros((), xp.int64), 0
        progress = Progress(f"epoch {epoch:{len(str(args.epochs))}}/{args.epochs}", batches_per_epoch)
        order = to_device(order[: batches_per_epoch * args.batch_size], device)
        for images, labels in ahead(batches(train_images, train_labels, order, args, epoch, BATCHES_AT_ONCE[device])):
            optimizer.lr = schedule(step, total_steps, args.lr)
            optimizer.zero_grad()
            logits = model(images)
            loss = loss_function(logits, labels)
            model.backward(loss_function.backward(), need_dx=False)
            optimizer.step()
            if average:
                average.update()

            step += 1
            seen += len(labels)
            loss_sum += loss * len(labels)
            correct += (logits.argmax(axis=1) == labels).sum()
            last = step == epoch * batches_per_epoch or bool(interrupted)
            if last or (step - 1) % STEPS_BETWEEN_READINGS[device] == 0:
                train_loss, train_accuracy = float(loss_sum) / seen, float(correct) / seen
                check_finite("loss", train_loss, epoch, step, args.lr)
            progress.update(len(labels), train_loss, train_accuracy, last)
            if interrupted:
                break
        progress.close()
        if interrupted:
            break

        # Validation, of the averaged weights where there are any; without validation images, the last weights are kept
        row = {
            "epoch": epoch,
            "lr": optimizer.lr,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "validation_loss": None,
            "validation_accuracy": None,
        }
        last_epoch = epoch == args.epochs
        if last_epoch or not args.full_train:
            if average:
                average.swap()
                some = batches(train_images, train_labels, order[:STATISTICS_IMAGES], args, epoch)
                measure_statistics(model, (images for images, _ in some))
            if not args.full_train:
                validation_loss, row["validation_accuracy"] = evaluate(model, *validation, cifar10.MEAN, cifar10.STD)
                check_finite("validation loss", validation_loss, epoch, step, args.lr)
                row["validation_loss"] = validation_loss
            if args.full_train or validation_loss < best_loss:
                best_loss = row["validation_loss"]
                save_weights(out / "best.safetensors", model, row)
            if average:
                average.swap()
        row["seconds"] = round(time.monotonic() - epoch_started, 1)
        history.append(row)
        write_log(out / "log.csv", history)
        print_row(row, header=epoch == 1)
        if interrupted:
            break

    # What was learned
    if history:
        draw("plot_curves", history, out / "curves.png")
    if interrupted and step < total_steps:
        save_weights(out / "last.safetensors", model, {"step": step})
        print(f"\ninterrupted in epoch {epoch}, after step {step}; the weights are in {out / 'last.safetensors'}")
        return 130
    best, best_row = load_model(out / "best.safetensors")
    test_loss, test_accuracy = evaluate(best.to(device), *test, cifar10.MEAN, cifar10.STD)
    result = {"test_loss": test_loss, "test_accuracy": test_accuracy}
    if args.tta:
        tta = evaluate(best, *test, cifar10.MEAN, cifar10.STD, tta=True)
        result |= {"test_loss_tta": tta[0], "test_accuracy_tta": tta[1]}
    result |= {
        "test_images": len(test[0]),
        "best_epoch": best_row["epoch"],
        "validation_loss": best_row["validation_loss"],
        "validation_accuracy": best_row["validation_accuracy"],
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(out / "result.json", result)
    print(
        f"test loss {test_loss:.4f}, test accuracy {test_accuracy:.2%} on {len(test[0]):,} images, "
        + (f"{tta[1]:.2%} with their mirror images, " if args.tta else "")
        + f"with the weights of epoch {best_row['epoch']}; {result['seconds']:.0f} s"
    )
    return 0


def batches(images, labels, order, args, epoch, at_once=1, start=0):
    """Yield (images, labels), augmented and normalised, in the order of an epoch, from place `start` on.

    What chance does to an image depends on its place in the epoch alone, so any number of batches can be augmented at
    once.
    """
    for first in range(start, len(order), at_once * args.batch_size):
        index = order[first : first + at_once * args.batch_size]
        augmented = augment(images[index], index, args, epoch, first)
        for i in range(0, len(index), args.batch_size):
            batch = slice(i, i + args.batch_size)
            yield normalize(augmented[batch], cifar10.MEAN, cifar10.STD), labels[index[batch]]


def augment(images, index, args, epoch, start):
    """Augment images of the training set, given with their index there and the place of the first in the epoch."""
    if args.crop:
        images = random_crop(images, args.seed, epoch, start, args.crop)
    if args.flip == "random":
        images = random_flip(images, args.seed, epoch, start)
    if args.flip == "alternating":
        images = alternating_flip(images, index, args.seed, epoch)
    if args.trivial_augment:
        images = trivial_augment(images, args.seed, epoch, start)
    if args.cutout:
        images = cutout(images, args.seed, epoch, start, args.cutout)
    return images


def ahead(items):
    """Yield the items in their order, each made in another thread while the one before is in use."""
    items, end = iter(items), object()
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item


def run_folder(out):
    """Make the run folder, a new one or an empty one: runs/ and the time unless a name is given."""
    if out:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(
                f"--out {out} exists and is not an empty folder: name another, nothing is overwritten"
            )
        out.mkdir(parents=True, exist_ok=True)
        return out
    now = time.strftime("%Y%m%d-%H%M%S")
    for ending in itertools.chain([""], map("-{}".format, itertools.count(2))):
        out = pathlib.Path("runs", now + ending)
        try:
            out.mkdir(parents=True)
            return out
        except FileExistsError:  # another run began in the same second
            continue


def check_finite(name, loss, epoch, step, lr):
    if not math.isfinite(loss):
        raise FloatingPointError(f"the {name} is {loss} in epoch {epoch}, step {step}: try a smaller --lr than {lr}")


def interrupts():
    """Return a list that gets an entry on Ctrl-C, for the loop to end at a good place; a second one ends at once."""
    pressed = []

    def on_ctrl_c(*_):
        print("\nending after this step; Ctrl-C again ends at once, without saving", file=sys.stderr)
        pressed.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, on_ctrl_c)
    return pressed


class Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, title, batches):
        self.title, self.batches, self.batch, self.images = title, batches, 0, 0
        self.started = self.last_line = time.monotonic()
        self.bar = tqdm(total=batches, desc=title, bar_format=BAR, leave=False, disable=None, dynamic_ncols=True)

    def update(self, images, loss, accuracy, last):
        self.batch += 1
        self.images += images
        now = time.monotonic()
        text = f"loss {loss:.4f}, accuracy {accuracy:.1%}, {self.images / (now - self.started):.0f} images/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.bar.disable and not last and now - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now
            print(f"{self.title}, batch {self.batch}/{self.batches}: {text}", flush=True)

    def close(self):
        self.bar.close()


def print_row(row, header):
    if header:
        print("epoch        lr | train loss  accuracy | valid loss  accuracy |  seconds")
    validation = f"{'-':>10} {'-':>9} |"
    if row["validation_loss"] is not None:
        validation = f"{row['validation_loss']:10.4f} {row['validation_accuracy']:9.2%} |"
    print(
        f"{row['epoch']:5} {row['lr']:9.2e} | {row['train_loss']:10.4f} {row['train_accuracy']:9.2%} | "
        f"{validation} {row['seconds']:8.1f}",
        flush=True,
    )


def write_log(path, history):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n")


def versions():
    return {
        "minires": minires.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def draw(plot, *args):
    """Draw a picture of minires.plots, where matplotlib is installed; a run does not end for want of a picture."""
    try:
        getattr(plots, plot)(*args)
    except ImportError as error:
        if getattr(error, "name", None) != "matplotlib":
            print(f"no picture {args[-1]}: {error}", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (GPUError, cifar10.DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before the loop, or a second one
        sys.exit(130)
