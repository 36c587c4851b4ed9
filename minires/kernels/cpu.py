"""The kernels made fast on NumPy, for float32: the same names, arguments and meaning as in reference.py.

Four ideas, each of which a reader can take alone:

    threads     A kernel is cut into tasks that run side by side (see threads.py).
    caches      A task works on pieces that fit a cache, the core's own or the one that cores share, and takes a piece
                through all its steps before the next one comes. Memory is read and written about once, however many
                steps there are.
    long rows   NumPy walks along the last axis fast and pays for every row. Per-channel vectors of 64 numbers make
                short rows, so several rows are taken as one (`fold`).
    Winograd    A 3x3 convolution with stride 1 needs a quarter of the multiplications (`winograd_conv2d`).

What is not here is the reference's. The tests hold each function equal to its reference twin.
"""

import math

import numpy as np

from minires.kernels import reference
from minires.kernels.memory import fresh, scratch
from minires.kernels.reference import (  # noqa: F401  (the rest of the set)
    MIXED_DTYPES,
    add_and_relu,
    col2im,
    dropout_backward,
    dropout_forward,
    dropout_mask,
    global_avg_pool2d_forward,
    im2col,
    image_chunks,
    output_size,
    relu_backward,
    relu_forward,
    rsqrt,
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
    update_running_statistics,
)
from minires.kernels.threads import one_blas_thread, run

# How large the pieces are, found by trying on two cores with 1 MB of cache each and 32 MB for both. They decide in
# which order sums are added.
BLOCK = 2**19  # numbers in a piece for elementwise work: with smaller ones, threads wait for Python's lock too often
SMALLEST_BLOCK = 2**18  # a piece is an eighth of all if that is less than BLOCK, for more threads; but not below this
ROW = 2**13  # numbers in a row that NumPy walks along; longer ones gain nothing
UPDATE_BLOCK = 2**17  # the same as BLOCK, for an optimizer's update with its many intermediate results
COLUMN_ROWS = 256  # rows of im2col in a piece: enough that the product is worth the reading of the weights
TILES = 128  # tiles in a piece of a Winograd convolution, for the same reason
GROUPS = 16  # sums of a weight gradient that are kept apart: as many threads can share it, and no more
LARGE_WEIGHTS = 2**15  # C * O from which Winograd's weights no longer fit beside a piece: threads share the frequencies
TILES_AT_ONCE = 512  # tiles that exist at one time then, or those of one image: bounds the memory


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

    run(fill, chunks_of_images(N, H * W * C, BLOCK))
    return dx


def add(a, b):
    """See `reference.add`."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    out = fresh(a.shape)
    terms, total = (a.reshape(-1), b.reshape(-1)), out.reshape(-1)
    run(lambda part: np.add(terms[0][part], terms[1][part], out=total[part]), blocks(out.size, 1))
    return out


def fold(C, M):
    """Return how many of M rows of C numbers to take as one, so that a row has up to ROW numbers."""
    return math.gcd(M, 2 ** (max(1, ROW // C).bit_length() - 1))  # M, pixels times images, is rich in factors of 2


def blocks(rows, row_size, size=None):
    """Cut rows of row_size numbers into slices of about `size` numbers, by default a size for elementwise work."""
    size = size or min(BLOCK, max(SMALLEST_BLOCK, rows * row_size // 8))
    step = max(1, size // row_size)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def column_sums(x):
    """Sum over rows. A matrix product with ones is the fastest way.

    Shapes      x (rows, C)  ->  (C,)
    """
    return np.ones(len(x), x.dtype) @ x


def unfold_sum(row, C):
    """Sum the parts of a folded row, in float64.

    Shapes      row (f*C,)  ->  (C,)
    """
    return row.reshape(-1, C).sum(axis=0, dtype=np.float64)


def sum_over_rows(x):
    """See `reference.sum_over_rows`. A block is added up in float32 to one long row, all else in float64."""
    C = x.shape[-1]
    M = x.size // C
    f = fold(C, M)
    rows = np.ascontiguousarray(x).reshape(M // f, f * C)
    partial = run(lambda block: unfold_sum(column_sums(rows[block]), C), blocks(*rows.shape))
    return np.sum(partial, axis=0).astype(x.dtype)


def batch_norm_forward(x, weight, bias, eps, residual=None, relu=False):
    """See `reference.batch_norm_forward`. Two passes over memory: one for mean and variance, one for the output.

    Why         A block of rows has a mean m_b of its own and a sum of squares around it, both found while the block is
                in the cache. Around the mean of all rows, the block's sum of squares is larger by n_b (m_b - mean)^2.

    Source      Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
                variances"
    """
    C = x.shape[-1]
    M = x.size // C
    f = fold(C, M)
    rows = np.ascontiguousarray(x).reshape(M // f, f * C)

    def statistics(block):
        n = (block.stop - block.start) * f
        block_mean = unfold_sum(column_sums(rows[block]), C) / n  # (C,)
        centred = scratch("block", rows[block].shape)
        np.subtract(rows[block], np.tile(block_mean, f).astype(x.dtype), out=centred)
        squares = np.multiply(centred, centred, out=centred)
        return n, block_mean, unfold_sum(column_sums(squares), C)

    counts, means, squares = zip(*run(statistics, blocks(*rows.shape)), strict=True)
    counts, means, squares = np.array(counts)[:, None], np.stack(means), np.stack(squares)  # (blocks, C), float64
    mean = (counts * means).sum(axis=0) / M  # (C,)
    var = (squares + counts * (means - mean) ** 2).sum(axis=0) / M  # (C,)
    mean, var = mean.astype(x.dtype), var.astype(x.dtype)
    return batch_norm_inference(x, weight, bias, mean, var, eps, residual, relu), mean, var


def batch_norm_inference(x, weight, bias, mean, var, eps, residual=None, relu=False):
    """See `reference.batch_norm_inference`. One pass over memory."""
    C = x.shape[-1]
    M = x.size // C
    f = fold(C, M)
    rows = np.ascontiguousarray(x).reshape(M // f, f * C)
    residual_rows = None if residual is None else np.ascontiguousarray(residual).reshape(rows.shape)
    out = fresh(rows.shape)
    mean, scale, bias = (np.tile(v, f) for v in (mean, weight * rsqrt(var, eps), bias))  # (f*C,)
    zeros = np.zeros_like(mean)  # np.maximum is twice as fast with an array as with a number

    def normalise(block):
        piece = np.subtract(rows[block], mean, out=out[block])  # first, or the digits of x - mean would be lost
        piece *= scale
        piece += bias
        if residual is not None:
            piece += residual_rows[block]
        if relu:
            np.maximum(piece, zeros, out=piece)

    run(normalise, blocks(*rows.shape))
    return out.reshape(x.shape)


def batch_norm_backward(dout, x, out, weight, mean, var, eps, relu=False, need_dresidual=True):
    """See `reference.batch_norm_backward`. Two passes over memory: one for the two sums, one for dx."""
    C = x.shape[-1]
    M = x.size // C
    f = fold(C, M)
    rows = np.ascontiguousarray(x).reshape(M // f, f * C)
    dout_rows = np.ascontiguousarray(dout).reshape(rows.shape)
    out_rows = np.ascontiguousarray(out).reshape(rows.shape) if relu else None
    g = fresh(rows.shape) if relu else dout_rows
    dx = fresh(rows.shape)
    rstd = rsqrt(var, eps)  # (C,)
    long_mean = np.tile(mean, f)

    def sums(block):
        if relu:
            np.multiply(dout_rows[block], out_rows[block] > 0, out=g[block])
        product = np.subtract(rows[block], long_mean, out=scratch("block", rows[block].shape))
        product *= g[block]
        return unfold_sum(column_sums(g[block]), C), unfold_sum(column_sums(product), C)

    dbias, dscale = np.sum(run(sums, blocks(*rows.shape)), axis=0)  # (C,) each, float64
    dweight = dscale * rstd

    # dx = scale (slope (x - mean) + shift + g): the formula of the reference, sorted by what varies from row to row
    slope, shift, scale = -rstd * dweight / M, -dbias / M, weight * rstd  # (C,)
    slope, shift, scale = (np.tile(v, f).astype(x.dtype) for v in (slope, shift, scale))  # (f*C,)

    def input_gradient(block):
        piece = np.subtract(rows[block], long_mean, out=dx[block])
        piece *= slope
        piece += shift
        piece += g[block]
        piece *= scale

    run(input_gradient, blocks(*rows.shape))
    dresidual = g.reshape(x.shape) if need_dresidual else None
    return dx.reshape(x.shape), dweight.astype(x.dtype), dbias.astype(x.dtype), dresidual


def conv2d_forward(x, weight, bias=None, stride=1, padding=0):
    """See `reference.conv2d_forward`. Winograd's way where it serves, else im2col, a few images at a time."""
    x = np.ascontiguousarray(x)
    if is_for_winograd(x.shape, weight.shape, stride, padding):
        out = winograd_conv2d(x, weight)
    else:
        out = im2col_conv2d(x, weight, stride, padding)
    if bias is not None:
        out += bias
    return out


def conv2d_backward(dout, x, weight, stride=1, padding=0, need_dx=True, need_dbias=True):
    """See `reference.conv2d_backward`."""
    x, dout = np.ascontiguousarray(x), np.ascontiguousarray(dout)
    dbias = sum_over_rows(dout) if need_dbias else None
    if is_for_winograd(x.shape, weight.shape, stride, padding):
        # x[y] meets out[y - 1 ... y + 1] through the window's last ... first row: dx is a convolution of dout with the
        # window turned by 180 degrees, from O channels to C
        dx = winograd_conv2d(dout, turned(weight)) if need_dx else None
        return dx, winograd_weight_gradient(dout, x), dbias
    dx = im2col_input_gradient(dout, weight, x.shape, stride, padding) if need_dx else None
    return dx, im2col_weight_gradient(dout, x, weight.shape, stride, padding), dbias


def chunks_of_images(N, rows_per_image, rows):
    """Cut N images into slices of about `rows` rows."""
    n = max(1, rows // rows_per_image)
    return [slice(start, min(start + n, N)) for start in range(0, N, n)]


def groups_of(chunks):
    """Share chunks out to at most GROUPS lists of neighbours."""
    size = -(-len(chunks) // GROUPS)
    return [chunks[start : start + size] for start in range(0, len(chunks), size)]


def sum_of_groups(partial):
    """Add the partial sums of groups, in their order.

    Shapes      partial (groups, ...)  ->  (...)
    """
    flat = partial.reshape(len(partial), -1)
    total = np.empty(flat.shape[1], flat.dtype)
    run(lambda part: np.add.reduce(flat[:, part], axis=0, out=total[part]), blocks(total.size, 1))
    return total.reshape(partial.shape[1:])


def padded_images(x, padding, height, width):
    """Copy images into scratch memory, at (padding, padding) of a frame of zeros.

    Shapes      x (n, H, W, C)  ->  (n, height, width, C)
    """
    n, H, W, C = x.shape
    padded = scratch("padded", (n, height, width, C))
    padded[:, :padding] = 0
    padded[:, padding + H :] = 0
    padded[:, padding : padding + H, :padding] = 0
    padded[:, padding : padding + H, padding + W :] = 0
    padded[:, padding : padding + H, padding : padding + W] = x
    return padded


def columns_of(x, kernel_size, stride, padding, out_size):
    """im2col into scratch memory.

    Shapes      x (n, H, W, C)  ->  columns (n, oh, ow, kh, kw, C)
    """
    (kh, kw), (oh, ow) = kernel_size, out_size
    n, H, W, C = x.shape
    if padding:
        x = padded_images(x, padding, H + 2 * padding, W + 2 * padding)
    per_image, per_row, per_pixel, per_channel = x.strides
    windows = np.lib.stride_tricks.as_strided(
        x,
        (n, oh, ow, kh, kw, C),
        (per_image, per_row * stride, per_pixel * stride, per_row, per_pixel, per_channel),
    )
    if (kh, kw, stride, padding) == (1, 1, 1, 0):
        return windows
    columns = scratch("columns", windows.shape)
    np.copyto(columns, windows)
    return columns


def im2col_conv2d(x, weight, stride, padding):
    """`reference.conv2d_forward` by im2col, chunks of images shared out to threads.

    Shapes      x (N, H, W, C), weight (kh, kw, C, O)  ->  out (N, oh, ow, O)
    """
    kh, kw, _, O = weight.shape
    N, H, W, _ = x.shape
    oh, ow = output_size(H, kh, stride, padding), output_size(W, kw, stride, padding)
    weight_rows = np.ascontiguousarray(weight).reshape(-1, O)  # (kh*kw*C, O)
    out = fresh((N, oh, ow, O))

    def convolve(images):
        columns = columns_of(x[images], (kh, kw), stride, padding, (oh, ow))  # (n, oh, ow, kh, kw, C)
        np.matmul(columns.reshape(-1, len(weight_rows)), weight_rows, out=out[images].reshape(-1, O))

    run(convolve, chunks_of_images(N, oh * ow, COLUMN_ROWS))
    return out


def im2col_weight_gradient(dout, x, weight_shape, stride, padding):
    """dweight of `reference.conv2d_backward` by im2col.

    Shapes      dout (N, oh, ow, O), x (N, H, W, C)  ->  dweight (kh, kw, C, O)
    """
    kh, kw, C, O = weight_shape
    N, oh, ow, _ = dout.shape
    groups = groups_of(chunks_of_images(N, oh * ow, COLUMN_ROWS))
    partial = fresh((len(groups), kh * kw * C, O))

    def add_up(group):
        for images in groups[group]:
            columns = columns_of(x[images], (kh, kw), stride, padding, (oh, ow)).reshape(-1, kh * kw * C)
            add_product(columns.T, dout[images].reshape(-1, O), partial[group], first=images is groups[group][0])

    run(add_up, range(len(groups)))
    return sum_of_groups(partial).reshape(weight_shape)


def im2col_input_gradient(dout, weight, x_shape, stride, padding):
    """dx of `reference.conv2d_backward`, by im2col of dout: pixels are collected from the outputs that they met.

    Why         With stride s and padding p, row y of x meets out[i] through row h of the window if y + p = i s + h.
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
            rows = np.ascontiguousarray(taps.transpose(0, 1, 3, 2)).reshape(-1, C)  # (th*tw*O, C)
            phases.append(((a - padding) % stride, (b - padding) % stride, taps.shape[:2], rows))

    def send_back(images):
        padded = padded_images(dout[images], margin, height, width)
        for y, x, (th, tw), rows in phases:
            pixels = dx[images, y::stride, x::stride]  # (n, ., ., C)
            if not len(rows):
                pixels[...] = 0
                continue
            top, left = (y + padding) // stride + margin - th + 1, (x + padding) // stride + margin - tw + 1
            columns = columns_of(padded[:, top:, left:], (th, tw), 1, 0, pixels.shape[1:3])
            product = scratch("product", pixels.shape)
            np.matmul(columns.reshape(-1, len(rows)), rows, out=product.reshape(-1, C))
            pixels[...] = product

    run(send_back, chunks_of_images(N, oh * ow, COLUMN_ROWS))
    return dx


def add_product(a, b, total, first):
    """Add a @ b to the total, or put it there if it is the first."""
    if first:
        np.matmul(a, b, out=total)
    else:
        total += np.matmul(a, b, out=scratch("product", total.shape))


# Winograd's matrices for four outputs of three taps, at the points 0, 1, -1, 2, -2 and infinity; `winograd_conv2d` says
# where they come from. INPUT brings 6 inputs and WEIGHT 3 taps to the 6 points, OUTPUT makes 4 outputs of 6 products.
INPUT = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    np.float32,
)
WEIGHT = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    np.float32,
)
OUTPUT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], np.float32)


def is_for_winograd(x_shape, weight_shape, stride, padding):
    """Whether a convolution has a 3x3 window, stride 1 and padding 1, and Winograd's way pays.

    It does not with few channels, which do not pay for the transforms, nor with images so small that tiles of 4x4 are
    mostly beyond them: 36 multiplications a tile should be fewer than 6 a pixel, where im2col has 9.
    """
    _, H, W, _ = x_shape
    kh, kw, C, O = weight_shape
    fills_its_tiles = 36 * tiles_of(H) * tiles_of(W) < 6 * H * W
    return (kh, kw, stride, padding) == (3, 3, 1, 1) and min(C, O) >= 16 and fills_its_tiles


def turned(weight):
    """Turn the window by 180 degrees and exchange channels in and out.

    Shapes      weight (3, 3, C, O)  ->  (3, 3, O, C)
    """
    kh, kw, C, O = weight.shape
    out = fresh((kh, kw, O, C))
    run(
        lambda part: np.copyto(out[:, :, :, part], weight[::-1, ::-1, part].transpose(0, 1, 3, 2)),
        blocks(C, kh * kw * O),
    )
    return out


def winograd_conv2d(x, weight):
    """A 3x3 convolution with stride 1 and padding 1, by tiles of 4x4 outputs and a quarter of the multiplications.

    Forward     for every tile of 6x6 inputs x and every pair of channels, with * element by element:
                out = OUTPUT (sum_c (INPUT x INPUT.T) * (WEIGHT weight WEIGHT.T)) OUTPUT.T

    Why         First in one dimension, and first the product of two polynomials: g with 3 coefficients times d with 4.
                It has 6 coefficients and takes 12 multiplications. But a polynomial with 6 coefficients is known from
                its values at 6 points, and at a point the value of the product is the product of the values: 6
                multiplications. The points are 0, 1, -1, 2, -2, and "infinity", where the value is the leading
                coefficient. In matrices,
                    product = INPUT.T ((WEIGHT g) * (OUTPUT.T d))
                The row of OUTPUT.T for the point a is (1, a, a^2, a^3), so it takes the value of d. That of WEIGHT is
                (1, a, a^2) over the product of the differences from a to the other points, and that of INPUT has the
                coefficients of prod (t - b) over the other finite b: together, Lagrange's interpolation.
                For a fixed g the product is a matrix times d, which has g[j - i] in row j and column i. A filter is the
                same matrix transposed, as y[i] = sum_k g[k] x[i + k] = sum_j g[j - i] x[j]. Transpose both sides:
                    y = OUTPUT ((WEIGHT g) * (INPUT x))
                with six multiplications in place of twelve. In two dimensions it is done along columns, then along
                rows: 36 in place of 144. OUTPUT is linear, so channels are added before it, and each of the 36 places
                of a tile becomes one matrix product, (tiles, C) @ (C, O).

    Limits      It adds and takes off again: relative to float64, forward and dx come out 1.7e-6, 2.4e-6, 3.4e-6 and
                3.8e-6 off at the four stages of the default network, by im2col 1.6e-7 to 3.7e-7; dweight 2.2e-6 to
                0.9e-6, by im2col 3.7e-7 to 1.4e-7 (norms, normal numbers, 5 images). A tile shares the rounding of its
                largest number; where it holds an infinity or NaN, all of the tile is NaN. Tiles of 2x2 outputs would
                lose fewer digits and save half as much; the network has no use for them
    Shapes      x (N, H, W, C), weight (3, 3, C, O)  ->  out (N, H, W, O)
    Source      Lavin and Gray 2016, "Fast algorithms for convolutional neural networks" (arXiv 1509.09308, 2015),
                section 4; their matrices for F(4x4, 3x3)
    """
    N, H, W, C = x.shape
    O = weight.shape[3]
    per_image = tiles_of(H) * tiles_of(W)
    out = fresh((N, H, W, O))
    U = weight_transform(weight)  # (36, C, O)

    def convolve(images):
        tiles = (images.stop - images.start) * per_image
        V, M = matrices("V", tiles, C), matrices("M", tiles, O)
        input_transform(x[images], V)
        np.matmul(V, U, out=M)
        output_transform(out[images], M)

    def convolve_by_frequency(images):
        tiles = (images.stop - images.start) * per_image
        V, M = matrices("all V", tiles, C), matrices("all M", tiles, O)
        share_out(input_transform, x[images], V)
        run(lambda f: np.matmul(V[f], U[f], out=M[f]), range(36))
        share_out(output_transform, out[images], M)

    if C * O < LARGE_WEIGHTS:
        run(convolve, chunks_of_images(N, per_image, TILES))
    else:
        for images in chunks_of_images(N, per_image, TILES_AT_ONCE):
            convolve_by_frequency(images)
    return out


def winograd_weight_gradient(dout, x):
    """dweight of `winograd_conv2d`, with a quarter of the multiplications too.

    Backward    for every pair of channels, V and dM being the tiles INPUT x INPUT.T and OUTPUT.T dout OUTPUT:
                dweight = WEIGHT.T (sum of V * dM over all tiles) WEIGHT

    Why         Each step of the forward is linear, so each goes back by its transpose.

    Shapes      dout (N, H, W, O), x (N, H, W, C)  ->  dweight (3, 3, C, O)
    """
    N, H, W, C = x.shape
    O = dout.shape[3]
    per_image = tiles_of(H) * tiles_of(W)

    if C * O < LARGE_WEIGHTS:
        groups = groups_of(chunks_of_images(N, per_image, TILES))
        partial = fresh((len(groups), 36, C, O))

        def add_up(group):
            for images in groups[group]:
                tiles = (images.stop - images.start) * per_image
                V, dM = matrices("V", tiles, C), matrices("M", tiles, O)
                input_transform(x[images], V)
                output_transform_backward(dout[images], dM)
                add_product(V.transpose(0, 2, 1), dM, partial[group], first=images is groups[group][0])

        run(add_up, range(len(groups)))
        return weight_transform_backward(sum_of_groups(partial))

    dU = matrices("U", C, O)

    def add_up_by_frequency(images):
        tiles = (images.stop - images.start) * per_image
        V, dM = matrices("all V", tiles, C), matrices("all M", tiles, O)
        share_out(input_transform, x[images], V)
        share_out(output_transform_backward, dout[images], dM)
        run(lambda f: add_product(V[f].T, dM[f], dU[f], first=images.start == 0), range(36))

    for images in chunks_of_images(N, per_image, TILES_AT_ONCE):
        add_up_by_frequency(images)
    return weight_transform_backward(dU)


def tiles_of(size):
    """Return how many tiles of four pixels cover a side; the last may reach beyond it, into zeros."""
    return -(-size // 4)


def matrices(name, rows, columns):
    """Return scratch memory for 36 matrices, one for each place in a tile.

    Each has a row too many. Without it they would begin a power of two apart, which a cache maps to one place.

    Shapes      ->  (36, rows, columns)
    """
    return scratch(name, (36, rows + 1, columns))[:, :rows]


def share_out(transform, images, tiles):
    """Run a transform between images and all their tiles on all threads, a few images at a time."""
    _, H, W, _ = images.shape
    n = tiles_of(H) * tiles_of(W)
    run(
        lambda chunk: transform(images[chunk], tiles[:, chunk.start * n : chunk.stop * n]),
        chunks_of_images(len(images), n, TILES // 8),
    )


def weight_transform(weight):
    """U = WEIGHT weight WEIGHT.T for every pair of channels.

    Shapes      weight (3, 3, C, O)  ->  U (36, C, O)
    """
    _, _, C, O = weight.shape
    both = np.kron(WEIGHT, WEIGHT)  # (36, 9): the two products with WEIGHT as one
    taps = np.ascontiguousarray(weight).reshape(9, C * O)
    U = matrices("U", C, O)
    flat = U.reshape(36, C * O)
    run(lambda part: np.matmul(both, taps[:, part], out=flat[:, part]), blocks(C * O, 36))
    return U


def weight_transform_backward(dU):
    """dweight = WEIGHT.T dU WEIGHT, the adjoint of `weight_transform`.

    Shapes      dU (36, C, O)  ->  dweight (3, 3, C, O)
    """
    _, C, O = dU.shape
    both = np.ascontiguousarray(np.kron(WEIGHT, WEIGHT).T)  # (9, 36)
    products = dU.reshape(36, C * O)
    dweight = fresh((9, C * O))
    run(lambda part: np.matmul(both, products[:, part], out=dweight[:, part]), blocks(C * O, 36))
    return dweight.reshape(3, 3, C, O)


def tile_axes(V, n, th, tw):
    """See (36, n*th*tw, C) as (n, th, 6, tw, 6, C): the order in which tiles lie in the images."""
    return V.reshape(6, 6, n, th, tw, V.shape[-1]).transpose(2, 3, 0, 4, 1, 5)


def input_transform(x, V):
    """V = INPUT tile INPUT.T for every tile of 6x6 pixels and every channel; the tiles overlap by two pixels.

    The tiles are not copied out: a view shows them where they lie, first their rows, then their columns.

    Shapes      x (n, H, W, C)  ->  V (36, n*th*tw, C)
    """
    n, H, W, C = x.shape
    th, tw = tiles_of(H), tiles_of(W)
    width = 4 * tw + 2
    padded = padded_images(x, 1, 4 * th + 2, width)
    per_image, per_row, per_pixel, per_channel = padded.strides
    rows = np.lib.stride_tricks.as_strided(
        padded, (n, th, 6, width * C), (per_image, 4 * per_row, per_row, per_channel)
    )
    half = np.matmul(INPUT, rows, out=scratch("half", rows.shape))  # (n, th, 6, width*C)
    per_row = width * C * half.itemsize
    columns = np.lib.stride_tricks.as_strided(
        half,
        (n, th, 6, tw, 6, C),
        (6 * th * per_row, 6 * per_row, per_row, 4 * per_pixel, per_pixel, per_channel),
    )
    np.matmul(INPUT, columns, out=tile_axes(V, n, th, tw))


def output_transform(out, M):
    """out = OUTPUT m OUTPUT.T for every tile m of 6x6 products: tiles of 4x4 pixels, side by side.

    Shapes      out (n, H, W, O) is written from M (36, n*th*tw, O)
    """
    n, H, W, O = out.shape
    th, tw = tiles_of(H), tiles_of(W)
    half = scratch("half", (n, th, 6, tw, 4, O))
    np.matmul(OUTPUT, tile_axes(M, n, th, tw), out=half)
    reaches_beyond = H % 4 or W % 4
    whole = scratch("whole", (n, 4 * th, 4 * tw, O)) if reaches_beyond else out
    np.matmul(OUTPUT, half.reshape(n, th, 6, -1), out=whole.reshape(n, th, 4, -1))
    if reaches_beyond:
        out[...] = whole[:, :H, :W]


def output_transform_backward(dout, dM):
    """dm = OUTPUT.T dout OUTPUT for every tile of 4x4 pixels: the adjoint of `output_transform`.

    Shapes      dout (n, H, W, O)  ->  dM (36, n*th*tw, O)
    """
    n, H, W, O = dout.shape
    th, tw = tiles_of(H), tiles_of(W)
    if H % 4 or W % 4:
        dout = padded_images(dout, 0, 4 * th, 4 * tw)
    half = scratch("half", (n, th, 6, tw, 4, O))
    np.matmul(OUTPUT.T, dout.reshape(n, th, 4, -1), out=half.reshape(n, th, 6, -1))
    np.matmul(OUTPUT.T, half, out=tile_axes(dM, n, th, tw))


def sum_of_squares(x):
    """See `reference.sum_of_squares`. A block at a time; what the blocks give is added up in float64."""
    flat = np.ascontiguousarray(x).reshape(-1)
    return np.sum(run(lambda b: flat[b] @ flat[b], blocks(flat.size, 1)), dtype=np.float64).astype(x.dtype)


def sgd_update(param, grad, velocity, lr, momentum=0.0, nesterov=False, weight_decay=0.0, grad_scale=1.0):
    """See `reference.sgd_update`. A block at a time, so that what the steps in between make stays in the cache."""
    update_blocks(reference.sgd_update, (param, grad, velocity), lr, momentum, nesterov, weight_decay, grad_scale)


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
