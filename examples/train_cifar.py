"""Train the residual network on CIFAR-10.

    python examples/train_cifar.py --data sample --epochs 10 --batch-size 50     the built-in sample, a first look
    python examples/train_cifar.py --data DIR                                    the whole data set, on CPU or GPU
    python examples/train_cifar.py --resume runs/my-run                          go on with a run that was stopped
    python examples/train_cifar.py --recipe fast                                 better in 30 epochs; best takes 200

The defaults are the recipe of the report "Residual Network Design": Adam at 0.001, batches of 128, 20 epochs, four
fifths of the training images to train on and one fifth to validate, random crop and flip, dropout before the last
layer, the weights with the lowest validation loss kept. RECIPES below lists it and two others; each ingredient is an
option of its own, which overrides the recipe. The test images are looked at once, at the end.

The run folder holds config.json, log.csv (a row per epoch), best.safetensors (the weights; PyTorch reads them too),
checkpoint.safetensors (from which the run can go on, and previous.safetensors, the one before), result.json, and with
matplotlib curves.png and images.png. Ctrl-C and SIGTERM end the run after the step at hand, with a checkpoint. A run
that was stopped, or killed, and resumed gives the same bits as one that never was.

Exit codes: 0 done, 1 something went wrong, 2 something was asked for that cannot be, 130 Ctrl-C, 143 SIGTERM.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import platform
import re
import shlex
import signal
import sys
import time
import warnings

import numpy as np
from tqdm import tqdm

import minires
from minires import cifar10, plots
from minires.augment import alternating_flip, cutout, normalize, random_crop, random_flip, trivial_augment
from minires.backend import GPUError, array_module, choose_device, memory_shortage, to_device
from minires.checkpoint import (
    PART,
    PREVIOUS,
    CheckpointError,
    load_checkpoint,
    load_model,
    part_of,
    remove_parts,
    restore_training_state,
    save_checkpoint,
    save_weights,
    training_state,
    write_atomically,
)
from minires.evaluate import evaluate, measure_statistics
from minires.finite import all_finite, first_not_finite
from minires.kernels import gpu

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
        # Page 2018, "How to train your ResNet": the weight decay, the shape of the schedule, cutout of 8. He et al.
        # 2019, "Bag of tricks": smoothing, no decay on vectors. Jordan 2024, "94% on CIFAR-10 in 3.29 seconds":
        # alternating flip, mirrored test images. The average is over about half an epoch. The rate is twice Page's for
        # a batch of this size; by validation accuracy, one seed each: 93.86 %, and 93.62 % without cutout.
        "epochs": 30,
        "optimizer": "sgd",
        "lr": 0.2,
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
        # Müller and Hutter 2021, "TrivialAugment": optimizer, rate (0.1 for batches of 128), weight decay, schedule,
        # epochs, augmentation with cutout of 16. The rest as in fast, with an average over five epochs.
        "epochs": 200,
        "batch_size": 256,
        "optimizer": "sgd",
        "lr": 0.2,
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
FREE_IN_A_RESUMED_RUN = ("device", "data", "checkpoint_every", "resume", "out", "debug")  # no result depends on them
MAY_CHANGE_DIGITS = ("minires", "numpy", "kernels", "device")
BATCHES_AT_ONCE = {"cpu": 1, "gpu": 40}  # that are augmented together: on a GPU, many small launches take longer
PRECISIONS = {"float32": "float32", "tf32": "float32", "fp16": "float16"}  # and the type of the images
LOSS_SCALE = 1024.0  # with fp16: small gradients stay above 0, and the largest far below the limit of 65,504
STATISTICS_IMAGES = 5000  # with which BatchNorm's statistics are measured for averaged weights, one in eight or ten


class UsageError(ValueError):
    """What was asked for cannot be done; the message says why, and what can."""


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train the residual network on CIFAR-10.", allow_abbrev=False)
    add = parser.add_argument
    add("--device", choices=["auto", "cpu", "gpu"], default="auto", help="auto, the default: a GPU where there is one")
    add(
        "--precision",
        choices=list(PRECISIONS),
        help="of convolutions: on the CPU float32; on a GPU also tf32, the default there for the report's recipe, and "
        "fp16, the default for others, with weights and sums in float32",
    )
    add("--graph", action=argparse.BooleanOptionalAction, default=True, help="on a GPU, record a step and replay it")
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
    add("--checkpoint-every", type=not_negative, default=10, metavar="MINUTES", help="default 10; 0: after each step")
    add("--resume", type=pathlib.Path, metavar="RUN_FOLDER", help="go on with a run, with the flags it was begun with")
    add("--debug", action="store_true", help="errors with a traceback; on a GPU a look for NaN at each step")
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
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))  # a flag that is not given stays None
    given = {name: value for name, value in vars(parser.parse_args(namespace=unset)).items() if value is not None}
    return args, given


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
    args, given = parse_arguments()
    with contextlib.ExitStack() as held:  # the lock on the run folder, the handlers of signals
        try:
            return train(args, given, held)
        except MemoryError as error:  # CuPy's is one as well
            size = f"batches of {args.batch_size}: {memory_shortage(error)}"
            raise MemoryError(f"out of memory with {size}; try --batch-size {max(2, args.batch_size // 2)}") from error


def train(args, given, held):
    saved = None
    try:
        minires.kernels.chosen(), minires.kernels.num_threads()
    except ValueError as error:  # in an environment variable
        raise UsageError(str(error)) from error
    if args.resume:
        held.enter_context(locked(args.resume))
        saved = load_checkpoint(args.resume)
        config = saved[1]["config"] if saved else read_config(args.resume)
        args = resumed(args, given, config)
        if (args.out / "result.json").exists():
            print(f"the run in {args.out} is finished, see {args.out / 'result.json'}")
            return 0

    # Data: one split, images as bytes on the device
    device = choose_device(args.device)
    tensor_cores = device == "gpu" and minires.kernels.chosen() == "fast"
    if args.precision is None:
        args.precision = "float32" if not tensor_cores else "tf32" if args.recipe == "report" else "fp16"
    if args.precision != "float32" and not tensor_cores and not args.resume:
        raise UsageError(f"--precision {args.precision} needs a GPU and its fast kernels; without, it is float32")
    precision = args.precision if tensor_cores else "float32"  # a GPU's run can go on on a CPU
    gpu.set_precision("float32" if precision == "float32" else "tf32")
    dtype, loss_scale = PRECISIONS[precision], LOSS_SCALE if precision == "fp16" else 1.0
    data = cifar10.load_sample() if args.data == "sample" else cifar10.load(args.data, or_download=True)
    train_index, validation_index = cifar10.split(len(data.train_images), seed=args.seed)
    if args.full_train:
        train_index, validation_index = np.arange(len(data.train_images)), np.arange(0)
    train_images = to_device(data.train_images[train_index], device)
    train_labels = to_device(data.train_labels[train_index], device)
    validation = data.train_images[validation_index], data.train_labels[validation_index]
    test = data.test_images, data.test_labels
    data_sha256 = hashlib.sha256(b"".join(hashlib.sha256(array).digest() for array in data)).hexdigest()
    if args.resume and data_sha256 != config.get("data_sha256"):
        raise UsageError(f"the images are not those that the run in {args.out} began with: name its data by --data")
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

    if args.resume:
        out = args.out
        print_changes(config, versions() | {"device": device})
        config |= {name: vars(args)[name] for name in ("data", "checkpoint_every")} | {"device": device}
    else:
        out = run_folder(args.out)
        held.enter_context(locked(out))
        config = {name: value for name, value in vars(args).items() if name not in ("resume", "debug")}
        config |= {"out": str(out), "device": device, "parameters": model.num_parameters(), "data_sha256": data_sha256}
        config |= versions() | {"started": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_json(out / "config.json", config)
    remove_parts(out)
    interrupted = held.enter_context(interrupts())
    print(
        f"{model.num_parameters():,} parameters, {len(train_images):,} training, {len(validation[0]):,} validation and "
        f"{len(test[0]):,} test images, device {device}, run folder {out}",
        flush=True,
    )
    titles = [cifar10.CLASSES[label] for label in data.train_labels[:50]]
    draw("plot_images", data.train_images[:50], titles, out / "images.png")

    # Where the run is: at its beginning, or where it was left
    history, best, step = [], {}, 0  # a row for each epoch; the weights with the lowest validation loss; steps done
    xp = array_module(train_images)
    sums = xp.zeros(2, xp.float64)  # of losses and of right answers, in the epoch at hand
    seen, epoch_seconds, seconds = 0, 0.0, 0.0  # in the epoch at hand; in the whole run
    if saved:
        state, position = saved
        restore_training_state(model, optimizer, average, state)
        best, history, step = part_of(state, "best."), position["history"], position["step"]
        seen, sums[0], sums[1] = position["seen"], position["loss_sum"], position["correct"]
        epoch_seconds, seconds = position["epoch_seconds"], position["seconds"]
        if best:  # the files may be ahead of the checkpoint
            best_model = minires.ResNet.from_state_dict(best, shortcut=not args.no_shortcut)
            save_weights(out / "best.safetensors", best_model, best_of(history))
            write_log(out / "log.csv", history)
    if args.resume:
        print(f"going on after step {step} of {total_steps}", flush=True)
    epochs_before = len(history)
    started = time.monotonic() - seconds
    epoch_started = time.monotonic() - epoch_seconds
    saved_step, saved_epochs, saved_at = step, len(history), time.monotonic()

    def save():
        nonlocal saved_step, saved_epochs, saved_at
        now = time.monotonic()
        state = training_state(model, optimizer, average) | {f"best.{name}": array for name, array in best.items()}
        epoch_state = {"seen": seen, "loss_sum": float(sums[0]), "correct": int(sums[1])}
        position = {"step": step, "history": history, "seconds": now - started, "epoch_seconds": now - epoch_started}
        try:
            save_checkpoint(out, state, position | epoch_state | {"config": config})
        except FloatingPointError as error:
            raise not_finite(error, epoch, step, saved_step, args.lr) from error
        saved_step, saved_epochs, saved_at = step, len(history), time.monotonic()

    def fill_gradients(images, labels):
        """Forward and backward: fill every grad, add to the sums; return the loss."""
        optimizer.zero_grad()
        logits = model(images)
        loss = loss_function(logits, labels)
        model.backward(loss_function.backward(loss_scale), need_dx=False)
        sums[0] += loss * len(labels)
        sums[1] += (logits.argmax(axis=1) == labels).sum()
        return loss

    step_through = fill_gradients
    if precision != "float32" and args.graph:
        fill_gradients = gpu.replay(fill_gradients)

    # The loop
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # a loss that is not finite ends the run with more grace
    readings = 1 if args.debug else STEPS_BETWEEN_READINGS[device]
    for epoch in range(len(history) + 1, args.epochs + 1):
        done = step - (epoch - 1) * batches_per_epoch  # 0, but in an epoch that is gone on with
        if done == 0:
            seen, sums[...], epoch_started = 0, 0, time.monotonic()
        train_loss, train_accuracy = float(sums[0]) / max(seen, 1), float(sums[1]) / max(seen, 1)
        order = np.random.default_rng([args.seed, epoch]).permutation(len(train_images))
        progress = Progress(f"epoch {epoch:{len(str(args.epochs))}}/{args.epochs}", batches_per_epoch, done)
        order = to_device(order[: batches_per_epoch * args.batch_size], device)
        left = {"at_once": BATCHES_AT_ONCE[device], "start": done * args.batch_size}
        made = batches(train_images, train_labels, order, args, epoch, dtype, **left)
        for images, labels in ahead(made) if device == "cpu" else made:
            optimizer.lr = schedule(step, total_steps, args.lr)
            loss = fill_gradients(images, labels)
            last = step + 1 == epoch * batches_per_epoch or bool(interrupted)
            reading = last or step % readings == 0
            if reading and not all_finite([loss, optimizer.flat.grad]):
                again = functools.partial(step_through, images, labels)
                what = look_again(model, again, loss, step, readings)
                raise not_finite(what, epoch, step + 1, saved_step, args.lr)
            optimizer.step(1 / loss_scale)
            if average:
                average.update()

            step += 1
            seen += len(labels)
            if reading:
                train_loss, train_accuracy = float(sums[0]) / seen, float(sums[1]) / seen
            progress.update(len(labels), train_loss, train_accuracy, last)
            if time.monotonic() - saved_at >= 60 * args.checkpoint_every:
                save()
            if interrupted:
                break
        progress.close()
        if interrupted:
            break

        # Validation, of the averaged weights where there are any; without validation images, the last weights are kept
        row = {
            "epoch": epoch,
            "lr": schedule(step - 1, total_steps, args.lr),
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "validation_loss": None,
            "validation_accuracy": None,
        }
        last_epoch, stopped = epoch == args.epochs, False
        if last_epoch or not args.full_train:
            if average:
                average.swap()
                some = batches(train_images, train_labels, order[:STATISTICS_IMAGES], args, epoch, "float32")
                measure_statistics(model, (images for images, _ in some))
            if not args.full_train:
                validate = functools.partial(evaluate, model, *validation, cifar10.MEAN, cifar10.STD)
                row["validation_loss"], row["validation_accuracy"] = validate(stop=lambda: interrupted) or (None, None)
            stopped = bool(interrupted)  # looked at once: what follows is done whole or, when the run goes on, anew
            if not stopped:
                if not (args.full_train or math.isfinite(row["validation_loss"])):
                    where = first_not_finite(model, validate) or "the loss itself"
                    what = (
                        f"the validation loss is {row['validation_loss']}: the first number that is not finite is in "
                    )
                    raise not_finite(what + where, epoch, step, saved_step, args.lr)
                if args.full_train or row is best_of([*history, row]):
                    best = model.state_dict()
                    save_weights(out / "best.safetensors", model, row)
            if average:
                average.swap()
        if stopped:
            break
        row["seconds"] = round(time.monotonic() - epoch_started, 1)
        history.append(row)
        write_log(out / "log.csv", history)
        print_row(row, header=len(history) == epochs_before + 1)
        if time.monotonic() - saved_at >= 60 * args.checkpoint_every:
            save()

    # What was learned
    if (saved_step, saved_epochs) != (step, len(history)):
        save()
    if history:
        draw("plot_curves", history, out / "curves.png")
    tested = None
    if not interrupted:
        best_model, best_row = load_model(out / "best.safetensors")
        measure = functools.partial(evaluate, best_model.to(device), *test, cifar10.MEAN, cifar10.STD)
        tested = measure(stop=lambda: interrupted)
    tta = measure(tta=True, stop=lambda: interrupted) if args.tta and tested else None
    if tested is None or (args.tta and tta is None):
        epoch = min(len(history) + 1, args.epochs)
        print(f"\ninterrupted in epoch {epoch}, after step {step} of {total_steps}; to go on from there:")
        print("    " + shlex.join([sys.executable, sys.argv[0], "--resume", str(out)]))
        return 128 + interrupted[0]  # as shells count a process that a signal has ended
    test_loss, test_accuracy = tested
    result = {"test_loss": test_loss, "test_accuracy": test_accuracy}
    if args.tta:
        result |= {"test_loss_tta": tta[0], "test_accuracy_tta": tta[1]}
    result |= {
        "test_images": len(test[0]),
        "best_epoch": best_row["epoch"],
        "validation_loss": best_row["validation_loss"],
        "validation_accuracy": best_row["validation_accuracy"],
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(out / "result.json", result)
    (out / PREVIOUS).unlink(missing_ok=True)
    print(
        f"test loss {test_loss:.4f}, test accuracy {test_accuracy:.2%} on {len(test[0]):,} images, "
        + (f"{tta[1]:.2%} with their mirror images, " if args.tta else "")
        + f"with the weights of epoch {best_row['epoch']}; {result['seconds']:.0f} s"
    )
    return 0


def batches(images, labels, order, args, epoch, dtype, at_once=1, start=0):
    """Yield (images, labels), augmented and normalised, in the order of an epoch, from place `start` on.

    What chance does to an image depends on its place in the epoch alone, so any number of batches can be augmented at
    once.
    """
    for first in range(start, len(order), at_once * args.batch_size):
        index = order[first : first + at_once * args.batch_size]
        augmented = normalize(augment(images[index], index, args, epoch, first), cifar10.MEAN, cifar10.STD, dtype)
        for i in range(0, len(index), args.batch_size):
            batch = slice(i, i + args.batch_size)
            yield augmented[batch], labels[index[batch]]


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
        try:
            out.mkdir(parents=True, exist_ok=True)
            taken = any(path.suffix != PART for path in out.iterdir())
        except FileExistsError:
            taken = True
        except OSError as error:
            raise UsageError(f"--out {out} cannot be made: {error.strerror}; name another folder") from error
        if taken:
            raise UsageError(
                f"--out {out} exists and is not an empty folder: name another, nothing is overwritten "
                f"(--resume {out} goes on with a run)"
            )
        return out
    now = time.strftime("%Y%m%d-%H%M%S")
    for ending in itertools.chain([""], map("-{}".format, itertools.count(2))):
        out = pathlib.Path("runs", now + ending)
        try:
            out.mkdir(parents=True)
            return out
        except FileExistsError:  # another run began in the same second
            continue


def read_config(folder):
    """Return what config.json says, for a run that has not come as far as its first checkpoint."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"there is no run in {folder}, for {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}), and there is no checkpoint: start the run anew") from error


def resumed(args, given, config):
    """Return the flags of a run that goes on: those it was begun with, and the free ones as they are given now."""
    different = [
        f"--{name.replace('_', '-')} is {config.get(name)} in the run and {value} on the command line"
        for name, value in given.items()
        if name not in FREE_IN_A_RESUMED_RUN and value != config.get(name)
    ]
    if "out" in given and given["out"].resolve() != args.resume.resolve():
        different.append(f"--out is {args.resume} in the run and {given['out']} on the command line")
    if different:
        raise UsageError(f"the run in {args.resume} was begun otherwise: {'; '.join(different)}. Leave the flags out")
    begun = {name: config[name] for name in vars(args) if name in config and name not in ("resume", "debug")}
    return argparse.Namespace(**{**vars(args), **begun, **given, "out": args.resume})


def print_changes(then, now):
    """Say what has changed since a run began that may change the last digits."""
    changed = [name for name in MAY_CHANGE_DIGITS if then.get(name) != now[name]]
    if changed:
        changes = "; ".join(f"{name} {then.get(name)} then, {now[name]} now" for name in changed)
        print(f"note: {changes}: last digits may differ from those of a run that never stopped", file=sys.stderr)


@contextlib.contextmanager
def locked(folder):
    """Hold a run folder for this process alone. The lock goes with the process, however that ends."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"there is no run in {folder}: {error.strerror}") from error
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{folder} is in use by another process: wait until it ends, or stop it") from None
        yield
    finally:
        os.close(descriptor)


def look_again(model, again, loss, step, readings):
    """Do a step once more, layer by layer, and say what is not finite and where that begins."""
    model.dropout.step = step  # the same mask
    what = "a gradient is not finite" if math.isfinite(float(loss)) else f"the loss is {float(loss)}"
    where = first_not_finite(model, again) or "the loss itself"
    seldom = f" (looked at every {readings} steps, with --debug at each)" if readings > 1 else ""
    return f"{what}: the first number that is not finite is in {where}{seldom}"


def not_finite(what, epoch, step, saved_step, lr):
    kept = f"the checkpoint after step {saved_step} is kept" if saved_step else "there is no checkpoint yet"
    return FloatingPointError(f"in epoch {epoch}, step {step} {what}; {kept}; try a smaller --lr than {lr}")


@contextlib.contextmanager
def interrupts():
    """Give a list that gets the number of the first SIGINT or SIGTERM, for the loop to end at a good place.

    A second one ends the process at once, by the system's own way: nothing of ours runs, and what is on the disk stays.
    """
    arrived = []

    def on_signal(number, _):
        arrived.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        os.write(2, b"\nending after this step; Ctrl-C again ends at once, without saving\n")  # print may be busy

    before = {}
    for each in (signal.SIGINT, signal.SIGTERM):
        before[each] = signal.signal(each, on_signal)
    try:
        yield arrived
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, title, batches, done):
        self.title, self.batches, self.batch, self.images = title, batches, done, 0
        self.started = self.last_line = time.monotonic()
        form = {"bar_format": BAR, "leave": False, "disable": None, "dynamic_ncols": True}
        self.bar = tqdm(total=batches, initial=done, desc=title, **form)

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


def best_of(history):
    """Return the row of the epoch whose weights are kept: the lowest validation loss, or the last without any."""
    measured = [row for row in history if row["validation_loss"] is not None]
    return min(measured, key=lambda row: row["validation_loss"]) if measured else history[-1]


def write_log(path, history):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, history[0])
    writer.writeheader()
    writer.writerows(history)
    write_atomically(path, text.getvalue().encode())


def write_json(path, content):
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def versions():
    return {
        "minires": minires.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "kernels": minires.kernels.chosen(),
    }


def draw(plot, *args):
    """Draw a picture of minires.plots, where matplotlib is installed; a run does not end for want of a picture."""
    try:
        getattr(plots, plot)(*args)
    except ImportError as error:
        if getattr(error, "name", None) != "matplotlib":
            print(f"no picture {args[-1]}: {error}", file=sys.stderr)


def explain(error):
    """Return the exit code for an error, 2 if the user can mend it by asking otherwise and 1 if not, and a line."""
    if isinstance(error, UsageError | GPUError | cifar10.DataError | CheckpointError):
        return 2, str(error)
    if isinstance(error, FloatingPointError | cifar10.DownloadError):
        return 1, str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        line = f"{where}{error.strerror or error}; what was there before is unharmed"
        return 1, f"{line}. Once the cause is mended, a run that had begun goes on with --resume RUN_FOLDER"
    if isinstance(error, MemoryError):
        return 1, f"{error}; a run that had begun is in its last checkpoint"
    return 1, f"{type(error).__name__}: {error} (--debug shows the place)"


if __name__ == "__main__":
    debug = "--debug" in sys.argv
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        code, line = main(), ""
    except KeyboardInterrupt:  # before the loop
        code, line = 130, ""
    except Exception as error:
        if debug:
            raise
        code, line = explain(error)
    if line:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
