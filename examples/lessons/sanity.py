"""Before a long run: six checks of a network, in less than a minute, on the images that come with minires.

    python examples/lessons/sanity.py                       the built-in network, with few channels
    python examples/lessons/sanity.py --full                all of it, 4,977,226 parameters
    python examples/lessons/sanity.py --module mine.py:Net  a Module of yours: Net() turns images (N, 32, 32, 3) into
                                                            logits (N, 10)

A network with a mistake in it trains all the same, only worse, and nobody knows what it could have reached. Each check
knows the answer beforehand: what the loss is when nothing is known, that a network can memorise 32 images, that it
learns less where there is nothing to see. The exit code is 1 if a check fails.

Source      Karpathy 2019, "A recipe for training neural networks"; the course CS231n of Stanford, "Babysitting the
            learning process", for the ratio of update to weight
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import math
import pathlib
import sys
import traceback
import warnings
from dataclasses import dataclass

import numpy as np

import minires
from minires import cifar10
from minires.augment import normalize
from minires.console import note
from minires.plots import figure_class
from minires.training import UsageError
from minires.training.arguments import at_least, positive
from minires.training.script import run_script

BATCH_SIZE, STEPS, OVERFIT_STEPS, EXPLODE_STEPS = 32, 50, 80, 15
OVERFITTED = 0.1  # a loss that is only reached with the images memorised, with or without dropout
LN_10 = math.log(10)  # the loss of ten classes that are equally likely
PICTURE = pathlib.Path("runs", "sanity.png")


@dataclass
class Scale:
    """What one step of training shows of a layer: standard deviations, and how far its weights move."""

    name: str
    activation: float = math.nan  # of its output
    gradient: float = 0.0  # of the gradient of its output; 0 if its backward is not called
    ratio: float | None = None  # |update| / |weight|, of its matrix or filters


def checks(make_model, images, labels, lr, trained, scales):
    """Yield (what is checked, what was found, what is wrong or None) for each check.

    Args        make_model: a function without arguments, called for each training anew; trained, scales: what `train`
                has returned for such a model, after STEPS steps, with the scales of the first and the last of them
    Shapes      images (M, 32, 32, 3) normalised, labels (M,)
    """
    yield "the loss at step 0 is ln 10", f"{trained[0]:.3f}, and ln 10 is {LN_10:.3f}", wrong_at_step_0(trained[0])

    few = images[:BATCH_SIZE], labels[:BATCH_SIZE]
    losses, _ = train(make_model(), batches(*few, OVERFIT_STEPS), lr, enough=lambda losses: last(losses) < OVERFITTED)
    found = f"loss {losses[0]:.3f} to {last(losses):.3f} in {len(losses)} steps"
    yield "32 images are overfitted", found, wrong_in_overfitting(losses)

    found = f"loss {trained[0]:.3f} to {last(trained):.3f} in {len(trained)} steps"
    yield f"the loss falls with lr {lr:g}", found, wrong_with_lr(trained)

    blind, _ = train(make_model(), batches(np.zeros_like(images), labels, STEPS // 2), lr)
    found = f"loss {last(blind):.3f} after {len(blind)} steps, and {last(trained[: len(blind)]):.3f} with the images"
    yield "zeroed inputs do worse", found, wrong_with_zeros(blind, trained)

    exploded, _ = train(make_model(), batches(images, labels, EXPLODE_STEPS), 100 * lr, enough=has_exploded)
    found = f"loss {exploded[0]:.3f} to {exploded[-1]:.3g} in {len(exploded)} steps"
    yield f"the loss explodes with 100 times the lr, {100 * lr:g}", found, wrong_with_100_lr(exploded)

    yield "each layer keeps the scale, and learns", scales_in_words(scales), wrong_scales(scales)


def batches(images, labels, steps):
    """Yield batches, as many as there are steps, in a new order in each epoch."""
    whole = len(images) // BATCH_SIZE * BATCH_SIZE
    orders = (np.random.default_rng([0, epoch]).permutation(len(images))[:whole] for epoch in itertools.count())
    epochs = (minires.Batches(images, labels, order, BATCH_SIZE) for order in orders)
    return itertools.islice(itertools.chain.from_iterable(epochs), steps)


def train(model, batches, lr, measured=(), enough=lambda losses: False):
    """Train a model by Adam, until a loss is not finite, `enough(losses)`, or no batch is left.

    Returns     the loss of each step; for each of the measured steps, which count from 1, the Scale of every layer
    """
    optimizer, loss_function = minires.Adam(model.parameters(), lr), minires.SoftmaxCrossEntropy()
    losses, scales = [], []
    for step, (images, labels) in enumerate(batches, 1):
        with watched(model) if step in measured else contextlib.nullcontext() as of_step:
            optimizer.zero_grad()
            losses.append(float(loss_function(model(images), labels)))
            model.backward(loss_function.backward())
            optimizer.step()
        if step in measured:
            scales.append(of_step)
        if not math.isfinite(losses[-1]) or enough(losses):
            break
    return losses, scales


@contextlib.contextmanager
def watched(model):
    """Measure what comes out of each layer, what comes back to it, and how far its weights move.

    Yields      a list of Scale, which fills until the block is left, one for each module with weights or without parts
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if list(layer.attributes(minires.Parameter)) or not list(layer.named_children())
    }
    scales = {name: Scale(name or "model") for name in layers}
    matrices = [  # biases and BatchNorm's parameters start at 0 and 1, and tell nothing
        (scales[name], parameter, parameter.data.copy())
        for name, layer in layers.items()
        for _, parameter in layer.attributes(minires.Parameter)
        if parameter.data.ndim >= 2
    ]

    def watch(layer, scale):
        forward, backward = layer.forward, layer.backward

        def watched_forward(*inputs, **named):
            out = forward(*inputs, **named)
            scale.activation = float(out.std())
            return out

        def watched_backward(dout, *options, **named):
            scale.gradient = float(dout.std())
            return backward(dout, *options, **named)

        layer.forward, layer.backward = watched_forward, watched_backward  # they hide the methods of the class

    for name, layer in layers.items():
        watch(layer, scales[name])
    try:
        yield list(scales.values())
    finally:
        for layer in layers.values():
            del layer.forward, layer.backward
    for scale, parameter, before in matrices:
        scale.ratio = float(np.linalg.norm(parameter.data - before) / np.linalg.norm(before))


def last(losses):
    """The mean of the last five losses; they differ from batch to batch."""
    return float(np.mean(losses[-5:]))


def wrong_at_step_0(loss):
    if not math.isfinite(loss):
        return "a number is not finite in the first forward pass: a division by 0, a logarithm of 0, or an overflow"
    if loss > LN_10 + 0.4:
        return "the last layer's weights are too large, or the loss is a sum over the batch where the mean is meant"
    if loss < LN_10 - 0.2:
        return "the labels are in the images, or the loss leaves something out"
    return None


def wrong_in_overfitting(losses):
    if last(losses) < OVERFITTED:
        return None
    if not last(losses) < losses[0]:
        return "steps go up the gradient, not down, or lr is far too large"
    return (
        "a gradient is wrong or does not flow back (see gradcheck.py), gradients are not set to 0 before each step, "
        "labels do not belong to their images, or the output is behind a dropout or a ReLU"
    )


def wrong_with_lr(trained):
    if last(trained) < trained[0] - 0.1:
        return None
    return "if 32 images can be overfitted, lr is too small or too large for this network; if not, see there"


def wrong_with_zeros(blind, trained):
    if not math.isfinite(blind[-1]):
        return "a layer divides by 0 where all its inputs are alike: is there an eps in the normalisation?"
    if not last(blind) > last(trained[: len(blind)]) + 0.05:
        return "the images teach it nothing: labels of other images, or a layer gives the same whatever comes in"
    return None


def has_exploded(losses):
    return not losses[-1] < 2 * losses[0]  # also if it is NaN


def wrong_with_100_lr(exploded):
    if has_exploded(exploded):
        return None
    return "the steps do not depend on lr, the gradients are 0, or lr is 100 times smaller than it could be"


def wrong_scales(scales):
    first, after = scales[0], scales[-1]
    # at both steps: where weights start at 0, nothing flows back through them at the first
    silent = [a.name for a, b in zip(first, after, strict=True) if a.gradient == b.gradient == 0]
    if silent:
        return f"nothing flows back to {silent[0]}: a backward leaves out a way on which it influences the loss"
    still = [scale.name for scale in after if scale.ratio == 0]
    if still:
        return f"the weights of {still[0]} do not move: its backward does not fill their gradient"
    large = [scale.activation for scale in first if scale.ratio is not None and scale.activation]
    if large and not max(large) < 1000 * min(large):
        return "the scale changes from layer to layer: initial weights of another variance than 2 / n (see Conv2d)"
    fast = [scale for scale in after if scale.ratio is not None and not 1e-5 < scale.ratio < 0.1]
    if fast:
        size = "small" if fast[0].ratio <= 1e-5 else "large"
        return f"a step moves the weights of {fast[0].name} by {fast[0].ratio:.0e} of their size: lr is too {size}"
    return None


def scales_in_words(scales):
    ratios = [scale.ratio for scale in scales[-1] if scale.ratio is not None]
    if not ratios:
        return "no layer has a matrix or filters"
    return f"a step moves weights by {min(ratios):.0e} to {max(ratios):.0e} of their size; about 1e-03 is usual"


def print_table(scales, steps):
    print(f"\n{'standard deviation of':20} {'output':>19} {'its gradient':>19} {'update / weight':>19}")
    print(f"{'at step':20}" + f" {steps[0]:9} {steps[-1]:9}" * 3)
    for first, after in zip(scales[0], scales[-1], strict=True):
        ratios = ["-" if scale.ratio is None else f"{scale.ratio:.1e}" for scale in (first, after)]
        print(
            f"{first.name:20} {first.activation:9.3f} {after.activation:9.3f} {first.gradient:9.1e} "
            f"{after.gradient:9.1e} {ratios[0]:>9} {ratios[1]:>9}"
        )


def draw(scales, steps, path):
    """Draw the table, where matplotlib is installed; nothing ends for want of a picture."""
    try:
        figure = figure_class()(figsize=(11, 4), layout="constrained")
        from matplotlib.ticker import NullFormatter

        panels = figure.subplots(1, 3)
        titles = ("deviation of the output", "deviation of its gradient", "update / weight")
        for axes, title, value in zip(panels, titles, ("activation", "gradient", "ratio"), strict=True):
            rows = [getattr(scale, value) is not None for scale in scales[0]]
            for step, of_step in zip(steps, scales, strict=True):
                named = [scale for scale, shown in zip(of_step, rows, strict=True) if shown]
                values = [getattr(scale, value) for scale in named]
                axes.plot(values, range(len(named)), "o-", ms=4, label=f"step {step}")
            axes.set_yticks(range(len(named)), [scale.name for scale in named], fontsize=6)
            axes.set(title=title, xscale="log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.invert_yaxis()  # the first layer on top
            axes.grid(alpha=0.3)
        panels[2].axvline(1e-3, color="gray", ls="--")
        panels[0].legend(fontsize=7)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        print(f"the same as a picture: {path}")
    except Exception as error:
        if getattr(error, "name", None) != "matplotlib":
            note(f"no picture {path}: {error}")


def load_class(text):
    """Return the Module subclass that file.py:ClassName names.

    Raises      UsageError
    """
    path, _, name = text.rpartition(":")
    if not path.endswith(".py") or not pathlib.Path(path).is_file():
        missing = ": no such file" if path.endswith(".py") else ""
        raise UsageError(f"--module expects FILE.py:CLASS, got {text}{missing}")
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(pathlib.Path(path).absolute().parent))  # it may import what lies beside it
    sys.modules.setdefault(spec.name, module)  # where dataclasses look
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, minires.Module)):
        raise UsageError(f"--module: {path} has no Module of the name {name}")
    return found


def line_of_theirs(error, path):
    """Return the error with the last line of a file on the way to it, for errors in a learner's Module."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if pathlib.Path(frame.filename).resolve() == path.resolve()
    ]
    where = f"{path.name}, line {frames[-1].lineno}, in {frames[-1].name}: {frames[-1].line}\n" if frames else ""
    return f"{where}{type(error).__name__}: {error}"


def main():
    parser = argparse.ArgumentParser(description="Six checks of a network, before a long run.", allow_abbrev=False)
    parser.add_argument("--full", action="store_true", help="the built-in network with all its channels")
    parser.add_argument("--module", metavar="FILE.py:CLASS", help="a Module of yours in place of the built-in network")
    parser.add_argument("--lr", type=positive, metavar="RATE", help="of Adam; default 0.003, with --full 0.001")
    parser.add_argument("--images", type=at_least(BATCH_SIZE), default=1000, metavar="N", help="of the sample; 1000")
    parser.add_argument("--picture", type=pathlib.Path, default=PICTURE, metavar="FILE", help=f"default {PICTURE}")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    args = parser.parse_args()

    channels = {} if args.full else {"blocks": (1, 1, 1), "channels": (16, 32, 64), "dropout": 0.0}
    make_model = load_class(args.module) if args.module else functools.partial(minires.ResNet, **channels)
    lr = args.lr or (1e-3 if args.full else 3e-3)
    data = cifar10.load_sample()
    images = normalize(data.train_images[: args.images], cifar10.MEAN, cifar10.STD)
    labels = data.train_labels[: args.images]
    failed = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numbers that overflow are what some checks look for
            trained, scales = train(make_model(), batches(images, labels, STEPS), lr, measured=(1, STEPS))
            for what, found, wrong in checks(make_model, images, labels, lr, trained, scales):
                print(
                    f"{'WRONG' if wrong else 'ok':6} {what}: {found}" + (f"\n       {wrong}" if wrong else ""),
                    flush=True,
                )
                failed += bool(wrong)
    except Exception as error:
        if args.debug or not args.module:
            raise
        note(f"error: {line_of_theirs(error, pathlib.Path(args.module.rpartition(':')[0]))}")
        return 1
    steps = (1, STEPS)[: len(scales)]  # fewer if a loss was not finite
    print_table(scales, steps)
    draw(scales, steps, args.picture)
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
