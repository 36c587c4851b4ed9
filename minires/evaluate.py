"""What a trained network says about images it has not seen."""

import numpy as np

from minires.augment import normalize
from minires.backend import array_module, to_device, to_numpy
from minires.loss import SoftmaxCrossEntropy


def predict_logits(model, images, mean, std, batch_size=200, stop=lambda: False):
    """Run images through a model in evaluation mode, a batch at a time; each part's mode is restored.

    Shapes      images (N, H, W, 3) uint8, on host or device  ->  logits (N, K), on the host
    Args        stop: asked before each batch; once it says True, the rest is left undone and None is returned
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    device = "cpu" if array_module(model.parameters()[0].data) is np else "gpu"
    try:
        logits = []
        for i in range(0, len(images), batch_size):
            if stop():
                return None
            batch = to_device(images[i : i + batch_size], device)
            logits.append(to_numpy(model(normalize(batch, mean, std))))
        return np.concatenate(logits)
    finally:
        for module, training in modes:
            module.training = training


def evaluate(model, images, labels, mean, std, batch_size=200, stop=lambda: False):
    """Return the mean loss and the accuracy over all the images, as Python floats.

    Shapes      images (N, H, W, 3) uint8, labels (N,) on the host
    Args        stop: asked before each batch; once it says True, the rest is left undone and None is returned
    """
    logits = predict_logits(model, images, mean, std, batch_size, stop)
    if logits is None:
        return None
    return float(SoftmaxCrossEntropy().forward(logits, labels)), float((logits.argmax(axis=1) == labels).mean())


def confusion_matrix(labels, predictions, num_classes):
    """Count how often each class was taken for each.

    Shapes      labels (N,), predictions (N,)  ->  (K, K): row the label, column the prediction
    """
    pairs = labels * num_classes + predictions
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
