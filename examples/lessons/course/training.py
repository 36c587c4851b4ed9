"""A small residual network trained twice, step by step: with the learner's functions, and with minires's own.

Both have the same seeds, so that right functions give the same losses, but for rounding, and for what a learner's
dropout, cutout or initial weights draw in a way of their own.
"""

import collections
import functools
import inspect
import types
import unittest.mock

import numpy as np

import minires
from course.catalog import EXERCISES
from course.source import reference, reference_with
from minires import cifar10, kernels
from minires.augment import normalize, random_flip

SEED, BATCH_SIZE, LR, TEST_IMAGES = 0, 32, {"adam": 3e-3, "sgd": 0.05}, 200
SECONDS_FOR_A_STEP = 120.0


class Side:
    """A run: a model, its optimizer, and the functions that drive it."""

    def __init__(self, functions, optimizer):
        self.functions = functions
        own = {
            name: f for name, f in vars(functions).items() if inspect.isfunction(getattr(kernels.reference, name, None))
        }
        self.kernels = types.SimpleNamespace(**own)
        with unittest.mock.patch("minires.resnet.BasicBlock", functions.BasicBlock):
            self.model = minires.ResNet((1, 1, 1), (8, 16, 32), dropout=0.2, seed=SEED)
        rng = np.random.default_rng(SEED)
        for layer in self.model.modules():
            if isinstance(layer, minires.Conv2d):
                layer.weight.data[...] = functions.he_weight(
                    layer.kernel_size, layer.in_channels, layer.out_channels, rng
                )
        parameters = self.model.parameters()
        if optimizer == "adam":
            self.optimizer = minires.Adam(parameters, LR[optimizer])
        else:
            self.optimizer = minires.SGD(parameters, LR[optimizer], momentum=0.9, weight_decay=5e-4)
        self.peak, self.loss_function = LR[optimizer], minires.SoftmaxCrossEntropy()

    def step(self, images, labels, number, steps):
        """One step of training; return the loss before it."""
        images = random_flip(images, SEED, number)
        images = normalize(self.functions.cutout(images, SEED, number), cifar10.MEAN, cifar10.STD)
        with kernels.use(self.kernels):
            self.optimizer.lr = self.functions.half_cosine(number, steps, self.peak, 0.0)
            self.optimizer.zero_grad()
            loss = float(self.loss_function(self.model(images), labels))
            self.model.backward(self.loss_function.backward(), need_dx=False)
            self.optimizer.step()
        return loss

    def accuracy(self, data):
        with kernels.use(self.kernels):
            images, labels = data.test_images[:TEST_IMAGES], data.test_labels[:TEST_IMAGES]
            return minires.evaluate(self.model, images, labels, cifar10.MEAN, cifar10.STD)[1]


def train(learner, give, steps, optimizer, *names):
    """Train both, and say what of the learner's was called how often. Return the exit code."""
    steps, calls = int(steps), collections.Counter()
    calls.last = None

    def counted(name, function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            calls[name] += 1
            calls.last = name
            return function(*args, **kwargs)

        return wrapper

    for name in names:
        if inspect.isfunction(learner.own[name]):
            learner.own[name] = counted(name, learner.own[name])
        elif inspect.isclass(learner.own[name]):
            made = learner.own[name]
            made.forward = counted(name, made.forward)
    functions = reference_with({name: learner.own[name] for name in names})
    learner.use(functions)
    try:
        with np.errstate(all="ignore"):
            give(SECONDS_FOR_A_STEP)
            yours = Side(functions, optimizer)
            ours = Side(reference(), optimizer)
            run(yours, ours, cifar10.load_sample(), steps, give)
    except (Exception, SystemExit) as error:
        after = f"after {calls.last} of yours: " if calls.last else ""
        print(f"The training ended, {after}{learner.excuse(error)}")
        return 1
    used = ", ".join(f"{name} ({calls[name]})" for name in EXERCISES if calls[name])
    print(f"\nYours in this run, and how often it was called: {used or 'nothing'}.")
    unused = [name for name in names if not calls[name]]
    if unused:
        print(f"Yours, but not part of this network and its training: {', '.join(unused)}.")
    return 0


def run(yours, ours, data, steps, give):
    print("  step   loss with yours   loss with minires's", flush=True)
    order = np.random.default_rng(SEED).permutation(len(data.train_images))
    for number in range(steps):
        give(SECONDS_FOR_A_STEP)
        index = np.take(order, range(number * BATCH_SIZE, (number + 1) * BATCH_SIZE), mode="wrap")
        images, labels = data.train_images[index], data.train_labels[index]
        losses = [side.step(images, labels, number, steps) for side in (yours, ours)]
        if number % 10 == 9 or number in (0, steps - 1):
            print(f"{number + 1:6} {losses[0]:17.5f} {losses[1]:21.5f}", flush=True)
    give(SECONDS_FOR_A_STEP)
    accuracies = [f"{side.accuracy(data):.1%}" for side in (yours, ours)]
    print(f"  test {accuracies[0]:>17} {accuracies[1]:>21}   of {TEST_IMAGES} images right; guessing gives 10 %")
