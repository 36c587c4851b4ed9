"""The mathematics of every layer: each forward with its backward right below, for NumPy and CuPy alike.

This is the page to read first. Every function is pure: it takes arrays, returns new ones and writes to none of its
arguments, but for the four whose names say update, which are there to write.

A backward is given dout, the derivative of the loss by the forward's output, and returns the derivative of the loss by
each input, in the shape of that input. It is found the same way each time: ask through which outputs an element of
the input meets the loss, and add up.

Letters in shapes: N images in the batch, H and W height and width, C channels in, O channels out, kh and kw the size of
a convolution's window, oh and ow height and width of the output, D numbers that describe an image at the end of the
network, K classes; M = N H W. Images are NHWC: channels last.
"""

import math

from minires.backend import array_module
from minires.rng import random_words

MIXED_DTYPES = ()  # pairs of dtypes, of images and of parameters, that differ and are served all the same
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


def add(a, b):
    """Add two arrays of one shape: the gradients of an input that went two ways."""
    return a + b


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
                x[n, d] meets the loss through every k, each time scaled by weight[d, k]:
                    dx[n, d] = sum_k dout[n, k] weight[d, k]
                weight[d, k] meets it through every n, each time scaled by x[n, d]:
                    dweight[d, k] = sum_n x[n, d] dout[n, k]
                bias[k] meets it once in every row. Each sum is one matrix product.

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


def dropout_forward(x, p, key, step):
    """Set each element to 0 with probability p, and scale the others so that the expected value stays the same.

    Forward     out = x * mask / (1 - p), where mask is 1 with probability 1 - p, else 0

    Args        key, step: what the mask is drawn from (see rng.py): the same key and step draw the same mask
    """
    return x * dropout_mask(x, p, key, step)


def dropout_backward(dout, p, key, step):
    """Send the gradient of `dropout_forward` back to x.

    Backward    dx = dout * mask / (1 - p), with the forward's mask

    Why         Given the mask, dropout multiplies every element by a constant. The mask is a function of key and step,
                so it is drawn again rather than kept.
    """
    return dout * dropout_mask(dout, p, key, step)


def dropout_mask(x, p, key, step):
    """Draw 0 with probability p and 1 / (1 - p) otherwise, for each element of x.

    Four neighbours in memory share one counter and take one word each.
    """
    xp = array_module(x)
    words = random_words(-(-x.size // 4), key, step, xp=xp).reshape(-1)[: x.size]  # uint32
    kept = (words >= int(p * 2**32)).reshape(x.shape)
    return kept.astype(x.dtype) * (1 / (1 - p))


def global_avg_pool2d_forward(x):
    """Average each channel over all pixels of the image.

    Forward     out[n, c] = 1 / (H W) sum_hw x[n, h, w, c]

    Shapes      x (N, H, W, C)  ->  out (N, C)
    """
    return x.mean(axis=(1, 2))


def global_avg_pool2d_backward(dout, x_shape):
    """Send the gradient of `global_avg_pool2d_forward` back to x.

    Backward    dx[n, h, w, c] = dout[n, c] / (H W)

    Why         Every pixel of a channel has the same part in the average.

    Shapes      dout (N, C), x_shape = (N, H, W, C)  ->  dx (N, H, W, C)
    """
    _, H, W, _ = x_shape
    xp = array_module(dout)
    return xp.ascontiguousarray(xp.broadcast_to((dout / (H * W))[:, None, None, :], x_shape))  # (N, H, W, C)


def softmax_cross_entropy_forward(logits, labels, label_smoothing=0.0):
    """Turn scores into probabilities and measure how far they are from the labels, averaged over the batch.

    Forward     p = softmax(logits)        loss = -1 / N sum_nk target[n, k] log p[n, k]
                target is 1 - s + s / K for the label and s / K for each other class, s the label smoothing

    Why         log p = logits - max - log sum exp(logits - max): with the largest score taken off, exp cannot
                overflow, and the logarithm is taken of a sum that is at least 1.

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

    Shapes      dloss a number, probabilities (N, K), labels (N,)  ->  dlogits (N, K)
    """
    xp = array_module(probabilities)
    N, K = probabilities.shape
    dlogits = probabilities - label_smoothing / K  # (N, K)
    dlogits[xp.arange(N), labels] -= 1 - label_smoothing
    return dlogits * (dloss / N)


def batch_norm_forward(x, weight, bias, eps, residual=None, relu=False):
    """Give every channel mean 0 and variance 1 over the batch, then scale and shift it.

    Two steps that follow a normalisation in a residual network are offered with it, as a fast kernel does all three
    in one pass over memory: the sum with a residual, and ReLU.

    Forward     x_hat = (x - mean) / sqrt(var + eps)        out = x_hat weight + bias
                then out + residual if there is one, then max(out, 0) if relu

    Why         mean and var are taken over the M = N H W rows, the variance as the mean of (x - mean)^2, which cannot
                come out negative as the mean of x^2 less mean^2 can.

    Shapes      x and residual (N, H, W, C), weight and bias (C,)  ->  out (N, H, W, C), mean (C,), var (C,)
    Source      Ioffe and Szegedy 2015, algorithm 1; var is the biased one, as there
    """
    M = x.size // x.shape[-1]
    mean = sum_over_rows(x) / M  # (C,)
    centred = x - mean  # (N, H, W, C)
    var = sum_over_rows(centred * centred) / M  # (C,)
    out = centred * (weight * rsqrt(var, eps)) + bias  # (N, H, W, C)
    return add_and_relu(out, residual, relu), mean, var


def batch_norm_inference(x, weight, bias, mean, var, eps, residual=None, relu=False):
    """Normalise as `batch_norm_forward` does, by given statistics in place of the batch's own."""
    out = (x - mean) * (weight * rsqrt(var, eps)) + bias  # (N, H, W, C)
    return add_and_relu(out, residual, relu)


def batch_norm_backward(dout, x, out, weight, mean, var, eps, relu=False, need_dresidual=True):
    """Send the gradient of `batch_norm_forward` back to x, weight, bias and the residual.

    Backward    g = dout where out > 0 if relu, else dout        dresidual = g
                dbias = sum g        dweight = sum g x_hat       (over the M rows)
                dx = weight / sqrt(var + eps) (g - dbias / M - x_hat dweight / M)

    Why         Write rstd for 1 / sqrt(var + eps), and g_hat = g weight for the gradient that reaches x_hat. One x[j]
                of a channel meets the loss in three ways: directly, through the mean, which moves every x_hat[i] alike,
                and through rstd, whose derivative is -rstd^2 x_hat[j] / M and which scales each x_hat[i]:
                    dx_hat[i] / dx[j] = rstd ((1 if i = j else 0) - 1 / M - x_hat[i] x_hat[j] / M)
                Times g_hat[i], summed over i:
                    dx = rstd (g_hat - mean(g_hat) - x_hat mean(g_hat x_hat))
                and the two means are weight dbias / M and weight dweight / M. But for eps, that is g_hat without its
                part along 1 and without its part along x_hat.

    Args        need_dresidual: False where the forward had no residual

    Shapes      dout, x, out (N, H, W, C), weight, mean, var (C,)
                ->  dx (N, H, W, C), dweight (C,), dbias (C,), dresidual (N, H, W, C) or None
    """
    g = relu_backward(dout, out) if relu else dout  # (N, H, W, C)
    M = x.size // x.shape[-1]
    rstd = rsqrt(var, eps)  # (C,)
    x_hat = (x - mean) * rstd  # (N, H, W, C)
    dbias = sum_over_rows(g)  # (C,)
    dweight = sum_over_rows(g * x_hat)  # (C,)
    dx = (g - dbias / M - x_hat * (dweight / M)) * (weight * rstd)  # (N, H, W, C)
    return dx, dweight, dbias, g if need_dresidual else None


def update_running_statistics(running_mean, running_var, mean, var, momentum, M):
    """Move the running statistics towards those of a batch of M rows; writes to the running ones.

    Update      running = (1 - momentum) running + momentum batch, where the batch's variance is made unbiased
    """
    for running, batch in ((running_mean, mean), (running_var, var * (M / (M - 1)))):
        running *= 1 - momentum
        running += batch * momentum


def rsqrt(var, eps):
    """1 / sqrt(var + eps), the reciprocal of the standard deviation; eps keeps a constant channel from dividing by 0"""
    return 1 / array_module(var).sqrt(var + eps)


def add_and_relu(out, residual, relu):
    """What follows a normalisation in a residual network: the sum with the residual, then ReLU, each if asked for."""
    if residual is not None:
        out = out + residual
    return relu_forward(out) if relu else out


def conv2d_forward(x, weight, bias=None, stride=1, padding=0):
    """Slide a window over each image, and at each place take O weighted sums of what it shows.

    Forward     out[n, i, j, o] = bias[o] + sum_hwc x[n, i s + h - p, j s + w - p, c] weight[h, w, c, o]
                with stride s and padding p, where x is 0 outside the image

    Why         `im2col` lays what each window shows side by side as one row; the convolution is then one matrix
                product. A row repeats each pixel up to kh kw times, so columns are made for as many images at a time as
                fit into COLUMN_BYTES, and dropped again. With a batch of 128, the columns of the
                default network's first stage alone would take 1.2 GB, those of all its layers 1.6 GB.

    Shapes      x (N, H, W, C), weight (kh, kw, C, O), bias (O,) or None  ->  out (N, oh, ow, O)
    Source      Chellapilla, Puri and Simard 2006, "High performance convolutional neural networks for document
                processing"
    """
    xp = array_module(x)
    kh, kw, C, O = weight.shape
    N, H, W, _ = x.shape
    out = xp.empty((N, output_size(H, kh, stride, padding), output_size(W, kw, stride, padding), O), dtype=x.dtype)
    for images in image_chunks(out.shape, weight.shape, x.dtype.itemsize):
        columns = im2col(x[images], (kh, kw), stride, padding)  # (n, oh, ow, kh*kw*C)
        product = columns.reshape(-1, kh * kw * C) @ weight.reshape(-1, O)  # (n*oh*ow, O)
        out[images] = product.reshape(out[images].shape)
    return out if bias is None else out + bias


def conv2d_backward(dout, x, weight, stride=1, padding=0, need_dx=True, need_dbias=True):
    """Send the gradient of `conv2d_forward` back to its three inputs.

    Backward    dcolumns = dout @ weight.T    dx = col2im(dcolumns)    dweight = columns.T @ dout    dbias = sum dout

    Why         On columns, a convolution is a linear layer, with that layer's backward. What reaches the columns goes
                on to x by the adjoint of `im2col`: `col2im`. The columns are made again from x; keeping those of the
                forward pass would take nine times the memory of x for a 3x3 window.

    Args        need_dx: False for a network's first layer, where nobody asks for the gradient of the images;
                need_dbias: False for a layer without a bias

    Shapes      dout (N, oh, ow, O), x (N, H, W, C), weight (kh, kw, C, O)
                ->  dx (N, H, W, C) or None, dweight (kh, kw, C, O), dbias (O,) or None
    """
    xp = array_module(x)
    kh, kw, C, O = weight.shape
    weight_rows = weight.reshape(-1, O)  # (kh*kw*C, O)
    dweight = xp.zeros_like(weight_rows)  # (kh*kw*C, O)
    dx = xp.empty_like(x) if need_dx else None
    for images in image_chunks(dout.shape, weight.shape, x.dtype.itemsize):
        columns = im2col(x[images], (kh, kw), stride, padding)  # (n, oh, ow, kh*kw*C)
        dout_rows = dout[images].reshape(-1, O)  # (n*oh*ow, O)
        dweight += columns.reshape(-1, kh * kw * C).T @ dout_rows
        if need_dx:
            dcolumns = (dout_rows @ weight_rows.T).reshape(columns.shape)  # (n, oh, ow, kh*kw*C)
            dx[images] = col2im(dcolumns, x[images].shape, (kh, kw), stride, padding)
    return dx, dweight.reshape(weight.shape), sum_over_rows(dout) if need_dbias else None


def im2col(x, kernel_size, stride, padding):
    """Lay out what the window shows at each of its places as one row.

    Forward     columns[n, i, j, (h, w, c)] = x[n, i stride + h - padding, j stride + w - padding, c]

    Shapes      x (N, H, W, C), kernel_size (kh, kw)  ->  columns (N, oh, ow, kh*kw*C)
    """
    xp = array_module(x)
    padded = xp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))  # (N, H + 2p, W + 2p, C)
    windows = xp.lib.stride_tricks.sliding_window_view(padded, kernel_size, axis=(1, 2))[:, ::stride, ::stride]
    N, oh, ow, C, kh, kw = windows.shape  # a view: nothing is copied before the reshape
    return windows.transpose(0, 1, 2, 4, 5, 3).reshape(N, oh, ow, kh * kw * C)


def col2im(columns, x_shape, kernel_size, stride, padding):
    """The adjoint of `im2col`: add every entry of the columns to the pixel that it was taken from.

    Backward    dx[n, y, x, c] = sum of dcolumns[n, i, j, (h, w, c)] over all windows that show this pixel

    Why         im2col copies, and a value that was copied several times meets the loss once through each copy. For one
                place (h, w) in the window the pixels are all different, so all windows can be added at once.

    Shapes      columns (N, oh, ow, kh*kw*C), x_shape = (N, H, W, C)  ->  (N, H, W, C)
    """
    xp = array_module(columns)
    N, H, W, C = x_shape
    kh, kw = kernel_size
    _, oh, ow, _ = columns.shape
    windows = columns.reshape(N, oh, ow, kh, kw, C)
    padded = xp.zeros((N, H + 2 * padding, W + 2 * padding, C), dtype=columns.dtype)
    for h in range(kh):
        for w in range(kw):
            padded[:, h : h + oh * stride : stride, w : w + ow * stride : stride] += windows[:, :, :, h, w]
    return padded[:, padding : padding + H, padding : padding + W]


def output_size(size, kernel_size, stride, padding):
    """How many places a window has along a side of `size` pixels; less than 1 if it does not fit."""
    return (size + 2 * padding - kernel_size) // stride + 1


def image_chunks(out_shape, weight_shape, itemsize):
    """Cut a batch into slices of as many images as have their columns within COLUMN_BYTES, at least one image."""
    N, oh, ow, _ = out_shape
    column_bytes = oh * ow * math.prod(weight_shape[:3]) * itemsize  # of one image
    images = max(1, COLUMN_BYTES // column_bytes)
    return [slice(start, start + images) for start in range(0, N, images)]


def sum_of_squares(x):
    """Return the sum of the squares of all numbers in x, an array without axes on the device of x."""
    return (x * x).sum()


def sgd_update(param, grad, velocity, lr, momentum=0.0, nesterov=False, weight_decay=0.0, grad_scale=1.0):
    """Move a parameter against its gradient; writes to param and velocity.

    Update      g = grad_scale grad + weight_decay param        velocity = momentum velocity + g
                param = param - lr (g + momentum velocity if nesterov, else velocity)

    Args        grad_scale: takes back the factor that a loss in 16 bits is given to keep small gradients above 0
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


def adam_update(param, grad, m, v, step, lr, betas, eps, weight_decay=0.0, grad_scale=1.0):
    """Move a parameter by about lr, whatever the scale of its gradient; writes to param, m and v.

    Update      g = grad_scale grad + weight_decay param
                m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
                param = param - lr m_hat / (sqrt(v_hat) + eps)
                m_hat = m / (1 - beta1^step)        v_hat = v / (1 - beta2^step)

    Why         m and v start at 0 and are too small at first, by exactly these factors if the gradient is constant.

    Args        step: 1 at the first update; grad_scale: as in `sgd_update`
    Shapes      param, grad, m and v of one shape; m and v start at 0
    Source      Kingma and Ba 2015, algorithm 1; weight_decay is added to the gradient, as in PyTorch's Adam
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
    """Move a running average towards a parameter; writes to average.

    Update      average = decay average + (1 - decay) param

    Shapes      average and param of one shape
    """
    average += (1 - decay) * (param - average)
