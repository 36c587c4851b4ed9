"""Ten steps of training in float64, by one process or by several: what test_distributed.py compares.

mpiexec -n 2 python tests/shared_steps.py FOLDER    rank 0 leaves a file for each variant
"""

import functools
import hashlib
import pathlib
import sys

import numpy as np

import minires
from minires import cifar10
from minires.augment import cutout, normalize, random_crop, random_flip
from minires.backend import to_device
from minires.batches import Batches
from minires.evaluation import averaged_weights, evaluate
from minires.training.checkpoint import training_state
from minires.training.launch import processes
from minires.trivial_augment import trivial_augment

IMAGES, BATCH, STEPS = 23, 7, 10  # the last batch of an epoch has 2 images, fewer than three ranks

VARIANTS = {
    "plain": {},
    "without BatchNorm": {"batch_norm": False, "lr": 0.01},
    "momentum": {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "decay_vectors": False},
    "Adam": {"adam": True, "lr": 1e-3},
    "clipping": {"max_norm": 0.3},
    "label smoothing": {"label_smoothing": 0.2},
    "dropout": {"dropout": 0.4},
    "average": {"average": True, "momentum": 0.9},
    "average without BatchNorm": {"average": True, "batch_norm": False, "lr": 0.01},
    "Muon": {"muon": True, "weight_decay": 5e-4, "decay_vectors": False, "bias_lr": 8.0, "max_norm": 0.3},
    "everything": {"adam": True, "lr": 1e-3, "dropout": 0.4, "average": True, "max_norm": 0.3, "label_smoothing": 0.1},
    "batches of one": {"batch_size": 1, "batch_norm": False, "lr": 0.01},
}


def train(
    ranks,
    dtype="float64",
    batch_size=BATCH,
    batch_norm=True,
    dropout=0.0,
    adam=False,
    muon=False,
    lr=0.1,
    bias_lr=1.0,
    momentum=0.0,
    label_smoothing=0.0,
    average=False,
    local=False,
    device="cpu",
    **options,
):
    """Return all that ten steps leave behind, as arrays by name, and what the test images say to it."""
    rng = np.random.default_rng(7)
    images, labels = rng.integers(0, 256, (IMAGES, 8, 8, 3), np.uint8), rng.integers(0, 10, IMAGES)
    # of each rank its own: they begin from those of rank 0
    model = minires.ResNet((1, 1), (6, 10), dropout=dropout, batch_norm=batch_norm, seed=ranks.rank).to(device, dtype)
    loss_function = minires.SoftmaxCrossEntropy(label_smoothing)
    for module in model.modules():
        if isinstance(module, minires.BatchNorm2d):
            module.bias.lr_factor = bias_lr
    if adam:
        optimizer = minires.Adam(model.parameters(), lr, **options)
    elif muon:
        optimizer = minires.Muon(model.parameters(), lr, **options)
    else:
        optimizer = minires.SGD(model.parameters(), lr, momentum, **options)
    ranks.distribute(model, optimizer, loss_function, local)
    average = minires.WeightAverage(optimizer, 0.9) if average else None

    on_device = to_device(images, device), to_device(labels, device)

    def transform(epoch, images, index, start):
        images = random_flip(random_crop(images, 3, epoch, start, 1), 3, epoch, start)
        images = cutout(trivial_augment(images, 3, epoch, start), 3, epoch, start, 3)
        return normalize(images, cifar10.MEAN, cifar10.STD, dtype)

    def batches(epoch):
        order = to_device(np.random.default_rng([3, epoch]).permutation(IMAGES), device)
        return Batches(*on_device, order, batch_size, functools.partial(transform, epoch), ranks)

    losses = []
    for epoch in range(STEPS):
        for x, y in batches(epoch):
            optimizer.zero_grad()
            losses.append(float(loss_function(model(x), y)))
            model.backward(loss_function.backward(), need_dx=False)
            optimizer.step()
            if average:
                average.update()
            if len(losses) == STEPS:
                break
        else:
            continue
        break
    found = {"losses": np.array(losses)} | training_state(model, optimizer, average)
    with averaged_weights(average, model, (x for x, _ in batches(STEPS))):
        for tta in (False, True):
            found[f"measured {tta}"] = np.array(
                evaluate(
                    model,
                    images,
                    labels,
                    cifar10.MEAN,
                    cifar10.STD,
                    batch_size=4,
                    tta=tta,
                    predict=ranks.predict_logits,
                )
            )
        found |= {f"evaluated {name}": array for name, array in model.state_dict().items()}
    return found


def main(folder):
    """Train every variant in this job's processes; then look at the bits of sums of many sizes, twice."""
    ranks = processes()
    for name, options in VARIANTS.items():
        found = train(ranks, **options)
        ranks.check_same(found, name)
        if ranks.rank == 0:
            np.savez(folder / f"{name}.npz", **found)
    digests = []
    for _ in range(2):
        digest = hashlib.sha256()
        for size in (1, 3, 129, 1025, 20_000, 300_001, 1_200_000):
            for dtype in ("float32", "float64"):
                rng = np.random.default_rng([ranks.rank, size])
                array = ranks.sum((rng.standard_normal(size) * 10.0 ** rng.integers(-3, 3, size)).astype(dtype))
                ranks.check_same({f"a sum of {size} numbers of {dtype}": array}, "a sum")
                digest.update(array)
        digests.append(digest.hexdigest())
    if ranks.rank == 0:
        (folder / "digest").write_text(digests[0])
        (folder / "digest of the second time").write_text(digests[1])


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
