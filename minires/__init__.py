"""minires: a residual network trained in plain NumPy and CuPy, every backward pass written by hand.

The names below are in reading order: each file uses only files that come before it.
"""

from minires import backend, rng, kernels  # noqa: I001  (reading order, not the alphabet's)
from minires.module import Buffer, Module, Parameter, Sequential
from minires.layers import BatchNorm2d, Bias2d, Conv2d, Dropout, GlobalAvgPool2d, Linear, ReLU
from minires.loss import SoftmaxCrossEntropy
from minires.optim import SGD, Adam, WeightAverage
from minires.schedules import constant, cosine, one_cycle, triangular
from minires.resnet import BasicBlock, ResNet
from minires.summary import summary
from minires.gradcheck import check_gradients
from minires import augment, trivial_augment, evaluate, checkpoint, finite

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
    "Linear",
    "GlobalAvgPool2d",
    "BatchNorm2d",
    "Bias2d",
    "Conv2d",
    "SoftmaxCrossEntropy",
    "SGD",
    "Adam",
    "WeightAverage",
    "constant",
    "cosine",
    "one_cycle",
    "triangular",
    "BasicBlock",
    "ResNet",
    "summary",
    "check_gradients",
    "cifar10",
    "augment",
    "trivial_augment",
    "evaluate",
    "checkpoint",
    "finite",
]


def __getattr__(name):
    """Import cifar10 when it is first asked for: python -m minires.cifar10 must not find itself already there."""
    if name == "cifar10":
        import importlib

        return importlib.import_module("minires.cifar10")
    raise AttributeError(f"module 'minires' has no attribute {name!r}")
