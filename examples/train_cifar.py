"""Train the residual network on CIFAR-10.

    python examples/train_cifar.py --data sample --epochs 10 --batch-size 50     the built-in sample, a first look
    python examples/train_cifar.py --data DIR                                    the whole data set, on CPU or GPU

The defaults are the recipe of the report "Residual Network Design": Adam at 0.001, batches of 128, 20 epochs, four
fifths of the training images to train on and one fifth to validate, random crop and flip, dropout before the last
layer, the weights with the lowest validation loss kept. The test images are looked at once, at the end.

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
from minires.augment import normalize, random_crop, random_flip
from minires.backend import GPUError, array_module, choose_device, to_device
from minires.checkpoint import load_model, save_weights
from minires.evaluate import evaluate

SCHEDULES = {"constant": minires.constant, "cosine": minires.cosine, "one-cycle": minires.one_cycle}
BAR = "{desc} |{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
SECONDS_BETWEEN_LINES = 30  # where the output is no terminal
STEPS_BETWEEN_READINGS = {"cpu": 1, "gpu": 10}  # reading the loss waits for the GPU


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train the residual network on CIFAR-10.", allow_abbrev=False)
    add = parser.add_argument
    add("--device", choices=["auto", "cpu", "gpu"], default="auto", help="auto, the default: a GPU where there is one")
    add("--data", metavar="sample|DIR", help="the built-in sample or a folder; default $MINIRES_DATA, ~/.cache/minires")
    add("--epochs", type=at_least(1), default=20, metavar="N", help="default 20")
    add("--batch-size", type=at_least(2), default=128, metavar="N", help="default 128")
    add("--lr", type=positive, default=1e-3, metavar="RATE", help="learning rate, default 0.001")
    add("--schedule", choices=list(SCHEDULES), default="constant", help="of the learning rate, default constant")
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
    add("--dropout", type=probability, default=0.5, metavar="P", help="before the last layer, default 0.5")
    add("--no-augment", action="store_true", help="no random crop and flip")
    return parser.parse_args()


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
probability = number("from 0 to below 1", lambda value: 0 <= value < 1)


def main():
    args = parse_arguments()

    # Data: one split, images as bytes on the device
    device = choose_device(args.device)
    data = cifar10.load_sample() if args.data == "sample" else cifar10.load(args.data, or_download=True)
    train_index, validation_index = cifar10.split(len(data.train_images), seed=args.seed)
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
    model = minires.ResNet(args.blocks, dropout=args.dropout, shortcut=not args.no_shortcut, seed=args.seed).to(device)
    loss_function = minires.SoftmaxCrossEntropy()
    optimizer = minires.Adam(model.parameters(), lr=args.lr)
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
        key = None if args.no_augment else args.seed
        for images, labels in ahead(batches(train_images, train_labels, order, args.batch_size, key, step)):
            optimizer.lr = schedule(step, total_steps, args.lr)
            optimizer.zero_grad()
            logits = model(images)
            loss = loss_function(logits, labels)
            model.backward(loss_function.backward(), need_dx=False)
            optimizer.step()

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

        validation_loss, validation_accuracy = evaluate(model, *validation, cifar10.MEAN, cifar10.STD)
        check_finite("validation loss", validation_loss, epoch, step, args.lr)
        row = {
            "epoch": epoch,
            "lr": optimizer.lr,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "validation_loss": validation_loss,
            "validation_accuracy": validation_accuracy,
            "seconds": round(time.monotonic() - epoch_started, 1),
        }
        history.append(row)
        write_log(out / "log.csv", history)
        print_row(row, header=epoch == 1)
        if validation_loss < best_loss:
            best_loss = validation_loss
            save_weights(out / "best.safetensors", model, row)
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
    result = {
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "test_images": len(test[0]),
        "best_epoch": best_row["epoch"],
        "validation_loss": best_row["validation_loss"],
        "validation_accuracy": best_row["validation_accuracy"],
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(out / "result.json", result)
    print(
        f"test loss {test_loss:.4f}, test accuracy {test_accuracy:.2%} on {len(test[0]):,} images, "
        f"with the weights of epoch {best_row['epoch']}; {result['seconds']:.0f} s"
    )
    return 0


def batches(images, labels, order, batch_size, key, step):
    """Yield (images, labels), normalised and, if there is a key, augmented by the draws of each step."""
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        batch = images[index]
        if key is not None:
            batch = random_flip(random_crop(batch, key, step), key, step)
        yield normalize(batch, cifar10.MEAN, cifar10.STD), labels[index]
        step += 1


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
    print(
        f"{row['epoch']:5} {row['lr']:9.2e} | {row['train_loss']:10.4f} {row['train_accuracy']:9.2%} | "
        f"{row['validation_loss']:10.4f} {row['validation_accuracy']:9.2%} | {row['seconds']:8.1f}",
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
    except (FloatingPointError, cifar10.DownloadError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before the loop, or a second one
        sys.exit(130)
