"""Train the residual network on CIFAR-10.

    python examples/train_cifar.py --data sample --epochs 10 --batch-size 50     the built-in sample, a first look
    python examples/train_cifar.py --data DIR                                    the whole data set, on CPU or GPU
    python examples/train_cifar.py --resume runs/my-run                          go on with a run that was stopped
    python examples/train_cifar.py --recipe fast                                 better in 30 epochs; best takes 200

The defaults are the recipe of the report "Residual Network Design": Adam at 0.001, batches of 128, 20 epochs, four
fifths of the training images to train on and one fifth to validate, random crop and flip, dropout before the last
layer, the weights with the lowest validation loss kept. recipes.py lists it and two others; each ingredient is an
option of its own, which overrides the recipe. The test images are looked at once, at the end.

The run folder holds config.json, log.csv (a row per epoch), best.safetensors (the weights; PyTorch reads them too),
checkpoint.safetensors (from which the run can go on, and previous.safetensors, the one before), result.json, and with
matplotlib curves.png and images.png. Ctrl-C, SIGTERM and SIGHUP end the run after the step at hand, with a checkpoint.
A run that was stopped, or killed, and resumed gives the same bits as one that never was.

Exit codes: 0 done, 1 something went wrong, 2 something was asked for that cannot be, 130 Ctrl-C, 143 SIGTERM, 129 the
terminal was closed, 141 nobody reads the output any more.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import math
import pathlib
import shlex
import sys
import time
import warnings

import numpy as np
from recipes import LOSS_SCALE, PRECISIONS, SCHEDULES, parse_arguments, position_of, print_changes, read_config, resumed
from run_folder import (
    Progress,
    UsageError,
    best_of,
    best_row_of,
    check_space,
    draw,
    interrupts,
    load_data,
    locked,
    print_row,
    run,
    run_folder,
    say,
    versions,
    write_json,
    write_log,
)

import minires
from minires import cifar10
from minires.augment import alternating_flip, cutout, normalize, random_crop, random_flip
from minires.backend import array_module, choose_device, memory_shortage, to_device
from minires.checkpoint import (
    PREVIOUS,
    load_checkpoint,
    load_model,
    part_of,
    remove_parts,
    restore_training_state,
    save_checkpoint,
    save_weights,
    training_state,
)
from minires.evaluate import evaluate, measure_statistics
from minires.finite import all_finite, first_not_finite
from minires.kernels import gpu
from minires.trivial_augment import trivial_augment

STEPS_BETWEEN_READINGS = {"cpu": 1, "gpu": 10}  # reading the loss waits for the GPU
IMAGES_AT_ONCE = {"cpu": 1, "gpu": 5120}  # that are augmented together: on a GPU, many small launches take longer
STATISTICS_IMAGES = 5000  # with which BatchNorm's statistics are measured for averaged weights, one in eight or ten


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
    if args.resume:
        held.enter_context(locked(args.resume))
        saved = load_checkpoint(args.resume)
        config = position_of(saved[1], args.resume)["config"] if saved else read_config(args.resume)
        args = resumed(args, given, config)
        if (args.out / "result.json").exists():
            print(f"the run in {args.out} is finished, see {args.out / 'result.json'}")
            return 0

    # Data: one split, images as bytes on the device
    device = choose_device(args.device)
    precision = choose_precision(args, device)
    dtype, loss_scale = PRECISIONS[precision], LOSS_SCALE if precision == "fp16" else 1.0
    data = load_data(args.data, args.resume)
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
    weights = sum(array.nbytes for array in model.state_dict().values())  # a checkpoint has those of the best epoch too
    state = sum(array.nbytes for array in training_state(model, optimizer, average).values())
    check_space(args.out or pathlib.Path("runs"), checkpoint=state + weights, weights=weights)

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
            save_weights(out / "best.safetensors", best_model, best_row_of(history))
        if history:
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
        progress = Progress(
            f"epoch {epoch:{len(str(args.epochs))}}/{args.epochs}", batches_per_epoch, done, interrupted
        )
        order = to_device(order[: batches_per_epoch * args.batch_size], device)
        at_once = max(1, IMAGES_AT_ONCE[device] // args.batch_size)
        made = batches(train_images, train_labels, order, args, epoch, dtype, at_once, start=done * args.batch_size)
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
        if time.monotonic() - saved_at >= 60 * args.checkpoint_every:
            save()
        print_row(row, len(history) == epochs_before + 1, interrupted)
        if interrupted:
            break

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
        command = [sys.executable, *(str(pathlib.Path(path).absolute()) for path in (sys.argv[0], out))]
        say(
            f"\ninterrupted in epoch {epoch}, after step {step} of {total_steps}; to go on from there:\n    "
            + shlex.join([*command[:2], "--resume", command[2]]),
            interrupted,
        )
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


def choose_precision(args, device):
    """Return how convolutions multiply in this process, and set it; the flag gets its default, for config.json.

    A run that was begun on a GPU can go on on a CPU, in float32.

    Raises      UsageError for a precision that needs tensor cores, where there are none
    """
    tensor_cores = device == "gpu" and minires.kernels.chosen() == "fast" and gpu.is_for(minires.backend.gpu_library())
    if args.precision is None:
        args.precision = "float32" if not tensor_cores else "tf32" if args.recipe == "report" else "fp16"
    if args.precision != "float32" and not tensor_cores and not args.resume:
        raise UsageError(f"--precision {args.precision} needs a GPU and its fast kernels; without, it is float32")
    if device == "gpu" and not tensor_cores:
        print("note: the reference kernels serve this GPU; the fast ones need compute capability 8.0", file=sys.stderr)
    precision = args.precision if tensor_cores else "float32"
    gpu.set_precision("float32" if precision == "float32" else "tf32")
    return precision


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


if __name__ == "__main__":
    run(main)
