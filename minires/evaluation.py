"""What a trained network says about images it has not seen."""

import contextlib
import numbers

import numpy as np

from minires.augment import normalize
from minires.backend import array_module, to_device, to_numpy
from minires.layers import BatchNorm2d
from minires.loss import SoftmaxCrossEntropy
from minires.module import check_array, real_array_of


def measure_statistics(model, batches):
    """Set the running statistics of every BatchNorm to their mean over some batches, by the number of images in each.

    For weights that did not come out of a training step themselves, above all averaged ones. Other layers, dropout
    among them, are in evaluation mode meanwhile; each part's mode is restored.

    Shapes      batches: several (N, H, W, C), as in training: normalised, on the model's device
    Raises      ValueError for no batch, or one without images
    Source      Izmailov et al. 2018, "Averaging weights leads to wider optima", section 3.2
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    ranks = norms[0].ranks  # the processes that share each batch
    with evaluation_mode(model):
        try:
            seen = 0
            for images in batches:
                count = ranks.total if ranks else len(images)
                if not count:
                    raise ValueError(f"measure_statistics: expected images in each batch, got {images.shape}")
                seen += count
                for norm in norms:
                    norm.training, norm.momentum = True, count / seen  # the mean over all images so far
                model(images)
            if not seen:
                raise ValueError("measure_statistics: expected at least one batch of images, got none")
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum, norm._cache = momentum, None


@contextlib.contextmanager
def averaged_weights(average, model, batches):
    """Put averaged weights into a model until the block is left, and measure BatchNorm's statistics for them.

    The statistics stay, as the next training step moves on from them: measure anew to evaluate the other weights.

    Args        average: a WeightAverage, or None, with which nothing is done; batches: see `measure_statistics`
    """
    if average is None:
        yield
        return
    average.swap()
    try:
        measure_statistics(model, batches)
        yield
    finally:
        average.swap()


@contextlib.contextmanager
def evaluation_mode(model):
    """Put a model into evaluation mode, and each of its parts back into its own mode when the block is left."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def checked_batch_size(images, batch_size):
    """Return the batch size as a Python integer, which never runs over, if it and the images are as they should be."""
    check_array("predict_logits", images)
    if images.ndim != 4 or not len(images):
        raise ValueError(f"predict_logits expects images (N, H, W, C), at least one of them, got {images.shape}")
    if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
        raise ValueError(f"predict_logits: batch_size must be an integer of at least 1, got {batch_size!r}")
    return int(batch_size)


def predict_logits(model, images, mean, std, batch_size=200, tta=False, stop=lambda: None):
    """Run images through a model in evaluation mode, a batch at a time; each part's mode is restored.

    Shapes      images (N, H, W, C) uint8, on host or device  ->  logits (N, K), on the host
    Args        tta: test-time augmentation, the mean of the logits of each image and of its mirror image; stop: called
                before each batch; what it raises leaves the rest undone
    """
    batch_size = checked_batch_size(images, batch_size)
    weight = real_array_of(model)
    device = "cpu" if array_module(weight) is np else "gpu"
    logits = []
    with evaluation_mode(model):
        for start in range(0, len(images), batch_size):
            stop()
            batch = normalize(to_device(images[start : start + batch_size], device), mean, std, weight.dtype)
            out = model(batch)
            if tta:
                out = (out + model(array_module(batch).ascontiguousarray(batch[:, :, ::-1]))) / 2
            logits.append(to_numpy(out))
    return np.concatenate(logits)


def evaluate(model, images, labels, mean, std, batch_size=200, tta=False, stop=lambda: None, *, predict=predict_logits):
    """Return the mean loss and the accuracy over all the images, as Python floats.

    Shapes      images (N, H, W, C) uint8, labels (N,) on the host
    Args        tta, stop: see `predict_logits`; predict: another function that does what `predict_logits` does
    """
    logits = predict(model, images, mean, std, batch_size, tta, stop)
    return float(SoftmaxCrossEntropy().forward(logits, labels)), float((logits.argmax(axis=1) == labels).mean())


def confusion_matrix(labels, predictions, num_classes):
    """Count how often each class was taken for each.

    Shapes      labels (N,), predictions (N,)  ->  (K, K): row the label, column the prediction
    Raises      ValueError for what are no integers from 0 to K - 1, or not as many of the one as of the other
    """
    labels, predictions, num_classes = np.asarray(labels), np.asarray(predictions), int(num_classes)
    if labels.ndim != 1 or labels.shape != predictions.shape:
        raise ValueError(f"confusion_matrix expects (N,) twice, got {labels.shape} and {predictions.shape}")
    for name, classes in (("labels", labels), ("predictions", predictions)):
        if len(classes) and (classes.dtype.kind not in "iu" or not 0 <= classes.min() <= classes.max() < num_classes):
            span = f"{classes.min()} to {classes.max()}, " if classes.dtype.kind in "biuf" else ""
            raise ValueError(
                f"confusion_matrix expects {name} that are integers from 0 to {num_classes - 1}, got "
                f"{span}{classes.dtype}"
            )
    pairs = labels.astype(np.int64) * num_classes + predictions.astype(np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
