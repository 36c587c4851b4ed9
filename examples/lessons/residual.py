"""Lesson 5: twenty blocks with and without the sum, side by side: the gradient on its way back, and what is learned.

python examples/lessons/residual.py
"""

import argparse

import numpy as np

from minires import SGD, BasicBlock, Batches, ResNet, SoftmaxCrossEntropy, cifar10
from minires.augment import normalize
from minires.training.arguments import at_least
from minires.training.script import run_script

CHANNELS, EPOCHS, BATCH_SIZE, LR = 8, 3, 50, 0.3


def halved_images():
    """Return the sample's training images, normalised, each pixel the mean of four, and their labels.

    Shapes      (1000, 16, 16, 3), (1000,)
    """
    data = cifar10.load_sample()
    images = normalize(data.train_images, cifar10.MEAN, cifar10.STD)  # (1000, 32, 32, 3)
    return images.reshape(-1, 16, 2, 16, 2, 3).mean(axis=(2, 4)), data.train_labels


def network(blocks, shortcut, seed):
    return ResNet((blocks,), (CHANNELS,), dropout=0.0, shortcut=shortcut, seed=seed)


def gradient_norms(model, images, labels):
    """Return the norm of the gradient that leaves each block on the way back, first block first."""
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock)]
    norms = []

    def watch(block):
        backward = block.backward

        def watched(dout):
            dx = backward(dout)
            norms.append(np.linalg.norm(dx))
            return dx

        block.backward = watched  # hides the method of the class

    for block in blocks:
        watch(block)
    loss_function = SoftmaxCrossEntropy()
    loss_function(model(images), labels)
    model.backward(loss_function.backward())
    for block in blocks:
        del block.backward
    return np.array(norms[::-1])


def agreement(model, images, labels, batches=6):
    """Return the mean cosine between the gradients that batches of 100 images give to the first block's first weights.

    1 if all batches say the same of how these weights should move, 0 if what one says tells nothing of the others.
    """
    loss_function, weight = SoftmaxCrossEntropy(), model.layer1.layers()[0].conv1.weight
    units = []
    for start in range(0, 100 * batches, 100):
        weight.grad[...] = 0
        loss_function(model(images[start : start + 100]), labels[start : start + 100])
        model.backward(loss_function.backward())
        units.append(weight.grad.ravel() / np.linalg.norm(weight.grad))
    cosines = np.array(units) @ np.array(units).T  # (batches, batches), with 1 for each batch and itself
    return (cosines.sum() - batches) / (batches * (batches - 1))


def train(model, images, labels, seed):
    """Train, and return the mean loss of the last epoch."""
    loss_function, optimizer = SoftmaxCrossEntropy(), SGD(model.parameters(), LR)
    for epoch in range(EPOCHS):
        losses = []
        order = np.random.default_rng([seed, epoch]).permutation(len(images))
        for x, labels_of_x in Batches(images, labels, order, BATCH_SIZE):
            optimizer.zero_grad()
            losses.append(loss_function(model(x), labels_of_x))
            model.backward(loss_function.backward(), need_dx=False)
            optimizer.step()
    return np.mean(losses)


def main():
    parser = argparse.ArgumentParser(description="Twenty blocks, plain and residual.", allow_abbrev=False)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the weights and the order of the images")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    args = parser.parse_args()

    images, labels = halved_images()
    mixed = np.random.default_rng(args.seed).permutation(len(images))
    for name, shortcut in (("plain", False), ("residual", True)):
        norms = gradient_norms(network(20, shortcut, args.seed), images[:100], labels[:100])
        print(f"{name}, gradient at blocks 1, 5, 10, 15, 20:", *(f"{norms[i - 1]:.1e}" for i in (1, 5, 10, 15, 20)))
        for start, end in ((20, 11), (10, 1)):
            growth = (norms[end - 1] / norms[start - 1]) ** (1 / (start - end))
            print(f"{name}, growth per block from {start} to {end}: {growth:.2f}")
        agreed = agreement(network(20, shortcut, args.seed), images[mixed], labels[mixed])
        print(f"{name}, agreement of batches in block 1: {agreed:.2f}")

    for name, blocks, shortcut in (("plain", 2, False), ("plain", 20, False), ("residual", 20, True)):
        loss = train(network(blocks, shortcut, args.seed), images, labels, args.seed)
        print(f"{name}, {blocks} blocks, loss of epoch {EPOCHS}: {loss:.2f}")


if __name__ == "__main__":
    run_script(main)
