"""The kernels made fast on NumPy, for float32: the same names, arguments and meaning as in reference.py.

Four ideas, each of which a reader can take alone:

    threads     A kernel is cut into tasks that run side by side (see threads.py).
    caches      A task works on pieces that fit a cache, the core's own or the one that cores share, and takes a piece
                through all its steps before the next one comes. Memory is read and written about once, however many
                steps there are.
    long rows   NumPy walks along the last axis fast and pays for every row. Per-channel vectors of 64 numbers make
                short rows, so several rows are taken as one (`fold`).
    Winograd    A 3x3 convolution with stride 1 needs a quarter of the multiplications (see winograd.py).

What is not here is the reference's. The tests hold each function equal to its reference twin.
"""

import math
from typing import NamedTuple

import numpy as np

from minires.kernels import reference, threads, winograd
from minires.kernels.memory import Frame, add_product, frame, fresh, scratch, workspace
from minires.kernels.reference import output_size, rsqrt
from minires.kernels.threads import blocks, chunks_of_images, groups_of, one_blas_thread, run, sum_of_groups

ROW = 2**13  # numbers in a row that NumPy walks along; longer ones gain nothing
UPDATE_BLOCK = 2**17  # numbers in a piece of an optimizer's update, which has many intermediate results
TALL = 256  # rows that are added up in float32; sums of more lose digits
COLUMN_ROWS = 256, 1024  # rows of im2col in a piece, an eighth of all between these: a product reads the weights once
FAR = 4.0  # deviations from 0 up to which BatchNorm need not subtract a mean first; more would cost over two bits


def __getattr__(name):
    return getattr(reference, name)


def linear_forward(x, weight, bias=None):
    """See `reference.linear_forward`."""
    with one_blas_thread():
        return reference.linear_forward(x, weight, bias)


def linear_backward(dout, x, weight):
    """See `reference.linear_backward`."""
    with one_blas_thread():
        return reference.linear_backward(dout, x, weight)


def global_avg_pool2d_backward(dout, x_shape):
    """See `reference.global_avg_pool2d_backward`."""
    N, H, W, C = x_shape
    share = dout / (H * W)  # (N, C)
    dx = fresh(x_shape)

    def fill(images):
        dx[images] = share[images, None, None]

    run(fill, chunks_of_images(N, H * W * C, threads.BLOCK))
    return dx


def add(a, b):
    """See `reference.add`."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    out = fresh(a.shape)
    terms, total = (a.reshape(-1), b.reshape(-1)), out.reshape(-1)
    run(lambda part: np.add(terms[0][part], terms[1][part], out=total[part]), blocks(out.size, 1))
    return out


def fold(x):
    """See x as rows of channels, and several rows, f, as one, so that it has up to ROW numbers.

    Shapes      x (..., C), which are M rows  ->  (M / f, f*C)
    """
    C = x.shape[-1]
    return np.ascontiguousarray(x).reshape(-1, folded_row(x.size // C, C))


def folded_row(M, C):
    """Return f*C for M rows of C numbers. M, pixels times images, is rich in factors of 2."""
    return math.gcd(M, 2 ** (max(1, ROW // C).bit_length() - 1)) * C


def along(rows, v):
    """Repeat a number for each channel along a folded row.

    Shapes      rows (M / f, f*C), v (C,)  ->  (f*C,)
    """
    return np.tile(v, rows.shape[1] // len(v))


def column_sums(x):
    """Sum over rows. A matrix product with ones is the fastest way.

    Shapes      x (rows, C)  ->  (C,)
    """
    return sum_of_pieces(lambda piece: np.ones(piece.shape[-2], x.dtype) @ piece, x)


def column_products(x, y):
    """Sum x y over rows. No array of products is made.

    Shapes      x, y (rows, C)  ->  (C,)
    """
    return sum_of_pieces(lambda a, b: np.einsum("...ij,...ij->...j", a, b), x, y)


def sum_of_pieces(sums, *arrays):
    """Sum over rows, TALL at a time, and in float64 what these give. Rows that cannot be folded are many, and short.

    Args        sums: a function of the arrays, (..., rows, C) to (..., C)
    Shapes      arrays (rows, C) each  ->  (C,)
    """
    rows, C = arrays[0].shape
    if rows <= TALL:
        return sums(*arrays)
    whole = rows - rows % TALL
    pieces = sums(*(x[:whole].reshape(-1, TALL, C) for x in arrays))  # (., C)
    return pieces.sum(axis=0, dtype=np.float64) + sums(*(x[whole:] for x in arrays))


def unfold_sums(rows, C):
    """Sum the parts of each folded row, in float64.

    Args        rows: a list of them, one for each block. It is done for all together: a task that stops for many small
                sums keeps Python's lock from the others
    Shapes      rows (blocks, f*C)  ->  (blocks, C)
    """
    return np.reshape(rows, (len(rows), -1, C)).sum(axis=1, dtype=np.float64)


def sum_over_rows(x):
    """See `reference.sum_over_rows`. A block is added up in float32 to one long row, all else in float64."""
    rows = fold(x)
    partial = run(lambda block: column_sums(rows[block]), blocks(*rows.shape))
    return unfold_sums(partial, x.shape[-1]).sum(axis=0).astype(x.dtype)


def batch_norm_statistics(x):
    """See `reference.batch_norm_statistics`. One pass over memory, or two.

    Why         A block of rows has a mean m_b of its own and a sum of squares around it. Around the mean of all rows,
                its sum of squares is larger by n_b (m_b - mean)^2. Around its own mean it is the sum of x^2, less n_b
                m_b^2. Far from 0 the two are large and almost equal, and their difference has no digits left. Then the
                mean is subtracted first, in a second pass. It has lost digits, too, as a float32 sum of large numbers.
                But what is left is small: its own mean, the rest of m_b, is right, and a constant channel has
                variance 0.

    Source      Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
                variances"
    """
    C, rows = x.shape[-1], fold(x)
    parts = blocks(*rows.shape)
    counts = np.array([[rows[part].size // C] for part in parts])  # (blocks, 1)

    def sums_and_squares(piece):
        return column_sums(piece), column_products(piece, piece)

    def means_and_squares(piece_of):  # (blocks, C) each, float64
        partial = run(lambda i: sums_and_squares(piece_of(i)), range(len(parts)))
        sums, squares = (unfold_sums(of_blocks, C) for of_blocks in zip(*partial, strict=True))
        means = sums / counts
        return means, np.maximum(squares - counts * means**2, 0)  # rounding could leave less

    means, squares = means_and_squares(lambda i: rows[parts[i]])
    if is_far(means, squares / counts):
        about = means.astype(x.dtype)
        rest, squares = means_and_squares(lambda i: centred(rows[parts[i]], along(rows, about[i])))
        means = about + rest
    M = counts.sum()
    mean = (counts * means).sum(axis=0) / M  # (C,)
    var = (squares + counts * (means - mean) ** 2).sum(axis=0) / M  # (C,)
    return mean.astype(x.dtype), var.astype(x.dtype)


def is_far(mean, var):
    """Whether any channel, of any block, is so far from 0 that its mean has to be subtracted first, to lose no digits.

    Shapes      mean, var (..., C)  ->  bool
    """
    return bool((np.abs(mean) > FAR * np.sqrt(var)).any())


def centred(piece, mean):
    """Subtract the mean, into scratch memory."""
    return np.subtract(piece, mean, out=scratch("block", piece.shape))


def batch_norm_forward(x, weight, bias, mean, var, eps):
    """See `reference.batch_norm_forward`."""
    return batch_norm_add_relu_forward(x, weight, bias, mean, var, eps)


def batch_norm_add_relu_forward(x, weight, bias, mean, var, eps, residual=None, relu=False):
    """See `reference.batch_norm_add_relu_forward`. One pass over memory.

    Why         (x - mean) scale + bias = x scale + (bias - mean scale), which is an operation less for each number.
    """
    rows, residual_rows = fold(x), None if residual is None else fold(residual)
    out = fresh(rows.shape)
    far, scale = is_far(mean, var), weight * rsqrt(var, eps)
    shift = bias if far else bias - mean * scale
    mean, scale, shift = (along(rows, v) for v in (mean, scale, shift))  # (f*C,)
    zeros = np.zeros_like(mean)  # np.maximum is twice as fast with an array as with a number

    def normalise(block):
        piece = centred(rows[block], mean) if far else rows[block]
        piece = np.multiply(piece, scale, out=out[block])
        piece += shift
        if residual is not None:
            piece += residual_rows[block]
        if relu:
            np.maximum(piece, zeros, out=piece)

    run(normalise, blocks(*rows.shape))
    return out.reshape(x.shape)


def batch_norm_backward_sums(dout, x, mean, var, eps):
    """See `reference.batch_norm_backward_sums`; the sums are float64."""
    return batch_norm_add_relu_backward_sums(dout, x, None, mean, var, eps)[1:]


def batch_norm_add_relu_backward_sums(dout, x, out, mean, var, eps):
    """See `reference.batch_norm_add_relu_backward_sums`. One pass over memory; the sums are float64.

    Why         sum g (x - mean) = sum g x - mean sum g, which is an operation less for each number.
    """
    C, rows, dout_rows, out_rows = x.shape[-1], fold(x), fold(dout), None if out is None else fold(out)
    g = dout_rows if out is None else fresh(rows.shape)
    far, mean_row = is_far(mean, var), along(rows, mean)  # (f*C,)

    def sums(block):
        if out is not None:
            np.multiply(dout_rows[block], out_rows[block] > 0, out=g[block])
        piece = centred(rows[block], mean_row) if far else rows[block]
        return column_sums(g[block]), column_products(piece, g[block])

    partial = zip(*run(sums, blocks(*rows.shape)), strict=True)
    dbias, dscale = (unfold_sums(of_blocks, C).sum(axis=0) for of_blocks in partial)  # (C,) each
    if not far:
        dscale -= mean * dbias
    return g.reshape(x.shape), dscale * rsqrt(var, eps), dbias


def batch_norm_backward(dout, x, weight, mean, var, eps, dweight, dbias):
    """See `reference.batch_norm_backward`. One pass over memory.

    Why         dx = scale (slope (x - mean) + shift + dout): the formula, sorted by what varies from row to row.
                Where the mean need not be subtracted first, slope mean is part of the shift.
    """
    rows, dout_rows = fold(x), fold(dout)
    M = x.size // x.shape[-1]
    dx = fresh(rows.shape)
    far, rstd = is_far(mean, var), rsqrt(var, eps)  # (C,)
    slope, scale = -rstd * dweight / M, weight * rstd  # (C,)
    shift = -dbias / M - (0 if far else slope * mean)
    mean, slope, shift, scale = (along(rows, v).astype(x.dtype) for v in (mean, slope, shift, scale))  # (f*C,)

    def input_gradient(block):
        piece = centred(rows[block], mean) if far else rows[block]
        piece = np.multiply(piece, slope, out=dx[block])
        piece += shift
        piece += dout_rows[block]
        piece *= scale

    run(input_gradient, blocks(*rows.shape))
    return dx.reshape(x.shape)


def conv2d_forward(x, weight, bias=None, stride=1, padding=0):
    """See `reference.conv2d_forward`."""
    return conv2d_add_relu_forward(x, weight, bias, stride, padding)


def conv2d_add_relu_forward(x, weight, bias=None, stride=1, padding=0, residual=None, relu=False):
    """See `reference.conv2d_add_relu_forward`. Winograd's way where it serves, else im2col, a few images at a time.

    What follows the convolution is done to each piece of out while it is in the cache.
    """
    x, residual = np.ascontiguousarray(x), None if residual is None else np.ascontiguousarray(residual)
    kh, kw, _, O = weight.shape
    pixels = output_size(x.shape[1], kh, stride, padding) * output_size(x.shape[2], kw, stride, padding)
    row = folded_row(pixels, O)
    zeros = np.zeros(row, x.dtype)
    biases = None if bias is None else np.tile(bias, row // O)

    def finish(out, images):
        rows = out.reshape(-1, row)
        if biases is not None:
            rows += biases
        if residual is not None:
            rows += residual[images].reshape(-1, row)
        if relu:
            np.maximum(rows, zeros, out=rows)

    if winograd.is_for(x.shape, weight.shape, stride, padding):
        return winograd.conv2d(x, weight, finish)
    return im2col_conv2d(x, weight, stride, padding, finish)


def conv2d_backward(dout, x, weight, stride=1, padding=0, need_dx=True, need_dbias=True):
    """See `reference.conv2d_backward`."""
    x, dout = np.ascontiguousarray(x), np.ascontiguousarray(dout)
    dbias = sum_over_rows(dout) if need_dbias else None
    if winograd.is_for(x.shape, weight.shape, stride, padding):
        dx = winograd.input_gradient(dout, weight) if need_dx else None
        return dx, winograd.weight_gradient(dout, x), dbias
    dx = im2col_input_gradient(dout, weight, x.shape, stride, padding) if need_dx else None
    return dx, im2col_weight_gradient(dout, x, weight.shape, stride, padding), dbias


class Windows(NamedTuple):
    """Working space of im2col in framed images."""

    frame: Frame  # of the images
    windows: np.ndarray  # (n, oh, ow, kh, kw, C): what a window sees at each position, a view of the frame
    columns: np.ndarray  # the same shape
    rows: np.ndarray  # (n*oh*ow, kh*kw*C), a view of that

    def copy_out(self):
        """Copy what the windows show, and return it as rows."""
        np.copyto(self.columns, self.windows)
        return self.rows


def windows_in(x, kernel_size, stride, out_size):
    """See x through a window at each of its positions, a view.

    Shapes      x (n, H, W, C)  ->  (n, oh, ow, kh, kw, C)
    """
    per_image, per_row, per_pixel, per_channel = x.strides
    shape = (len(x), *out_size, *kernel_size, x.shape[3])
    strides = (per_image, per_row * stride, per_pixel * stride, per_row, per_pixel, per_channel)
    return np.lib.stride_tricks.as_strided(x, shape, strides)


def framed_windows(x_shape, padding, height, width, top, left, kernel_size, stride, out_size):
    """Return Windows of a frame.

    Args        padding, height, width: of the frame, see `memory.frame`; top, left: where its first window is
    """
    images = workspace(frame, x_shape, padding, height, width)
    windows = windows_in(images.padded[:, top:, left:], kernel_size, stride, out_size)
    columns = scratch("columns", windows.shape)
    return Windows(images, windows, columns, columns.reshape(-1, math.prod(windows.shape[3:])))


def column_chunks(N, rows_per_image):
    """Cut N images into the pieces of im2col."""
    fewest, most = COLUMN_ROWS
    return chunks_of_images(N, rows_per_image, min(max(N * rows_per_image // 8, fewest), most))


def columns_of(x, kernel_size, stride, padding, out_size):
    """im2col into scratch memory. A 1x1 window with stride 1 and no padding needs none: its columns are x itself.

    Shapes      x (n, H, W, C)  ->  columns (n*oh*ow, kh*kw*C)
    """
    _, H, W, C = x.shape
    if padding:
        height, width = H + 2 * padding, W + 2 * padding
        framed = workspace(framed_windows, x.shape, padding, height, width, 0, 0, kernel_size, stride, out_size)
        framed.frame.fill(x)
        return framed.copy_out()
    if (*kernel_size, stride) == (1, 1, 1):
        return x.reshape(-1, C)
    windows = windows_in(x, kernel_size, stride, out_size)
    columns = scratch("columns", windows.shape)
    np.copyto(columns, windows)
    return columns.reshape(-1, math.prod(windows.shape[3:]))


def im2col_conv2d(x, weight, stride, padding, finish):
    """`reference.conv2d_forward` by im2col, chunks of images shared out to threads.

    Args        finish: see `winograd.conv2d`
    Shapes      x (N, H, W, C), weight (kh, kw, C, O)  ->  out (N, oh, ow, O)
    """
    kh, kw, _, O = weight.shape
    N, H, W, _ = x.shape
    oh, ow = output_size(H, kh, stride, padding), output_size(W, kw, stride, padding)
    weight_rows = np.ascontiguousarray(weight).reshape(-1, O)  # (kh*kw*C, O)
    out = fresh((N, oh, ow, O))

    def convolve(images):
        columns = columns_of(x[images], (kh, kw), stride, padding, (oh, ow))
        np.matmul(columns, weight_rows, out=out[images].reshape(-1, O))
        finish(out[images], images)

    run(convolve, column_chunks(N, oh * ow))
    return out


def im2col_weight_gradient(dout, x, weight_shape, stride, padding):
    """dweight of `reference.conv2d_backward` by im2col.

    Shapes      dout (N, oh, ow, O), x (N, H, W, C)  ->  dweight (kh, kw, C, O)
    """
    kh, kw, C, O = weight_shape
    N, oh, ow, _ = dout.shape
    groups = groups_of(column_chunks(N, oh * ow))
    partial = fresh((len(groups), kh * kw * C, O))

    def add_up(group):
        for images in groups[group]:
            columns = columns_of(x[images], (kh, kw), stride, padding, (oh, ow))
            add_product(columns.T, dout[images].reshape(-1, O), partial[group], first=images is groups[group][0])

    run(add_up, range(len(groups)))
    return sum_of_groups(partial).reshape(weight_shape)


def im2col_input_gradient(dout, weight, x_shape, stride, padding):
    """dx of `reference.conv2d_backward`, by im2col of dout: a pixel collects from the outputs that it influences.

    Why         With stride s and padding p, row y of x influences out[i] through the window's row h if y + p = i s + h.
                So h = a + t s and i = q - t, where a and q are remainder and quotient of y + p by s: the pixels of one
                remainder see only every s-th row of the window, and for them dx is a convolution of dout with stride
                1. The same goes for columns, so there are s^2 kinds of pixels. A 3x3 window with stride 2 falls into
                windows of 2x2, 2x1, 1x2 and 1x1.

    Shapes      dout (N, oh, ow, O), weight (kh, kw, C, O)  ->  dx x_shape = (N, H, W, C)
    """
    kh, kw, C, _ = weight.shape
    N, H, W, _ = x_shape
    _, oh, ow, _ = dout.shape
    margin = -(-max(kh, kw) // stride) - 1  # how far a window reaches back beyond the first output
    height = margin + max(oh, (H - 1 + padding) // stride + 1)
    width = margin + max(ow, (W - 1 + padding) // stride + 1)
    dx = fresh(x_shape)

    phases = []
    for a in range(stride):
        for b in range(stride):
            taps = weight[a::stride, b::stride][::-1, ::-1]  # (th, tw, C, O), the last first, as i falls with t
            th, tw = taps.shape[:2]
            y, x = (a - padding) % stride, (b - padding) % stride  # the first pixel
            top, left = (y + padding) // stride + margin - th + 1, (x + padding) // stride + margin - tw + 1
            pixels = (slice(None), slice(y, None, stride), slice(x, None, stride))
            rows = np.ascontiguousarray(taps.transpose(0, 1, 3, 2)).reshape(-1, C)  # (th*tw*O, C)
            phases.append((pixels, rows, (top, left, (th, tw), 1, (-(-(H - y) // stride), -(-(W - x) // stride)))))

    def send_back(images):
        size_of_frame = dout[images].shape, margin, height, width
        workspace(frame, *size_of_frame).fill(dout[images])
        for pixels, rows, windows in phases:
            target = dx[images][pixels]  # (n, ., ., C)
            if not len(rows):
                target[...] = 0
                continue
            columns = workspace(framed_windows, *size_of_frame, *windows).copy_out()
            product = scratch("product", target.shape)
            np.matmul(columns, rows, out=product.reshape(-1, C))
            target[...] = product

    run(send_back, column_chunks(N, oh * ow))
    return dx


def sum_of_squares(x):
    """See `reference.sum_of_squares`. A block at a time; what the blocks give is added up in float64."""
    flat = np.ascontiguousarray(x).reshape(-1)
    return np.sum(run(lambda b: flat[b] @ flat[b], blocks(flat.size, 1)), dtype=np.float64).astype(x.dtype)


def sgd_update(param, grad, velocity, lr, momentum=0.0, nesterov=False, weight_decay=0.0, grad_scale=1.0):
    """See `reference.sgd_update`. A block at a time, so that what the steps in between make stays in the cache."""
    update_blocks(reference.sgd_update, (param, grad, velocity), lr, momentum, nesterov, weight_decay, grad_scale)


def muon_update(weights, grads, velocities, lr, momentum=0.6, grad_scale=1.0):
    """See `reference.muon_update`. A filter bank is a task, the largest first."""
    banks = sorted(zip(weights, grads, velocities, strict=True), key=lambda arrays: -arrays[0].size)
    run(lambda arrays: reference.muon_update(*([a] for a in arrays), lr, momentum, grad_scale), banks)


def adam_update(param, grad, m, v, step, lr, betas, eps, weight_decay=0.0, grad_scale=1.0):
    """See `reference.adam_update`. A block at a time, so that what the steps in between make stays in the cache."""
    update_blocks(reference.adam_update, (param, grad, m, v), step, lr, betas, eps, weight_decay, grad_scale)


def average_update(average, param, decay):
    """See `reference.average_update`. A block at a time, for the same reason."""
    update_blocks(reference.average_update, (average, param), decay)


def update_blocks(update, arrays, *settings):
    """Call an update of the reference for block after block of its arrays, which are of one shape or None."""
    if not all(a is None or a.flags.c_contiguous for a in arrays):
        return update(*arrays, *settings)
    flat = [a if a is None else a.reshape(-1) for a in arrays]
    run(lambda b: update(*(a if a is None else a[b] for a in flat), *settings), blocks(flat[0].size, 1, UPDATE_BLOCK))
