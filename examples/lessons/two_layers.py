"""Lesson 2: two layers and their backward by hand; whether it is right; and what two layers can learn.

python examples/lessons/two_layers.py
"""

import argparse
import math

import numpy as np
from linear_classifier import rows

from minires import cifar10
from minires.kernels.reference import (
    linear_backward,
    linear_forward,
    relu_backward,
    relu_forward,
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
)
from minires.training.arguments import at_least
from minires.training.script import run_script

HIDDEN, EPOCHS, BATCH_SIZE, LR = 100, 20, 50, 0.03


def forward(x, weight1, bias1, weight2, bias2):
    """Return the scores, and what lies between the layers, which backward needs."""
    hidden = relu_forward(linear_forward(x, weight1, bias1))  # (N, 100)
    return linear_forward(hidden, weight2, bias2), hidden  # (N, 10)


def backward(dlogits, x, hidden, weight1, weight2):
    """Return the gradients of weight1, bias1, weight2 and bias2: the forward's steps, last one first."""
    dhidden, dweight2, dbias2 = linear_backward(dlogits, hidden, weight2)
    dsum = relu_backward(dhidden, hidden)  # of x @ weight1 + bias1
    _, dweight1, dbias1 = linear_backward(dsum, x, weight1)
    return dweight1, dbias1, dweight2, dbias2


def mixed_up_backward(dlogits, *others):
    """A backward with a mistake: each image is given the gradient of another one."""
    return backward(dlogits[::-1], *others)


def gradient_error(backward, dout, h, seed):
    """Compare a backward with what the forward does when all parameters move a little, along a random direction.

    Args        dout: makes a loss of the scores, sum(dout * scores), whose gradient by the scores is dout; h: how far
    """
    rng = np.random.default_rng([seed, 1])
    x, parameters = rng.standard_normal((len(dout), 20)), initial_parameters(rng, 20, 30)
    directions = [rng.standard_normal(parameter.shape) for parameter in parameters]

    def loss_at(h):
        moved = [parameter + h * direction for parameter, direction in zip(parameters, directions, strict=True)]
        return np.sum(dout * forward(x, *moved)[0])

    hidden = forward(x, *parameters)[1]
    gradients = backward(dout, x, hidden, parameters[0], parameters[2])
    claim = sum(np.sum(gradient * direction) for gradient, direction in zip(gradients, directions, strict=True))
    truth = (loss_at(h) - loss_at(-h)) / (2 * h)
    return abs(claim - truth) / max(abs(claim), abs(truth))


def initial_parameters(rng, inputs, hidden):
    """Random weights that keep the scale of x (`Conv2d` derives it) and give scores near 0; biases of 0; in float64."""
    weight1 = rng.normal(0, math.sqrt(2 / inputs), (inputs, hidden))
    weight2 = rng.normal(0, 0.1 / math.sqrt(hidden), (hidden, 10))
    return weight1, np.zeros(hidden), weight2, np.zeros(10)


def train(data, parameters, rng):
    """Train as in lesson 1, and return the accuracies on the training and the test images."""
    x_train, x_test = rows(data.train_images), rows(data.test_images)
    parameters = [parameter.astype(np.float32) for parameter in parameters]
    for _ in range(EPOCHS):
        order = rng.permutation(len(x_train))
        for start in range(0, len(order), BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            x, labels = x_train[batch], data.train_labels[batch]
            logits, hidden = forward(x, *parameters)
            _, probabilities = softmax_cross_entropy_forward(logits, labels)
            dlogits = softmax_cross_entropy_backward(1.0, probabilities, labels)
            gradients = backward(dlogits, x, hidden, parameters[0], parameters[2])
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= LR * gradient
    pairs = (x_train, data.train_labels), (x_test, data.test_labels)
    return [np.mean(forward(x, *parameters)[0].argmax(axis=1) == labels) for x, labels in pairs]


def main():
    parser = argparse.ArgumentParser(description="Check and train a network of two layers.", allow_abbrev=False)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the weights and the order of the images")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)

    random, ones = rng.standard_normal((5, 10)), np.ones((5, 10))
    for exponent in range(-2, -13, -2):
        error = gradient_error(backward, random, 10.0**exponent, args.seed)
        print(f"right backward, random dout, h = 1e{exponent}: {error:.1e}")
    for name, dout in (("random dout", random), ("dout of ones", ones)):
        error = gradient_error(mixed_up_backward, dout, 1e-6, args.seed)
        print(f"mixed-up backward, {name}, h = 1e-6: {error:.1e}")

    data, parameters = cifar10.load_sample(), initial_parameters(rng, 3072, HIDDEN)
    training, test = train(data, parameters, rng)
    print(f"training accuracy: {training:.1%}")
    print(f"test accuracy: {test:.1%}")
    training, _ = train(data, [np.zeros_like(parameter) for parameter in parameters], rng)
    print(f"training accuracy with weights of 0: {training:.1%}")


if __name__ == "__main__":
    run_script(main)
