"""The network: a residual network for small images, 4,977,226 parameters with the defaults.

    stem      3x3 convolution to 64 channels, BatchNorm, ReLU        (N, 32, 32, 64)
    layer1    blocks at 64 channels                                  (N, 32, 32, 64)
    layer2    blocks at 128 channels, the first with stride 2        (N, 16, 16, 128)
    layer3    the same at 256                                        (N, 8, 8, 256)
    layer4    the same at 512                                        (N, 4, 4, 512)
    head      average over all pixels, dropout, linear               (N, 10)

Source      He, Zhang, Ren and Sun 2016, "Deep residual learning for image recognition", in the layout for CIFAR-10 that
            is common in PyTorch (3x3 stem without pooling, names as here); Shamooun, Deshmukh and Alamuru, "Residual
            Network Design", for the numbers of blocks
"""

import numbers
from collections.abc import Iterable

import numpy as np

from minires.kernels import kernels_for
from minires.layers import BatchNorm2d, Bias2d, Conv2d, Dropout, GlobalAvgPool2d, Linear
from minires.module import Module, Sequential


class BasicBlock(Module):
    """Two 3x3 convolutions whose result is added to the input: out = relu(F(x) + x).

    Where the block changes the shape, the input is brought to the new one by a 1x1 convolution with BatchNorm, the
    projection of the paper's option B.

    Backward    dx = dF + g, where g is the gradient of the sum F(x) + x, and dF what F's backward makes of it; with a
                projection, what its backward makes of g takes the place of g

    Why         x influences the loss in two ways, through F and through the shortcut, which carries g back as it is. So
                through any number of blocks of one shape there is a way back from the loss on which no weight scales
                the gradient (the ReLUs between blocks only set some of it to 0), and deep networks train. Without the
                shortcut, every block on the way multiplies the gradient by its weights.

    Shapes      x (N, H, W, in_channels)  ->  out (N, H / stride, W / stride, out_channels), rounded up
    Args        shortcut: False leaves it out, which gives the plain network that the paper compares with;
                batch_norm: False leaves only the biases of BatchNorm
    """

    def __init__(self, in_channels, out_channels, stride=1, shortcut=True, batch_norm=True, *, rng=None):
        rng = np.random.default_rng(rng)
        norm = BatchNorm2d if batch_norm else Bias2d
        self.conv1 = Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False, rng=rng)
        self.bn1 = norm(out_channels, relu=True)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1, bias=False, rng=rng)
        self.bn2 = norm(out_channels, relu=True)
        if not shortcut:
            self.shortcut = None
        elif stride == 1 and in_channels == out_channels:
            self.shortcut = Sequential()
        else:
            self.shortcut = Sequential(
                Conv2d(in_channels, out_channels, 1, stride, bias=False, rng=rng), norm(out_channels)
            )

    def forward(self, x):
        out = self.conv2(self.bn1(self.conv1(x)))
        return self.bn2(out) if self.shortcut is None else self.bn2(out, self.shortcut(x))

    def backward(self, dout):
        if self.shortcut is None:
            dout = self.bn2.backward(dout)
            return self.conv1.backward(self.bn1.backward(self.conv2.backward(dout)))
        dout, dshortcut = self.bn2.backward(dout)  # dshortcut is g; dout from here on that of conv2's output
        dx = self.conv1.backward(self.bn1.backward(self.conv2.backward(dout)))
        return kernels_for(dx).add(dx, self.shortcut.backward(dshortcut))  # x went two ways: both gradients count


class ResNet(Sequential):
    """The residual network: a Sequential whose parts have names.

    Backward    backward(dlogits, need_dx=False) leaves out the gradient of the images, which training does not use
    Shapes      x (N, H, W, 3)  ->  logits (N, num_classes)
    Args        blocks: how many in each stage; channels: of each stage; dropout: p before the last layer; shortcut:
                False for the plain network; seed: for the initial weights and the dropout masks; batch_norm: False
                for a network that only adds biases where it would normalise
    Raises      ValueError for blocks and channels that do not pair up; TypeError for what are no lists
    """

    def __init__(
        self,
        blocks=(2, 1, 1, 1),
        channels=(64, 128, 256, 512),
        num_classes=10,
        dropout=0.5,
        shortcut=True,
        seed=0,
        batch_norm=True,
    ):
        for name, value in (("blocks", blocks), ("channels", channels)):
            if isinstance(value, str) or not isinstance(value, Iterable):
                raise TypeError(f"ResNet: {name} must be a list, a number for each stage, got {value!r}")
        blocks, channels = tuple(blocks), tuple(channels)
        if not all(isinstance(count, numbers.Integral) for count in blocks):
            raise TypeError(f"ResNet: blocks must be integers, got {blocks}")
        if len(blocks) != len(channels) or not blocks or min(blocks) < 1:
            raise ValueError(
                f"ResNet expects one number of blocks, at least 1, for each number of channels, got blocks={blocks} "
                f"and channels={channels}"
            )
        self.has_shortcut = shortcut
        rng = np.random.default_rng(seed)
        self.conv1 = Conv2d(3, channels[0], 3, padding=1, bias=False, rng=rng)
        self.bn1 = (BatchNorm2d if batch_norm else Bias2d)(channels[0], relu=True)
        in_channels = channels[0]
        for i, (count, out_channels) in enumerate(zip(blocks, channels, strict=True)):
            stage = []
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1  # each stage but the first begins by halving the image
                stage.append(BasicBlock(in_channels, out_channels, stride, shortcut, batch_norm, rng=rng))
                in_channels = out_channels
            setattr(self, f"layer{i + 1}", Sequential(*stage))
        self.pool = GlobalAvgPool2d()
        self.dropout = Dropout(dropout, rng=rng)
        self.linear = Linear(in_channels, num_classes, rng=rng)

    def backward(self, dout, need_dx=True):
        first, *rest = self.layers()
        for layer in reversed(rest):
            dout = layer.backward(dout)
        return first.backward(dout, need_dx)
