"""What each function is given, and what the usual mistakes would return: the tables behind `checks.check_kernel`.

For every function there are cases, from a generator of random numbers: odd shapes, a single image, every option. And
suspects: a mistake's sentence beside the numbers that it gives. Both read like a list of what students get wrong.
"""

import itertools
import math
import types

import numpy as np

from course.checks import Check
from course.source import reference
from minires.kernels.reference import pixels_of_tap


def dot(a, b):
    return np.sum(a * b)


def cases_of_linear(rng):
    for N, D, K in ((4, 3, 5), (1, 2, 3), (3, 3, 3)):
        x, weight, bias = rng.standard_normal((N, D)), rng.standard_normal((D, K)), rng.standard_normal(K)
        yield {"x": x, "weight": weight, "bias": bias, "dout": rng.standard_normal((N, K))}
    yield {"x": x, "weight": weight, "bias": None, "dout": rng.standard_normal((N, K))}


def suspects_of_linear(a, e):
    yield "out", "The bias is missing.", lambda: a.x @ a.weight
    yield "out", "The bias is subtracted.", lambda: a.x @ a.weight - a.bias


def suspects_of_linear_backward(a, e):
    yield "dx", "weight should be transposed: dx[n, d] takes weight[d, k] for all k.", lambda: a.dout @ a.weight
    yield "dx", "It is transposed.", lambda: (a.dout @ a.weight.T).T
    yield "dweight", "It is transposed: x.T @ dout has the shape of weight.", lambda: a.dout.T @ a.x
    yield "dweight", "x should be transposed: the sum runs over the N rows.", lambda: a.x @ a.dout
    yield "dbias", "It is dout of the first row: sum over all rows.", lambda: a.dout[0]
    yield (
        "dbias",
        "It is summed over the outputs; the bias of an output is the same in all rows, so sum over rows.",
        (lambda: a.dout.sum(1)),
    )
    yield "dbias", "The sum over the rows is missing.", lambda: a.dout
    yield (
        "dbias",
        "It is summed over all of dout: an output has a bias of its own, so sum over the rows only.",
        (lambda: a.dout.sum()),
    )
    yield (
        "dbias",
        "dbias is all ones times N: the gradient that comes from above, dout, is missing.",
        (lambda: np.full(a.dout.shape[1], len(a.dout))),
    )


def cases_of_relu(rng):
    for shape in ((3, 4), (2, 3, 5, 2)):
        x = rng.standard_normal(shape)
        yield {"x": x, "out": np.maximum(x, 0), "dout": rng.standard_normal(shape)}


def suspects_of_relu(a, e):
    for axis in (0, None):
        sentence = "np.max takes the largest number of an array; np.maximum compares element by element."
        yield "out", sentence, lambda axis=axis: a.x.max(axis)
    yield "out", "It is |x|: negative numbers become 0, not positive.", lambda: np.abs(a.x)
    yield "out", "The small ones are kept and the large ones set to 0.", lambda: np.minimum(a.x, 0)
    yield "out", "It is the mask, 0 or 1: x itself is missing.", lambda: a.x > 0


def suspects_of_relu_backward(a, e):
    yield "dx", "It is dout unchanged: the mask is missing, dout may pass only where out > 0.", lambda: a.dout
    yield "dx", "The mask looks at the sign of dout; it is the sign of out that counts.", lambda: a.dout * (a.dout > 0)
    yield "dx", "It is the mask alone, without dout.", lambda: a.out > 0
    yield "dx", "dout is multiplied by out; the derivative is 1 where out > 0, not out.", lambda: a.dout * a.out
    yield "dx", "The mask is the wrong way round: dout passes where out is 0.", lambda: a.dout * (a.out <= 0)


def cases_of_softmax(rng):
    far = np.array([[1000.0, 1001.0, 999.0], [-2000.0, -2001.0, -1999.5], [0.0, 800.0, 1600.0]])
    for logits, smoothing, dloss in (
        (2 * rng.standard_normal((5, 4)), 0.0, 1.0),
        (2 * rng.standard_normal((5, 4)), 0.0, 0.7),
        (2 * rng.standard_normal((3, 7)), 0.3, 0.7),
        (far, 0.0, 1.0),
        (rng.standard_normal((1, 2)), 0.1, 1.0),
    ):
        N, K = logits.shape
        labels = logits.argmin(axis=1) if logits is far else rng.integers(K, size=N)  # of which p may be 0
        probabilities = reference().softmax_cross_entropy_forward(logits, labels)[1]
        case = {"logits": logits, "labels": labels, "label_smoothing": smoothing}
        yield {**case, "dloss": dloss, "probabilities": probabilities}


def suspects_of_softmax(a, e):
    N, K = a.logits.shape
    shifted = a.logits - a.logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    picked = -log_p[np.arange(N), a.labels].mean()
    s = a.label_smoothing
    yield "loss", "label_smoothing is not used.", picked
    yield (
        "loss",
        "Of the target, the label gets 1 - s + s / K and each other class s / K: here it gets 1 - s.",
        (lambda: picked * (1 - s) - (log_p.sum(1) - log_p[np.arange(N), a.labels]).mean() * s / K),
    )
    yield (
        "loss",
        "The smoothed part is summed over the K classes: each gets s / K.",
        (lambda: (1 - s) * picked - s * log_p.sum(1).mean()),
    )
    yield (
        "loss",
        "It is the mean of the probabilities of the labels: -log is missing.",
        (lambda: np.exp(log_p)[np.arange(N), a.labels].mean()),
    )
    yield (
        "loss",
        "It is averaged over all N K entries: pick the label's one in each row, and average over the N rows.",
        (lambda: picked / K),
    )
    yield (
        "loss",
        "It is a number for each row: the mean over the batch is missing.",
        (lambda: -log_p[np.arange(N), a.labels]),
    )
    yield (
        "loss",
        "It is the mean logit of the labels: the log of the sum of exp is missing.",
        (lambda: -a.logits[np.arange(N), a.labels].mean()),
    )
    for axis, top in itertools.product((0, None), (a.logits.max(1, keepdims=True), a.logits.max(0), a.logits.max())):
        exp = np.exp(a.logits - top)
        yield (
            "probabilities",
            "Each row should sum to 1: the sum is taken over the wrong axis.",
            (exp / exp.sum(axis=axis, keepdims=True)),
        )
    yield "probabilities", "They are not divided by their sum.", lambda: np.exp(shifted)
    yield "probabilities", "They are not divided by their sum.", lambda: np.exp(a.logits)
    yield "probabilities", "It is the logarithm of the probabilities.", lambda: log_p


def suspects_of_softmax_backward(a, e):
    N, K = a.probabilities.shape
    s, p = a.label_smoothing, a.probabilities
    onehot = np.eye(K)[a.labels]
    scale = a.dloss / N
    target = onehot * (1 - s) + s / K
    yield "dlogits", "It is p / N: the target is not subtracted.", lambda: scale * p
    yield "dlogits", "label_smoothing is not used.", lambda: scale * (p - onehot)
    yield (
        "dlogits",
        "The label's target is 1 - s + s / K, here it is 1 - s.",
        (lambda: scale * (p - np.where(onehot == 1, 1 - s, s / K))),
    )
    yield "dlogits", "1 / N is missing: the loss is a mean over the N rows.", lambda: a.dloss * (p - target)
    yield "dlogits", "dloss is not used.", lambda: (p - target) / N
    yield "dlogits", "1 / N is missing, and dloss is not used.", lambda: p - target
    yield "dlogits", "It is divided by N K: the loss is a mean over the N rows only.", lambda: scale / K * (p - target)
    yield "dlogits", "1 is subtracted from all classes; it should be only the label's.", lambda: scale * (p - 1)
    yield (
        "dlogits",
        "It is the derivative of one probability, p (1 - p): the loss looks at its logarithm.",
        (lambda: scale * p * (1 - p)),
    )
    yield (
        "dlogits",
        "Only the label's entry is there: all other logits of the row influence the loss as well.",
        (lambda: scale * (p - target) * onehot),
    )


def cases_of_average(rng):
    for shape in ((2, 3, 5, 4), (1, 2, 1, 3)):
        x, dout = rng.standard_normal(shape), rng.standard_normal((shape[0], shape[3]))
        yield {"x": x, "x_shape": shape, "dout": dout}


def suspects_of_average(a, e):
    yield "out", "It is the largest pixel, not the average.", lambda: a.x.max((1, 2))
    yield "out", "It is averaged over the rows only.", lambda: a.x.mean(1)
    yield "out", "It is averaged over images and pixels: each image has its own.", lambda: a.x.mean((0, 1, 2))
    yield "out", "It is averaged over the channels: each channel has its own.", lambda: a.x.mean((1, 2, 3))


def suspects_of_average_backward(a, e):
    dout = a.dout[:, None, None, :]
    yield (
        "dx",
        "It gives all of dout to one pixel; every pixel has the same part.",
        (lambda: np.where(np.arange(a.x_shape[1] * a.x_shape[2]).reshape(a.x_shape[1], a.x_shape[2], 1) == 0, dout, 0)),
    )
    yield "dx", "It has axes of length 1: broadcast it to x_shape.", lambda: dout / (a.x_shape[1] * a.x_shape[2])


def pixels_in(a):
    return {"H W": a.x_shape[1] * a.x_shape[2], "H": a.x_shape[1], "W": a.x_shape[2], "N": a.x_shape[0]}


def cases_of_max_pool(rng):
    for shape, kernel_size, stride, ties in (
        ((2, 5, 7, 3), (2, 2), 2, False),
        ((2, 6, 5, 2), (3, 2), 1, False),
        ((1, 7, 7, 1), (3, 3), 2, False),
        ((2, 6, 6, 2), (2, 2), 1, True),
    ):
        x = rng.standard_normal(shape) - 1.5  # windows of negative numbers are among them
        x = np.round(x) if ties else x  # several pixels of a window are the largest, as after a ReLU
        out = reference().max_pool2d_forward(x, kernel_size, stride)
        dout = rng.standard_normal(out.shape)
        yield {"x": x, "kernel_size": kernel_size, "stride": stride, "out": out, "dout": dout, "kink": ties}


def taps(a):
    for h in range(a.kernel_size[0]):
        for w in range(a.kernel_size[1]):
            yield pixels_of_tap(h, w, a.x.shape, a.kernel_size, a.stride)


def suspects_of_max_pool(a, e):
    yield "out", "It begins with 0, so windows of negative numbers come out as 0.", lambda: np.maximum(e, 0)
    yield "out", "It is the average of the window.", lambda: np.mean([a.x[pixels] for pixels in taps(a)], axis=0)
    yield "out", "It is the smallest pixel.", lambda: np.min([a.x[pixels] for pixels in taps(a)], axis=0)
    yield (
        "out",
        "The maximum is taken over the channels as well.",
        lambda: np.broadcast_to(e.max(-1, keepdims=True), e.shape),
    )
    yield "out", "The stride is not used.", lambda: reference().max_pool2d_forward(a.x, a.kernel_size, 1)


def suspects_of_max_pool_backward(a, e):
    def assigned():
        dx = np.zeros_like(a.x)
        for pixels in taps(a):
            dx[pixels] = a.dout * (a.x[pixels] == a.out)
        return dx

    def to_each_largest():
        dx = np.zeros_like(a.x)
        for pixels in taps(a):
            dx[pixels] += a.dout * (a.x[pixels] == a.out)
        return dx

    def shared():
        dx, count = np.zeros_like(a.x), sum(a.x[pixels] == a.out for pixels in taps(a))
        for pixels in taps(a):
            dx[pixels] += a.dout / count * (a.x[pixels] == a.out)
        return dx

    def to_the_last():
        dx, waiting = np.zeros_like(a.x), np.ones(a.out.shape, bool)
        for pixels in reversed(list(taps(a))):
            largest = (a.x[pixels] == a.out) & waiting
            dx[pixels] += a.dout * largest
            waiting ^= largest
        return dx

    yield "dx", "Of several largest pixels in a window each gets dout; the first alone should.", to_each_largest
    sentence = "dout is shared among several largest pixels: as right, but here, as in PyTorch, the first gets all."
    yield "dx", sentence, shared
    yield "dx", "Of several largest pixels the last gets dout; here, as in PyTorch, the first does.", to_the_last

    def assigned_where_largest():
        dx = np.zeros_like(a.x)
        for n, i, j, c in np.ndindex(a.out.shape):
            window = a.x[n, i * a.stride :, j * a.stride :, c][: a.kernel_size[0], : a.kernel_size[1]]
            h, w = np.unravel_index(np.argmax(window), window.shape)
            dx[n, i * a.stride + h, j * a.stride + w, c] = a.dout[n, i, j, c]
        return dx

    def to_all(scale=1.0):
        dx = np.zeros_like(a.x)
        for pixels in taps(a):
            dx[pixels] += a.dout * scale
        return dx

    sentence = "Windows overlap: add (+=) what each window gives to a pixel; = keeps that of the last."
    yield "dx", sentence, assigned
    yield "dx", sentence, assigned_where_largest
    yield "dx", "Every pixel of the window gets dout; only the largest one influences the output.", to_all
    yield (
        "dx",
        "dout is shared out among all pixels of the window, as for an average.",
        (lambda: to_all(1 / math.prod(a.kernel_size))),
    )
    yield (
        "dx",
        "It is the mask alone, without dout.",
        (lambda: reference().max_pool2d_backward(np.ones_like(a.dout), a.x, a.out, a.kernel_size, a.stride)),
    )


GEOMETRIES = (  # shape of x, window, O, stride, padding
    ((2, 5, 4, 3), (3, 3), 4, 1, 1),
    ((3, 6, 5, 2), (3, 3), 5, 2, 1),
    ((1, 4, 5, 2), (2, 3), 3, 1, 0),
    ((2, 5, 5, 3), (1, 1), 2, 2, 0),
)


def cases_of_columns(rng):
    for shape, kernel_size, _, stride, padding in GEOMETRIES:
        x = rng.standard_normal(shape)
        columns = rng.standard_normal(reference().im2col(x, kernel_size, stride, padding).shape)
        yield dict(x=x, x_shape=shape, kernel_size=kernel_size, stride=stride, padding=padding, columns=columns)


def suspects_of_im2col(a, e):
    N, oh, ow, _ = e.shape
    (kh, kw), C = a.kernel_size, a.x.shape[3]
    parts = e.reshape(N, oh, ow, kh, kw, C)
    yield (
        "columns",
        "The order within a row is (c, h, w); it should be (h, w, c), channels last.",
        (lambda: parts.transpose(0, 1, 2, 5, 3, 4).reshape(e.shape)),
    )
    yield (
        "columns",
        "The order within a row is (w, h, c); it should be (h, w, c).",
        (lambda: parts.transpose(0, 1, 2, 4, 3, 5).reshape(e.shape)),
    )
    yield (
        "columns",
        "The window is turned round: tap (0, 0) is its top left.",
        (lambda: parts[:, :, :, ::-1, ::-1].reshape(e.shape)),
    )
    yield (
        "columns",
        "The padding repeats the border; it should be zeros.",
        lambda: reference().im2col(
            np.pad(a.x, ((0, 0), (a.padding,) * 2, (a.padding,) * 2, (0, 0)), mode="edge"), a.kernel_size, a.stride, 0
        ),
    )
    yield "columns", "The stride is not used.", lambda: reference().im2col(a.x, a.kernel_size, 1, a.padding)
    yield "columns", "The padding is not used.", lambda: reference().im2col(a.x, a.kernel_size, a.stride, 0)
    yield "columns", "The taps have axes of their own: reshape to (N, oh, ow, kh*kw*C) at the end.", lambda: parts


def scatter(a, write):
    """col2im that ends with the padding cut off, with another way to write."""
    (N, H, W, C), (kh, kw), p = a.x_shape, a.kernel_size, a.padding
    windows = a.columns.reshape(*a.columns.shape[:3], kh, kw, C)
    padded = np.zeros((N, H + 2 * p, W + 2 * p, C))
    for h in range(kh):
        for w in range(kw):
            pixels = pixels_of_tap(h, w, padded.shape, a.kernel_size, a.stride)
            padded[pixels] = write(padded[pixels], windows[:, :, :, h, w])
    return padded


def assigned_by_window(a):
    (N, H, W, C), (kh, kw), p, s = a.x_shape, a.kernel_size, a.padding, a.stride
    windows = a.columns.reshape(*a.columns.shape[:3], kh, kw, C)
    padded = np.zeros((N, H + 2 * p, W + 2 * p, C))
    for i, j in np.ndindex(a.columns.shape[1:3]):
        padded[:, i * s : i * s + kh, j * s : j * s + kw] = windows[:, i, j]
    return padded[:, p : p + H, p : p + W]


def suspects_of_col2im(a, e):
    _, H, W, C = a.x_shape
    (kh, kw), p = a.kernel_size, a.padding
    cut = (slice(None), slice(p, p + H), slice(p, p + W))
    add = np.add
    sentence = "Windows overlap, and what they give to a pixel adds up: it looks like = in place of +=."
    yield "dx", sentence, lambda: scatter(a, lambda old, new: new)[cut]
    yield "dx", sentence, lambda: assigned_by_window(a)
    yield "dx", "The padding is not cut off: its pixels are no pixels of x.", lambda: scatter(a, add)
    sentence = "Without padding, padding:-padding is 0:0, which is nothing: write padding : padding + H."
    yield "dx", sentence, lambda: scatter(a, add)[:, p:-p, p:-p]
    yield (
        "dx",
        "The padding is cut off at one side only: rows padding to padding + H are those of x.",
        (lambda: scatter(a, add)[:, :H, :W]),
    )
    yield (
        "dx",
        "It is averaged over the windows that show a pixel; it should be the sum.",
        (lambda: e / np.maximum(reference().col2im(np.ones_like(a.columns), a.x_shape, a.kernel_size, a.stride, p), 1)),
    )
    shuffled = a.columns.reshape(*a.columns.shape[:3], C, kh, kw).transpose(0, 1, 2, 4, 5, 3)
    yield (
        "dx",
        "The entries of a row are read in the order (c, h, w); they lie as (h, w, c).",
        (lambda: reference().col2im(shuffled.reshape(a.columns.shape), a.x_shape, a.kernel_size, a.stride, p)),
    )
    yield (
        "dx",
        "Taps are turned round: tap (0, 0) is the window's top left.",
        (
            lambda: reference().col2im(
                a.columns.reshape(*a.columns.shape[:3], kh, kw, C)[:, :, :, ::-1, ::-1].reshape(a.columns.shape),
                a.x_shape,
                a.kernel_size,
                a.stride,
                p,
            )
        ),
    )


def cases_of_conv(rng):
    needs = itertools.cycle(((True, True), (True, True), (False, True), (True, False)))
    for shape, kernel_size, O, stride, padding in GEOMETRIES:
        x, weight = rng.standard_normal(shape), rng.standard_normal((*kernel_size, shape[3], O))
        out = reference().columns_conv2d_forward(x, weight, stride, padding)
        bias, dout = rng.standard_normal(O), rng.standard_normal(out.shape)
        need_dx, need_dbias = next(needs)
        case = {"x": x, "weight": weight, "bias": bias if need_dbias else None, "stride": stride, "padding": padding}
        yield {**case, "dout": dout, "need_dx": need_dx, "need_dbias": need_dbias}


def suspects_of_conv(a, e):
    solved = reference().columns_conv2d_forward
    O = a.weight.shape[3]
    yield "out", "The bias is missing.", lambda: solved(a.x, a.weight, a.stride, a.padding)
    bias = 0 if a.bias is None else a.bias
    for extra in (0, bias):
        yield (
            "out",
            "The window is turned by 180 degrees: the field's convolution does not turn it.",
            (lambda extra=extra: solved(a.x, a.weight[::-1, ::-1], a.stride, a.padding) + extra),
        )
        yield (
            "out",
            "The weights are read in the order (O, kh, kw, C); they lie as (kh, kw, C, O).",
            (
                lambda extra=extra: (
                    solved(a.x, a.weight.reshape(O, -1).T.reshape(a.weight.shape), a.stride, a.padding) + extra
                )
            ),
        )
        yield "out", "The padding is not used.", lambda extra=extra: solved(a.x, a.weight, a.stride, 0) + extra
        yield "out", "The stride is not used.", lambda extra=extra: solved(a.x, a.weight, 1, a.padding) + extra


def suspects_of_conv_backward(a, e):
    solved = reference().columns_conv2d_backward
    kernel_size = a.weight.shape[:2]
    dweight = solved(a.dout, a.x, a.weight, a.stride, a.padding)[1]
    yield (
        "dx",
        "The window is turned by 180 degrees once too often.",
        (lambda: solved(a.dout, a.x, a.weight[::-1, ::-1], a.stride, a.padding)[0]),
    )
    yield (
        "dx",
        "Windows overlap, and what they give to a pixel adds up: it looks like = in place of +=.",
        (
            lambda: assigned_by_window(
                types.SimpleNamespace(
                    columns=np.einsum("nijo,hwco->nijhwc", a.dout, a.weight).reshape(*a.dout.shape[:3], -1),
                    x_shape=a.x.shape,
                    kernel_size=kernel_size,
                    stride=a.stride,
                    padding=a.padding,
                )
            )
        ),
    )
    yield (
        "dweight",
        "It is that of the last image: the images share the weights, so it adds up (+=, not =).",
        (lambda: solved(a.dout[-1:], a.x[-1:], a.weight, a.stride, a.padding)[1]),
    )
    yield (
        "dweight",
        "It is that of the first image: the images share the weights, so it adds up.",
        (lambda: solved(a.dout[:1], a.x[:1], a.weight, a.stride, a.padding)[1]),
    )
    yield "dweight", "The window is turned by 180 degrees.", lambda: dweight[::-1, ::-1]
    yield (
        "dweight",
        "It has the shape of the columns' product, (kh*kw*C, O): reshape it to that of weight.",
        (lambda: dweight.reshape(-1, dweight.shape[-1])),
    )
    columns = reference().im2col(a.x, kernel_size, a.stride, a.padding)
    yield (
        "dweight",
        "dout is reshaped to (O, ...), which mixes its numbers: transpose, do not reshape.",
        (
            lambda: (a.dout.reshape(a.dout.shape[3], -1) @ columns.reshape(-1, columns.shape[-1])).T.reshape(
                a.weight.shape
            )
        ),
    )
    yield "dbias", "It is summed over the images only: the bias is added at every pixel.", lambda: a.dout.sum(0)
    yield "dbias", "It is averaged over the pixels.", lambda: a.dout.mean((1, 2)).sum(0)
    yield (
        "dbias",
        "It is averaged; the bias influences the loss through every pixel, so it is the sum.",
        (lambda: a.dout.mean((0, 1, 2))),
    )
    yield "dbias", "The sum over the images is missing.", lambda: a.dout.sum((1, 2))


def conv_sizes(a):
    N, oh, ow, _ = a.dout.shape
    return {"N": N, "N oh ow": N * oh * ow, "oh ow": oh * ow, "kh kw": math.prod(a.weight.shape[:2])}


def loss_of_conv(ref, a):
    return dot(a.dout, ref.conv2d_forward(a.x, a.weight, a.bias, a.stride, a.padding))


def loss_of_columns_conv(ref, a):
    return dot(a.dout, ref.columns_conv2d_forward(a.x, a.weight, a.stride, a.padding))


def cases_of_norm(rng):
    for shape, eps in (((3, 2, 3, 4), 1e-5), ((2, 3, 2, 2), 0.3), ((5, 1, 1, 3), 1e-3)):
        C = shape[3]
        x = rng.standard_normal(shape) * [0.5, 2, 1, 3][:C] + [1, -2, 0, 5][:C]
        mean, var = reference().batch_norm_statistics(x)
        dout, weight, bias = rng.standard_normal(shape), rng.uniform(0.5, 2, C), rng.standard_normal(C)
        dweight, dbias = reference().batch_norm_backward_sums(dout, x, mean, var, eps)
        case = {"x": x, "weight": weight, "bias": bias, "mean": mean, "var": var, "eps": eps}
        yield {**case, "dout": dout, "dweight": dweight, "dbias": dbias, "M": x.size // C}


def cases_of_statistics(rng):
    yield from cases_of_norm(rng)
    yield {"x": rng.standard_normal((2, 4, 5, 3)) + np.array([1000, -500, 2000])}  # float32 keeps 7 digits


def suspects_of_statistics(a, e):
    M = a.x.size // a.x.shape[3]
    yield (
        "mean",
        "It is a mean for each pixel, over the images alone: a channel has one, over images and pixels.",
        (lambda: a.x.mean(0)),
    )
    yield "mean", "It is a mean for each image: a channel has one for the whole batch.", lambda: a.x.mean((1, 2))
    yield (
        "var",
        "It is divided by M - 1, the unbiased variance; to normalise, M is right.",
        (lambda: a.x.var((0, 1, 2)) * M / (M - 1)),
    )
    yield "var", "It is the standard deviation: the variance is its square.", lambda: a.x.std((0, 1, 2))
    yield "var", "It is a variance for each pixel, over the images alone.", lambda: a.x.var(0)
    yield "var", "It is the mean of x^2: the mean has to be subtracted first.", lambda: (a.x**2).mean((0, 1, 2))
    yield "var", "The mean of x - mean is 0; it should be squared before.", lambda: 0 * e


def normed(a):
    return (a.x - a.mean) / np.sqrt(a.var + a.eps)


def suspects_of_norm(a, e):
    yield "out", "eps is missing.", lambda: (a.x - a.mean) / np.sqrt(a.var) * a.weight + a.bias
    yield (
        "out",
        "eps is added to the standard deviation; it belongs under the root, to the variance.",
        (lambda: (a.x - a.mean) / (np.sqrt(a.var) + a.eps) * a.weight + a.bias),
    )
    yield (
        "out",
        "It is divided by the variance: the root is missing.",
        (lambda: (a.x - a.mean) / (a.var + a.eps) * a.weight + a.bias),
    )
    yield "out", "weight and bias are missing.", lambda: normed(a)
    yield "out", "The bias is missing.", lambda: normed(a) * a.weight
    yield "out", "The weight is missing.", lambda: normed(a) + a.bias
    yield "out", "The mean is not subtracted.", lambda: a.x / np.sqrt(a.var + a.eps) * a.weight + a.bias
    yield (
        "out",
        "The bias is multiplied by the weight, too: x_hat weight + bias.",
        lambda: (normed(a) + a.bias) * a.weight,
    )
    yield (
        "out",
        "The batch's own mean and variance are used; mean and var are given (in evaluation they differ).",
        (lambda: (a.x - a.x.mean((0, 1, 2))) / np.sqrt(a.x.var((0, 1, 2)) + a.eps) * a.weight + a.bias),
    )


def cases_of_norm_forward(rng):
    yield from cases_of_norm(rng)
    case = next(cases_of_norm(rng))
    yield {**case, "mean": case["mean"] + 0.5, "var": case["var"] * 2}  # running statistics


def suspects_of_norm_sums(a, e):
    total = (0, 1, 2)
    yield (
        "dweight",
        "It is sum dout x; weight is multiplied by x_hat, the normalised x.",
        lambda: (a.dout * a.x).sum(total),
    )
    yield (
        "dweight",
        "It is sum dout (x - mean): the division by the standard deviation is missing.",
        (lambda: (a.dout * (a.x - a.mean)).sum(total)),
    )
    yield (
        "dweight",
        "It is the sum of dout, which is dbias: are the two exchanged, or is x_hat missing?",
        (lambda: a.dout.sum(total)),
    )
    yield "dweight", "It is summed over the images only.", lambda: (a.dout * normed(a)).sum(0)
    yield "dweight", "eps is missing.", lambda: (a.dout * (a.x - a.mean) / np.sqrt(a.var)).sum(total)
    yield "dbias", "It is summed over the images only: the bias is added at every pixel.", lambda: a.dout.sum(0)


def suspects_of_norm_backward(a, e):
    M, x_hat, rstd = a.M, normed(a), 1 / np.sqrt(a.var + a.eps)
    scale = a.weight * rstd
    through_mean, through_var = a.dbias / M, x_hat * a.dweight / M
    yield (
        "dx",
        ("The terms through mean and variance are missing: both depend on every x, they are no constants."),
        lambda: a.dout * scale,
    )
    yield (
        "dx",
        "The term through the mean is missing: an x also moves the mean that is subtracted from all (dbias).",
        (lambda: (a.dout - through_var) * scale),
    )
    yield (
        "dx",
        "The term through the variance is missing: an x also moves what all are divided by (x_hat dweight).",
        (lambda: (a.dout - through_mean) * scale),
    )
    yield "dx", "weight is missing.", lambda: e / a.weight
    yield "dx", "1 / sqrt(var + eps) is missing.", lambda: e / rstd
    yield (
        "dx",
        "eps is missing.",
        lambda: (a.dout - through_mean - (a.x - a.mean) / np.sqrt(a.var) * a.dweight / M) * a.weight / np.sqrt(a.var),
    )
    yield (
        "dx",
        "The two terms are added; they should be subtracted.",
        (lambda: (a.dout + through_mean + through_var) * scale),
    )
    yield (
        "dx",
        "In the term through the variance stands x - mean; it should be x_hat.",
        (lambda: (a.dout - through_mean - (a.x - a.mean) * a.dweight / M) * scale),
    )
    N = len(a.x)
    yield (
        "dx",
        "The sums are divided by N; a channel has M = N H W rows.",
        (lambda: (a.dout - a.dbias / N - x_hat * a.dweight / N) * scale),
    )
    yield "dx", "The sums are not divided by M = N H W.", lambda: (a.dout - a.dbias - x_hat * a.dweight) * scale
    yield (
        "dx",
        "It divides by M - 1 where M belongs.",
        (lambda: (a.dout - a.dbias / (M - 1) - x_hat * a.dweight / (M - 1)) * scale),
    )


def loss_of_norm(ref, a):
    mean, var = ref.batch_norm_statistics(a.x)  # they move with x
    return dot(a.dout, ref.batch_norm_forward(a.x, a.weight, a.bias, mean, var, a.eps))


def norm_sizes(a):
    return {"M": a.M, "N": len(a.x)} if "M" in vars(a) else {}


def cases_of_running(rng):
    for M, momentum in ((10, 0.1), (3, 0.3)):
        C = 4
        case = {"running_mean": rng.standard_normal(C), "running_var": rng.uniform(1, 2, C)}
        yield {**case, "mean": rng.standard_normal(C), "var": rng.uniform(3, 4, C), "momentum": momentum, "M": M}


def suspects_of_running(a, e):
    new = a.var * a.M / (a.M - 1)
    k = a.momentum
    swapped = (
        "momentum is the weight of the new batch, here it is that of the old: 1 - momentum and momentum exchanged."
    )
    yield "running_mean", swapped, lambda: k * a.running_mean + (1 - k) * a.mean
    yield "running_var", swapped, lambda: k * a.running_var + (1 - k) * new
    yield "running_mean", "It is the batch's; the running one moves only a little.", lambda: a.mean
    yield "running_mean", "The old value is not scaled by 1 - momentum.", lambda: a.running_mean + k * a.mean
    yield (
        "running_var",
        "The batch's variance should be made unbiased: times M / (M - 1).",
        (lambda: (1 - k) * a.running_var + k * a.var),
    )
    yield (
        "running_var",
        "M / (M - 1) is the wrong way round.",
        (lambda: (1 - k) * a.running_var + k * a.var * (a.M - 1) / a.M),
    )
    yield (
        "running_var",
        "It has not changed: `running_var = ...` makes a new array; write into the one given.",
        a.running_var,
    )
    yield "running_mean", "It has not changed: `running_mean = ...` makes a new array; write into it.", a.running_mean


def cases_of_sgd(rng):
    shape = (3, 4)
    param, grad, velocity = rng.standard_normal((3, *shape))
    case = {"param": param, "grad": grad, "velocity": velocity, "lr": 0.1}
    yield {**case, "velocity": None}
    yield {**case, "momentum": 0.9}
    yield {**case, "momentum": 0.9, "nesterov": True}
    yield {**case, "momentum": 0.5, "weight_decay": 0.03}
    yield {**case, "momentum": 0.5, "weight_decay": 0.03, "grad_scale": 0.25}
    yield {**case, "velocity": None, "weight_decay": 0.03, "grad_scale": 0.25}
    yield {**case, "momentum": 0.5, "nesterov": True, "weight_decay": 0.03, "grad_scale": 0.25}


def suspects_of_sgd(a, e):
    k, decay, scale = (getattr(a, n, 0.0) for n in ("momentum", "weight_decay", "grad_scale"))
    scale = scale or 1.0
    nesterov = getattr(a, "nesterov", False)
    g = scale * a.grad + decay * a.param
    old = 0.0 if a.velocity is None else a.velocity

    def step(g, moved, plain=0.0):
        return a.param - a.lr * (g + k * moved if nesterov else moved) - plain

    yield "param", "The step goes up the gradient: subtract it.", lambda: 2 * a.param - e
    if decay:
        yield "param", "weight_decay is not used.", lambda: step(scale * a.grad, k * old + scale * a.grad)
        yield (
            "param",
            "weight_decay has the wrong sign: it is added to the gradient, and so shrinks the weights.",
            (lambda: step(g, k * old + scale * a.grad - decay * a.param)),
        )
        decoupled = "weight_decay bypasses the velocity; here it is part of g, from the beginning."
        yield "param", decoupled, lambda: step(g, k * old + scale * a.grad, a.lr * decay * a.param)
        yield (
            "param",
            "grad_scale should multiply the gradient alone, before weight_decay is added.",
            (lambda: step(g, k * old + scale * (a.grad + decay * a.param))),
        )
        yield "velocity", "weight_decay is not used in the velocity.", lambda: k * old + scale * a.grad
    if scale != 1:
        yield "param", "grad_scale is not used.", (lambda: step(a.grad, k * old + a.grad + decay * a.param))
    if k:
        yield "param", "The step is taken along the gradient: momentum is not used.", lambda: a.param - a.lr * g
        averaged = "velocity is the running average, (1 - momentum) g; here g is added whole."
        yield "param", averaged, lambda: step(g, k * a.velocity + (1 - k) * g)
        yield "velocity", averaged, lambda: k * a.velocity + (1 - k) * g
        early = "lr is in the velocity; here it scales the velocity when it is used."
        yield "param", early, lambda: a.param - (k * a.velocity + a.lr * g)
        yield "velocity", early, lambda: k * a.velocity + a.lr * g
        yield "velocity", "The velocity is not decayed by momentum.", lambda: a.velocity + g
        yield "velocity", "velocity has not changed: write into it (velocity *= ..., +=).", lambda: a.velocity
        yield "param", "The step uses the old velocity.", lambda: a.param - a.lr * a.velocity
        yield "param", "The velocity is not decayed by momentum.", lambda: step(g, a.velocity + g)
        if nesterov:
            yield (
                "param",
                "nesterov is not used: the step is lr times the velocity.",
                (lambda: a.param - a.lr * (k * a.velocity + g)),
            )
            yield (
                "param",
                "Nesterov's step is g + momentum velocity, with the velocity after its update.",
                (lambda: a.param - a.lr * (g + k * a.velocity)),
            )


def cases_of_adam(rng):
    param, grad, m = rng.standard_normal((3, 3, 4))
    v = rng.uniform(0.5, 1.5, (3, 4))
    case = {"param": param, "grad": grad, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    yield {**case, "m": 0 * m, "v": 0 * v, "step": 1}
    yield {**case, "m": m, "v": v, "step": 4, "eps": 0.1}
    yield {**case, "m": m, "v": v, "step": 3, "weight_decay": 0.2}
    yield {**case, "m": m, "v": v, "step": 3, "weight_decay": 0.2, "grad_scale": 0.25}


def suspects_of_adam(a, e):
    (b1, b2), t = a.betas, a.step
    decay, scale = getattr(a, "weight_decay", 0.0), getattr(a, "grad_scale", 1.0)
    g = scale * a.grad + decay * a.param

    def step(m, v, c1=1 - b1**t, c2=1 - b2**t, root=lambda v: np.sqrt(v) + a.eps):
        return a.param - a.lr * (m / c1) / root(v / c2)

    def moments(g):
        return b1 * a.m + (1 - b1) * g, b2 * a.v + (1 - b2) * g * g

    m, v = moments(g)
    yield "param", "The step goes up the gradient: subtract it.", lambda: 2 * a.param - e
    yield (
        "param",
        "The correction of m and v, which start at 0, is missing: m / (1 - beta1^step), v / (1 - beta2^step).",
        (lambda: step(m, v, 1, 1)),
    )
    yield (
        "param",
        "The correction lacks its power: 1 - beta1**step and 1 - beta2**step, not 1 - beta.",
        (lambda: step(m, v, 1 - b1, 1 - b2)),
    )
    yield "param", "Only m is corrected.", lambda: step(m, v, c2=1)
    yield "param", "Only v is corrected.", lambda: step(m, v, c1=1)
    yield (
        "param",
        "step is counted one too high: it is 1 at the first update.",
        (lambda: step(m, v, 1 - b1 ** (t + 1), 1 - b2 ** (t + 1))),
    )
    yield "param", "The root is missing: the step is divided by v_hat.", lambda: step(m, v, root=lambda v: v + a.eps)
    yield (
        "param",
        "eps stands under the root; it is added to the root.",
        (lambda: step(m, v, root=lambda v: np.sqrt(v + a.eps))),
    )
    yield "param", "eps is missing.", lambda: step(m, v, root=np.sqrt)
    yield "param", "The step is taken with g in place of m.", lambda: step(g, v, c1=1)
    yield "v", "The gradient is not squared.", lambda: b2 * a.v + (1 - b2) * g
    yield "v", "1 - beta2 is squared with the gradient.", lambda: b2 * a.v + ((1 - b2) * g) ** 2
    yield "v", "The square of m is averaged; it should be that of g.", lambda: b2 * a.v + (1 - b2) * m * m
    swapped = "beta and 1 - beta are exchanged."
    yield "m", swapped, lambda: (1 - b1) * a.m + b1 * g
    yield "v", swapped, lambda: (1 - b2) * a.v + b2 * g * g
    yield "m", "1 - beta1 is missing.", lambda: b1 * a.m + g
    yield "m", "m should keep the uncorrected average.", lambda: m / (1 - b1**t)
    yield "v", "v should keep the uncorrected average.", lambda: v / (1 - b2**t)
    for name in ("m", "v"):
        yield (
            name,
            f"{name} has not changed: `{name} = ...` makes a new array; write into the one given.",
            getattr(a, name),
        )
    if decay:
        for name, value in zip(("m", "v"), moments(scale * a.grad), strict=True):
            yield name, "weight_decay is not used in the gradient that m and v average.", value
    if scale != 1:
        for name, value in zip(("m", "v"), moments(a.grad + decay * a.param), strict=True):
            yield name, "grad_scale is not used.", value


def cases_of_cosine(rng):
    for end in (0.0, 0.03):
        for step, steps in ((0, 10), (3, 10), (10, 10), (7, 21)):
            yield {"step": step, "steps": steps, "start": 0.2, "end": end}


def suspects_of_cosine(a, e):
    part = a.step / a.steps
    down = (1 + math.cos(math.pi * part)) / 2
    yield "rate", "end is not used.", a.start * down
    yield "rate", "end is added to all of it: at step 0 the rate should be start.", a.end + a.start * down
    yield "rate", "It goes below 0: 1 + cos goes from 2 to 0.", a.start * math.cos(math.pi * part)
    yield (
        "rate",
        "It goes beyond end: 1 + cos goes from 2 to 0.",
        (a.end + (a.start - a.end) * math.cos(math.pi * part)),
    )
    yield "rate", "It is twice too large: 1 + cos goes from 2 to 0.", a.end + (a.start - a.end) * 2 * down
    yield "rate", "It is a straight line.", a.end + (a.start - a.end) * (1 - part)
    yield "rate", "pi is missing: cos takes radians.", a.end + (a.start - a.end) * (1 + math.cos(part)) / 2
    yield (
        "rate",
        "It is a whole cosine: by the last step it should have gone half a period, pi.",
        (a.end + (a.start - a.end) * (1 + math.cos(2 * math.pi * part)) / 2),
    )
    yield "rate", "It goes the other way: start and end are exchanged.", a.start + (a.end - a.start) * down


def linear_sizes(a):
    return {"N": len(a.dout), "K": a.dout.shape[1], "D": a.x.shape[1]}


def softmax_sizes(a):
    N, K = a.logits.shape
    return {"N": N, "K": K, "N K": N * K}


KERNELS = {
    "linear_forward": Check("out", cases_of_linear, suspects_of_linear, linear_sizes),
    "linear_backward": Check(
        "dx dweight dbias",
        cases_of_linear,
        suspects_of_linear_backward,
        linear_sizes,
        lambda ref, a: dot(a.dout, ref.linear_forward(a.x, a.weight, a.bias)),
        "x weight bias",
    ),
    "relu_forward": Check("out", cases_of_relu, suspects_of_relu),
    "relu_backward": Check(
        "dx",
        cases_of_relu,
        suspects_of_relu_backward,
        loss=lambda ref, a: dot(a.dout, ref.relu_forward(a.x)),
        of="x",
    ),
    "softmax_cross_entropy_forward": Check(
        "loss probabilities",
        cases_of_softmax,
        suspects_of_softmax,
        softmax_sizes,
        overflow="exp overflows, or its sum is 0: subtract the largest logit of each row (its own, not one for all) "
        "before exp, and do not take the log of a probability, which may be 0.",
    ),
    "softmax_cross_entropy_backward": Check(
        "dlogits",
        cases_of_softmax,
        suspects_of_softmax_backward,
        softmax_sizes,
        lambda ref, a: a.dloss * ref.softmax_cross_entropy_forward(a.logits, a.labels, a.label_smoothing)[0],
        "logits",
    ),
    "global_avg_pool2d_forward": Check("out", cases_of_average, suspects_of_average, pixels_in),
    "global_avg_pool2d_backward": Check(
        "dx",
        cases_of_average,
        suspects_of_average_backward,
        pixels_in,
        lambda ref, a: dot(a.dout, ref.global_avg_pool2d_forward(a.x)),
        "x",
    ),
    "max_pool2d_forward": Check("out", cases_of_max_pool, suspects_of_max_pool),
    "max_pool2d_backward": Check(
        "dx",
        cases_of_max_pool,
        suspects_of_max_pool_backward,
        loss=lambda ref, a: dot(a.dout, ref.max_pool2d_forward(a.x, a.kernel_size, a.stride)),
        of="x",
    ),
    "im2col": Check("columns", cases_of_columns, suspects_of_im2col),
    "col2im": Check(
        "dx",
        cases_of_columns,
        suspects_of_col2im,
        loss=lambda ref, a: dot(a.columns, ref.im2col(a.x, a.kernel_size, a.stride, a.padding)),
        of="x",
    ),
    "columns_conv2d_forward": Check("out", cases_of_conv, suspects_of_conv, conv_sizes),
    "columns_conv2d_backward": Check(
        "dx dweight", cases_of_conv, suspects_of_conv_backward, conv_sizes, loss_of_columns_conv, "x weight"
    ),
    "conv2d_forward": Check("out", cases_of_conv, suspects_of_conv, conv_sizes),
    "conv2d_backward": Check(
        "dx dweight dbias", cases_of_conv, suspects_of_conv_backward, conv_sizes, loss_of_conv, "x weight bias"
    ),
    "batch_norm_statistics": Check("mean var", cases_of_statistics, suspects_of_statistics, norm_sizes),
    "batch_norm_forward": Check("out", cases_of_norm_forward, suspects_of_norm),
    "batch_norm_backward_sums": Check(
        "dweight dbias", cases_of_norm, suspects_of_norm_sums, norm_sizes, loss_of_norm, "weight bias"
    ),
    "batch_norm_backward": Check("dx", cases_of_norm, suspects_of_norm_backward, norm_sizes, loss_of_norm, "x"),
    "update_running_statistics": Check(
        "running_mean running_var", cases_of_running, suspects_of_running, writes="running_mean running_var"
    ),
    "sgd_update": Check("param velocity", cases_of_sgd, suspects_of_sgd, writes="param velocity"),
    "adam_update": Check("m v param", cases_of_adam, suspects_of_adam, writes="param m v"),
    "half_cosine": Check("rate", cases_of_cosine, suspects_of_cosine),
}
