"""Lesson 1: a linear classifier of images, every step of its training written out.

python examples/lessons/linear_classifier.py
"""

import argparse

import numpy as np

from minires import cifar10
from minires.augment import normalize
from minires.kernels.reference import (
    linear_backward,
    linear_forward,
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
)
from minires.training.arguments import at_least
from minires.training.script import run_script

EPOCHS, BATCH_SIZE, LR = 10, 50, 1e-3


def rows(images):
    """Return each image as one row of numbers, about as often below 0 as above, most between -2 and 2.

    Shapes      images (N, 32, 32, 3) of bytes  ->  (N, 3072)
    """
    return normalize(images, cifar10.MEAN, cifar10.STD).reshape(len(images), -1)


def accuracy(x, labels, weight, bias):
    """The share of images whose own class has the largest score."""
    scores = linear_forward(x, weight, bias)  # (N, 10)
    return np.mean(scores.argmax(axis=1) == labels)


def main():
    parser = argparse.ArgumentParser(description="Train a linear classifier on 1,000 images.", allow_abbrev=False)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the order of the images")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)

    data = cifar10.load_sample()
    x_train, x_test = rows(data.train_images), rows(data.test_images)  # (1000, 3072), (500, 3072)
    weight, bias = np.zeros((3072, 10), np.float32), np.zeros(10, np.float32)

    for epoch in range(EPOCHS):  # in an epoch every image is seen once
        order = rng.permutation(len(x_train))
        for start in range(0, len(order), BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            x, labels = x_train[batch], data.train_labels[batch]  # (50, 3072), (50,)
            logits = linear_forward(x, weight, bias)  # (50, 10)
            loss, probabilities = softmax_cross_entropy_forward(logits, labels)
            if epoch == start == 0:
                print(f"loss before the first step: {loss:.3f}")
            dlogits = softmax_cross_entropy_backward(1.0, probabilities, labels)  # (50, 10)
            _, dweight, dbias = linear_backward(dlogits, x, weight)  # nobody asks for dx, the gradient of the images
            weight -= LR * dweight
            bias -= LR * dbias

    print(f"loss of the last batch: {loss:.3f}")
    print(f"training accuracy: {accuracy(x_train, data.train_labels, weight, bias):.1%}")
    print(f"test accuracy: {accuracy(x_test, data.test_labels, weight, bias):.1%}")


if __name__ == "__main__":
    run_script(main)
