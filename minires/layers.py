"""The layers, simplest first. Each keeps its parameters and what its backward needs; the arithmetic is in kernels/.

Images are channels last, (N, H, W, C), and weights are stored as the products use them; the shapes of PyTorch appear in
`state_dict` only. Every layer that draws random numbers takes `rng`, a NumPy Generator or a seed; without it the
numbers differ from run to run. Every backward raises ValueError for a dout whose shape is not that of the output.

Several processes can share a batch, see training/distributed.py. To almost every layer that is nothing: what it does to
an image depends on no other image. The two layers that look at a batch as a whole, Dropout and BatchNorm2d, then have
`ranks`, which knows the other processes; in a single process it is None.
"""

import math
import numbers

import numpy as np

from minires.backend import array_module
from minires.kernels import kernels_for
from minires.module import Buffer, Module, Parameter, check_array


class ReLU(Module):
    """The rectifier: out = max(x, 0).

    Cached      out, which the next layer keeps anyway
    """

    def forward(self, x):
        out = kernels_for(x).relu_forward(x)
        self._keep(out)
        return out

    def backward(self, dout):
        (out,) = self._take_cache()
        _check_dout(self, dout, out.shape, out.dtype)
        return kernels_for(dout).relu_backward(dout, out)


class Dropout(Module):
    """In training, set each element to 0 with probability p and scale the others by 1 / (1 - p).

    The mask is a function of `key`, drawn once from rng, and of `step`, which counts the training passes. To resume a
    run where it was left, set `step`. On a GPU, `step` is a 0-d array there: a recorded pass (see kernels/gpu.py)
    counts on by itself.

    Cached      what backward draws the mask from again, the step above all, and the shape of x
    Modes       in evaluation the identity
    Args        p: the probability of 0, from 0 up to but not including 1
    Raises      ValueError for another p
    Source      Srivastava et al. 2014, in the inverted form of PyTorch, which leaves evaluation alone. PyTorch also
                takes p = 1, which trains nothing
    """

    ranks = None

    def __init__(self, p=0.5, *, rng=None):
        _check_numbers("Dropout", p=p)
        if not 0 <= p < 1:
            raise ValueError(f"Dropout: p must be at least 0 and below 1, got {p}")
        self.p = float(p)  # a NumPy float64 would turn what it touches into float64
        self.key = int(np.random.default_rng(rng).integers(2**64, dtype=np.uint64))
        self.step = 0

    def forward(self, x):
        if not self.training or self.p == 0:
            self._keep(None, x.shape, x.dtype)
            return x
        xp = array_module(x)
        self.step = int(self.step) if xp is np else xp.asarray(self.step, dtype="uint64")
        self.step += 1  # in place if it is an array; backward comes before the next forward, so it finds the same
        draw = (self.p, self.key, self.step)
        if self.ranks:  # the mask is the whole batch's, of which x has the rows from ranks.start on
            draw += (self.ranks.start * math.prod(x.shape[1:]),)
        self._keep(draw, x.shape, x.dtype)
        return kernels_for(x).dropout_forward(x, *draw)

    def backward(self, dout):
        draw, x_shape, dtype = self._take_cache()
        _check_dout(self, dout, x_shape, dtype)
        return dout if draw is None else kernels_for(dout).dropout_backward(dout, *draw)


class Flatten(Module):
    """Lay all numbers of an image side by side, as Linear takes them: the identity, in another shape.

    The order is that of memory: row by row, pixel by pixel, and of a pixel channel by channel. PyTorch's images are
    channels first, so there all of a channel comes before the next one. A weight of PyTorch's Linear that stood behind
    a Flatten, (K, C*H*W), has its columns brought into the order here by
        weight.reshape(K, C, H, W).transpose(0, 2, 3, 1).reshape(K, -1)

    Shapes      x (N, H, W, C), or any other  ->  out (N, H*W*C)
    Cached      the shape of x
    """

    def forward(self, x):
        self._keep(x.shape, x.dtype)
        return x.reshape(len(x), math.prod(x.shape[1:]))

    def backward(self, dout):
        x_shape, dtype = self._take_cache()
        _check_dout(self, dout, (x_shape[0], math.prod(x_shape[1:])), dtype)
        return dout.reshape(x_shape)


class Linear(Module):
    """A fully connected layer: out = x @ weight + bias.

    Shapes      x (N, in_features)  ->  out (N, out_features)
    Cached      x: its own gradient needs only the weights, the weights' gradient needs x
    Limits      two dimensions; flatten images first, with `Flatten` or a pooling
    Raises      ValueError for sizes below 1, and for an x of another width or dtype
    Source      PyTorch's Linear, its initialisation included: uniform within 1 / sqrt(in_features). Here weight is
                stored (in, out), so that the forward pass is one product without a transpose
    """

    def __init__(self, in_features, out_features, bias=True, *, rng=None):
        in_features, out_features = _integers("Linear", in_features=in_features, out_features=out_features)
        rng = np.random.default_rng(rng)
        self.in_features, self.out_features = in_features, out_features
        bound = 1 / math.sqrt(in_features)
        weight = rng.uniform(-bound, bound, (in_features, out_features)).astype(np.float32)
        self.weight = Parameter(weight, torch_axes=(1, 0))
        self.bias = Parameter(rng.uniform(-bound, bound, out_features).astype(np.float32)) if bias else None

    def forward(self, x):
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"Linear expects (N, {self.in_features}), got {x.shape}")
        _check_dtype(self, x)
        self._keep(x)
        return kernels_for(x).linear_forward(x, self.weight.data, self.bias and self.bias.data)

    def backward(self, dout):
        (x,) = self._take_cache()
        _check_dout(self, dout, (len(x), self.out_features), x.dtype)
        dx, dweight, dbias = kernels_for(dout).linear_backward(dout, x, self.weight.data)
        self.weight.grad += dweight
        if self.bias:
            self.bias.grad += dbias
        return dx


class GlobalAvgPool2d(Module):
    """Average each channel over all pixels.

    Shapes      x (N, H, W, C)  ->  out (N, C)
    Cached      the shape of x
    Raises      ValueError for an x of another shape, or without pixels
    Source      Lin, Chen and Yan 2014, "Network in network". PyTorch writes it AdaptiveAvgPool2d(1) and flattens
    """

    def forward(self, x):
        if x.ndim != 4 or 0 in x.shape[1:3]:  # the mean of no pixels is NaN
            raise ValueError(f"GlobalAvgPool2d expects (N, H, W, C), got {x.shape}")
        self._keep(x.shape, x.dtype)
        return kernels_for(x).global_avg_pool2d_forward(x)

    def backward(self, dout):
        x_shape, dtype = self._take_cache()
        _check_dout(self, dout, (x_shape[0], x_shape[3]), dtype)
        return kernels_for(dout).global_avg_pool2d_backward(dout, x_shape)


class MaxPool2d(Module):
    """Keep the largest number that each window shows, channel by channel; the window moves by stride pixels.

    Shapes      x (N, H, W, C)  ->  out (N, oh, ow, C), oh = (H - kernel_size) // stride + 1, and ow likewise
    Cached      x and out, which the layers on both sides keep anyway
    Limits      square windows, no padding; pixels at the far edges that fill no window are left out
    Args        kernel_size, stride: pixels, at least 1; without a stride it is kernel_size, and windows do not overlap
    Raises      ValueError for sizes that are no such numbers, and for an x of another shape, or smaller than the window
    Source      PyTorch's MaxPool2d, its ties included: the first of several largest pixels gets all of the gradient
    """

    def __init__(self, kernel_size, stride=None):
        stride = kernel_size if stride is None else stride
        self.kernel_size, self.stride = _integers("MaxPool2d", kernel_size=kernel_size, stride=stride)

    def forward(self, x):
        if x.ndim != 4:
            raise ValueError(f"MaxPool2d expects (N, H, W, C), got {x.shape}")
        _check_window(self, x, 0)
        out = kernels_for(x).max_pool2d_forward(x, (self.kernel_size, self.kernel_size), self.stride)
        self._keep(x, out)
        return out

    def backward(self, dout):
        x, out = self._take_cache()
        _check_dout(self, dout, out.shape, x.dtype)
        return kernels_for(dout).max_pool2d_backward(dout, x, out, (self.kernel_size, self.kernel_size), self.stride)


class BatchNorm2d(Module):
    """Give every channel mean 0 and variance 1, then a scale and a shift that are learned.

    In a residual network a sum and a ReLU follow. Both can be handed to this layer, which lets a fast kernel do all
    three in one pass over memory (`residual` is what the shortcut brings; papers call the other term, F(x), so):
        BatchNorm2d(C)(x)                          x_hat weight + bias
        BatchNorm2d(C, relu=True)(x)               max(x_hat weight + bias, 0)
        BatchNorm2d(C, relu=True)(x, residual)     max(x_hat weight + bias + residual, 0)

    Backward    dx, or with a residual the pair (dx, dresidual)
    Shapes      x and residual (N, H, W, C)  ->  out (N, H, W, C)
    Cached      x, the batch's mean and variance; with relu also out, whose sign is the mask
    Modes       training: statistics of the batch, which also move the running ones:
                    running = (1 - momentum) running + momentum batch, with the unbiased variance
                evaluation: the running statistics, and nothing is kept
    Args        num_features: C; eps: added to var; momentum: the newest batch's part (SGD's: that of the old), 0 to 1
    Raises      ValueError for sizes outside these ranges, an x of another shape or dtype, a residual that does not
                match, and in training for a batch with a single value in each channel, which has no variance
    Source      Ioffe and Szegedy 2015; biased and unbiased variance, eps and momentum as in PyTorch
    """

    ranks = None

    def __init__(self, num_features, eps=1e-5, momentum=0.1, *, relu=False):
        (num_features,) = _integers("BatchNorm2d", num_features=num_features)
        _check_numbers("BatchNorm2d", eps=eps, momentum=momentum)
        if not (np.float32(eps) > 0 and 0 <= momentum <= 1):  # else a constant channel would be 0 / 0
            raise ValueError(
                f"BatchNorm2d: eps must be above 0 in float32 and momentum from 0 to 1, got {eps} and {momentum}"
            )
        self.num_features, self.eps, self.momentum, self.relu = num_features, float(eps), float(momentum), relu
        self.weight = Parameter(np.ones(num_features, np.float32))
        self.bias = Parameter(np.zeros(num_features, np.float32))
        self.running_mean = Buffer(np.zeros(num_features, np.float32))
        self.running_var = Buffer(np.ones(num_features, np.float32))

    def forward(self, x, residual=None):
        _check_images(self, x, self.num_features)
        _check_residual(self, x, residual)
        kernels = kernels_for(x)
        running = self.running_mean.data, self.running_var.data
        if self.training:
            mean, var = kernels.batch_norm_statistics(x)
            M = x.size // self.num_features
            if self.ranks:
                mean, var, M = self.ranks.statistics(x, mean, var)
            if M < 2:
                raise ValueError(
                    f"BatchNorm2d needs more than one value in a channel to train, got x of shape {x.shape}"
                )
            # by their own set, also where a process has no image: all have to come to the same bits
            kernels_for(running[0]).update_running_statistics(*running, mean, var, self.momentum, M)
        else:
            mean, var = running
        out = kernels.batch_norm_add_relu_forward(
            x, self.weight.data, self.bias.data, mean, var, self.eps, residual, self.relu
        )
        self._keep(x, out if self.relu else None, mean, var, residual is not None)
        return out

    def backward(self, dout):
        x, out, mean, var, has_residual = self._take_cache()
        _check_dout(self, dout, x.shape, x.dtype)
        kernels = kernels_for(dout)
        dout, dweight, dbias = kernels.batch_norm_add_relu_backward_sums(dout, x, out, mean, var, self.eps)
        sums = self.ranks.backward_sums(x, dweight, dbias) if self.ranks else (dweight, dbias)
        dx = kernels.batch_norm_backward(dout, x, self.weight.data, mean, var, self.eps, *sums)
        self.weight.grad += dweight.astype(self.weight.grad.dtype, copy=False)  # sums may be float64 up to here
        self.bias.grad += dbias.astype(self.bias.grad.dtype, copy=False)
        return (dx, dout) if has_residual else dx


class Bias2d(Module):
    """Add a number to each channel, and then a residual and a ReLU if asked for: a BatchNorm2d that does not normalise.

    It stands in for BatchNorm2d where one wants to know what the normalisation is worth.

    Backward    dx, or with a residual the pair (dx, dresidual), which are the same array
    Shapes      x and residual (N, H, W, C)  ->  out (N, H, W, C)
    Cached      the shape of x; with relu also out, whose sign is the mask
    Raises      ValueError for a size below 1, an x of another shape or dtype, a residual that does not match
    """

    def __init__(self, num_features, *, relu=False):
        (num_features,) = _integers("Bias2d", num_features=num_features)
        self.num_features, self.relu = num_features, relu
        self.bias = Parameter(np.zeros(num_features, np.float32))

    def forward(self, x, residual=None):
        _check_images(self, x, self.num_features)
        _check_residual(self, x, residual)
        out = kernels_for(x).add_and_relu(x + self.bias.data.astype(x.dtype), residual, self.relu)
        self._keep(x.shape, x.dtype, out if self.relu else None, residual is not None)
        return out

    def backward(self, dout):
        x_shape, dtype, out, has_residual = self._take_cache()
        _check_dout(self, dout, x_shape, dtype)
        kernels = kernels_for(dout)
        dx = kernels.relu_backward(dout, out) if self.relu else dout
        self.bias.grad += kernels.sum_over_rows(dx)
        return (dx, dx) if has_residual else dx


class Conv2d(Module):
    """A convolution (in the field's sense: a correlation) of images with learned filters.

    Backward    backward(dout, need_dx=False) leaves out the gradient of x and returns None, for a first layer
    Shapes      x (N, H, W, in_channels)  ->  out (N, oh, ow, out_channels),
                oh = (H + 2 padding - kernel_size) // stride + 1, and ow likewise
    Cached      x and the shape of out. The columns of x, kernel_size^2 times as large, are made again in backward, a
                few images at a time: kept for a batch of 128, those of the default network would take 1.6 GB
    Limits      square windows, the same stride and padding both ways, no dilation, no groups
    Args        kernel_size, stride: pixels, at least 1; padding: pixels of zeros on every side, at least 0
    Raises      ValueError for sizes that are no such numbers, and for an x of another shape or dtype, or smaller than
                the window
    Why         The initial weights are normal with variance 2 / n, n = kernel_size^2 in_channels, which keeps the scale
                of activations through ReLUs. An output y is the sum of n products of a weight and an input r, which are
                independent and the weights of mean 0: Var(y) = n Var(weight) E[r^2]. And r = max(y', 0), of an output
                y' of the layer before, as often negative as positive: E[r^2] = Var(y') / 2, and Var(y) = Var(y').
    Source      LeCun et al. 1998; initialised after He et al. 2015, "Delving deep into rectifiers", eq. 10. PyTorch's
                default has a sixth of that variance
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, *, bias=True, rng=None):
        in_channels, out_channels, kernel_size, stride = _integers(
            "Conv2d", in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride
        )
        (padding,) = _integers("Conv2d", least=0, padding=padding)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        deviation = math.sqrt(2 / (kernel_size**2 * in_channels))
        weight = np.random.default_rng(rng).normal(0, deviation, shape).astype(np.float32)
        self.weight = Parameter(weight, torch_axes=(3, 2, 0, 1))
        self.bias = Parameter(np.zeros(out_channels, np.float32)) if bias else None

    def forward(self, x):
        self.check_input(x)
        out = kernels_for(x).conv2d_forward(
            x, self.weight.data, self.bias and self.bias.data, self.stride, self.padding
        )
        self._keep(x, out.shape)
        return out

    def check_input(self, x):
        _check_images(self, x, self.in_channels)
        _check_window(self, x, self.padding)

    def backward(self, dout, need_dx=True):
        x, out_shape = self._take_cache()
        _check_dout(self, dout, out_shape, x.dtype)
        dx, dweight, dbias = kernels_for(dout).conv2d_backward(
            dout, x, self.weight.data, self.stride, self.padding, need_dx, need_dbias=self.bias is not None
        )
        self.weight.grad += dweight
        if self.bias:
            self.bias.grad += dbias
        return dx


def _integers(layer, least=1, **sizes):
    """Return the sizes as Python's integers: arithmetic in NumPy's uint8 would wrap round at 256."""
    for name, value in sizes.items():
        if not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(f"{layer}: {name} must be an integer of at least {least}, got {value!r}")
    return [int(value) for value in sizes.values()]


def _check_numbers(layer, **values):
    for name, value in values.items():
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{layer}: {name} must be a number, got {value!r}")


def _check_images(layer, x, channels):
    if x.ndim != 4 or x.shape[3] != channels:
        raise ValueError(f"{type(layer).__name__} expects images (N, H, W, {channels}), channels last, got {x.shape}")
    _check_dtype(layer, x)


def _check_window(layer, x, padding):
    if min(x.shape[1:3]) + 2 * padding < layer.kernel_size:
        name, size = type(layer).__name__, layer.kernel_size
        raise ValueError(f"{name}: with padding {padding}, a window of {size} does not fit into {x.shape}")


def _check_residual(layer, x, residual):
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"{type(layer).__name__} expects a residual like x, {x.shape} {x.dtype}, got {residual.shape} "
            f"{residual.dtype}"
        )


def _check_dout(layer, dout, out_shape, out_dtype):
    check_array(f"{type(layer).__name__}.backward", dout)
    if dout.shape != out_shape:
        raise ValueError(
            f"{type(layer).__name__}.backward expects the gradient of its output, {out_shape}, got {dout.shape}"
        )
    if dout.dtype != out_dtype and (out_dtype, dout.dtype) not in kernels_for(dout).MIXED_DTYPES:
        raise ValueError(
            f"{type(layer).__name__}.backward expects the gradient in the dtype of its output, {out_dtype}, "
            f"got {dout.dtype}"
        )


def _check_dtype(layer, x):
    own = (layer.bias if isinstance(layer, Bias2d) else layer.weight).data
    dtype, library = own.dtype, array_module(own).__name__
    if array_module(x) is not array_module(own):
        raise ValueError(
            f"{type(layer).__name__} has parameters of {library}, got an input of {array_module(x).__name__}: move the "
            "module by to(device), or the input by backend.to_device"
        )
    if x.dtype != dtype and (x.dtype, dtype) not in kernels_for(x).MIXED_DTYPES:
        raise ValueError(
            f"{type(layer).__name__} has {dtype} parameters, got an input of {x.dtype}: convert the input, or the "
            "module by to(dtype=...); only the fast kernels of a GPU take float16 beside float32"
        )
