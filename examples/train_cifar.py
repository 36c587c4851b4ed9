"""Train the residual network on CIFAR-10.

    python examples/train_cifar.py --data sample --epochs 10 --batch-size 50     the built-in sample, a first look
    python examples/train_cifar.py --data DIR                                    the whole data set, on CPU or GPU
    python examples/train_cifar.py --resume runs/my-run                          resume a run that was stopped
    python examples/train_cifar.py --recipe hour                                 better in an hour on two CPU cores
    python examples/train_cifar.py --recipe fast                                 for a GPU, 30 epochs; best takes 200
    mpiexec -n 4 python examples/train_cifar.py                                  four processes, see DISTRIBUTED.md

The defaults are the recipe of the report "Residual Network Design": Adam at 0.001, batches of 128, 20 epochs, four
fifths of the training images to train on and one fifth to validate, random crop and flip, dropout before the last
layer, the weights with the lowest validation loss kept. recipes.py lists it and three others; each ingredient is an
option of its own, which overrides the recipe. The test images are looked at once, at the end.

`train` below is the whole of it. What a run does besides (its folder, checkpoints, signals, progress, the search for
NaN) is the Run's, in minires/training; README.md beside this file explains the options.
"""

import functools
import math
import os
import pathlib
import sys
import warnings
from typing import NamedTuple

import numpy as np

import minires
from minires import cifar10
from minires.augment import alternating_flip, cutout, normalize, random_crop, random_flip, resize
from minires.backend import memory_shortage, to_device
from minires.batches import Batches
from minires.console import note
from minires.evaluation import averaged_weights, evaluate
from minires.kernels import gpu
from minires.training import Run, UsageError, load_model
from minires.training.arguments import read_data
from minires.training.launch import processes
from minires.training.output import draw
from minires.training.script import run_script
from minires.training.weights import WEIGHTS
from minires.trivial_augment import trivial_augment

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for recipes.py, also under python -m and PYTHONSAFEPATH
from recipes import FREE_IN_A_RESUMED_RUN, NO_SETTINGS, SCHEDULES, choose_precision, parse_arguments, resumed_arguments
from report import REPORT, write_report

STATISTICS_IMAGES = 5000  # of 40,000 or 50,000: with these, BatchNorm's statistics are measured for averaged weights


def train(args, run):
    # Data, model, loss, optimizer
    device = run.ranks.choose_device(args.device)
    dtype, loss_scale, recorded = choose_precision(args, device)
    data = load_data(args, run, device)
    check_parts(args, run, data)
    model = make_model(args).to(device)
    loss_function = minires.SoftmaxCrossEntropy(args.label_smoothing)
    optimizer = make_optimizer(args, model)
    run.ranks.distribute(model, optimizer, loss_function, args.local_batch_norm)
    average = minires.WeightAverage(optimizer, args.ema) if args.ema else None
    begin(args, run, data, model, optimizer, average)

    def forward_and_backward(images, labels):
        optimizer.zero_grad()
        logits = model(images)
        loss = loss_function(logits, labels)
        model.backward(loss_function.backward(loss_scale), need_dx=False)
        run.count(loss, logits, labels)
        return loss

    if recorded:
        forward_and_backward = gpu.replay(forward_and_backward, also=lambda: run.ranks.total)

    # The loop
    for epoch in run.epochs():
        for images, labels in run.steps(batches(args, run, data, epoch, dtype)):
            optimizer.lr = SCHEDULES[args.schedule](run.step, run.total_steps, args.lr)
            loss = forward_and_backward(images, labels)
            run.check(loss, forward_and_backward)
            optimizer.step(1 / loss_scale)
            if average:
                average.update()

        # Validation, of the averaged weights where there are any
        if epoch == args.epochs or not args.full_train:
            with averaged_weights(average, model, statistics_batches(args, run, data, epoch)):
                validate(args, run, data, model)

    # Test, of the weights that were kept
    test(args, run, data, run.ranks.first(load_model, run.folder / WEIGHTS)[0].to(device))


class Data(NamedTuple):
    """The images and labels of each part; those to train on are on the device, as bytes."""

    train: tuple
    validation: tuple
    test: tuple
    steps_per_epoch: int
    sha256: str
    first_images: tuple


def load_data(args, run, device):
    """Read the images and cut them into parts.

    Raises      DataError; UsageError for a run that is resumed with other images than it began with
    """
    try:
        data = run.ranks.first(read_data, args.data)
    except cifar10.DataError as error:
        if not run.resumed:
            raise
        raise cifar10.DataError(f"{error}; or name its data by --data DIR") from error
    sha256 = data.sha256()
    if run.resumed and sha256 != run.settings.get("data_sha256"):
        raise UsageError(f"the images are not those that the run in {run.folder} began with: name its data by --data")
    train_index, validation_index = cifar10.split(len(data.train_images), seed=args.seed)
    if args.full_train:
        train_index, validation_index = np.arange(len(data.train_images)), np.arange(0)
    limit = args.limit_batches * args.batch_size if args.limit_batches else None
    return Data(
        train=tuple(to_device(array[train_index], device) for array in (data.train_images, data.train_labels)),
        validation=(data.train_images[validation_index][:limit], data.train_labels[validation_index][:limit]),
        test=(data.test_images[:limit], data.test_labels[:limit]),
        steps_per_epoch=min(math.ceil(len(train_index) / args.batch_size), args.limit_batches or math.inf),
        sha256=sha256,
        first_images=(data.train_images[:50], data.train_labels[:50]),
    )


def check_parts(args, run, data):
    """Refuse batches, of which the last is the smallest, of which a process would have no image, where it needs one."""
    images = min(len(data.train[1]), data.steps_per_epoch * args.batch_size)
    passes = [images, min(images, STATISTICS_IMAGES)] if args.ema else [images]
    smallest = min((count - 1) % args.batch_size + 1 for count in passes)
    on_gpu = not isinstance(data.train[0], np.ndarray)
    if (args.local_batch_norm or on_gpu) and smallest < run.ranks.size:
        what = "--local-batch-norm" if args.local_batch_norm else "--device gpu"
        raise UsageError(
            f"{what} takes an image of every batch for each of the {run.ranks.size} processes, and the "
            f"smallest has {smallest}: start fewer processes, or choose another --batch-size than {args.batch_size}"
        )


def make_model(args):
    return minires.ResNet(
        args.blocks,
        args.channels,
        dropout=args.dropout,
        shortcut=not args.no_shortcut,
        batch_norm=not args.no_batch_norm,
        seed=args.seed,
    )


def make_optimizer(args, model):
    settings = {
        "weight_decay": args.weight_decay,
        "decay_vectors": args.decay_vectors,
        "max_norm": args.clip or math.inf,
    }
    for module in model.modules():
        if isinstance(module, minires.BatchNorm2d):
            module.bias.lr_factor = args.bias_lr
    if args.optimizer == "adam":
        return minires.Adam(model.parameters(), args.lr, **settings)
    if args.optimizer == "muon":
        settings["filter_lr"] = args.filter_lr
    optimizer = {"sgd": minires.SGD, "muon": minires.Muon}[args.optimizer]
    return optimizer(model.parameters(), args.lr, args.momentum, args.nesterov, **settings)


def begin(args, run, data, model, optimizer, average):
    """Let the run begin, or go to where it was stopped, and say what it is."""
    settings = {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}
    run.track(
        model,
        optimizer,
        average,
        epochs=args.epochs,
        steps_per_epoch=data.steps_per_epoch,
        settings=settings | {"data_sha256": data.sha256},
        free=FREE_IN_A_RESUMED_RUN,
        checkpoint_every=args.checkpoint_every,
        check_every=1 if args.debug else None,
    )
    parts = (len(labels) for _, labels in (data.train, data.validation, data.test))
    pids = run.ranks.gather(os.getpid())  # a launcher tells of a process that was killed by this number
    together = f"processes {', '.join(map(str, pids))} (rank 0 to {len(pids) - 1}), " if 1 < len(pids) <= 16 else ""
    print(
        f"{model.num_parameters():,} parameters, {{:,}} training, {{:,}} validation and {{:,}} test images, "
        f"device {run.settings['device']}, {together}run folder {run.folder}".format(*parts),
        flush=True,
    )
    images, labels = data.first_images
    names = [cifar10.CLASSES[label] for label in labels]
    run.ranks.first(draw, "plot_images", images, names, run.folder / "images.png")


def batches(args, run, data, epoch, dtype):
    """The batches of an epoch, in its own order."""
    images, labels = data.train
    order = np.random.default_rng([args.seed, epoch]).permutation(len(images))[: data.steps_per_epoch * args.batch_size]
    order = to_device(order, "cpu" if isinstance(images, np.ndarray) else "gpu")
    return Batches(images, labels, order, args.batch_size, functools.partial(transform, args, epoch, dtype), run.ranks)


def statistics_batches(args, run, data, epoch):
    """The first images of an epoch, as the network has been given them, for the statistics of averaged weights."""
    first = batches(args, run, data, epoch, "float32")
    first.order = first.order[:STATISTICS_IMAGES]
    return (images for images, _ in first)


def transform(args, epoch, dtype, images, index, start):
    """Augment images of the training set and normalise them, as Batches asks for it."""
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
    if args.early_size and 2 * epoch <= args.epochs:
        images = resize(images, args.early_size)
    return normalize(images, cifar10.MEAN, cifar10.STD, dtype)


def validate(args, run, data, model):
    """Let the run keep the weights with the lowest validation loss, or the last ones if all images are trained on."""
    if args.full_train:
        run.keep_weights()
    else:
        run.validate(functools.partial(measure, model, data.validation, run))


def measure(model, images_and_labels, run, tta=False):
    settings = {"tta": tta, "stop": run.stop_if_asked, "predict": run.ranks.predict_logits}
    return evaluate(model, *images_and_labels, cifar10.MEAN, cifar10.STD, **settings)


def test(args, run, data, model):
    """Measure the weights that were kept, on the test images alone and with their mirror images; write the result."""
    images, labels = data.test
    logits = run.ranks.predict_logits(model, images, cifar10.MEAN, cifar10.STD, stop=run.stop_if_asked)
    result, mirrored = {"test_loss": float(minires.SoftmaxCrossEntropy()(logits, labels))}, ""
    result["test_accuracy"] = float((logits.argmax(axis=1) == labels).mean())
    if args.tta:
        result["test_loss_tta"], result["test_accuracy_tta"] = measure(model, data.test, run, tta=True)
        mirrored = f"{result['test_accuracy_tta']:.2%} with their mirror images, "
    result = run.finish(result | {"test_images": len(labels)})
    print(
        f"test loss {result['test_loss']:.4f}, test accuracy {result['test_accuracy']:.2%} on {len(labels):,} images, "
        f"{mirrored}with the weights of epoch {result['best_epoch']}; {result['seconds']:.0f} s"
    )
    run.ranks.first(report_on, run, images, labels, logits)


def report_on(run, images, labels, logits):
    try:
        write_report(run.folder, images, labels, logits)
    except Exception as error:  # the run has its result, whatever is wrong with the page about it
        note(f"no report {run.folder / REPORT}: {error}")


def attempt(args):
    return "begin a new run with" if args.resume else "try"


def main():
    ranks = processes("--distributed" in sys.argv)
    args, given = parse_arguments()
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # a loss that is not finite ends the run with more grace
    try:
        flags = {"folder_flag": "--out", "resume_flag": "--resume"}
        with Run(args.resume or args.out, resume=args.resume is not None, **flags, ranks=ranks) as run:
            if run.resumed:
                args = resumed_arguments(args, given, run.settings)
            if run.finished:
                print(f"the run in {run.folder} is finished, see {run.folder / 'result.json'}")
            else:
                train(args, run)
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}; {attempt(args)} a smaller --lr than {args.lr}") from error
    except MemoryError as error:  # CuPy's is one as well
        smaller = f"{attempt(args)} --batch-size {max(2, args.batch_size // 2)}"
        size = f"{memory_shortage(error)} with batches of {args.batch_size}"
        raise MemoryError(f"{size}; {smaller}; a run that had begun is in its last checkpoint") from error
    return 0


if __name__ == "__main__":
    run_script(main, functools.partial(processes, "--distributed" in sys.argv))
