"""The training of first_training.py as a run: with checkpoints, a log, a progress bar, and an end that loses nothing.

    python examples/resumable_training.py runs/first        begin; stop it by Ctrl-C, or kill it
    python examples/resumable_training.py runs/first        the same command resumes it, to the same bits

What is new is the Run: `with`, `track`, its two generators around epochs and batches, `count`, `check` and `validate`.
"""

import pathlib
import sys

import numpy as np

import minires
from minires import cifar10
from minires.augment import normalize, random_flip
from minires.training import Run

SEED, EPOCHS, BATCH_SIZE = 0, 5, 50

data = cifar10.load_sample()
training, validation = cifar10.split(len(data.train_images), seed=SEED)
images, labels = data.train_images[training], data.train_labels[training]

model = minires.ResNet(blocks=(1, 1, 1), channels=(16, 32, 64), dropout=0.0, seed=SEED)
loss_function = minires.SoftmaxCrossEntropy()
optimizer = minires.Adam(model.parameters(), lr=3e-3)


def batches(epoch):
    def transform(images, index, start):
        return normalize(random_flip(images, SEED, epoch, start), cifar10.MEAN, cifar10.STD)

    order = np.random.default_rng([SEED, epoch]).permutation(len(images))
    return minires.Batches(images, labels, order, BATCH_SIZE, transform)


def measure(images, labels):
    return minires.evaluate(model, images, labels, cifar10.MEAN, cifar10.STD, stop=run.stop_if_asked)


with Run(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "runs/first")) as run:
    run.track(model, optimizer, epochs=EPOCHS, steps_per_epoch=len(batches(1)), settings={"seed": SEED})
    for epoch in run.epochs():
        for x, y in run.steps(batches(epoch)):
            optimizer.zero_grad()
            logits = model(x)
            loss = loss_function(logits, y)
            model.backward(loss_function.backward())
            run.count(loss, logits, y)
            run.check(loss)
            optimizer.step()
        run.validate(lambda: measure(data.train_images[validation], data.train_labels[validation]))
    test_loss, test_accuracy = measure(data.test_images, data.test_labels)
    run.finish({"test_loss": test_loss, "test_accuracy": test_accuracy})
    print(f"test loss {test_loss:.3f}, {test_accuracy:.1%} of the test images are right")
