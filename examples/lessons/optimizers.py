"""Three small worlds in which an optimizer shows what it does: a valley, a bowl with noise, a network of two layers.

    python examples/lessons/optimizers.py

The first two have so few numbers that what happens can be worked out by hand; the third is trained on the images that
come with minires.
"""

import argparse
import functools
import math

import numpy as np

import minires
from minires import cifar10
from minires.augment import normalize
from minires.training.arguments import at_least
from minires.training.script import run_script

NARROW = 100.0  # how many times as steep the walls of the valley are as its floor
STEPS, COPIES = 300, 10_000  # in the bowl with noise
EPOCHS, BATCH_SIZE, HIDDEN = 10, 50, 64  # of the network


def steps_down_a_valley(make_optimizer, angle=0.0):
    """Count the steps from a distance of 1.4 to 0.001 from the minimum, in a valley along an axis, or turned.

    The loss is (a^2 + NARROW b^2) / 2, where a is the distance along the valley and b the distance across it.
    """
    axes = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])  # along, across
    curvature = axes @ np.diag([1.0, NARROW]) @ axes.T
    w = minires.Parameter(axes @ np.ones(2))
    optimizer, steps = make_optimizer([w]), 0
    while np.linalg.norm(w.data) > 0.001:
        w.grad[...] = curvature @ w.data
        optimizer.step()
        steps += 1
    return steps


def mean_square_in_a_noisy_bowl(schedule, lr, rng):
    """Minimise w^2 / 2 from w = 1 with gradients w + noise, COPIES times at once; return the mean of w^2 at the end."""
    w = minires.Parameter(np.ones(COPIES))
    optimizer = minires.SGD([w], lr)
    for step in range(STEPS):
        optimizer.lr = schedule(step, STEPS, lr)
        w.grad[...] = w.data + rng.standard_normal(COPIES)
        optimizer.step()
    return float((w.data**2).mean())


def training_loss(make_optimizer, data, seed, factor=1.0):
    """Train a network of two layers, with the loss multiplied by a factor; return its loss on all training images."""
    rng = np.random.default_rng(seed)
    model = minires.Sequential(
        minires.Flatten(), minires.Linear(3072, HIDDEN, rng=rng), minires.ReLU(), minires.Linear(HIDDEN, 10, rng=rng)
    )
    loss_function, optimizer = minires.SoftmaxCrossEntropy(), make_optimizer(model.parameters())
    images = normalize(data.train_images, cifar10.MEAN, cifar10.STD)
    for _ in range(EPOCHS):
        for x, labels in minires.Batches(images, data.train_labels, rng.permutation(len(images)), BATCH_SIZE):
            optimizer.zero_grad()
            loss_function(model(x), labels)
            model.backward(loss_function.backward(factor))
            optimizer.step()
    return minires.evaluate(model, data.train_images, data.train_labels, cifar10.MEAN, cifar10.STD)[0]


def main():
    parser = argparse.ArgumentParser(description="What SGD, momentum, Adam and a schedule do.", allow_abbrev=False)
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of all that is random; default 0")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    args = parser.parse_args()

    root = math.sqrt(NARROW)  # the best settings for this valley
    sgd = functools.partial(minires.SGD, lr=2 / (1 + NARROW))
    momentum = functools.partial(minires.SGD, lr=(2 / (1 + root)) ** 2, momentum=((root - 1) / (root + 1)) ** 2)
    adam = functools.partial(minires.Adam, lr=0.1)
    print(f"steps down the valley, SGD: {steps_down_a_valley(sgd)}")
    print(f"steps down the valley, momentum: {steps_down_a_valley(momentum)}")
    print(f"steps down the valley, Adam: {steps_down_a_valley(adam)}")
    for name, make in (("momentum", momentum), ("Adam", adam)):
        print(f"steps down the turned valley, {name}: {steps_down_a_valley(make, math.pi / 4)}")

    rng = np.random.default_rng(args.seed)
    for lr in (0.1, 0.4):
        found = mean_square_in_a_noisy_bowl(minires.constant, lr, rng)
        print(f"mean square, rate {lr}: {found:.4f}, and lr / (2 - lr) is {lr / (2 - lr):.4f}")
    print(f"mean square, cosine from 0.4: {mean_square_in_a_noisy_bowl(minires.cosine, 0.4, rng):.4f}")

    data = cifar10.load_sample()
    for name, make, factor in (
        ("SGD at 0.001", functools.partial(minires.SGD, lr=0.001), 1),
        ("SGD at 0.01", functools.partial(minires.SGD, lr=0.01), 1),
        ("momentum 0.9 at 0.001", functools.partial(minires.SGD, lr=0.001, momentum=0.9), 1),
        ("Adam at 0.001", functools.partial(minires.Adam, lr=0.001), 1),
        ("Adam, loss times 1000", functools.partial(minires.Adam, lr=0.001), 1000.0),
    ):
        print(f"training loss, {name}: {training_loss(make, data, args.seed, factor):.3f}", flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
