"""The mathematics of every layer: each forward with its backward right below, for NumPy and CuPy alike.

This is the page to read first. Every function is pure: it takes arrays, returns others and writes to none of its
arguments, but for the five whose names say update, which are there to write. The examples in the docstrings are run
by the tests.

The loss is one number, how wrong the network is. Its derivative by each element of x, in the shape of x, is dx, the
gradient of x. A backward is given dout, that of the forward's output, and returns those of the inputs. It is found the
same way each time: ask through which outputs an element of the input influences the loss, and add up.

A window is the rectangle of kh by kw pixels that a convolution or a pooling looks at. It slides over the image, with a
frame of `padding` zeros around it, in steps of `stride` pixels; each pixel that it shows is a tap. A convolution
multiplies what the window shows by weights: those of one output channel are a filter. (The field calls window and
filter a kernel, hence kernel_size. Here a kernel is a function that computes, such as those below.)

Letters in shapes: N images at once (a batch), H and W height and width, C channels in, O channels out, kh and kw height
and width of a window, oh and ow those of the output, D numbers that describe an image at the end of the network, K
classes; M = N H W (a product). Images are NHWC: the channels of a pixel, at first three colours, lie side by side.
"""

import math

from minires.backend import array_module
from minires.rng import random_words

MIXED_DTYPES = ()  # (dtype of images, dtype of parameters) that a set serves though they differ; here none
COLUMN_BYTES = 8 * 2**20  # columns that exist at one time: small enough for a CPU's cache, and no batch is too large


def relu_forward(x):
    """Keep what is positive.

    Forward     out = max(x, 0)
    """
    return array_module(x).maximum(x, 0)


def relu_backward(dout, out):
    """Send the gradient of `relu_forward` back to x.

    Backward    dx = dout where out > 0, else 0

    Why         Where x is positive, out moves with it one to one; elsewhere out stays 0 whatever x does. The output
                tells the two apart as well as the input would, and the next layer keeps it anyway.
    """
    return dout * (out > 0)


def linear_forward(x, weight, bias=None):
    """Multiply each row by the weights and add the bias.

    Forward     out = x @ weight + bias

    Shapes      x (N, D), weight (D, K), bias (K,) or None  ->  out (N, K)
    """
    out = x @ weight  # (N, K)
    return out if bias is None else out + bias


def linear_backward(dout, x, weight):
    """Send the gradient of `linear_forward` back to its three inputs.

    Backward    dx = dout @ weight.T        dweight = x.T @ dout        dbias = dout summed over rows

    Why         One output is out[n, k] = sum_d x[n, d] weight[d, k] + bias[k].
                x[n, d] influences the loss through every k, each time scaled by weight[d, k]:
                    dx[n, d] = sum_k dout[n, k] weight[d, k]
                weight[d, k] influences it through every n, each time scaled by x[n, d]:
                    dweight[d, k] = sum_n x[n, d] dout[n, k]
                bias[k] influences it once in every row. Each sum is one matrix product.

    Shapes      dout (N, K), x (N, D), weight (D, K)  ->  dx (N, D), dweight (D, K), dbias (K,)
    """
    dx = dout @ weight.T  # (N, D)
    dweight = x.T @ dout  # (D, K)
    return dx, dweight, sum_over_rows(dout)


def sum_over_rows(x):
    """Sum over every axis but the last, in float64: a float32 sum of 131,072 rows would lose two digits.

    Shapes      x (..., C)  ->  (C,), in the dtype of x
    """
    return x.sum(axis=tuple(range(x.ndim - 1)), dtype="float64").astype(x.dtype)


def dropout_forward(x, p, key, step, start=0):
    """Set each element to 0 with probability p, and scale the others so that the expected value stays the same.

    Forward     out = x * mask / (1 - p), where mask is 1 with probability 1 - p, else 0

    Args        key, step: what the mask is drawn from (see rng.py): the same key and step draw the same mask; start:
                where x begins, if it is a part of an array for which the mask is drawn: elements before it
    """
    return x * dropout_mask(x, p, key, step, start)


def dropout_backward(dout, p, key, step, start=0):
    """Send the gradient of `dropout_forward` back to x.

    Backward    dx = dout * mask / (1 - p), with the forward's mask

    Why         Given the mask, dropout multiplies every element by a constant. The mask is a function of key and step,
                so it is drawn again rather than kept.
    """
    return dout * dropout_mask(dout, p, key, step, start)


def dropout_mask(x, p, key, step, start=0):
    """Draw 0 with probability p and 1 / (1 - p) otherwise, for each element of x.

    Four neighbours in memory share one counter, and each takes one of its four words: integers from 0 to 2**32 - 1.
    """
    xp = array_module(x)
    first, end = start // 4, -(-(start + x.size) // 4)  # counters
    words = random_words(end - first, key, step, xp=xp, start=first).reshape(-1)[start % 4 :][: x.size]  # uint32
    kept = (words >= int(p * 2**32)).reshape(x.shape)
    return kept.astype(x.dtype) * (1 / (1 - p))


def global_avg_pool2d_forward(x):
    """Average each channel over all pixels of the image.

    Forward     out[n, c] = 1 / (H W) sum_hw x[n, h, w, c]

    Shapes      x (N, H, W, C)  ->  out (N, C)
    """
    return x.mean(axis=(1, 2), dtype="float64").astype(x.dtype)  # in float32 a large image would lose digits


def global_avg_pool2d_backward(dout, x_shape):
    """Send the gradient of `global_avg_pool2d_forward` back to x.

    Backward    dx[n, h, w, c] = dout[n, c] / (H W)

    Why         Every pixel of a channel has the same part in the average.

    Shapes      dout (N, C), x_shape = (N, H, W, C)  ->  dx (N, H, W, C)
    """
    _, H, W, _ = x_shape
    xp = array_module(dout)
    return xp.ascontiguousarray(xp.broadcast_to((dout / (H * W))[:, None, None, :], x_shape))  # (N, H, W, C)


def max_pool2d_forward(x, kernel_size, stride):
    """Keep the largest number that each window shows, channel by channel.

    Forward     out[n, i, j, c] = max over h and w of x[n, i stride + h, j stride + w, c]

    Shapes      x (N, H, W, C), kernel_size (kh, kw)  ->  out (N, oh, ow, C)
    """
    xp = array_module(x)
    out = x[pixels_of_tap(0, 0, x.shape, kernel_size, stride)]  # (N, oh, ow, C)
    for h in range(kernel_size[0]):
        for w in range(kernel_size[1]):
            out = xp.maximum(out, x[pixels_of_tap(h, w, x.shape, kernel_size, stride)])
    return out


def max_pool2d_backward(dout, x, out, kernel_size, stride):
    """Send the gradient of `max_pool2d_forward` back to x.

    Backward    dx of a pixel = sum of dout over all windows in which it is the largest

    Why         A window's output moves one to one with its largest pixel, and the others do not influence it. Windows
                may overlap, so what a pixel gets is added up. On a tie the first of the largest pixels gets all, row
                by row from the top left, as in PyTorch: halves for two would be as right, but all to each would not.

    Shapes      dout and out (N, oh, ow, C), x (N, H, W, C)  ->  dx (N, H, W, C)

    >>> import numpy as np
    >>> x = np.array([[1, 3, 3], [2, 0, 1]]).reshape(1, 2, 3, 1)
    >>> out = max_pool2d_forward(x, (2, 2), 1)  # two windows, both show the 3 in the middle
    >>> out.reshape(2)
    array([3, 3])
    >>> max_pool2d_backward(np.array([10, 1]).reshape(out.shape), x, out, (2, 2), 1).reshape(2, 3)
    array([[ 0, 11,  0],
           [ 0,  0,  0]])
    """
    xp = array_module(x)
    dx = xp.zeros_like(x)  # (N, H, W, C)
    waiting = xp.ones(out.shape, dtype=bool)  # windows whose largest pixel has not come yet
    for h in range(kernel_size[0]):
        for w in range(kernel_size[1]):
            pixels = pixels_of_tap(h, w, x.shape, kernel_size, stride)
            is_largest = (x[pixels] == out) & waiting  # (N, oh, ow, C)
            dx[pixels] += dout * is_largest  # what one tap shows are different pixels, so none is added to twice
            waiting = waiting ^ is_largest
    return dx


def pixels_of_tap(h, w, x_shape, kernel_size, stride):
    """Return the index into images of what tap (h, w) of the window shows, at every position of the window.

    Shapes      x_shape = (N, H, W, C): x[index] is (N, oh, ow, C)
    """
    _, H, W, _ = x_shape
    oh, ow = output_size(H, kernel_size[0], stride, 0), output_size(W, kernel_size[1], stride, 0)
    return slice(None), slice(h, h + oh * stride, stride), slice(w, w + ow * stride, stride)


def output_size(size, kernel_size, stride, padding):
    """How many positions a window has along a side of `size` pixels; less than 1 if it does not fit."""
    return (size + 2 * padding - kernel_size) // stride + 1


def softmax_cross_entropy_forward(logits, labels, label_smoothing=0.0):
    """Turn scores into probabilities, and measure how far these are from the labels, averaged over the batch.

    The scores, one for each class and of any size and sign, are called logits.

    Forward     p = exp(logits) / sum_k exp(logits), the softmax        loss = -1 / N sum_nk target[n, k] log p[n, k]
                target is 1 - s + s / K for the label and s / K for each other class, s the label smoothing

    Why         log p = logits - max - log sum exp(logits - max), as what is taken from all scores cancels in the
                fraction. So exp cannot overflow, and the logarithm is taken of a sum that is at least 1.

    Shapes      logits (N, K), labels (N,) integers  ->  loss (), probabilities (N, K)
    Source      label smoothing as in Szegedy et al. 2016, "Rethinking the Inception architecture", section 7
    """
    xp = array_module(logits)
    shifted = logits - logits.max(axis=1, keepdims=True)  # (N, K)
    exp = xp.exp(shifted)  # (N, K)
    total = exp.sum(axis=1, keepdims=True)  # (N, 1)
    log_probabilities = shifted - xp.log(total)  # (N, K)
    loss = -log_probabilities[xp.arange(len(labels)), labels].mean() * (1 - label_smoothing)
    if label_smoothing:
        loss = loss - log_probabilities.mean() * label_smoothing
    return loss, exp / total


def softmax_cross_entropy_backward(dloss, probabilities, labels, label_smoothing=0.0):
    """Send the gradient of `softmax_cross_entropy_forward` back to the logits.

    Backward    dlogits = dloss (p - target) / N

    Why         loss_n = log sum_k exp(logits[n, k]) - sum_k target[n, k] logits[n, k], as the targets of a row sum to
                1. The derivative of the first term by logits[n, k] is exp(logits[n, k]) / sum exp = p[n, k], that of
                the second is target[n, k].

    Shapes      dloss a number, 1 for the loss itself, probabilities (N, K), labels (N,)  ->  dlogits (N, K)

    >>> import numpy as np
    >>> loss, probabilities = softmax_cross_entropy_forward(np.log([[1, 2, 1]]), np.array([1]))
    >>> softmax_cross_entropy_backward(1.0, probabilities, np.array([1]))
    array([[ 0.25, -0.5 ,  0.25]])
    """
    xp = array_module(probabilities)
    N, K = probabilities.shape
    dlogits = probabilities - label_smoothing / K  # (N, K)
    dlogits[xp.arange(N), labels] -= 1 - label_smoothing
    return dlogits * (dloss / N)


def im2col(x, kernel_size, stride, padding):
    """Lay out what the window shows at each of its positions as one row; the field calls all of these "columns".

    Forward     columns[n, i, j, (h, w, c)] = x[n, i stride + h - padding, j stride + w - padding, c]
                with zeros outside the image

    Shapes      x (N, H, W, C), kernel_size (kh, kw)  ->  columns (N, oh, ow, kh*kw*C)

    >>> import numpy as np
    >>> x = np.arange(9).reshape(1, 3, 3, 1)  # 0 1 2 / 3 4 5 / 6 7 8
    >>> im2col(x, (2, 2), stride=1, padding=0).reshape(4, 4)  # four windows, four taps each
    array([[0, 1, 3, 4],
           [1, 2, 4, 5],
           [3, 4, 6, 7],
           [4, 5, 7, 8]])
    """
    xp = array_module(x)
    padded = xp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))  # (N, H + 2p, W + 2p, C)
    windows = xp.lib.stride_tricks.sliding_window_view(padded, kernel_size, axis=(1, 2))[:, ::stride, ::stride]
    N, oh, ow, C, kh, kw = windows.shape  # a view: nothing is copied before the reshape
    return windows.transpose(0, 1, 2, 4, 5, 3).reshape(N, oh, ow, kh * kw * C)


def col2im(columns, x_shape, kernel_size, stride, padding):
    """Add every entry of the columns to the pixel that `im2col` took it from: the backward of `im2col`.

    Backward    dx of a pixel = sum of dcolumns[n, i, j, (h, w, c)] over all windows (i, j) and taps (h, w) that show it

    Why         im2col copies, and a value that was copied several times influences the loss once through each copy.
                In other words, im2col is linear, a matrix of zeros and ones, and its backward is the transposed matrix,
                the adjoint: <im2col(x), c> = <x, col2im(c)> for every x and c, where <a, b> is the sum of a b.
                For one tap (h, w) the pixels are all different, so all windows can be added at once.

    Shapes      columns (N, oh, ow, kh*kw*C), x_shape = (N, H, W, C)  ->  (N, H, W, C)

    >>> import numpy as np
    >>> col2im(np.ones((1, 2, 2, 4)), (1, 3, 3, 1), (2, 2), stride=1, padding=0).reshape(3, 3)  # windows at a pixel
    array([[1., 2., 1.],
           [2., 4., 2.],
           [1., 2., 1.]])
    """
    xp = array_module(columns)
    N, H, W, C = x_shape
    kh, kw = kernel_size
    _, oh, ow, _ = columns.shape
    windows = columns.reshape(N, oh, ow, kh, kw, C)
    padded = xp.zeros((N, H + 2 * padding, W + 2 * padding, C), dtype=columns.dtype)
    for h in range(kh):
        for w in range(kw):
            padded[pixels_of_tap(h, w, padded.shape, kernel_size, stride)] += windows[:, :, :, h, w]
    return padded[:, padding : padding + H, padding : padding + W]


def columns_conv2d_forward(x, weight, stride, padding):
    """Slide a window over each image, and at each position take O weighted sums of what it shows.

    Forward     out[n, i, j, o] = sum_hwc x[n, i s + h - p, j s + w - p, c] weight[h, w, c, o]
                with stride s and padding p, where x is 0 outside the image

    Why         `im2col` lays what each window shows side by side as one row. The convolution is then one matrix product
                of these rows with the weights, a column of which is a filter.

    Shapes      x (N, H, W, C), weight (kh, kw, C, O)  ->  out (N, oh, ow, O)
    Source      Chellapilla, Puri and Simard 2006, "High performance convolutional neural networks for document
                processing"
    """
    kh, kw, C, O = weight.shape
    columns = im2col(x, (kh, kw), stride, padding)  # (N, oh, ow, kh*kw*C)
    product = columns.reshape(-1, kh * kw * C) @ weight.reshape(-1, O)  # (N*oh*ow, O)
    return product.reshape(*columns.shape[:3], O)


def columns_conv2d_backward(dout, x, weight, stride, padding, need_dx=True):
    """Send the gradient of `columns_conv2d_forward` back to x and weight.

    Backward    dcolumns = dout @ weight.T        dx = col2im(dcolumns)        dweight = columns.T @ dout

    Why         On columns, a convolution is a linear layer, with that layer's backward, and `col2im` is the backward of
                `im2col`. The columns are made again from x; keeping those of the forward pass would take nine times the
                memory of x for a 3x3 window.

    Shapes      dout (N, oh, ow, O), x (N, H, W, C), weight (kh, kw, C, O)
                ->  dx (N, H, W, C) or None, dweight (kh, kw, C, O)
    """
    kh, kw, C, O = weight.shape
    columns = im2col(x, (kh, kw), stride, padding)  # (N, oh, ow, kh*kw*C)
    dout_rows = dout.reshape(-1, O)  # (N*oh*ow, O)
    dweight = (columns.reshape(-1, kh * kw * C).T @ dout_rows).reshape(weight.shape)
    if not need_dx:
        return None, dweight
    dcolumns = (dout_rows @ weight.reshape(-1, O).T).reshape(columns.shape)
    return col2im(dcolumns, x.shape, (kh, kw), stride, padding), dweight


def conv2d_forward(x, weight, bias=None, stride=1, padding=0):
    """Convolve a batch a few images at a time, and add the bias.

    Forward     out = `columns_conv2d_forward` + bias

    Why         Columns hold each pixel up to kh kw times. So they are made for as many images as fit into COLUMN_BYTES,
                and dropped again: for a batch of 128, those of the default network's first stage alone would take
                1.2 GB, those of all its layers 1.6 GB.

    Shapes      x (N, H, W, C), weight (kh, kw, C, O), bias (O,) or None  ->  out (N, oh, ow, O)
    """
    kh, kw, _, O = weight.shape
    N, H, W, _ = x.shape
    out_shape = N, output_size(H, kh, stride, padding), output_size(W, kw, stride, padding), O
    out = array_module(x).empty(out_shape, dtype=x.dtype)
    for images in image_chunks(out_shape, weight.shape, x.dtype.itemsize):
        out[images] = columns_conv2d_forward(x[images], weight, stride, padding)
    return out if bias is None else out + bias


def conv2d_backward(dout, x, weight, stride=1, padding=0, need_dx=True, need_dbias=True):
    """Send the gradient of `conv2d_forward` back to its three inputs.

    Backward    dx and dweight by `columns_conv2d_backward`        dbias = sum dout

    Why         An image's dx is its own; every image influences the loss through the same weights, so dweight adds up.

    Args        need_dx: False for a network's first layer, where nobody asks for the gradient of the images;
                need_dbias: False for a layer without a bias

    Shapes      dout (N, oh, ow, O), x (N, H, W, C), weight (kh, kw, C, O)
                ->  dx (N, H, W, C) or None, dweight (kh, kw, C, O), dbias (O,) or None
    """
    xp = array_module(x)
    dx = xp.empty_like(x) if need_dx else None
    dweight = xp.zeros_like(weight)
    for images in image_chunks(dout.shape, weight.shape, x.dtype.itemsize):
        dx_part, dweight_part = columns_conv2d_backward(dout[images], x[images], weight, stride, padding, need_dx)
        if need_dx:
            dx[images] = dx_part
        dweight += dweight_part
    return dx, dweight, sum_over_rows(dout) if need_dbias else None


def image_chunks(out_shape, weight_shape, itemsize):
    """Cut a batch into slices of as many images as have their columns within COLUMN_BYTES, at least one image."""
    N, oh, ow, _ = out_shape
    column_bytes = oh * ow * math.prod(weight_shape[:3]) * itemsize  # of one image
    images = max(1, COLUMN_BYTES // column_bytes)
    return [slice(start, start + images) for start in range(0, N, images)]


def batch_norm_statistics(x):
    """Return mean and variance of every channel over the batch.

    Forward     mean = 1 / M sum x        var = 1 / M sum (x - mean)^2        (over the M = N H W rows)

    Why         Written so, the variance cannot come out negative, as the mean of x^2 less mean^2 can by rounding.

    Shapes      x (N, H, W, C)  ->  mean (C,), var (C,)
    Source      Ioffe and Szegedy 2015, algorithm 1; var is the biased one, as there
    """
    M = x.size // x.shape[-1] or 1  # 1 where a process has no image of the last, short batch
    mean = sum_over_rows(x) / M  # (C,)
    centred = x - mean  # (N, H, W, C)
    return mean, sum_over_rows(centred * centred) / M


def batch_norm_forward(x, weight, bias, mean, var, eps):
    """Normalise: give every channel mean 0 and variance 1, then scale and shift it.

    Forward     x_hat = (x - mean) / sqrt(var + eps)        out = x_hat weight + bias

    Args        mean, var: in training the batch's, `batch_norm_statistics(x)`; after it running averages of these

    Shapes      x (N, H, W, C), weight, bias, mean, var (C,)  ->  out (N, H, W, C)
    """
    return (x - mean) * (weight * rsqrt(var, eps)) + bias


def batch_norm_backward_sums(dout, x, mean, var, eps):
    """Send the gradient of `batch_norm_forward` back to weight and bias: two sums, which dx needs as well.

    Backward    dweight = sum dout x_hat        dbias = sum dout        (over the M rows)

    Why         out = x_hat weight + bias in every row, so weight[c] influences the loss once in each, scaled by x_hat,
                and so does bias[c], scaled by 1.

    Shapes      dout, x (N, H, W, C), mean, var (C,)  ->  dweight (C,), dbias (C,)
    """
    x_hat = (x - mean) * rsqrt(var, eps)  # (N, H, W, C)
    return sum_over_rows(dout * x_hat), sum_over_rows(dout)


def batch_norm_backward(dout, x, weight, mean, var, eps, dweight, dbias):
    """Send the gradient of `batch_norm_forward` back to x, where mean and var are the batch's own.

    Backward    dx = weight rstd (dout - dbias / M - x_hat dweight / M)        with rstd = 1 / sqrt(var + eps)

    Why         One x[j] of a channel influences the loss in three ways: directly, through the mean and through rstd.
                Write [i = j] for 1 if i is j, else 0.
                    mean = 1/M sum_i x[i]               dmean/dx[j] = 1/M
                    var = 1/M sum_i (x[i] - mean)^2     dvar/dx[j] = 2/M sum_i (x[i] - mean) ([i = j] - 1/M)
                                                                   = 2/M (x[j] - mean), as sum_i (x[i] - mean) = 0
                    rstd = (var + eps)^(-1/2)           drstd/dx[j] = -1/2 (var + eps)^(-3/2) dvar/dx[j]
                                                                    = -rstd^3 (x[j] - mean) / M = -rstd^2 x_hat[j] / M
                By the product rule, x_hat[i] = (x[i] - mean) rstd has the derivative
                    d x_hat[i] / dx[j] = ([i = j] - 1/M) rstd - (x[i] - mean) rstd^2 x_hat[j] / M
                                       = rstd ([i = j] - 1/M - x_hat[i] x_hat[j] / M)
                The gradient that reaches x_hat[i] is g[i] = dout[i] weight. Times the derivative, summed over i:
                    dx[j] = rstd (g[j] - 1/M sum_i g[i] - x_hat[j] 1/M sum_i g[i] x_hat[i])
                and the two sums are weight dbias and weight dweight. But for eps, the sums of dx and of dx x_hat are 0:
                a batch's own mean and scale do not influence the loss.

    Args        dweight, dbias: what `batch_norm_backward_sums` gives. Where several processes share a batch, and mean
                and var are those of all its rows: the sums over all rows, times the share of the rows that x holds

    Shapes      dout, x (N, H, W, C), weight, mean, var, dweight, dbias (C,)  ->  dx (N, H, W, C)

    >>> import numpy as np
    >>> def dx(dout, x):
    ...     mean, var = batch_norm_statistics(x)
    ...     dweight, dbias = batch_norm_backward_sums(dout, x, mean, var, 0.0)
    ...     return batch_norm_backward(dout, x, np.ones(1), mean, var, 0.0, dweight, dbias)
    >>> x, dout = np.array([[0.0], [3.0], [6.0]]), np.array([[1.0], [0.0], [0.0]])  # one channel, M = 3
    >>> (dx(dout, x) * 6 * np.sqrt(6)).round(12).ravel()
    array([ 1., -2.,  1.])
    >>> dx(dout[:2], x[:2]).ravel() + 0  # M = 2: out is -1 and 1 whatever x is
    array([0., 0.])
    """
    M = x.size // x.shape[-1] or 1
    rstd = rsqrt(var, eps)  # (C,)
    x_hat = (x - mean) * rstd  # (N, H, W, C)
    return (dout - dbias / M - x_hat * (dweight / M)) * (weight * rstd)


def rsqrt(var, eps):
    """1 / sqrt(var + eps), the reciprocal of the standard deviation; eps keeps a constant channel from dividing by 0"""
    return 1 / array_module(var).sqrt(var + eps)


def update_running_statistics(running_mean, running_var, mean, var, momentum, M):
    """Take the part `momentum` of a batch's statistics into the running ones, for use after training; writes to these.

    Update      running = (1 - momentum) running + momentum batch, with the unbiased variance, var M / (M - 1)
    """
    for running, batch in ((running_mean, mean), (running_var, var * (M / (M - 1)))):
        running *= 1 - momentum
        running += batch * momentum


def sgd_update(param, grad, velocity, lr, momentum=0.0, nesterov=False, weight_decay=0.0, grad_scale=1.0):
    """Move a parameter against its gradient; writes to param and velocity.

    Update      g = grad_scale grad + weight_decay param        velocity = momentum velocity + g
                param = param - lr velocity, or with nesterov: param - lr (g + momentum velocity)

    Why         The velocity is g_t + momentum g_(t-1) + momentum^2 g_(t-2) + ...: along a valley of the loss the
                gradients agree and add up, to 1 / (1 - momentum) times one of them; across it they change sign from
                step to step and cancel.
                Nesterov takes the gradient not at w, but where momentum is about to carry it, p = w - lr momentum v:
                    v' = momentum v + g(p)        w' = w - lr v'        (v: the velocity; v', w', p': after the step)
                Stored is p, where the gradients are. As v' - momentum v = g, it moves to
                    p' = w' - lr momentum v' = (p + lr momentum v) - lr v' - lr momentum v' = p - lr (g + momentum v')

    Args        lr: the learning rate; grad_scale: undoes the factor that keeps gradients of 16 bits from becoming 0
    Shapes      param, grad and velocity of one shape; velocity starts at 0, and is None without momentum
    Source      Sutskever et al. 2013, "On the importance of initialization and momentum", in PyTorch's form, in which
                lr scales the velocity when it is used, not when it is built up
    """
    if grad_scale != 1:
        grad = grad_scale * grad
    if weight_decay:
        grad = grad + weight_decay * param
    if momentum:
        velocity *= momentum
        velocity += grad
        grad = grad + momentum * velocity if nesterov else velocity
    param -= lr * grad


def muon_update(weights, grads, velocities, lr, momentum=0.6, grad_scale=1.0):
    """Move filters by lr times an orthogonal matrix, and hold the norm of each array; writes to weights and velocities.

    Update      velocity = momentum velocity + grad_scale grad        g = grad_scale grad + momentum velocity
                weight = weight sqrt(O) / |weight| - lr `orthogonalize`(g)

    Why         A filter bank is a matrix, from kh kw C inputs to O outputs, and its gradient mostly a product of few
                columns and rows, those of the inputs that are large at the moment. A step along it moves the outputs
                in these few directions far and in all others hardly. The orthogonal matrix nearest to it has all its
                singular values 1: of all matrices that change no output by more than a given length, it follows the
                gradient best, and rare directions are learned as fast as common ones.
                BatchNorm takes out the scale of a filter, so that a step of one length counts less, the longer the
                filter has grown. The norm is therefore held at that of an orthogonal matrix, sqrt(O) for O columns, and
                lr is the share of a filter that a step replaces (less for a shortcut's, which has fewer rows than
                columns). No weight decay is needed.

    Shapes      weights, grads, velocities: lists of (kh, kw, C, O); velocities start at 0
    Source      Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the norm as in Jordan's
                "94% on CIFAR-10 in 2.59 seconds" (airbench)
    """
    for weight, grad, velocity in zip(weights, grads, velocities, strict=True):
        O = weight.shape[3]
        velocity *= momentum
        velocity += grad_scale * grad
        direction = orthogonalize((grad_scale * grad + momentum * velocity).reshape(-1, O))
        weight *= O**0.5 / (norm(weight) + 1e-30)  # one of zeros stays so here
        weight -= lr * direction.reshape(weight.shape)


def orthogonalize(matrix, steps=3):
    """Return about U V.T for a matrix U S V.T: a turn V.T, a stretch S (its singular values, here made 1), a turn U.

    Forward     X = matrix / |matrix|, then `steps` times X = a X + b X (X.T X) + c X (X.T X)^2

    Why         With X = U S V.T, X (X.T X) = U S^3 V.T: a step leaves U and V as they are and maps each singular value
                s to p(s) = a s + b s^3 + c s^5. Newton and Schulz's p, with 1.5, -0.5 and 0, converges to 1, but a
                small s grows only by a half. This one makes it 3.4 times as large, and does not converge: after three
                steps, all that began between 0.02 and 1 are between 0.68 and 1.21, which serves as well. |matrix|, the
                root of the sum of squares, is at least the largest singular value; so none begins above 1.
                X is multiplied by Q = a I + b X.T X + c (X.T X)^2 in each step, which makes Q (X.T X) Q of X.T X. So
                all steps are done on the small square, and X is multiplied by the product of the Q once.

    Shapes      matrix (R, O)  ->  the same
    Source      Jordan et al. 2024, "Muon", for the coefficients; Björck and Bowie 1971, "An iterative algorithm for
                computing the best estimate of an orthogonal matrix"

    >>> import numpy as np
    >>> X = orthogonalize(np.array([[3.0, 0.0], [0.0, -0.5], [0.0, 0.0]]))  # singular values 3 and 0.5
    >>> X.round(2)
    array([[ 0.71,  0.  ],
           [ 0.  , -0.94],
           [ 0.  ,  0.  ]])
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    if matrix.shape[0] < matrix.shape[1]:
        return orthogonalize(matrix.T, steps).T  # the smaller of the two squares
    X = matrix / (norm(matrix) + 1e-18)  # of a gradient of 0 nothing is left, nor of one whose squares underflow
    square, eye = X.T @ X, array_module(X).eye(X.shape[1], dtype=X.dtype)  # (O, O)
    product = Q = a * eye + b * square + c * (square @ square)
    for _ in range(steps - 1):
        square = Q @ square @ Q
        Q = a * eye + b * square + c * (square @ square)
        product = product @ Q
    return X @ product


def norm(x):
    """The root of the sum of squares (Frobenius norm)."""
    return array_module(x).sqrt((x * x).sum())


def adam_update(param, grad, m, v, step, lr, betas, eps, weight_decay=0.0, grad_scale=1.0):
    """Move a parameter by about lr, whatever the scale of its gradient; writes to param, m and v.

    Update      g = grad_scale grad + weight_decay param
                m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
                param = param - lr m_hat / (sqrt(v_hat) + eps)
                m_hat = m / (1 - beta1^step)        v_hat = v / (1 - beta2^step)

    Why         m is the gradient's running mean, and sqrt(v) its usual size. Their ratio has no unit: multiply the loss
                by 1000, and the step stays what it is. It is about 1 while the gradient keeps its sign, and small while
                noise turns it to and fro.
                m and v start at 0 and are too small at first. For a constant gradient,
                    m_t = (1 - beta1) (1 + beta1 + ... + beta1^(t-1)) g = (1 - beta1^t) g
                by the geometric series, and v_t = (1 - beta2^t) g^2 likewise: m_hat and v_hat are g and g^2 at once.

    Args        step: 1 at the first update; grad_scale: as in `sgd_update`
    Shapes      param, grad, m and v of one shape; m and v start at 0
    Source      Kingma and Ba 2015, algorithm 1; weight_decay is added to the gradient, as in PyTorch's Adam

    >>> import numpy as np
    >>> param, m, v = np.zeros((3, 1))
    >>> adam_update(param, np.array([5.0]), m, v, step=1, lr=0.1, betas=(0.9, 0.999), eps=1e-8)
    >>> param.round(6)  # lr, against the gradient
    array([-0.1])
    >>> (-0.1 * m / np.sqrt(v)).round(6)  # without the correction: 0.1 / sqrt(0.001) times as far
    array([-0.316228])
    """
    beta1, beta2 = betas
    if grad_scale != 1:
        grad = grad_scale * grad
    if weight_decay:
        grad = grad + weight_decay * param
    m *= beta1
    m += (1 - beta1) * grad
    v *= beta2
    v += (1 - beta2) * (grad * grad)
    rms = array_module(v).sqrt(v) * (1 / math.sqrt(1 - beta2**step)) + eps
    param -= (lr / (1 - beta1**step)) * m / rms


def average_update(average, param, decay):
    """Move an exponential moving average (EMA) of a parameter towards its value; writes to average.

    Update      average = decay average + (1 - decay) param

    Shapes      average and param of one shape
    """
    average += (1 - decay) * (param - average)


def sum_of_squares(x):
    """Return the sum of the squares of all numbers in x, a 0-d array on the device of x."""
    return (x * x).sum()


def add(a, b):
    """Add two arrays of one shape: the gradients of an input that went two ways."""
    return a + b


def add_and_relu(out, residual, relu):
    """What follows a normalisation in a residual network: the sum with `residual`, what the shortcut brings, then ReLU.

    With the three functions below it stands here for speed alone: the mathematics is all above.
    A fast kernel does in one pass over memory what these compose.
    """
    if residual is not None:
        out = out + residual
    return relu_forward(out) if relu else out


def conv2d_add_relu_forward(x, weight, bias=None, stride=1, padding=0, residual=None, relu=False):
    """Convolve, then add the residual if there is one, then take ReLU if asked for."""
    return add_and_relu(conv2d_forward(x, weight, bias, stride, padding), residual, relu)


def batch_norm_add_relu_forward(x, weight, bias, mean, var, eps, residual=None, relu=False):
    """Normalise, then add the residual if there is one, then take ReLU if asked for."""
    return add_and_relu(batch_norm_forward(x, weight, bias, mean, var, eps), residual, relu)


def batch_norm_add_relu_backward_sums(dout, x, out, mean, var, eps):
    """Send the gradient back through the ReLU, and from there to weight and bias.

    Args        out: what the forward returned, whose sign is the ReLU's mask; None if there was no ReLU

    Shapes      dout, x, out (N, H, W, C), mean, var (C,)
                ->  g (N, H, W, C), the gradient before the ReLU, which is also the residual's; dweight (C,), dbias (C,)
    """
    g = dout if out is None else relu_backward(dout, out)
    return g, *batch_norm_backward_sums(g, x, mean, var, eps)
