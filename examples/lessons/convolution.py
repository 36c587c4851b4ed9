"""Lesson 3: a convolution is a matrix product; its two backwards; and what a network of two convolutions learns.

python examples/lessons/convolution.py
"""

import argparse

import numpy as np

from minires import SGD, Batches, Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential, SoftmaxCrossEntropy, cifar10
from minires.augment import normalize
from minires.evaluation import evaluate
from minires.kernels.reference import col2im, conv2d_forward, im2col
from minires.training.arguments import at_least
from minires.training.script import run_script

EPOCHS, BATCH_SIZE, LR = 10, 50, 0.02


def conv2d_by_loops(x, weight):
    """A convolution as it is defined: at each position of the window, for each filter, a sum of products."""
    N, H, W, _ = x.shape
    kh, kw, _, O = weight.shape
    out = np.zeros((N, H - kh + 1, W - kw + 1, O))
    for n, i, j, o in np.ndindex(out.shape):
        out[n, i, j, o] = np.sum(x[n, i : i + kh, j : j + kw] * weight[:, :, :, o])
    return out


def network(rng):
    """Images (N, 32, 32, 3) to scores (N, 10); each pooling halves height and width."""
    return Sequential(
        Conv2d(3, 16, 3, padding=1, rng=rng),  # (N, 32, 32, 16)
        ReLU(),
        MaxPool2d(2),  # (N, 16, 16, 16)
        Conv2d(16, 32, 3, padding=1, rng=rng),  # (N, 16, 16, 32)
        ReLU(),
        MaxPool2d(2),  # (N, 8, 8, 32)
        Flatten(),  # (N, 2048)
        Linear(2048, 10, rng=rng),
    )


def main():
    parser = argparse.ArgumentParser(description="Convolutions: as loops, as a product, trained.", allow_abbrev=False)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the weights and the order of the images")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)

    x, weight = rng.standard_normal((2, 6, 6, 3)), rng.standard_normal((3, 3, 3, 4))
    out = conv2d_forward(x, weight)  # (2, 4, 4, 4)
    print(f"loops less matrix product: {np.abs(conv2d_by_loops(x, weight) - out).max():.1e}")
    columns = rng.standard_normal((2, 4, 4, 27))
    left, right = np.sum(im2col(x, (3, 3), 1, 0) * columns), np.sum(x * col2im(columns, x.shape, (3, 3), 1, 0))
    print(f"sum of im2col(x) c less sum of x col2im(c): {abs(left - right):.1e}")
    moved = conv2d_forward(x[:, :, 1:], weight)  # all that is seen moves one pixel to the left
    print(f"output of a moved image less moved output: {np.abs(moved - out[:, :, 1:]).max():.1e}")

    data = cifar10.load_sample()
    model = network(rng)
    print(f"parameters: {model.num_parameters():,}")
    loss_function, optimizer = SoftmaxCrossEntropy(), SGD(model.parameters(), LR)  # parameter -= LR * gradient
    images = normalize(data.train_images, cifar10.MEAN, cifar10.STD)
    for _ in range(EPOCHS):
        order = rng.permutation(len(images))
        for x, labels in Batches(images, data.train_labels, order, BATCH_SIZE):
            optimizer.zero_grad()
            loss_function(model(x), labels)
            model.backward(loss_function.backward())
            optimizer.step()
    for name, images, labels in (
        ("training", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        print(f"{name} accuracy: {evaluate(model, images, labels, cifar10.MEAN, cifar10.STD)[1]:.1%}")


if __name__ == "__main__":
    run_script(main)
