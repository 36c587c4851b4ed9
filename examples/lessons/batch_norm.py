"""Lesson 4: the backward of BatchNorm, right and with its sums forgotten; and a network with and without BatchNorm.

python examples/lessons/batch_norm.py
"""

import argparse

import numpy as np

from minires import (
    SGD,
    Batches,
    BatchNorm2d,
    Bias2d,
    Conv2d,
    GlobalAvgPool2d,
    Linear,
    MaxPool2d,
    Module,
    Sequential,
    SoftmaxCrossEntropy,
    check_gradients,
    cifar10,
)
from minires.augment import normalize
from minires.training.arguments import at_least
from minires.training.script import run_script

EPOCHS, BATCH_SIZE = 4, 50


class Normalise(Module):
    """x_hat = (x - mean) / deviation of each column of x (M, C), without scale and shift."""

    def forward(self, x):
        x_hat, rstd = (x - x.mean(axis=0)) / x.std(axis=0), 1 / x.std(axis=0)
        self._keep(x_hat, rstd)
        return x_hat

    def backward(self, dout):
        x_hat, rstd = self._take_cache()
        return rstd * (dout - dout.mean(axis=0) - x_hat * (dout * x_hat).mean(axis=0))


class NormaliseWithoutSums(Normalise):
    """The same with the backward that one writes first: as if mean and deviation did not depend on x."""

    def backward(self, dout):
        _, rstd = self._take_cache()
        return rstd * dout


def largest_dx(dout, x):
    layer = Normalise()
    layer(x)
    return np.abs(layer.backward(dout)).max()


def network(norm, rng):
    """Three convolutions, each followed by BatchNorm2d or by Bias2d, which only adds a number to each channel."""
    return Sequential(
        Conv2d(3, 16, 3, padding=1, bias=False, rng=rng),
        norm(16, relu=True),
        MaxPool2d(2),
        Conv2d(16, 32, 3, padding=1, bias=False, rng=rng),
        norm(32, relu=True),
        MaxPool2d(2),
        Conv2d(32, 64, 3, padding=1, bias=False, rng=rng),
        norm(64, relu=True),
        GlobalAvgPool2d(),
        Linear(64, 10, rng=rng),
    )


def train(model, images, labels, lr, rng):
    """Train, and return the mean loss of the last epoch."""
    loss_function, optimizer = SoftmaxCrossEntropy(), SGD(model.parameters(), lr)
    for _ in range(EPOCHS):
        losses = []
        for x, labels_of_x in Batches(images, labels, rng.permutation(len(images)), BATCH_SIZE):
            optimizer.zero_grad()
            losses.append(loss_function(model(x), labels_of_x))
            model.backward(loss_function.backward())
            optimizer.step()
    return np.mean(losses)


def main():
    parser = argparse.ArgumentParser(description="BatchNorm: its backward, and its worth.", allow_abbrev=False)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the weights and the order of the images")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)

    x = rng.standard_normal((8, 3))
    print(f"error of the backward: {check_gradients(Normalise(), x)['x']:.1e}")
    errors = check_gradients(NormaliseWithoutSums(), x, tolerance=np.inf)  # measured, not refused
    print(f"error without the two sums: {errors['x']:.1e}")
    print(f"largest dx for dout of ones: {largest_dx(np.ones((8, 3)), x):.1e}")
    print(f"largest dx for a random dout: {largest_dx(rng.standard_normal((8, 3)), x):.1e}")

    data = cifar10.load_sample()
    images = normalize(data.train_images, cifar10.MEAN, cifar10.STD)
    for norm in (Bias2d, BatchNorm2d):
        for lr in (0.1, 1.0):
            same_start = np.random.default_rng(args.seed)
            with np.errstate(over="ignore", invalid="ignore"):  # too large a step may end in numbers that are none
                loss = train(network(norm, same_start), images, data.train_labels, lr, same_start)
            print(f"loss with {norm.__name__}, lr {lr}: {loss:.2f}")


if __name__ == "__main__":
    run_script(main)
