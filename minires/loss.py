"""What training makes small: softmax and cross-entropy in one, because together they are simple and stable."""

import numbers

import numpy as np

from minires.backend import array_module
from minires.kernels import kernels_for
from minires.module import check_array


class SoftmaxCrossEntropy:
    """The mean over the batch of the cross-entropy between the labels and the softmax of the logits.

    Backward    dlogits = (softmax(logits) - target) / N, times dloss, the number that the loss itself is multiplied by
    Shapes      logits (N, K), the scores of K classes before softmax, labels (N,) integers from 0 to K - 1
                ->  a number, on the device of logits; float() of it waits for the device
    Cached      the probabilities and the labels
    Limits      on a GPU the range of the labels is not checked: looking at them would wait for the device
    Args        label_smoothing: the share of the target that is spread evenly over all classes, 0 to 1
    Raises      ValueError for labels that are no array, do not fit the logits or are on another device, for a smoothing
                outside 0 to 1, and for a dloss that is an array; TypeError for logits that are no array and what is no
                number; RuntimeError for backward without forward
    Ranks       where several processes share a batch (training/distributed.py), the mean is over all of it, and each
                process gives the gradient of that mean by the logits of its own images, of which there may be none
    Source      PyTorch's CrossEntropyLoss
    """

    ranks = None

    def __init__(self, label_smoothing=0.0):
        if not isinstance(label_smoothing, numbers.Real):
            raise TypeError(f"SoftmaxCrossEntropy: label_smoothing must be a number, got {label_smoothing!r}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"SoftmaxCrossEntropy: label_smoothing must be from 0 to 1, got {label_smoothing}")
        self.label_smoothing = float(label_smoothing)
        self._cache = None

    def forward(self, logits, labels):
        check_array("SoftmaxCrossEntropy", logits)
        if not hasattr(labels, "__array_function__"):
            raise ValueError(f"SoftmaxCrossEntropy expects labels as an array (N,), got {type(labels).__name__}")
        if logits.ndim != 2 or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"SoftmaxCrossEntropy expects logits (N, K) and labels (N,), got {logits.shape} and {labels.shape}"
            )
        if array_module(labels) is not array_module(logits):
            libraries = " and ".join(array_module(array).__name__ for array in (logits, labels))
            raise ValueError(f"SoftmaxCrossEntropy expects logits and labels on one device, got arrays of {libraries}")
        if labels.dtype.kind not in "iu":
            raise ValueError(f"SoftmaxCrossEntropy expects labels that are integers, got {labels.dtype}")
        if not len(labels) and not self.ranks:
            raise ValueError(f"SoftmaxCrossEntropy expects at least one image, got logits {logits.shape}")
        on_host = array_module(labels) is np
        if len(labels) and on_host and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
            raise ValueError(
                f"SoftmaxCrossEntropy expects labels from 0 to {logits.shape[1] - 1}, "
                f"got {labels.min()} to {labels.max()}"
            )
        if not len(labels):
            loss, probabilities = array_module(logits).zeros((), logits.dtype), logits
        else:
            kernels = kernels_for(logits)
            loss, probabilities = kernels.softmax_cross_entropy_forward(logits, labels, self.label_smoothing)
        self._cache = probabilities, labels
        return self.ranks.mean(loss, len(labels)) if self.ranks else loss

    def backward(self, dloss=1.0):
        if self._cache is None:
            raise RuntimeError("SoftmaxCrossEntropy.backward: call forward first")
        if getattr(dloss, "shape", ()) != ():
            raise ValueError(f"SoftmaxCrossEntropy.backward: dloss must be a number, got an array of {dloss.shape}")
        (probabilities, labels), self._cache = self._cache, None
        if not len(labels):
            return probabilities
        dloss = float(dloss) * (self.ranks.share(len(labels)) if self.ranks else 1)
        return kernels_for(probabilities).softmax_cross_entropy_backward(
            dloss, probabilities, labels, self.label_smoothing
        )

    def __call__(self, logits, labels):
        return self.forward(logits, labels)
