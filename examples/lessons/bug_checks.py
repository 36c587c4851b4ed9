"""A check for each bug of bugs.py: it passes on minires as it is, and fails as long as the bug is there.

    python examples/lessons/bugs.py check 7 DIR     runs the one of bug 7 on the copy in DIR

A check measures the symptom, in as small a case as shows it, and says what it measured. They are a model for tests of
one's own: something is known beforehand (a sum, a mean, that two ways lead to the same), and the code has to agree.
"""

import argparse
import contextlib
import csv
import math
import pathlib
import sys
import tempfile
import types

import numpy as np

import minires
from minires import cifar10, kernels, plots
from minires.augment import normalize, random_flip
from minires.evaluation import averaged_weights, measure_statistics
from minires.gradcheck import require
from minires.training import Run

rng = np.random.default_rng(0)


def few_images(count):
    """The first images of the sample, normalised, and their labels."""
    data = cifar10.load_sample()
    return normalize(data.train_images[:count], cifar10.MEAN, cifar10.STD), data.train_labels[:count]


def small_network(dropout=0.0):
    return minires.ResNet(blocks=(1,), channels=(8,), dropout=dropout, seed=0)


def vector(*numbers):
    """A Parameter for trying an optimizer."""
    return minires.Parameter(np.array(numbers))


def train_cifar():
    """The module examples/train_cifar.py of the project whose minires this is."""
    sys.path.insert(0, str(pathlib.Path(minires.__file__).parent.parent / "examples"))
    import train_cifar

    return train_cifar


def steps_go_downhill():
    p = vector(1.0)
    optimizer = minires.Adam([p], lr=0.1)
    for _ in range(5):
        p.grad[...] = 2 * p.data  # of the loss p^2
        optimizer.step()
    require(p.data**2 < 1, f"the loss w^2 began at 1, and after five steps of Adam it is {p.data[0] ** 2:.2f}")


def loss_begins_at_ln_10():
    images, labels = few_images(32)
    loss = float(minires.SoftmaxCrossEntropy()(small_network()(images), labels))
    require(abs(loss - math.log(10)) < 0.4, f"the loss of a network that knows nothing is {loss:.2f}, not 2.30")


def black_images_are_finite():
    with np.errstate(all="ignore"):
        out = minires.BatchNorm2d(3)(np.zeros((4, 8, 8, 3), np.float32))
    require(np.isfinite(out).all(), f"of a batch of black images BatchNorm2d makes {out[0, 0, 0, 0]}")


def labels_stay_with_their_images():
    numbers = np.arange(20)
    for images, labels in minires.Batches(numbers, numbers, rng.permutation(20), batch_size=5):
        require((images == labels).all(), f"images {images} come with the labels of images {labels}")


def zero_grad_sets_gradients_to_0():
    p = vector(1.0)
    optimizer = minires.Adam([p])
    p.grad[...] = 3
    optimizer.zero_grad()
    require(p.grad == 0, f"a gradient of 3 is {p.grad[0]} after zero_grad")


def running_statistics_arrive():
    norm = minires.BatchNorm2d(1)
    for _ in range(100):
        norm(np.array([4, 6], np.float32).reshape(2, 1, 1, 1))
    mean = float(norm.running_mean.data[0])
    require(abs(mean - 5) < 0.01, f"after a hundred batches with the mean 5, the running mean is {mean:.2f}")


def evaluation_repeats_itself():
    network = small_network(dropout=0.5).eval()
    images, _ = few_images(4)
    require((network(images) == network(images)).all(), "in evaluation, the same images get other logits the next time")


def no_logit_is_dropped():
    logits = small_network(dropout=0.5)(few_images(16)[0])
    require((logits != 0).all(), f"{(logits == 0).mean():.0%} of the logits are exactly 0 in training")


def dropout_drops_p():
    share = float((minires.Dropout(0.2, rng=0)(np.ones((100, 100), np.float32)) == 0).mean())
    require(abs(share - 0.2) < 0.02, f"Dropout(0.2) sets {share:.0%} to 0")


def both_kernels_agree():
    images = rng.standard_normal((2, 6, 6, 3)).astype(np.float32)
    gradients = []
    for choice in ("fast", "reference"):
        with kernels.use(choice):
            layer = minires.Conv2d(3, 4, 3, padding=1, rng=0)
            gradients.append(layer.backward(np.ones_like(layer(images))))
    difference = float(np.abs(gradients[0] - gradients[1]).max())
    require(difference < 1e-4, f"the fast and the reference kernels give gradients that differ by {difference:.2f}")


def batch_norm_gives_variance_1():
    norm = minires.BatchNorm2d(1).to(dtype="float64")  # which the reference kernels serve
    var = float(norm(rng.standard_normal((10, 1, 1, 1))).var())
    require(abs(var - 1) < 0.01, f"BatchNorm2d makes the variance of a batch of ten {var:.2f}, not 1")


def shortcuts_have_gradients():
    block = minires.BasicBlock(3, 4, stride=2, rng=0)
    block.backward(np.ones_like(block(few_images(4)[0])))
    still = [name for name, parameter in block.named_parameters() if not parameter.grad.any()]
    require(not still, f"after a backward the gradient of {', '.join(still)} is 0")


def gradient_is_that_of_the_mean():
    logits, labels = rng.standard_normal((8, 10)), rng.integers(0, 10, 8)
    sums = []
    for times in (1, 4):
        loss = minires.SoftmaxCrossEntropy()
        loss(np.tile(logits, (times, 1)), np.tile(labels, times))
        sums.append(np.abs(loss.backward()).sum())
    require(np.isclose(*sums), f"with each image four times in the batch, gradients are {sums[1] / sums[0]:.1f} times")


def initial_weights_have_variance_2_over_n():
    ratio = float(minires.Conv2d(32, 64, 3, rng=0).weight.data.var()) / (2 / (9 * 32))
    require(abs(ratio - 1) < 0.1, f"a convolution's initial weights have {ratio:.2f} times the variance 2 / n")


def adam_moves_by_lr():
    p = vector(0.0)
    optimizer = minires.Adam([p], lr=0.01)
    for _ in range(20):
        before = float(p.data[0])
        p.grad[...] = 5
        optimizer.step()
    step = before - float(p.data[0])
    require(abs(step - 0.01) < 1e-4, f"with a constant gradient and lr 0.01, the 20th step of Adam is {step:.3f}")


def weights_decay_once():
    p = vector(1.0)
    minires.SGD([p], lr=0.1, weight_decay=0.1).step()
    require(
        abs(p.data[0] - 0.99) < 1e-6, f"lr 0.1 and weight decay 0.1 leave {p.data[0]:.4f} of a weight of 1, not 0.99"
    )


def rate_comes_down():
    few = ["--epochs", "2", "--batch-size", "10", "--limit-batches", "3", "--channels", "4", "4", "4", "4"]
    plots.plot_images = plots.plot_curves = lambda *_: None  # they take longer than this training
    with tempfile.TemporaryDirectory() as folder:
        run = pathlib.Path(folder, "run")
        sys.argv = [
            "train_cifar.py",
            "--data",
            "sample",
            "--device",
            "cpu",
            *few,
            "--schedule",
            "cosine",
            "--lr",
            "1",
            "--out",
            str(run),
        ]
        with contextlib.redirect_stdout(None):
            train_cifar().main()
        with (run / "log.csv").open() as file:
            rate = float(list(csv.DictReader(file))[-1]["lr"])
    expected = minires.cosine(5, 6, 1.0)
    require(abs(rate - expected) < 1e-6, f"the last rate of a cosine from 1 to 0 is {rate:.2f}, not {expected:.2f}")


def channels_are_colors():
    path = pathlib.Path(minires.__file__).parent / "cifar10" / "sample" / "data_batch_1.bin"
    red = np.frombuffer(path.read_bytes()[1:1025], np.uint8).reshape(32, 32)
    same = float((cifar10.load_sample().train_images[0, :, :, 0] == red).mean())
    require(
        same == 1, f"channel 0 of the first image agrees in {same:.0%} of its pixels with the red plane in the file"
    )


def flip_exchanges_left_and_right():
    image = np.array([[1, 2], [3, 4]], np.uint8).reshape(1, 2, 2, 1)
    rows = random_flip(image, key=0, epoch=1, p=1).reshape(2, 2).tolist()
    require(rows == [[2, 1], [4, 3]], f"the mirror image of [[1, 2], [3, 4]] is {rows}")


def accuracy_is_of_all_images():
    network, images = small_network(), cifar10.load_sample().test_images[:30]
    labels = minires.predict_logits(network, images, cifar10.MEAN, cifar10.STD).argmax(axis=1)
    labels[20:] = (labels[20:] + 1) % 10
    _, accuracy = minires.evaluate(network, images, labels, cifar10.MEAN, cifar10.STD, batch_size=20)
    require(accuracy == 20 / 30, f"with 20 of 30 images right, the accuracy is {accuracy:.1%}")


def images_are_measured_alone():
    network, images = small_network(), cifar10.load_sample().test_images[:8]
    one, eight = (minires.predict_logits(network, images[:n], cifar10.MEAN, cifar10.STD)[0] for n in (1, 8))
    apart = float(np.abs(one - eight).max())
    require(apart < 1e-4, f"with seven others in the batch, an image's logits change by up to {apart:.2f}")


def images_are_normalised():
    deviations = few_images(1000)[0].std(axis=(0, 1, 2))
    require(abs(deviations - 1).max() < 0.05, f"normalised images have the deviations {deviations.round(2)}, not 1")


def averages_have_their_own_statistics():
    network, (images, _) = small_network(), few_images(16)
    optimizer = minires.SGD(network.parameters(), lr=0.1)
    average = minires.WeightAverage(optimizer, decay=0.9)
    network.conv1.weight.data *= 3
    with averaged_weights(average, network, [images]):
        before = network.bn1.running_var.data.copy()
        measure_statistics(network, [images])
        ratio = float((before / network.bn1.running_var.data).mean())
    require(abs(ratio - 1) < 1e-3, f"averaged weights are evaluated with {ratio:.1f} times the variance that they make")


def batches_have_their_own_crops():
    settings = {"seed": 0, "crop": 4, "flip": "none", "trivial_augment": False, "cutout": 0, "early_size": 0}
    images = np.tile(cifar10.load_sample().train_images[:1], (8, 1, 1, 1))
    transform, args = train_cifar().transform, types.SimpleNamespace(**settings)
    first, second = (transform(args, 1, "float32", images, np.arange(8), start) for start in (0, 8))
    require((first != second).any(), "in two batches of an epoch, every image is moved as in the other batch")


def rate_survives_the_night():
    with tempfile.TemporaryDirectory() as folder:
        for resumed in (False, True):
            optimizer = minires.SGD((model := minires.Linear(2, 2, rng=0)).parameters(), lr=0.1)
            with Run(pathlib.Path(folder, "run")) as run:
                run.track(model, optimizer, epochs=2, steps_per_epoch=1)
                if not resumed:
                    optimizer.lr = 0.05
                    run.save()
    require(optimizer.lr == 0.05, f"a run that was stopped with lr 0.05 is resumed with {optimizer.lr}")


def epochs_are_chosen_by_validation():
    module, seen = train_cifar(), []
    module.measure = lambda model, images_and_labels, run: seen.append(images_and_labels)
    run = types.SimpleNamespace(validate=lambda measure: measure())
    data = types.SimpleNamespace(validation="the validation images", test="the test images")
    module.validate(types.SimpleNamespace(full_train=False), run, data, None)
    require(seen == [data.validation], f"the weights to keep are chosen by {seen[0]}")


def no_image_is_on_both_sides():
    training, validation = cifar10.split(1000)
    both = len(np.intersect1d(training, validation))
    require(not both, f"{both} of {len(validation)} validation images are trained on")


def gradients_are_right():
    """The gradient check, of which bugs.py says for each bug whether it finds it."""
    images = rng.standard_normal((3, 6, 6, 3))
    minires.check_gradients(minires.ResNet((1, 1), (4, 5), seed=0), images)
    minires.check_gradients(minires.MaxPool2d(3, stride=2), images)
    minires.check_gradients(minires.SoftmaxCrossEntropy(0.1), rng.standard_normal((4, 10)), rng.integers(0, 10, 4))


def main():
    parser = argparse.ArgumentParser(description="Run checks of bugs.py on the minires that Python finds.")
    parser.add_argument("checks", nargs="+", metavar="NAME", help="a function of this file")
    code = 0
    for name in parser.parse_args().checks:
        try:
            globals()[name]()
            print(f"{name}: ok")
        except AssertionError as error:
            print(f"{name}: {error}")
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
