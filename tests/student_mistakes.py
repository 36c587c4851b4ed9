"""What students get wrong in the exercises, with words of the sentence that must say so; and what is right anyway.

A mistake is a change in minires's own solution, or another body for the function. The only solutions that stand here
are those that look different from minires's.
"""

import textwrap
import typing

from course import source


class Planted(typing.NamedTuple):
    """A mistake: words that its sentence must have; either a new body, or a change (old, new) of the solution."""

    name: str
    words: str
    body: str = ""
    change: tuple = ()

    def text(self):
        if self.body:
            return with_body(self.name, self.body)
        code, (old, new) = source.piece(self.name).code, self.change
        whole = self.name in ("BasicBlock", "SGD_CUDA")
        solution = source.piece(self.name).solution if whole else with_body(self.name, code)
        assert solution.count(old) == 1, (self.name, old)
        return solution.replace(old, new)


def with_body(name, body):
    """The exercise's signature with another body; of the CUDA kernel, too."""
    blank = source.piece(name).blank
    to_do = source.TO_DO if source.TO_DO in blank else "// to do"
    assert blank.count(to_do) == 1
    return blank.replace(to_do, textwrap.indent(textwrap.dedent(body).strip(), "    ").strip())


# fmt: off
MISTAKES = [
    Planted("linear_forward", "The bias is missing", "return x @ weight"),
    Planted("linear_forward", "called with x (3, 3), weight (3, 3), bias=None", "return x @ weight + bias"),
    Planted("linear_backward", "N = 4 times too small: you took the mean where the sum belongs", change=(
        "dweight = x.T @ dout", "dweight = x.T @ dout / len(x)")),
    Planted("linear_backward", "transposed", change=("dweight = x.T @ dout", "dweight = dout.T @ x")),
    Planted("linear_backward", "sum over the rows is missing", change=("sum_over_rows(dout)", "dout")),
    Planted("linear_backward", "summed over the outputs", change=("sum_over_rows(dout)", "dout.sum(axis=1)")),
    Planted("linear_backward", "dout, is missing", change=(
        "sum_over_rows(dout)", "np.ones_like(dout).sum(axis=0)")),
    Planted("linear_backward", "matmul", change=("dout @ weight.T", "dout @ weight")),
    Planted("linear_backward", "writes to dout", "dout *= 1.5\nreturn dout @ weight.T, x.T @ dout, dout.sum(axis=0)"),
    Planted("linear_backward", "should return 3 results", "return dout @ weight.T, x.T @ dout"),
    Planted("relu_forward", "|x|", "return np.abs(x)"),
    Planted("relu_forward", "np.maximum compares", "return np.max(x, 0)"),
    Planted("relu_forward", "writes to x", "x[x < 0] = 0\nreturn x"),
    Planted("relu_backward", "the mask is missing", "return dout.copy()"),
    Planted("relu_backward", "sign of dout", "return dout * (dout > 0)"),
    Planted("relu_backward", "writes to dout", "dout[out <= 0] = 0\nreturn dout"),
    Planted("relu_backward", "without dout", "return (out > 0).astype(dout.dtype)"),
    Planted("softmax_cross_entropy_forward", "subtract the largest logit of each row", change=(
        "logits - logits.max(axis=1, keepdims=True)", "logits")),
    Planted("softmax_cross_entropy_forward", "its own, not one for all", change=(
        "logits.max(axis=1, keepdims=True)", "logits.max()")),
    Planted("softmax_cross_entropy_forward", "do not take the log of a probability", """
        exp = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = exp / exp.sum(axis=1, keepdims=True)
        log_p = np.log(probabilities)
        loss = -log_p[np.arange(len(labels)), labels].mean() * (1 - label_smoothing)
        if label_smoothing:
            loss -= label_smoothing * log_p.mean()
        return loss, probabilities"""),
    Planted("softmax_cross_entropy_forward", "wrong axis", change=(
        "exp.sum(axis=1, keepdims=True)", "exp.sum(axis=0, keepdims=True)")),
    Planted("softmax_cross_entropy_forward", "sign is the other way round", change=("loss = -log", "loss = log")),
    Planted("softmax_cross_entropy_forward", "N = 5 times too large: you summed where the mean was taken", change=(
        "labels].mean()", "labels].sum()")),
    Planted("softmax_cross_entropy_forward", "label_smoothing is not used", change=(
        "* (1 - label_smoothing)\n    if label_smoothing:", "\n    if False:")),
    Planted("softmax_cross_entropy_backward", "1 / N is missing", change=("(dloss / N)", "dloss")),
    Planted("softmax_cross_entropy_backward", "dloss is not used", change=("(dloss / N)", "(1 / N)")),
    Planted("softmax_cross_entropy_backward", "target is not subtracted", "return dloss / len(labels) * probabilities"),
    Planted("softmax_cross_entropy_backward", "writes to probabilities", """
        probabilities[np.arange(len(labels)), labels] -= 1
        return probabilities * dloss / len(labels)"""),
    Planted("softmax_cross_entropy_backward", "only the label's", change=(
        "dlogits[xp.arange(N), labels] -= 1 - label_smoothing", "dlogits -= 1")),
    Planted("dropout_mask", "p and 1 - p are exchanged", change=("words >= int(p", "words < int(p")),
    Planted("dropout_mask", "The scaling is missing", change=(" * (1 / (1 - p))", "")),
    Planted("dropout_mask", "scaled by 1 / p", change=(" * (1 / (1 - p))", " * (1 / p)")),
    Planted("dropout_mask", "between 0 and 2**32", """
        np.random.seed(key + step)
        return (np.random.random(x.shape) >= p).astype(x.dtype) / (1 - p)"""),
    Planted("dropout_mask", "the second time", "return (np.random.random(x.shape) >= p).astype(x.dtype) / (1 - p)"),
    Planted("dropout_mask", "Another step draws the same mask", """
        return (np.random.default_rng(key).random(x.shape) >= p).astype(x.dtype) / (1 - p)"""),
    Planted("dropout_mask", "float64 where float32 is expected", """
        return (np.random.default_rng([key, step]).random(x.shape) >= p) / np.float64(1 - p)"""),
    Planted("dropout_forward", "scaled twice", "return x * dropout_mask(x, p, key, step) / (1 - p)"),
    Planted("dropout_backward", "another mask than the forward's",
        "return dout * dropout_mask(dout, p, key, step + 1)"),
    Planted("dropout_backward", "dout unchanged", "return dout.copy()"),
    Planted("dropout_backward", "scaled twice", "return dout * dropout_mask(dout, p, key, step) ** 2"),
    Planted("global_avg_pool2d_forward", "H W = 15 times too large", "return x.sum(axis=(1, 2))"),
    Planted("global_avg_pool2d_forward", "over the channels", change=("axis=(1, 2)", "axis=(1, 2, 3)")),
    Planted("global_avg_pool2d_backward", "divide by H W", change=("dout / (H * W)", "dout")),
    Planted("global_avg_pool2d_backward", "axes of length 1",
        "return (dout / (x_shape[1] * x_shape[2]))[:, None, None]"),
    Planted("max_pool2d_forward", "begins with 0", """
        out = 0
        for h in range(kernel_size[0]):
            for w in range(kernel_size[1]):
                out = np.maximum(out, x[pixels_of_tap(h, w, x.shape, kernel_size, stride)])
        return out"""),
    Planted("max_pool2d_backward", "= keeps that of the last", change=("dx[pixels] +=", "dx[pixels] =")),
    Planted("max_pool2d_backward", "the first alone should", change=(" & waiting", "")),
    Planted("max_pool2d_backward", "is shared among", """
        dx, taps = np.zeros_like(x), list(np.ndindex(*kernel_size))
        pixels = [pixels_of_tap(h, w, x.shape, kernel_size, stride) for h, w in taps]
        count = sum(x[p] == out for p in pixels)
        for p in pixels:
            dx[p] += dout / count * (x[p] == out)
        return dx"""),
    Planted("max_pool2d_backward", "the last gets dout", change=(
        "range(kernel_size[0]):\n        for w in range(kernel_size[1]):",
        "reversed(range(kernel_size[0])):\n        for w in reversed(range(kernel_size[1])):")),
    Planted("max_pool2d_backward", "only the largest one", change=("dout * is_largest", "dout")),
    Planted("im2col", "(c, h, w); it should be (h, w, c)", change=("(0, 1, 2, 4, 5, 3)", "(0, 1, 2, 3, 4, 5)")),
    Planted("im2col", "repeats the border", change=("(0, 0)))", "(0, 0)), mode='edge')")),
    Planted("im2col", "The stride is not used", change=("[:, ::stride, ::stride]", "")),
    Planted("col2im", "= in place of +=", change=("] += windows", "] = windows")),
    Planted("col2im", "not cut off", change=("[:, padding : padding + H, padding : padding + W]", "")),
    Planted("col2im", "at one side only", change=("[:, padding : padding + H, padding : padding + W]", "[:, :H, :W]")),
    Planted("col2im", "read in the order (c, h, w)", change=(
        "columns.reshape(N, oh, ow, kh, kw, C)",
        "columns.reshape(N, oh, ow, C, kh, kw).transpose(0, 1, 2, 4, 5, 3)")),
    Planted("columns_conv2d_forward", "turned by 180 degrees", change=(
        "@ weight.reshape", "@ weight[::-1, ::-1].reshape")),
    Planted("columns_conv2d_backward", "turned by 180 degrees", change=(
        "@ weight.reshape", "@ weight[::-1, ::-1].reshape")),
    Planted("columns_conv2d_backward", "dout is reshaped to (O, ...)", change=(
        "(columns.reshape(-1, kh * kw * C).T @ dout_rows)",
        "(dout.reshape(O, -1) @ columns.reshape(-1, kh * kw * C)).T")),
    Planted("columns_conv2d_backward", "should be None", change=("if not need_dx:", "if False:")),
    Planted("columns_conv2d_backward", "N = 2 times too small", change=(
        ".reshape(weight.shape)\n", ".reshape(weight.shape) / len(x)\n")),
    Planted("conv2d_forward", "The bias is missing", change=("out if bias is None else out + bias", "out")),
    Planted("conv2d_forward", "The padding is not used", "return columns_conv2d_forward(x, weight, stride, 0)"),
    Planted("conv2d_backward", "summed over the images only", change=("sum_over_rows(dout)", "dout.sum(axis=0)")),
    Planted("conv2d_backward", "that of the last image", change=("dweight += dweight_part", "dweight = dweight_part")),
    Planted("conv2d_backward", "that of the last image", """
        for image in range(len(x)):
            part = slice(image, image + 1)
            dweight = columns_conv2d_backward(dout[part], x[part], weight, stride, padding)[1]
        dx = columns_conv2d_backward(dout, x, weight, stride, padding)[0] if need_dx else None
        return dx, dweight, sum_over_rows(dout) if need_dbias else None"""),
    Planted("conv2d_backward", "so it is the sum", change=("sum_over_rows(dout)", "dout.mean(axis=(0, 1, 2))")),
    Planted("batch_norm_statistics", "a mean for each pixel", "return x.mean(axis=0), x.var(axis=0)"),
    Planted("batch_norm_statistics", "unbiased variance",
        "return x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2), ddof=1)"),
    Planted("batch_norm_statistics", "standard deviation", "return x.mean(axis=(0, 1, 2)), x.std(axis=(0, 1, 2))"),
    Planted("batch_norm_statistics", "loses digits", """
        mean = x.mean(axis=(0, 1, 2))
        return mean, (x * x).mean(axis=(0, 1, 2)) - mean * mean"""),
    Planted("batch_norm_forward", "under the root", "return (x - mean) / (np.sqrt(var) + eps) * weight + bias"),
    Planted("batch_norm_forward", "the root is missing", "return (x - mean) / (var + eps) * weight + bias"),
    Planted("batch_norm_forward", "mean and var are given", """
        return (x - x.mean(axis=(0, 1, 2))) / np.sqrt(x.var(axis=(0, 1, 2)) + eps) * weight + bias"""),
    Planted("batch_norm_backward_sums", "weight is multiplied by x_hat",
        "return sum_over_rows(dout * x), sum_over_rows(dout)"),
    Planted("batch_norm_backward_sums", "exchanged", change=(
        "return sum_over_rows(dout * x_hat), sum_over_rows(dout)",
        "return sum_over_rows(dout), sum_over_rows(dout * x_hat)")),
    Planted("batch_norm_backward_sums", "M = 18 times too small", change=(
        "sum_over_rows(dout * x_hat)", "(dout * x_hat).mean(axis=(0, 1, 2))")),
    Planted("batch_norm_backward", "The term through the mean is missing", change=(" - dbias / M", "")),
    Planted("batch_norm_backward", "The term through the variance is missing", change=(" - x_hat * (dweight / M)", "")),
    Planted("batch_norm_backward", "no constants", "return dout * weight * rsqrt(var, eps)"),
    Planted("batch_norm_backward", "are not divided by M", change=(
        "dbias / M - x_hat * (dweight / M)", "dbias - x_hat * dweight")),
    Planted("batch_norm_backward", "divided by N", change=("M = x.size // x.shape[-1]", "M = len(x)")),
    Planted("batch_norm_backward", "weight is missing", change=("(weight * rstd)", "rstd")),
    Planted("update_running_statistics", "made unbiased", change=("var * (M / (M - 1))", "var")),
    Planted("update_running_statistics", "exchanged", change=(
        "running *= 1 - momentum\n        running += batch * momentum",
        "running *= momentum\n        running += batch * (1 - momentum)")),
    Planted("update_running_statistics", "makes a new array",
        "running_mean = (1 - momentum) * running_mean + momentum * mean"),
    Planted("BasicBlock", "x went two ways", change=(
        "kernels_for(dx).add(dx, self.shortcut.backward(dshortcut))", "dx")),
    Planted("BasicBlock", "has not masked", change=(
        "        dout, dshortcut = self.bn2.backward(dout)",
        "        dshortcut = dout\n        dout, _ = self.bn2.backward(dout)")),
    Planted("BasicBlock", "The shortcut is missing", change=(
        "return self.bn2(out) if self.shortcut is None else self.bn2(out, self.shortcut(x))", "return self.bn2(out)")),
    Planted("BasicBlock", "comes before", change=(
        "self.bn2(out, self.shortcut(x))", "self.bn2(out) + self.shortcut(x)")),
    Planted("BasicBlock", "writes to dout", change=(
        "    def backward(self, dout):\n", "    def backward(self, dout):\n        dout *= 2\n")),
    Planted("sgd_update", "makes a new array", "param = param - lr * grad"),
    Planted("sgd_update", "weight_decay is not used", """
        if not momentum:
            param -= lr * grad_scale * grad
            return
        g = grad_scale * grad + weight_decay * param
        velocity *= momentum
        velocity += g
        param -= lr * (g + momentum * velocity if nesterov else velocity)"""),
    Planted("sgd_update", "lr is in the velocity", """
        g = grad_scale * grad + weight_decay * param
        if not momentum:
            param -= lr * g
            return
        velocity *= momentum
        velocity += lr * g
        param -= lr * g + momentum * velocity if nesterov else velocity"""),
    Planted("sgd_update", "up the gradient", change=("param -= lr * grad", "param += lr * grad")),
    Planted("sgd_update", "weight_decay has the wrong sign", change=(
        "grad = grad + weight_decay", "grad = grad - weight_decay")),
    Planted("sgd_update", "running average", change=("velocity += grad", "velocity += (1 - momentum) * grad")),
    Planted("sgd_update", "nesterov is not used", change=(
        "grad + momentum * velocity if nesterov else velocity", "velocity")),
    Planted("sgd_update", "grad_scale is not used", change=("if grad_scale != 1:", "if False:")),
    Planted("sgd_update", "writes to grad", change=(
        "grad = grad + weight_decay * param", "grad += weight_decay * param")),
    Planted("adam_update", "lacks its power", change=("    m *= beta1", "    step = 1\n    m *= beta1")),
    Planted("adam_update", "start at 0, is missing", change=("    rms = ", "    step = 1e9\n    rms = ")),
    Planted("adam_update", "under the root", change=(
        "array_module(v).sqrt(v) * (1 / math.sqrt(1 - beta2**step)) + eps", "np.sqrt(v / (1 - beta2**step) + eps)")),
    Planted("adam_update", "not squared", change=("(grad * grad)", "grad")),
    Planted("he_weight", "normal() takes the standard deviation", change=(
        "math.sqrt(2 / (kernel_size**2 * in_channels))", "2 / (kernel_size**2 * in_channels)")),
    Planted("he_weight", "not out_channels", change=("**2 * in_channels", "**2 * out_channels")),
    Planted("he_weight", "The 2 is missing", change=("sqrt(2 /", "sqrt(1 /")),
    Planted("he_weight", "a sixth", change=("sqrt(2 /", "sqrt(1 / 3 /")),
    Planted("he_weight", "kernel_size counts twice", change=("kernel_size**2 *", "kernel_size *")),
    Planted("he_weight", "is float64", change=(".astype(np.float32)", "")),
    Planted("he_weight", "gives the same weights", change=("default_rng(rng)", "default_rng(0)")),
    Planted("half_cosine", "goes below 0", "return start * math.cos(math.pi * step / steps)"),
    Planted("half_cosine", "end is not used", "return start * (1 + math.cos(math.pi * step / steps)) / 2"),
    Planted("half_cosine", "straight line", "return start + (end - start) * step / steps"),
    Planted("cutout", "number start + n", change=(", start=start", "")),
    Planted("cutout", "never reaches beyond", change=(
        "draw_below(H, words[:, 0]) - size // 2, draw_below(W, words[:, 1]) - size // 2",
        "draw_below(H - size + 1, words[:, 0]), draw_below(W - size + 1, words[:, 1])")),
    Planted("cutout", "H and W exchanged", change=("draw_below(H, ", "draw_below(W, ")),
    Planted("cutout", "from the same number", change=("draw_below(W, words[:, 1])", "draw_below(W, words[:, 0])")),
    Planted("cutout", "cut into other batches", """
        out, (N, H, W, _), rng = images.copy(), images.shape, np.random.default_rng([key, epoch])
        rows, cols = (rng.integers(side, size=start + N)[start:] for side in (H, W))
        for n in range(N):
            top, left = rows[n] - size // 2, cols[n] - size // 2
            out[n, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = color
        return out"""),
    Planted("cutout", "and not from their sum", """
        out, (N, H, W, _) = images.copy(), images.shape
        for n in range(N):
            rng = np.random.default_rng(key + epoch + start + n)
            top, left = rng.integers(H) - size // 2, rng.integers(W) - size // 2
            out[n, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = color
        return out"""),
    Planted("cutout", "counts from the end", """
        out, (N, H, W, _) = images.copy(), images.shape
        for n in range(N):
            rng = np.random.default_rng([key, epoch, start + n])
            top, left = rng.integers(H) - size // 2, rng.integers(W) - size // 2
            out[n, top : top + size, left : left + size] = color
        return out"""),
    Planted("cutout", "never reaches beyond", """
        out, (N, H, W, _) = images.copy(), images.shape
        for n in range(N):
            rng = np.random.default_rng([key, epoch, start + n])
            top, left = max(rng.integers(H) - size // 2, 0), max(rng.integers(W) - size // 2, 0)
            out[n, top : top + size, left : left + size] = color
        return out"""),
    Planted("cutout", "draw for each image", change=(
        "random_words(N, key, epoch, CUTOUT_STREAM, xp=xp, start=start)",
        "random_words(1, key, epoch, CUTOUT_STREAM, xp=xp).repeat(N, 0)")),
    Planted("winograd_matrices", "Only signs are wrong", change=(
        "np.array(  # Lavin's B^T: 6 inputs to 6 points", "-np.array(")),
    Planted("winograd_matrices", "y[", change=("[0, 1, -1, 8, -8, 1]", "[0, 1, -1, 8, -8, 0]")),
    Planted("winograd_tile", "element by element, not as matrices", change=("WEIGHT.T * (", "WEIGHT.T @ (")),
    Planted("winograd_tile", "transpose on the right", change=("(INPUT @ x @ INPUT.T)", "(INPUT @ x)")),
]
MISTAKES_IN_CUDA = [
    Planted("SGD_CUDA", "last block has more threads", change=("    if (i >= size) return;\n", "")),
    Planted("SGD_CUDA", "where is blockIdx.x", change=("blockIdx.x * (long long)blockDim.x + ", "")),
    Planted("SGD_CUDA", "nesterov is not used", change=("nesterov ? g + momentum * moved : moved", "moved")),
    Planted("SGD_CUDA", "does not compile: SGD_CUDA:", change=("param[i] -= lr * g;", "param[i] -= lr * g")),
]

DIFFERENT = [  # right, and written otherwise
    ("linear_forward", """
        rows = []
        for row in x:
            total = sum(number * line for number, line in zip(row, weight))
            rows.append(total if bias is None else total + bias)
        return np.array(rows)"""),
    ("linear_backward", """
        return np.einsum("nk,dk->nd", dout, weight), np.einsum("nk,nd->dk", dout, x), np.einsum("nk->k", dout)"""),
    ("relu_forward", "y = x.copy()\ny[y < 0] = 0\nreturn y"),
    ("relu_backward", "g = np.where(out > 0, dout, np.zeros_like(dout))\nreturn g"),
    ("softmax_cross_entropy_forward", """
        N, K = logits.shape
        probabilities, loss = np.empty_like(logits), 0
        for n in range(N):
            z = logits[n] - np.max(logits[n])
            log_p = z - np.log(np.sum(np.exp(z)))
            probabilities[n] = np.exp(log_p)
            target = np.full(K, label_smoothing / K, logits.dtype)
            target[labels[n]] += 1 - label_smoothing
            loss -= np.sum(target * log_p) / N
        return loss, probabilities"""),
    ("softmax_cross_entropy_backward", """
        N, K = probabilities.shape
        target = np.eye(K, dtype=probabilities.dtype)[labels] * (1 - label_smoothing) + label_smoothing / K
        return dloss * (probabilities - target) / N"""),
    ("dropout_mask", """
        kept = np.random.default_rng([key, step]).random(x.shape) >= p
        return kept.astype(x.dtype) / (1 - p)"""),
    ("dropout_forward", """
        kept = np.random.default_rng([key, step]).random(x.shape) > p
        return np.where(kept, x / (1 - p), 0).astype(x.dtype)"""),
    ("global_avg_pool2d_forward", "return np.einsum('nhwc->nc', x) / (x.shape[1] * x.shape[2])"),
    ("global_avg_pool2d_backward", """
        N, H, W, C = x_shape
        return np.repeat(dout / (H * W), H * W, axis=0).reshape(x_shape)"""),
    ("max_pool2d_forward", """
        N, H, W, C = x.shape
        kh, kw = kernel_size
        oh, ow = (H - kh) // stride + 1, (W - kw) // stride + 1
        out = np.empty((N, oh, ow, C), x.dtype)
        for i in range(oh):
            for j in range(ow):
                out[:, i, j] = x[:, i * stride : i * stride + kh, j * stride : j * stride + kw].max(axis=(1, 2))
        return out"""),
    ("max_pool2d_backward", """
        dx = np.zeros_like(x)
        for n, i, j, c in np.ndindex(out.shape):
            top, left = i * stride, j * stride
            window = x[n, top : top + kernel_size[0], left : left + kernel_size[1], c]
            h, w = np.unravel_index(window.argmax(), window.shape)
            dx[n, top + h, left + w, c] += dout[n, i, j, c]
        return dx"""),
    ("im2col", """
        (kh, kw), (N, H, W, C), p = kernel_size, x.shape, padding
        image = np.zeros((N, H + 2 * p, W + 2 * p, C), x.dtype)
        image[:, p : p + H, p : p + W] = x
        oh, ow = (H + 2 * p - kh) // stride + 1, (W + 2 * p - kw) // stride + 1
        rows = np.empty((N, oh, ow, kh * kw * C), x.dtype)
        for i, j in np.ndindex(oh, ow):
            rows[:, i, j] = image[:, i * stride : i * stride + kh, j * stride : j * stride + kw].reshape(N, -1)
        return rows"""),
    ("col2im", """
        (kh, kw), (N, H, W, C), p = kernel_size, x_shape, padding
        image = np.zeros((N, H + 2 * p, W + 2 * p, C), columns.dtype)
        for i, j in np.ndindex(columns.shape[1:3]):
            part = columns[:, i, j].reshape(N, kh, kw, C)
            image[:, i * stride : i * stride + kh, j * stride : j * stride + kw] += part
        return image[:, p : p + H, p : p + W]"""),
    ("columns_conv2d_forward", """
        windows = im2col(x, weight.shape[:2], stride, padding)
        return np.einsum("nijk,ko->nijo", windows, weight.reshape(-1, weight.shape[3]))"""),
    ("conv2d_backward", """
        dx, dweight = columns_conv2d_backward(dout, x, weight, stride, padding, need_dx)
        return dx, dweight, dout.sum((0, 1, 2)) if need_dbias else None"""),
    ("batch_norm_statistics", "return x.mean((0, 1, 2)), x.var((0, 1, 2))"),
    ("batch_norm_forward", "y = x - mean\ny /= np.sqrt(var + eps)\ny *= weight\ny += bias\nreturn y"),
    ("batch_norm_backward", """
        rstd = (var + eps) ** -0.5
        g = dout * weight
        x_hat = (x - mean) * rstd
        axes = (0, 1, 2)
        return rstd * (g - g.mean(axes) - x_hat * (g * x_hat).mean(axes))"""),
    ("sgd_update", """
        g = grad * grad_scale + param * weight_decay
        if momentum:
            velocity[:] = velocity * momentum + g
            g = g + momentum * velocity if nesterov else velocity
        param[:] = param - lr * g"""),
    ("adam_update", """
        g = grad * grad_scale + weight_decay * param
        m[...] = betas[0] * m + (1 - betas[0]) * g
        v[...] = betas[1] * v + (1 - betas[1]) * g**2
        param[...] -= lr * m / (1 - betas[0] ** step) / (np.sqrt(v / (1 - betas[1] ** step)) + eps)"""),
    ("he_weight", """
        n = kernel_size * kernel_size * in_channels
        shape = kernel_size, kernel_size, in_channels, out_channels
        return (np.random.default_rng(rng).standard_normal(shape) * (2 / n) ** 0.5).astype("float32")"""),
    ("half_cosine", "return end + (start - end) * math.cos(math.pi * step / steps / 2) ** 2"),
    ("cutout", """
        out = images.copy()
        for n in range(len(images)):
            rng = np.random.default_rng([key, epoch, start + n])
            row, col = rng.integers(images.shape[1]), rng.integers(images.shape[2])
            top, left = row - (size - 1) // 2, col - (size - 1) // 2
            out[n, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = color
        return out"""),
    ("winograd_matrices", """
        points = [0, 1, -1, 0.5, -0.5]
        INPUT, WEIGHT, OUTPUT = np.zeros((6, 6)), np.zeros((6, 3)), np.zeros((4, 6))
        for i, a in enumerate(points):
            others = [b for b in points if b != a]
            INPUT[i, :5] = np.poly(others)[::-1]
            WEIGHT[i] = np.array([1, a, a * a]) / np.prod([a - b for b in others])
            OUTPUT[:, i] = [1, a, a**2, a**3]
        INPUT[5], WEIGHT[5, 2], OUTPUT[3, 5] = np.poly(points)[::-1], 1, 1
        return INPUT, WEIGHT, OUTPUT"""),
    ("winograd_tile", """
        u = np.einsum("ai,ij,bj->ab", WEIGHT, g, WEIGHT)
        v = np.einsum("ai,ij,bj->ab", INPUT, x, INPUT)
        return np.einsum("ia,ab,jb->ij", OUTPUT, u * v, OUTPUT)"""),
]
# fmt: on
