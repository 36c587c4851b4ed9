"""The kernels made fast on a GPU, for float32 and float16: the same names, arguments and meaning as in reference.py.

The CUDA source is gpu.cu, one module that CuPy compiles on first use and keeps on disk. This file decides, by shape
alone, what to launch and how large. Parameters and their gradients are float32 always; images may be float16, which
halves the memory that moves and doubles the tensor cores' rate. Sums are in float32 at least.

A convolution goes one of two ways:

    implicit    on the tensor cores, without columns (see gpu.cu): float16, and float32 with TF32 allowed, where the
                channels are multiples of what a tile holds. Where only those of the output are, as in the first layer,
                im2col makes columns, which the tensor cores take as a convolution with a 1x1 window
    columns     im2col, cuBLAS's matrix product, col2im: everything else, and float32 without TF32

TF32 keeps 10 bits of each factor's fraction where float32 has 23. `set_precision("float32")` does without.

What is not here is the reference's.
"""

import contextlib
import functools
import math
import pathlib

import numpy as np

from minires.backend import array_module
from minires.kernels import reference
from minires.kernels.reference import output_size

MIXED_DTYPES = (("float16", "float32"),)
PRECISIONS = ("tf32", "float32")
TYPES = {"float32": "float", "float16": "half", "uint8": "byte", "int64": "long long"}
THREADS = 256  # in a block, unless a kernel says otherwise
ROWS = {"float32": 16, "float16": 8}  # that a thread of batch normalisation keeps: 64 numbers in registers
SMALL_PRODUCT = 2**24  # multiplications up to which cuBLAS is not worth its launch,
NARROW_PRODUCT = 64  # nor for a matrix that has fewer rows or columns than this
COLUMN_BYTES = 2**27  # columns that exist at one time; longer sums in cuBLAS would lose a digit

# Tiles of the implicit convolutions: rows, columns, rows and columns of a warp, steps under way, bytes of a step along
# the inner dimension. The largest comes first. Found by trying on an H200; they decide in which order sums are added.
TILES = ((128, 128, 64, 64, 3, 128), (128, 64, 64, 32, 3, 128), (64, 64, 32, 32, 4, 64))
GRADIENT_TILES = {
    "float16": ((192, 64, 48, 64, 4, 64), (64, 64, 32, 32, 4, 64), (32, 64, 16, 32, 4, 64)),
    "float32": ((192, 64, 48, 64, 3, 128), (64, 64, 32, 32, 4, 64), (32, 64, 16, 32, 4, 64)),
}
COLUMNS_OF_A_TILE = 64  # at least
ROWS_OF_A_GRADIENT = 32  # at least
STEP_BYTES = 64  # of the shortest step along the inner dimension
BLOCKS = 128  # that a convolution should have, one for each multiprocessor of a large GPU
GRADIENT_BLOCKS = 264  # the same for the weight gradient, whose sums are split until there are so many
SHORTEST_SPLIT = 1024  # positions of the image that a block of the weight gradient sums at least
MOST_TAPS = 32  # of a window: one bit each
INDEX_LIMIT = 2**31  # the kernels count elements in 32 bits

NO_ARRAY = np.uint64(0)

_precision = "tf32"


def __getattr__(name):
    return getattr(reference, name)


def set_precision(precision):
    """Let convolutions of float32 use the tensor cores' short fractions ("tf32", the default) or not ("float32").

    Raises      ValueError for another word
    """
    global _precision
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be 'tf32' or 'float32', got {precision!r}")
    _precision = precision


def precision():
    """Return "tf32" or "float32": what `set_precision` has set."""
    return _precision


@functools.cache
def is_for(xp):
    """Whether the GPU has the instructions of gpu.cu: compute capability 8.0 (Ampere, 2020) or newer."""
    return not hasattr(xp, "cuda") or int(xp.cuda.Device().compute_capability) >= 80


# Launching


def kernel_names():
    """The instances of gpu.cu's templates that this file launches."""
    names = ["update_running", "batch_norm_merge", "batch_norm_backward_merge", "sum_splits", "adam", "sgd", "average"]
    for dtype, T in (("float32", "float"), ("float16", "half")):
        V = 16 // np.dtype(dtype).itemsize
        names += [f"dropout<{T}>", f"column_sums<{T}>"]
        names += [f"softmax_cross_entropy<{T}, {L}>" for L in ("byte", "long long")]
        for v in (1, V):
            names += [f"{name}<{T}, {v}>" for name in ("add", "average_pool", "average_pool_backward", "col2im")]
            names += [
                f"batch_norm_{name}<{T}, {v}, {ROWS[dtype]}>"
                for name in ("moments", "apply", "backward_sums", "backward_apply")
            ]
        names += [f"im2col<{T}, {v}, {whole}>" for v, whole in ((V, "true"), (V, "false"), (1, "true"))]
        names += [f"convolve<{T}, {tile_arguments(tile)}, {way}>" for tile in TILES for way in ("true", "false")]
        names += [f"convolve_weight_gradient<{T}, {tile_arguments(tile)}>" for tile in GRADIENT_TILES[dtype]]
        names += [f"small_product<{T}, float, {T}>", f"small_product<{T}, {T}, float>"]
    names += ["cast<half>", "small_product<half, float, float>", "small_product<float, float, half>"]
    names += [f"softmax_cross_entropy_backward<{L}>" for L in ("byte", "long long")]
    return tuple(dict.fromkeys(names))


@functools.cache
def module(xp):
    """Compile gpu.cu, or take it from CuPy's cache on disk."""
    source = (pathlib.Path(__file__).parent / "gpu.cu").read_text()
    return xp.RawModule(code=source, options=("-std=c++17",), name_expressions=kernel_names())


@functools.cache
def kernel(xp, name, shared_bytes):
    function = module(xp).get_function(name)
    if shared_bytes > 48 * 2**10:  # more has to be asked for
        function.max_dynamic_shared_size_bytes = shared_bytes
    return function


def launch(name, blocks, threads, first, *rest, shared_bytes=0):
    """Start a kernel of gpu.cu. Python's floats go as float, integers as the kernel takes them, None as no array."""
    xp = array_module(first)
    arguments = tuple(np.float32(a) if isinstance(a, float) else NO_ARRAY if a is None else a for a in (first, *rest))
    kernel(xp, name, shared_bytes)(blocks, threads, arguments, shared_mem=shared_bytes)


def blocks_of(count, threads=THREADS):
    return (-(-count // threads),)


def vector(size, x):
    """Return how many neighbours to move as one: 16 bytes if rows of `size` numbers allow it, else 1."""
    V = 16 // x.dtype.itemsize
    return V if size % V == 0 else 1


def type_name(x):
    return TYPES[str(x.dtype)]


def contiguous(*arrays):
    """Return the arrays without gaps in memory and from an address that 16 bytes can be read at; None stays None."""
    arrays = [None if a is None else array_module(a).ascontiguousarray(a) for a in arrays]
    return [a.copy() if a is not None and a.data.ptr % 16 else a for a in arrays]


# Elementwise and small things


def add(a, b):
    """See `reference.add`; here the sum has the dtype of a."""
    a, b = contiguous(a, b.astype(a.dtype, copy=False))
    out = array_module(a).empty_like(a)
    V = vector(a.size, a)
    launch(f"add<{type_name(a)}, {V}>", blocks_of(a.size // V), (THREADS,), a, b, out, a.size)
    return out


def dropout_forward(x, p, key, step, start=0):
    """See `reference.dropout_forward`."""
    (x,) = contiguous(x)
    out = array_module(x).empty_like(x)
    threshold, scale = np.uint32(int(p * 2**32)), 1 / (1 - p)
    step = array_module(x).asarray(step, dtype="uint64")
    arguments = (x, out, x.size, threshold, scale, np.uint64(key), step, np.uint64(start))
    launch(f"dropout<{type_name(x)}>", blocks_of(-(-(start % 4 + x.size) // 4)), (THREADS,), *arguments)
    return out


def dropout_backward(dout, p, key, step, start=0):
    """See `reference.dropout_backward`: the forward's multiplication again."""
    return dropout_forward(dout, p, key, step, start)


def product(a, b, dtype, bias=None):
    """Return a @ b + bias in a dtype, by the kernel for small products if it is one.

    Shapes      a (M, K), b (K, N), bias (N,) or None  ->  (M, N)
    """
    xp = array_module(a)
    (M, K), N = a.shape, b.shape[1]
    if M * N * K > SMALL_PRODUCT and min(M, N, K) >= NARROW_PRODUCT:
        out = (a.astype("float32", copy=False) @ b.astype("float32", copy=False)).astype(dtype, copy=False)
        return out if bias is None else (out + bias).astype(dtype, copy=False)
    out = xp.empty((M, N), dtype)
    strides = [stride // array.dtype.itemsize for array in (a, b) for stride in array.strides]
    name = f"small_product<{type_name(a)}, {type_name(b)}, {type_name(out)}>"
    launch(name, blocks_of(M * N * 32), (THREADS,), a, b, bias, out, M, N, K, *strides)
    return out


def linear_forward(x, weight, bias=None):
    """See `reference.linear_forward`."""
    return product(x, weight, x.dtype, bias)


def linear_backward(dout, x, weight):
    """See `reference.linear_backward`."""
    return product(dout, weight.T, x.dtype), product(x.T, dout, weight.dtype), sum_over_rows(dout)


def sum_over_rows(x):
    """See `reference.sum_over_rows`; here the result is float32 for float16 too."""
    (x,) = contiguous(x)
    C = x.shape[-1]
    out = array_module(x).empty(C, "float32")
    launch(f"column_sums<{type_name(x)}>", blocks_of(C * 32), (THREADS,), x, out, x.size // C, C)
    return out


def global_avg_pool2d_forward(x):
    """See `reference.global_avg_pool2d_forward`."""
    (x,) = contiguous(x)
    N, H, W, C = x.shape
    out = array_module(x).empty((N, C), x.dtype)
    V = vector(C, x)
    launch(f"average_pool<{type_name(x)}, {V}>", blocks_of(N * C // V), (THREADS,), x, out, N, H * W, C)
    return out


def global_avg_pool2d_backward(dout, x_shape):
    """See `reference.global_avg_pool2d_backward`."""
    (dout,) = contiguous(dout)
    _, H, W, C = x_shape
    dx = array_module(dout).empty(x_shape, dout.dtype)
    V = vector(C, dout)
    name = f"average_pool_backward<{type_name(dout)}, {V}>"
    launch(name, blocks_of(dx.size // V), (THREADS,), dout, dx, dx.size, H * W, C)
    return dx


def softmax_cross_entropy_forward(logits, labels, label_smoothing=0.0):
    """See `reference.softmax_cross_entropy_forward`; here loss and probabilities are float32."""
    xp = array_module(logits)
    (logits,), labels = contiguous(logits), integers(labels)
    probabilities, loss = xp.empty(logits.shape, "float32"), xp.empty((), "float32")
    name = f"softmax_cross_entropy<{type_name(logits)}, {type_name(labels)}>"
    launch(name, (1,), (1024,), logits, labels, probabilities, loss, *logits.shape, float(label_smoothing))
    return loss, probabilities


def softmax_cross_entropy_backward(dloss, probabilities, labels, label_smoothing=0.0):
    """See `reference.softmax_cross_entropy_backward`."""
    labels, dlogits = integers(labels), array_module(probabilities).empty_like(probabilities)
    N, K = probabilities.shape
    arguments = (probabilities, labels, dlogits, N, K, float(label_smoothing), float(dloss) / N)
    launch(f"softmax_cross_entropy_backward<{type_name(labels)}>", blocks_of(N * K), (THREADS,), *arguments)
    return dlogits


def integers(labels):
    """Labels as the kernels take them, bytes or 64-bit integers."""
    return contiguous(labels if str(labels.dtype) in ("uint8", "int64") else labels.astype("int64"))[0]


# Batch normalisation


def rectangle(x):
    """How a batch is laid over blocks, see gpu.cu.

    Returns     the template arguments as a kernel's name has them, blocks, threads, rows in a chunk
    """
    C = x.shape[-1]
    V, rows = vector(C, x), ROWS[str(x.dtype)]
    lanes = min(32, 1 << (C // V - 1).bit_length())
    chunk = rows * (THREADS // lanes)
    blocks = (-(-x.size // C // chunk), -(-C // V // lanes))
    return f"<{type_name(x)}, {V}, {rows}>", blocks, (lanes, THREADS // lanes), chunk


def batch_norm_statistics(x):
    """See `reference.batch_norm_statistics`. One pass over memory; the result is float32 for float16 too.

    Source      Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
                variances"
    """
    xp = array_module(x)
    (x,) = contiguous(x)
    C = x.shape[-1]
    M = x.size // C
    template, blocks, threads, chunk = rectangle(x)
    partial = xp.empty((blocks[0], 2, C), "float32")
    mean, var = xp.empty(C, "float32"), xp.empty(C, "float32")
    launch("batch_norm_moments" + template, blocks, threads, x, partial, M, C)
    launch("batch_norm_merge", blocks_of(C, 8), (8, 32), partial, mean, var, blocks[0], chunk, M, C)
    return mean, var


def batch_norm_forward(x, weight, bias, mean, var, eps):
    """See `reference.batch_norm_forward`."""
    return batch_norm_add_relu_forward(x, weight, bias, mean, var, eps)


def batch_norm_add_relu_forward(x, weight, bias, mean, var, eps, residual=None, relu=False):
    """See `reference.batch_norm_add_relu_forward`. One pass over memory."""
    x, residual, weight, bias, mean, var = contiguous(x, residual, weight, bias, mean, var)
    out = array_module(x).empty_like(x)
    template, blocks, threads, _ = rectangle(x)
    C = x.shape[-1]
    launch(
        "batch_norm_apply" + template, blocks, threads,
        x, residual, weight, bias, mean, var, out, x.size // C, C, float(eps), bool(relu),
    )  # fmt: skip
    return out


def batch_norm_backward_sums(dout, x, mean, var, eps):
    """See `reference.batch_norm_backward_sums`."""
    return batch_norm_add_relu_backward_sums(dout, x, None, mean, var, eps)[1:]


def batch_norm_add_relu_backward_sums(dout, x, out, mean, var, eps):
    """See `reference.batch_norm_add_relu_backward_sums`. One pass over memory."""
    xp = array_module(x)
    dout, x, out, mean, var = contiguous(dout.astype(x.dtype, copy=False), x, out, mean, var)
    C = x.shape[-1]
    M = x.size // C
    template, blocks, threads, _ = rectangle(x)
    partial = xp.empty((blocks[0], 2, C), "float32")
    dweight, dbias = xp.empty(C, "float32"), xp.empty(C, "float32")
    masked = None if out is None else xp.empty_like(x)
    arguments = (dout, x, out, mean, var, partial, masked, M, C, float(eps))
    launch("batch_norm_backward_sums" + template, blocks, threads, *arguments)
    launch("batch_norm_backward_merge", blocks_of(C, 8), (8, 32), partial, dbias, dweight, blocks[0], C)
    return dout if masked is None else masked, dweight, dbias


def batch_norm_backward(dout, x, weight, mean, var, eps, dweight, dbias):
    """See `reference.batch_norm_backward`. One pass over memory."""
    dout, x, weight, mean, var = contiguous(dout.astype(x.dtype, copy=False), x, weight, mean, var)
    dx = array_module(x).empty_like(x)
    template, blocks, threads, _ = rectangle(x)
    C = x.shape[-1]
    arguments = (dout, x, weight, mean, var, dbias, dweight, dx, x.size // C, C, float(eps))
    launch("batch_norm_backward_apply" + template, blocks, threads, *arguments)
    return dx


def update_running_statistics(running_mean, running_var, mean, var, momentum, M):
    """See `reference.update_running_statistics`."""
    arguments = (running_mean, running_var, mean, var, mean.size, float(momentum), M / (M - 1))
    launch("update_running", blocks_of(mean.size), (THREADS,), *arguments)


# Convolution


def conv2d_forward(x, weight, bias=None, stride=1, padding=0):
    """See `reference.conv2d_forward`."""
    xp = array_module(x)
    (x,) = contiguous(x)
    N, H, W, _ = x.shape
    kh, kw, C, O = weight.shape
    oh, ow = output_size(H, kh, stride, padding), output_size(W, kw, stride, padding)
    out = xp.empty((N, oh, ow, O), x.dtype)
    if is_implicit(x, weight.shape, out.shape):
        if C % step_of(x):
            columns, rows = padded_columns(x, weight, stride, padding)
            convolve(columns, rows, out, (N, oh, ow, rows.shape[2], oh, ow, O, 1, 1, 1, 0), forward=True)
        else:
            convolve(x, weight, out, (N, H, W, C, oh, ow, O, kh, kw, stride, padding), forward=True)
    else:
        rows = cast(weight, x.dtype).reshape(-1, O)  # (kh*kw*C, O)
        for images in chunks_of_images(x, kh * kw * C * oh * ow):
            columns = im2col(x[images], (kh, kw), stride, padding).reshape(-1, kh * kw * C)
            out[images] = (columns @ rows).reshape(out[images].shape)
    return out if bias is None else (out + bias).astype(x.dtype, copy=False)


def conv2d_add_relu_forward(x, weight, bias=None, stride=1, padding=0, residual=None, relu=False):
    """See `reference.conv2d_add_relu_forward`."""
    return reference.add_and_relu(conv2d_forward(x, weight, bias, stride, padding), residual, relu)


def conv2d_backward(dout, x, weight, stride=1, padding=0, need_dx=True, need_dbias=True):
    """See `reference.conv2d_backward`; dweight and dbias are float32."""
    x, dout = contiguous(x, dout.astype(x.dtype, copy=False))
    dweight = weight_gradient(dout, x, weight.shape, stride, padding)
    dx = input_gradient(dout, x, weight, stride, padding) if need_dx else None
    return dx, dweight, sum_over_rows(dout) if need_dbias else None


def input_gradient(dout, x, weight, stride, padding):
    xp = array_module(x)
    N, H, W, C = x.shape
    kh, kw, _, O = weight.shape
    _, oh, ow, _ = dout.shape
    dx = xp.empty_like(x)
    if is_implicit(x, (kh, kw, O, C), dout.shape) and O % step_of(x) == 0:
        convolve(dout, weight, dx, (N, H, W, C, oh, ow, O, kh, kw, stride, padding), forward=False)
        return dx
    rows = cast(weight, x.dtype).reshape(-1, O)  # (kh*kw*C, O)
    for images in chunks_of_images(x, kh * kw * C * oh * ow):
        dcolumns = dout[images].reshape(-1, O) @ rows.T  # (n*oh*ow, kh*kw*C)
        dx[images] = col2im(dcolumns.reshape(-1, oh, ow, kh * kw * C), x[images].shape, (kh, kw), stride, padding)
    return dx


def weight_gradient(dout, x, weight_shape, stride, padding):
    xp = array_module(x)
    N, H, W, C = x.shape
    kh, kw, _, O = weight_shape
    _, oh, ow, _ = dout.shape
    if is_implicit(x, weight_shape, dout.shape):
        rows = kh * kw * C
        if rows % ROWS_OF_A_GRADIENT == 0 and C * x.dtype.itemsize % 16 == 0:
            return convolve_weight_gradient(x, dout, weight_shape, (N, H, W, C, oh, ow, O, kw, stride, padding))
        columns = im2col(x, (kh, kw), stride, padding, row_size=round_up(rows, ROWS_OF_A_GRADIENT))
        K = columns.shape[3]
        dweight = convolve_weight_gradient(columns, dout, (1, 1, K, O), (N, oh, ow, K, oh, ow, O, 1, 1, 0))
        return dweight[0, 0, :rows].reshape(weight_shape)
    dweight = xp.zeros((kh * kw * C, O), "float32")
    for images in chunks_of_images(x, kh * kw * C * oh * ow):
        columns = im2col(x[images], (kh, kw), stride, padding).reshape(-1, kh * kw * C)
        dweight += columns.astype("float32", copy=False).T @ dout[images].reshape(-1, O).astype("float32", copy=False)
    return dweight.reshape(weight_shape)


def is_implicit(x, weight_shape, out_shape):
    """Whether the tensor cores take a convolution from x to an output, or back."""
    kh, kw, C, columns = weight_shape
    positions = math.prod(out_shape[:3])
    with_columns = C % step_of(x) or kh * kw * C % ROWS_OF_A_GRADIENT
    row = round_up(kh * kw * C, ROWS_OF_A_GRADIENT) if with_columns else 0
    largest = max(x.size, positions * out_shape[3], positions * row)
    allowed = x.dtype == "float16" or _precision == "tf32"
    return allowed and columns % COLUMNS_OF_A_TILE == 0 and kh * kw <= MOST_TAPS and largest < INDEX_LIMIT


def step_of(x):
    """How many channels a step along the inner dimension takes."""
    return STEP_BYTES // x.dtype.itemsize


def round_up(size, multiple):
    return -(-size // multiple) * multiple


def padded_columns(x, weight, stride, padding):
    """Columns and weights with rows of zeros up to a whole step: any convolution, as one with a 1x1 window.

    Shapes      x (N, H, W, C), weight (kh, kw, C, O)  ->  columns (N, oh, ow, K), rows (1, 1, K, O)
    """
    xp = array_module(x)
    kh, kw, C, O = weight.shape
    K = round_up(kh * kw * C, step_of(x))
    rows = xp.zeros((1, 1, K, O), "float32")
    rows[0, 0, : kh * kw * C] = weight.reshape(-1, O)
    return im2col(x, (kh, kw), stride, padding, row_size=K), rows


def tile_arguments(tile):
    return ", ".join(map(str, tile))


def choose_tile(rows, columns, inner, itemsize):
    """Take the largest tile that divides columns and inner dimension and leaves BLOCKS to work on, or the smallest."""
    fitting = [tile for tile in TILES if columns % tile[1] == 0 and inner * itemsize % tile[5] == 0]
    return next((tile for tile in fitting if -(-rows // tile[0]) * (columns // tile[1]) >= BLOCKS), fitting[-1])


def convolve(source, weight, target, geometry, forward):
    N, H, W, C, oh, ow, O, _, _, stride, _ = geometry
    phases = 1 if forward else stride**2
    rows = N * oh * ow if forward else N * -(-H // stride) * -(-W // stride)
    columns = O if forward else C
    tile = choose_tile(rows * phases, columns, C if forward else O, source.dtype.itemsize)
    BM, BN, WM, WN, stages, inner = tile
    name = f"convolve<{type_name(source)}, {tile_arguments(tile)}, {'true' if forward else 'false'}>"
    launch(
        name, (-(-rows // BM), columns // BN, phases), (BM // WM * (BN // WN) * 32,),
        source, cast(weight, source.dtype), target, *geometry, shared_bytes=stages * (BM + BN) * inner,
    )  # fmt: skip


def convolve_weight_gradient(x, dout, weight_shape, geometry):
    xp = array_module(x)
    N, _, _, _, oh, ow, O, _, _, _ = geometry
    positions, rows = N * oh * ow, math.prod(weight_shape[:3])
    tile = next(tile for tile in GRADIENT_TILES[str(x.dtype)] if rows % tile[0] == 0 and O % tile[1] == 0)
    BM, BN, WM, WN, stages, inner = tile
    tiles = rows // BM * (O // BN)
    splits = max(1, min(GRADIENT_BLOCKS // tiles, positions // SHORTEST_SPLIT))
    positions_each = round_up(-(-positions // splits), inner // x.dtype.itemsize)
    splits = -(-positions // positions_each)
    partial = xp.empty((splits, *weight_shape), "float32")
    launch(
        f"convolve_weight_gradient<{type_name(x)}, {tile_arguments(tile)}>",
        (rows // BM, O // BN, splits),
        (BM // WM * (BN // WN) * 32,),
        *(x, dout, partial, *geometry, positions_each),
        shared_bytes=stages * (BM + BN) * inner,
    )
    if splits == 1:
        return partial[0]
    dweight = xp.empty(weight_shape, "float32")
    launch("sum_splits", blocks_of(dweight.size // 4), (THREADS,), partial, dweight, dweight.size, splits)
    return dweight


def cast(weight, dtype):
    """Return the weights in the dtype of the images, without gaps."""
    (weight,) = contiguous(weight)
    if weight.dtype == dtype:
        return weight
    out = array_module(weight).empty(weight.shape, dtype)
    launch(f"cast<{type_name(out)}>", blocks_of(out.size), (THREADS,), weight, out, out.size)
    return out


def chunks_of_images(x, columns_per_image):
    images = max(1, COLUMN_BYTES // (columns_per_image * x.dtype.itemsize))
    return [slice(start, start + images) for start in range(0, len(x), images)]


def im2col(x, kernel_size, stride, padding, row_size=None):
    """See `reference.im2col`; rows may be filled up with zeros to row_size."""
    (x,) = contiguous(x)
    N, H, W, C = x.shape
    kh, kw = kernel_size
    oh, ow = output_size(H, kh, stride, padding), output_size(W, kw, stride, padding)
    row_size = row_size or kh * kw * C
    columns = array_module(x).empty((N, oh, ow, row_size), x.dtype)
    V = vector(row_size, columns)
    whole = V == 1 or vector(C, x) == V
    arguments = (x, columns, columns.size, row_size, H, W, C, oh, ow, kh, kw, stride, padding)
    launch(
        f"im2col<{type_name(x)}, {V}, {'true' if whole else 'false'}>",
        blocks_of(columns.size // V),
        (THREADS,),
        *arguments,
    )
    return columns


def col2im(columns, x_shape, kernel_size, stride, padding):
    """See `reference.col2im`."""
    (columns,) = contiguous(columns)
    _, H, W, C = x_shape
    _, oh, ow, _ = columns.shape
    dx = array_module(columns).empty(x_shape, columns.dtype)
    V = vector(C, columns)
    arguments = (columns, dx, dx.size, H, W, C, oh, ow, *kernel_size, stride, padding)
    launch(f"col2im<{type_name(dx)}, {V}>", blocks_of(dx.size // V), (THREADS,), *arguments)
    return dx


# Optimizers


def sgd_update(param, grad, velocity, lr, momentum=0.0, nesterov=False, weight_decay=0.0, grad_scale=1.0):
    """See `reference.sgd_update`."""
    numbers = (float(lr), float(momentum), bool(nesterov), float(weight_decay))
    arguments = (param, grad, velocity, param.size, float(grad_scale), *numbers)
    launch("sgd", blocks_of(param.size), (THREADS,), *arguments)


def adam_update(param, grad, m, v, step, lr, betas, eps, weight_decay=0.0, grad_scale=1.0):
    """See `reference.adam_update`."""
    beta1, beta2 = betas
    step_size, rms_scale = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    numbers = map(float, (grad_scale, weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, step_size, rms_scale, eps))
    launch("adam", blocks_of(param.size), (THREADS,), param, grad, m, v, param.size, *numbers)


def average_update(average, param, decay):
    """See `reference.average_update`."""
    arguments = (average, param, param.size, float(decay), 1 - float(decay))
    launch("average", blocks_of(param.size), (THREADS,), *arguments)


# Recording


def replay(function, also=lambda: None):
    """Return a function that does what `function` does, from the third call on by a single launch.

    Why         A training step is 200 short launches, and Python takes longer to ask for them than a GPU to carry them
                out. A CUDA graph asks for all of them at once.

    The first call with arrays of some shapes runs as it is (kernels are compiled, memory is asked for), the second one
    records, and those that follow replay with the arrays' values of the moment. What the function returns is written
    over by the next call. Of what `also` returns, as of the shapes, each value has a recording of its own.

    Limits      Python itself runs no more: a number that changes has to be an array, and whether the model trains, its
                momenta and the like stay what they were. What the function works on must stay where it is: make a new
                one after model.to or with another optimizer. CuPy's cuBLAS refuses to be recorded; a function that
                needs it (strict float32, channels that are no multiples of 64) goes on as it is
    """
    recordings, pools = {}, []

    @functools.wraps(function)
    def call(*arrays):
        key = (_precision, also(), *((array.shape, str(array.dtype)) for array in arrays))
        if key not in recordings:
            recordings[key] = None
            return function(*arrays)
        if recordings[key] is None:
            if not pools:  # one for all: they never run at the same time, and what is handed out stays alive
                pools.append(array_module(arrays[0]).cuda.MemoryPool())
            try:
                recordings[key] = Recording(function, arrays, pools[0])
            except NotImplementedError:  # by CuPy, of cuBLAS
                recordings[key] = function
        return recordings[key](*arrays)

    return call


class Recording:
    """A CUDA graph of what a function launches, with arrays of its own for the arguments and memory of its own."""

    def __init__(self, function, arrays, pool):
        cupy = array_module(arrays[0])
        self.arguments = [array.copy() for array in arrays]
        cupy.get_default_memory_pool().free_all_blocks()  # what the function took when it ran as it is
        stream = cupy.cuda.Stream(non_blocking=True)  # others may go on meanwhile
        with cupy.cuda.using_allocator(pool.malloc), stream:
            stream.begin_capture()
            try:
                self.result = function(*self.arguments)
            except BaseException:
                with contextlib.suppress(Exception):  # a capture that went wrong cannot end well
                    stream.end_capture()
                raise
            self.graph = stream.end_capture()

    def __call__(self, *arrays):
        for argument, array in zip(self.arguments, arrays, strict=True):
            argument[...] = array
        self.graph.launch()
        return self.result
