"""A 3x3 convolution with a quarter of the multiplications: Winograd's, by tiles of 4x4 outputs.

By hand     A filter of three taps g on four inputs x, in one dimension, has two outputs and takes six multiplications:
                y0 = x0 g0 + x1 g1 + x2 g2
                y1 = x1 g0 + x2 g1 + x3 g2
            These four numbers take four, as the sums of taps are made once for all the tiles of an image:
                m0 = (x0 - x2) g0                           m2 = (x2 - x1) (g0 - g1 + g2) / 2
                m1 = (x1 + x2) (g0 + g1 + g2) / 2           m3 = (x1 - x3) g2
            and they are enough, as m1 + m2 = x1 g1 + x2 (g0 + g2) and m1 - m2 = x1 (g0 + g2) + x2 g1:
                y0 = m0 + m1 + m2
                y1 = m1 - m2 - m3
            With F(outputs, taps) for "so many outputs of so many taps", this is F(2, 3). minires uses F(4, 3): six
            multiplications in place of twelve.

    >>> x0, x1, x2, x3 = 1, 2, 3, 4
    >>> g0, g1, g2 = 1, 10, 100
    >>> x0 * g0 + x1 * g1 + x2 * g2, x1 * g0 + x2 * g1 + x3 * g2
    (321, 432)
    >>> m0, m1 = (x0 - x2) * g0, (x1 + x2) * (g0 + g1 + g2) / 2
    >>> m3, m2 = (x1 - x3) * g2, (x2 - x1) * (g0 - g1 + g2) / 2
    >>> m0 + m1 + m2, m1 - m2 - m3
    (321.0, 432.0)

Why         First the product p of two polynomials, g with 3 coefficients and d with 4. It has 6 coefficients and takes
            12 multiplications. But a polynomial with 6 coefficients is known from its values at 6 points, and at a
            point the value of the product is the product of the values: 6 multiplications. The points a are 0, 1, -1,
            2, -2, and "infinity", where the value is the leading coefficient. (F(2, 3) takes 0, 1, -1 and infinity.)

            To the points. The value of g at a is (1, a, a^2) . g, at infinity (0, 0, 1) . g: one matrix times g, and
            likewise one times d, with rows (1, a, a^2, a^3). The latter is OUTPUT.T.
            Back, by Lagrange's interpolation. Write q_a(t) for the product of (t - b) over all other finite points b:
            it is 0 at each of these, and q_a(a) at a. So with q(t) for the product over all five,
                p(t) = sum_a p(a) q_a(t) / q_a(a) + p(infinity) q(t)
            as both sides agree at all six points. The coefficients of q_a, and last those of q, are the rows of INPUT.
            The divisions by q_a(a) are a diagonal matrix D: p = INPUT.T D (g at the points * d at the points), with *
            element by element. D (u * v) = (D u) * v, so it may go with the taps, which are transformed once: the rows
            of WEIGHT are (1, a, a^2) / q_a(a). Together,
                p = INPUT.T ((WEIGHT g) * (OUTPUT.T d)) = INPUT.T diag(WEIGHT g) OUTPUT.T d
            For a fixed g that is a matrix times d, and its entry in row k and column j is g[k - j].

            A filter is the same matrix transposed: y[i] = sum_k g[k] x[i + k] = sum_k g[k - i] x[k]. The transposed
            product is OUTPUT diag(WEIGHT g) INPUT, so
                y = OUTPUT ((WEIGHT g) * (INPUT x))

    >>> x, g = np.arange(1.0, 7.0), np.array([1.0, 10.0, 100.0])  # six inputs, four outputs
    >>> (OUTPUT @ ((WEIGHT @ g) * (INPUT @ x))).round(3)
    array([321., 432., 543., 654.])

            In two dimensions it is done along columns, then along rows: 36 multiplications in place of 144,
                out = OUTPUT ((WEIGHT g WEIGHT.T) * (INPUT x INPUT.T)) OUTPUT.T

    >>> x, g = np.eye(6), np.ones((3, 3))  # an output counts the ones that its window shows
    >>> (OUTPUT @ ((WEIGHT @ g @ WEIGHT.T) * (INPUT @ x @ INPUT.T)) @ OUTPUT.T).round(3) + 0
    array([[3., 2., 1., 0.],
           [2., 3., 2., 1.],
           [1., 2., 3., 2.],
           [0., 1., 2., 3.]])

Limits      It adds and subtracts again: relative to float64, forward and dx come out 1.7e-6, 2.4e-6, 3.4e-6 and 3.8e-6
            off at the four stages of the default network, by im2col 1.6e-7 to 3.7e-7; dweight 2.2e-6 to 0.9e-6, by
            im2col 3.7e-7 to 1.4e-7 (norms, normal numbers, 5 images). A tile shares the rounding of its largest number;
            where it holds an infinity or NaN, all of the tile is NaN. Tiles of 2x2 outputs would lose fewer digits and
            take 4 multiplications an output in place of 2.25; the network has no use for them
Source      Lavin and Gray 2016, "Fast algorithms for convolutional neural networks" (arXiv 1509.09308, 2015), section
            4, whose matrices for F(4x4, 3x3) these are: INPUT is B^T, WEIGHT is G, OUTPUT is A^T
"""

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from minires.kernels.memory import Frame, add_product, frame, fresh, scratch, workspace
from minires.kernels.threads import blocks, chunks_of_images, groups_of, run, sum_of_groups

TILES = 128  # tiles in a piece of work: enough that the products are worth the reading of the weights
LARGE_WEIGHTS = 2**15  # C * O from which the transformed weights no longer fit beside a piece: threads share the 36
TILES_AT_ONCE = 512  # tiles that exist at one time then, or those of one image: bounds the memory

INPUT = np.array(  # Lavin's B^T: 6 inputs to 6 points
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
WEIGHT = np.array(  # Lavin's G: 3 taps to 6 points
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
OUTPUT = np.array(  # Lavin's A^T: 6 products to 4 outputs
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], np.float32
)


def is_for(x_shape, weight_shape, stride, padding):
    """Whether a convolution has a 3x3 window, stride 1 and padding 1, and Winograd's way pays.

    It does not with few channels, which do not pay for the transforms, nor with images so small that tiles of 4x4 are
    mostly beyond them: 36 multiplications a tile should be fewer than 6 a pixel, where im2col has 9.
    """
    _, H, W, _ = x_shape
    kh, kw, C, O = weight_shape
    fills_its_tiles = 36 * tiles_of(H) * tiles_of(W) < 6 * H * W
    return (kh, kw, stride, padding) == (3, 3, 1, 1) and min(C, O) >= 16 and fills_its_tiles


def conv2d(x, weight, finish=lambda out, images: None):
    """Convolve with a 3x3 window, stride 1 and padding 1.

    Forward     for every tile of 6x6 inputs x and every pair of channels, with * element by element:
                out = OUTPUT (sum_c (INPUT x INPUT.T) * (WEIGHT weight WEIGHT.T)) OUTPUT.T

    Why         OUTPUT is linear, so channels are added before it, and each of the 36 positions in a tile becomes one
                matrix product, (tiles, C) @ (C, O).

    Args        finish: what is done to each piece of out, in place, given the piece and the slice of images that it is
    Shapes      x (N, H, W, C), weight (3, 3, C, O)  ->  out (N, H, W, O)
    """
    N, H, W, C = x.shape
    O = weight.shape[3]
    out = fresh((N, H, W, O))
    U = weight_transform(weight)  # (36, C, O)

    def convolve(images):
        n = images.stop - images.start
        V, M = matrices("V", n, H, W, C), matrices("M", n, H, W, O)
        input_transform(x[images], V.tiles)
        np.matmul(V.matrices, U, out=M.matrices)
        output_transform(out[images], M.tiles)
        finish(out[images], images)

    def convolve_by_position(images):
        n = images.stop - images.start
        V, M = matrices("all V", n, H, W, C), matrices("all M", n, H, W, O)

        def back_to_images(chunk, part):
            output_transform(out[chunk], M.tiles[part])
            finish(out[chunk], chunk)

        share_out(lambda chunk, part: input_transform(x[chunk], V.tiles[part]), images, H, W)
        run(lambda i: np.matmul(V.matrices[i], U[i], out=M.matrices[i]), range(36))
        share_out(back_to_images, images, H, W)

    if C * O < LARGE_WEIGHTS:
        run(convolve, chunks_of_images(N, tiles_of(H) * tiles_of(W), TILES))
    else:
        for images in chunks_of_images(N, tiles_of(H) * tiles_of(W), TILES_AT_ONCE):
            convolve_by_position(images)
    return out


def input_gradient(dout, weight):
    """dx of `conv2d`: a convolution too, of dout, from O channels to C.

    Why         x[y] influences out[y - 1], out[y] and out[y + 1] through the window's last, middle and first row. So
                the window is turned by 180 degrees, and channels in and out are exchanged.

    Shapes      dout (N, H, W, O), weight (3, 3, C, O)  ->  dx (N, H, W, C)
    """
    kh, kw, C, O = weight.shape
    turned = fresh((kh, kw, O, C))
    run(
        lambda part: np.copyto(turned[:, :, :, part], weight[::-1, ::-1, part].transpose(0, 1, 3, 2)),
        blocks(C, kh * kw * O),
    )
    return conv2d(dout, turned)


def weight_gradient(dout, x):
    """dweight of `conv2d`, with a quarter of the multiplications too.

    Backward    for every pair of channels, V and dM being the tiles INPUT x INPUT.T and OUTPUT.T dout OUTPUT:
                dweight = WEIGHT.T (sum of V * dM over all tiles) WEIGHT

    Why         Each step of the forward is linear, so each goes back by its transpose.

    Shapes      dout (N, H, W, O), x (N, H, W, C)  ->  dweight (3, 3, C, O)
    """
    N, H, W, C = x.shape
    O = dout.shape[3]

    if C * O < LARGE_WEIGHTS:
        groups = groups_of(chunks_of_images(N, tiles_of(H) * tiles_of(W), TILES))
        partial = fresh((len(groups), 36, C, O))

        def add_up(group):
            for images in groups[group]:
                n = images.stop - images.start
                V, dM = matrices("V", n, H, W, C), matrices("M", n, H, W, O)
                input_transform(x[images], V.tiles)
                output_transform_backward(dout[images], dM.tiles)
                first = images is groups[group][0]
                add_product(V.matrices.transpose(0, 2, 1), dM.matrices, partial[group], first)

        run(add_up, range(len(groups)))
        return weight_transform_backward(sum_of_groups(partial))

    dU = scratch_matrices("U", C, O)

    def add_up_by_position(images):
        n = images.stop - images.start
        V, dM = matrices("all V", n, H, W, C), matrices("all M", n, H, W, O)
        share_out(lambda chunk, part: input_transform(x[chunk], V.tiles[part]), images, H, W)
        share_out(lambda chunk, part: output_transform_backward(dout[chunk], dM.tiles[part]), images, H, W)
        run(lambda i: add_product(V.matrices[i].T, dM.matrices[i], dU[i], first=images.start == 0), range(36))

    for images in chunks_of_images(N, tiles_of(H) * tiles_of(W), TILES_AT_ONCE):
        add_up_by_position(images)
    return weight_transform_backward(dU)


def tiles_of(size):
    """Return how many tiles of four pixels cover a side; the last may reach beyond it, into zeros."""
    return -(-size // 4)


def share_out(transform, images, H, W):
    """Run a transform between images and all their tiles on all threads, a few images at a time.

    Args        transform: is given a slice of the images, and the same counted from images.start; images: all of them
    """

    def transform_chunk(part):
        transform(slice(images.start + part.start, images.start + part.stop), part)

    run(transform_chunk, chunks_of_images(images.stop - images.start, tiles_of(H) * tiles_of(W), TILES // 4))


def scratch_matrices(name, rows, columns):
    """Return scratch memory for 36 matrices, one for each position in a tile.

    Each has a row too many. Without it they would begin a power of two apart, which a cache maps to the same few lines.

    Shapes      ->  (36, rows, columns)
    """
    return scratch(name, (36, rows + 1, columns))[:, :rows]


class TileMatrices(NamedTuple):
    """The same memory seen in two ways: for products, and as the tiles lie in images."""

    matrices: np.ndarray  # (36, n*th*tw, C), n images of th*tw tiles
    tiles: np.ndarray  # (n, th, 6, tw, 6, C)


def matrices(name, n, H, W, C):
    """Return scratch memory for the tiles of n images, a TileMatrices."""
    return workspace(tile_matrices, name, n, H, W, C)


def tile_matrices(name, n, H, W, C):
    th, tw = tiles_of(H), tiles_of(W)
    V = scratch_matrices(name, n * th * tw, C)
    return TileMatrices(V, V.reshape(6, 6, n, th, tw, C).transpose(2, 3, 0, 4, 1, 5))


def weight_transform(weight):
    """U = WEIGHT weight WEIGHT.T for every pair of channels.

    Shapes      weight (3, 3, C, O)  ->  U (36, C, O)
    """
    _, _, C, O = weight.shape
    both = np.kron(WEIGHT, WEIGHT)  # (36, 9): the two products with WEIGHT as one
    taps = np.ascontiguousarray(weight).reshape(9, C * O)
    U = scratch_matrices("U", C, O)
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


class Overlapping(NamedTuple):
    """Working space of `input_transform`: tiles of 6x6 pixels, which overlap by two, seen where they lie."""

    frame: Frame  # of the images
    rows: np.ndarray  # (n, th, 6, width*C), a view of it: the rows of the tiles
    half: np.ndarray  # the same shape, transformed along columns
    columns: np.ndarray  # (n, th, 6, tw, 6, C), a view of that


def overlapping(n, H, W, C):
    th, tw = tiles_of(H), tiles_of(W)
    width = 4 * tw + 2
    images = frame((n, H, W, C), 1, 4 * th + 2, width)
    per_image, per_row, per_pixel, per_channel = images.padded.strides
    rows = as_strided(images.padded, (n, th, 6, width * C), (per_image, 4 * per_row, per_row, per_channel))
    half = scratch("half", rows.shape)
    columns = as_strided(
        half,
        (n, th, 6, tw, 6, C),
        (6 * th * per_row, 6 * per_row, per_row, 4 * per_pixel, per_pixel, per_channel),
    )
    return Overlapping(images, rows, half, columns)


def input_transform(x, V):
    """V = INPUT tile INPUT.T for every tile of 6x6 pixels and every channel.

    Shapes      x (n, H, W, C)  ->  V (n, th, 6, tw, 6, C), of th*tw tiles an image
    """
    tiles = workspace(overlapping, *x.shape)
    tiles.frame.fill(x)
    np.matmul(INPUT, tiles.rows, out=tiles.half)
    np.matmul(INPUT, tiles.columns, out=V)


class SideBySide(NamedTuple):
    """Working space of the other two transforms: tiles of 4x4 pixels, side by side."""

    half: np.ndarray  # (n, th, 6, tw, 4, O), between the two products
    rows: np.ndarray  # (n, th, 6, tw*4*O), a view of it
    rows_of_images: tuple  # (n, th, 4, tw*4*O), the shape of the images


def side_by_side(n, H, W, O):
    th, tw = tiles_of(H), tiles_of(W)
    half = scratch("half", (n, th, 6, tw, 4, O))
    return SideBySide(half, half.reshape(n, th, 6, -1), (n, th, 4, 4 * tw * O))


def output_transform(out, M):
    """out = OUTPUT m OUTPUT.T for every tile m of 6x6 products: tiles of 4x4 pixels, side by side.

    Shapes      out (n, H, W, O) is written from M (n, th, 6, tw, 6, O)
    """
    n, H, W, O = out.shape
    tiles = workspace(side_by_side, n, H, W, O)
    reaches_beyond = H % 4 or W % 4
    whole = scratch("whole", (n, 4 * tiles_of(H), 4 * tiles_of(W), O)) if reaches_beyond else out
    np.matmul(OUTPUT, M, out=tiles.half)
    np.matmul(OUTPUT, tiles.rows, out=whole.reshape(tiles.rows_of_images))
    if reaches_beyond:
        out[...] = whole[:, :H, :W]


def output_transform_backward(dout, dM):
    """dm = OUTPUT.T dout OUTPUT for every tile of 4x4 pixels: the adjoint of `output_transform`.

    Shapes      dout (n, H, W, O)  ->  dM (n, th, 6, tw, 6, O)
    """
    n, H, W, O = dout.shape
    tiles = workspace(side_by_side, n, H, W, O)
    if H % 4 or W % 4:
        images = workspace(frame, dout.shape, 0, 4 * tiles_of(H), 4 * tiles_of(W))
        images.fill(dout)
        dout = images.padded
    np.matmul(OUTPUT.T, dout.reshape(tiles.rows_of_images), out=tiles.rows)
    np.matmul(OUTPUT.T, tiles.half, out=dM)
