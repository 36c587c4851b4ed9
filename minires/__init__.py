"""minires: a residual network trained in plain NumPy and CuPy, every backward pass written by hand.

The names below are in reading order: each file uses only files that come before it.
"""

from minires import backend, rng, kernels  # noqa: I001  (reading order, not the alphabet's)
from minires.module import Buffer, Module, Parameter, Sequential
from minires.layers import BatchNorm2d, Bias2d, Conv2d, Dropout, Flatten, GlobalAvgPool2d, Linear, MaxPool2d, ReLU
from minires.loss import SoftmaxCrossEntropy
from minires.resnet import BasicBlock, ResNet
from minires.gradcheck import check_gradients
from minires.optim import SGD, Adam, Muon, WeightAverage
from minires.schedules import constant, cosine, one_cycle, triangular
from minires.summary import summary
from minires import augment
from minires.batches import Batches
from minires.evaluation import evaluate, predict_logits
from minires.folding import fold_batch_norm
from minires import cifar10

__version__ = "0.1.0"
__all__ = [  # noqa: RUF022
    "backend",
    "rng",
    "kernels",
    "Parameter",
    "Buffer",
    "Module",
    "Sequential",
    "ReLU",
    "Dropout",
    "Flatten",
    "Linear",
    "GlobalAvgPool2d",
    "MaxPool2d",
    "BatchNorm2d",
    "Bias2d",
    "Conv2d",
    "SoftmaxCrossEntropy",
    "BasicBlock",
    "ResNet",
    "check_gradients",
    "SGD",
    "Muon",
    "Adam",
    "WeightAverage",
    "constant",
    "cosine",
    "one_cycle",
    "triangular",
    "summary",
    "augment",
    "Batches",
    "evaluate",
    "predict_logits",
    "fold_batch_norm",
    "cifar10",
    "pretrained",
]


def pretrained():
    """Return the network with the weights that come with minires, in evaluation mode, on the CPU, in float32.

    weights/README.md tells how they were made, how good they are and who may use them.

    Limits      ten classes, those of `cifar10.CLASSES`; images of 32x32 pixels, normalised by `cifar10.MEAN` and STD
    Raises      CheckpointError for a file that is missing or not the one that was published
    """
    from minires.training.weights import load_published  # which needs more than NumPy

    return load_published()[0]
