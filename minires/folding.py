"""For evaluation: BatchNorm as a part of the convolution before it.

A trained network normalises with fixed numbers, so BatchNorm is linear, and so is the convolution before it: together
they are one convolution, with other weights and a bias. A pass over every activation is saved. What remains, the bias,
the sum with the shortcut and the ReLU, a CPU does to each piece of the convolution's output while it is in the cache.
"""

import copy
import itertools

import numpy as np

from minires.backend import array_module
from minires.kernels import kernels_for
from minires.kernels.reference import output_size
from minires.layers import BatchNorm2d, Conv2d
from minires.module import Buffer, Module, Sequential


def fold_batch_norm(model):
    """Return a copy of a model for evaluation, in which each BatchNorm2d behind a Conv2d is part of the convolution.

    Forward     (conv(x) - mean) scale + bias = conv with weight scale (x) + (bias - mean scale),
                scale = bn.weight / sqrt(running_var + eps), a number for each output channel

    "Behind" is what the order of a module's attributes says: conv1, bn1, conv2, bn2, where `forward` calls bn1 with
    what conv1 returns. A model that calls them otherwise has to be left as it is. In the copy, an empty Sequential
    stands in the place of the convolution and a FoldedConv2d in that of its BatchNorm, so the names in its state_dict
    are others. The outputs are those of model.eval() up to rounding.

    Raises      ValueError for a model in which there is nothing to fold
    Source      Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
                inference", section 3.2
    """
    folded = copy.deepcopy(model).eval()
    count = 0
    for module in folded.modules():
        parts = [(name, part) for name, part in vars(module).items() if isinstance(part, Module)]
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(parts):
            if type(conv) is Conv2d and type(norm) is BatchNorm2d and conv.out_channels == norm.num_features:
                setattr(module, conv_name, Sequential().eval())
                setattr(module, norm_name, FoldedConv2d(conv, norm).eval())
                count += 1
    if not count:
        raise ValueError(f"fold_batch_norm: no BatchNorm2d stands behind a Conv2d in this {type(model).__name__}")
    return folded


class FoldedConv2d(Conv2d):
    """A convolution with the BatchNorm behind it, and then a residual and a ReLU if asked for: for evaluation alone.

    Shapes      x (N, H, W, in_channels), residual like out  ->  out (N, oh, ow, out_channels)
    Raises      ValueError for an x that Conv2d does not take, and a residual that is not like out; RuntimeError in
                backward
    """

    def __init__(self, conv, norm):
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.stride, self.padding, self.relu = conv.stride, conv.padding, norm.relu
        xp, dtype = array_module(conv.weight.data), conv.weight.data.dtype
        weight, bias, mean, var = (
            v.data.astype(np.float64) for v in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
        scale = weight / xp.sqrt(var + norm.eps)  # (O,)
        if conv.bias:
            mean = mean - conv.bias.data
        self.weight = Buffer((conv.weight.data * scale).astype(dtype), conv.weight.torch_axes)
        self.bias = Buffer((bias - mean * scale).astype(dtype))

    def forward(self, x, residual=None):
        self.check_input(x)
        N, H, W, _ = x.shape
        oh, ow = (output_size(size, self.kernel_size, self.stride, self.padding) for size in (H, W))
        if residual is not None and (residual.shape, residual.dtype) != ((N, oh, ow, self.out_channels), x.dtype):
            raise ValueError(
                f"FoldedConv2d expects a residual like its output, {(N, oh, ow, self.out_channels)} {x.dtype}, got "
                f"{residual.shape} {residual.dtype}"
            )
        return kernels_for(x).conv2d_add_relu_forward(
            x, self.weight.data, self.bias.data, self.stride, self.padding, residual, self.relu
        )

    def backward(self, dout, need_dx=True):
        raise RuntimeError("FoldedConv2d.backward: a folded model is for evaluation, train the one that was folded")
