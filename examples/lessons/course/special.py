"""Checks of what is no plain function of arrays: random numbers, the residual block, the kernels for the brave.

A function that draws random numbers may draw others than minires does. It is judged by what must hold for any: how
often, how large, the same again for the same key.
"""

import copy
import os
import sys
import tempfile
import types

import numpy as np

from course.checks import MistakeError, call, close, describe, diagnose
from course.kernels import KERNELS, suspects_of_sgd
from course.source import PACKAGE, reference
from minires import backend, kernels

SIGMAS = 5  # of chance, beyond which a frequency is wrong
KEY = 2**63 + 11  # a layer's key has 64 bits


class NotCheckedError(Exception):
    """What a check needs and this machine has not."""


def unchanged(name, value, before):
    if not np.array_equal(value, before):
        raise MistakeError(f"It writes to {name}, which belongs to the caller and has other readers: work on a copy.")


def require_like(name, value, x):
    """An array of the shape and the dtype of x."""
    if value is None:
        raise MistakeError("It returns nothing: is a return missing?")
    if getattr(value, "shape", None) != x.shape:
        raise MistakeError(f"{name} has shape {getattr(value, 'shape', type(value).__name__)}, expected {x.shape}.")
    if value.dtype != x.dtype:
        raise MistakeError(
            f"{name} is {value.dtype} where {x.dtype} is expected: use astype, and Python numbers for scales."
        )


def check_mask(function, name="mask"):
    """A mask, or what dropout makes of x: 0 with probability p, and 1 / (1 - p) else."""
    rng = np.random.default_rng(1)
    for p, dtype, shape in ((0.2, "float64", (60, 41, 3)), (0.7, "float32", (50, 7, 21)), (0.25, "float32", (5, 3))):
        x = (rng.uniform(1, 2, shape) * rng.choice([-1, 1], shape)).astype(dtype)
        before = x.copy()

        def draw(key=KEY, step=3, x=x, p=p, before=before):
            drawn = call(function, {"x": x, "p": p, "key": key, "step": step})
            unchanged("x", x, before)
            require_like(name, drawn, x)
            return drawn if name == "mask" else drawn / x

        mask, given = draw(), f"for p={p}, x {shape}"
        if not np.array_equal(draw(), mask):
            raise MistakeError(
                "The same key and step draw another mask the second time: backward could not draw it again."
            )
        if x.size < 100:
            continue
        dropped = float((mask == 0).mean())
        chance = SIGMAS * np.sqrt(p * (1 - p) / x.size)
        if abs(dropped - p) > chance:
            if dropped == 0:
                hint = "Nothing is dropped."
            elif abs(dropped - (1 - p)) < chance:
                hint = "p and 1 - p are exchanged: p is the probability of 0."
            else:
                hint = "Compare uniform numbers from 0 to 1 with p; is each element drawn by itself?"
            raise MistakeError(f"{dropped:.1%} of the elements are 0 {given}. {hint}")
        kept = mask[mask != 0]
        if not np.allclose(kept, 1 / (1 - p), rtol=1e-5):
            looks = float(np.median(kept))
            hint = {
                1.0: "The scaling is missing: what is kept is multiplied by 1 / (1 - p), so that the mean stays.",
                round(1 / p, 4): "It is scaled by 1 / p, where what is kept, 1 - p, counts.",
                round(1 - p, 4): "It is multiplied by 1 - p; to keep the mean, it has to be divided.",
                round((1 - p) ** -2, 4): "It is scaled twice: dropout_mask is scaled already.",
            }.get(round(looks, 4), "")
            raise MistakeError(f"What is kept is multiplied by {looks:.4g} {given}, expected {1 / (1 - p):.4g}. {hint}")
        for other, what in ((draw(step=4), "step"), (draw(key=KEY + 1), "key")):
            if np.array_equal(other, mask):
                raise MistakeError(f"Another {what} draws the same mask: it should be drawn from key and step.")
        if any(np.array_equal(np.take(mask, 0, axis), np.take(mask, 1, axis)) for axis in range(mask.ndim)):
            raise MistakeError("Whole rows share their mask: each element of x has to be drawn by itself.")


def check_dropout_mask(mine):
    check_mask(mine.dropout_mask)


def check_dropout_forward(mine):
    check_mask(mine.dropout_forward, "out")


def check_dropout_backward(mine):
    """Against the learner's own forward, if that is right: any mask is right that forward and backward share."""
    forward = getattr(mine, "dropout_forward", None)
    try:
        check_mask(forward, "out")
    except Exception:

        def forward(x, p, key, step):
            return x * mine.dropout_mask(x, p, key, step)

    rng = np.random.default_rng(2)
    for p, dtype, shape in ((0.2, "float64", (7, 5)), (0.6, "float32", (3, 4, 5, 2))):
        x, dout = rng.uniform(1, 2, shape).astype(dtype), rng.standard_normal(shape).astype(dtype)
        mask = forward(x=x, p=p, key=KEY, step=3) / x
        before = dout.copy()
        dx = call(mine.dropout_backward, {"dout": dout, "p": p, "key": KEY, "step": 3})
        unchanged("dout", dout, before)
        require_like("dx", dx, dout)
        if close(np.asarray(dx, np.float64), dout * mask, 1e-5):
            continue
        suspects = (
            (dout, "It is dout unchanged: where the forward gave 0, x does not influence the loss."),
            (dout * (mask != 0), "The scaling by 1 / (1 - p) is missing: the forward multiplied by it, too."),
            (dout * mask * mask, "It is scaled twice."),
            (mask, "It is the mask alone, without dout."),
            (dout * (mask == 0) / (1 - p), "The mask is the wrong way round."),
        )
        found = next((text for what, text in suspects if close(np.float64(dx), np.float64(what), 1e-5)), "")
        if not found and not np.array_equal(dx != 0, mask != 0):
            found = "It is another mask than the forward's: the same p, key and step draw the same."
        raise MistakeError(f"dx is wrong for p={p}, dout {shape}: it should be dout times the forward's mask. {found}")


# The residual block

BLOCKS = (  # arguments, shape of x
    ({"in_channels": 3, "out_channels": 3}, (2, 5, 4, 3)),
    ({"in_channels": 3, "out_channels": 4, "stride": 2}, (3, 5, 6, 3)),
    ({"in_channels": 2, "out_channels": 2, "shortcut": False}, (2, 4, 4, 2)),
    ({"in_channels": 2, "out_channels": 3, "batch_norm": False}, (2, 3, 4, 2)),
)


def check_block(mine):
    rng = np.random.default_rng(3)
    with kernels.use("reference"):
        for options, shape in BLOCKS:
            for dtype in ("float64", "float32"):
                compare_blocks(mine.BasicBlock, options, rng.standard_normal(shape).astype(dtype), rng)


def compare_blocks(learners, options, x, rng):
    given = f"for BasicBlock({describe(options)}), x {x.shape}"
    solved, block = reference().BasicBlock(**options, rng=0), learners(**options, rng=0)
    for parameter in solved.parameters():
        parameter.data[...] += 0.3 * rng.standard_normal(parameter.data.shape)
    try:
        block.load_state_dict(solved.state_dict())
    except ValueError as error:
        raise MistakeError(f"Leave __init__ as it is: {error}.") from None
    for module in (solved, block):
        module.to(dtype=x.dtype)
    parts = copy.deepcopy(solved)
    expected, before = solved.forward(x), x.copy()
    out = call(block.forward, {"x": x})
    unchanged("x", x, before)
    require_like("out", out, expected)
    if not close(np.float64(out), np.float64(expected), 1e-4 if x.dtype == np.float32 else 1e-7):
        F = parts.conv2(parts.bn1(parts.conv1(x)))
        alone = parts.bn2(F)
        suspects = [(alone, "The shortcut is missing: bn2 takes it as its second argument.")]
        if parts.shortcut is not None:
            suspects.append(
                (alone + parts.shortcut(x), "The sum with the shortcut comes after the ReLU; it comes before.")
            )
            suspects.append((parts.bn2(F, 2 * parts.shortcut(x)), "The shortcut is added twice."))
        suspects.append((parts.bn2(parts.conv2(parts.conv1(x))), "bn1, with its ReLU, is left out."))
        raise MistakeError(f"out of forward is wrong {given}. {matching(out, suspects)}".strip())
    dout = rng.standard_normal(out.shape).astype(x.dtype)
    before = dout.copy()
    expected = solved.backward(dout)
    dx = call(block.backward, {"dout": dout})
    unchanged("dout", dout, before)
    require_like("dx of backward", dx, x)
    if not close(np.float64(dx), np.float64(expected), 1e-4 if x.dtype == np.float32 else 1e-7):
        raise MistakeError(f"dx of backward is wrong {given}. {matching(dx, ways_back(parts, x, dout))}".strip())
    for (name, right), yours in zip(solved.named_parameters(), block.parameters(), strict=True):
        if not close(np.float64(yours.grad), np.float64(right.grad), 1e-3 if x.dtype == np.float32 else 1e-7):
            hint = "It is 0: is that layer's backward not called?" if not yours.grad.any() else ""
            raise MistakeError(f"The gradient of {name} is wrong {given}. {hint}".strip())


def ways_back(parts, x, dout):
    """The gradients that mistakes in a block's backward give."""
    parts.forward(x)
    if parts.shortcut is None:
        return [(dout, "It is dout unchanged.")]
    before_relu, dshortcut = parts.bn2.backward(dout)
    shared = copy.deepcopy(parts.shortcut)
    through_f = parts.conv1.backward(parts.bn1.backward(parts.conv2.backward(before_relu)))
    through_shortcut = parts.shortcut.backward(dshortcut)
    suspects = [
        (
            through_f,
            "The gradient through the shortcut is missing: x went two ways, and what flows back on both adds up.",
        ),
        (through_shortcut, "It is the shortcut's alone: what flows back through conv2, bn1 and conv1 is missing."),
        (through_f + 2 * through_shortcut, "The shortcut's gradient is added twice."),
        (through_f * through_shortcut, "The two gradients are multiplied; they add up."),
    ]
    unmasked = "The shortcut is given dout, which the ReLU after the sum has not masked: take bn2's second gradient."
    suspects.append((through_f + shared.backward(dout), unmasked))
    return [(what, text) for what, text in suspects if np.shape(what) == x.shape]


def matching(value, suspects):
    return next((text for what, text in suspects if close(np.float64(value), np.float64(what), 1e-4)), "")


# What training begins with


def check_he_weight(mine):
    k, C, O = 3, 8, 64
    weight = call(mine.he_weight, {"kernel_size": k, "in_channels": C, "out_channels": O, "rng": 5})
    require_like("weight", weight, np.zeros((k, k, C, O), np.float32))
    n = k * k * C
    variance = float(weight.var())
    known = {
        2 / n: "",
        1 / n: "The 2 is missing: of what a ReLU lets through, half is 0.",
        4 / n**2: "2 / n is the variance; normal() takes the standard deviation, its root.",
        1 / n**2: "It is the variance that should be 2 / n, not the standard deviation.",
        2 / (k * k * O): "n counts the inputs of an output, kernel_size^2 in_channels, not out_channels.",
        2 / (k * C): "kernel_size counts twice: a window has kernel_size^2 taps.",
        2 / C: "A window has kernel_size^2 taps, each with in_channels numbers: n is their product.",
        4 / (k * k * (C + O)): "It is Glorot's, 2 / (inputs + outputs); He's counts the inputs alone.",
        2 / (k * k * (C + O)): "It counts the outputs as well; He's counts the inputs alone.",
        1 / (3 * n): "It is a sixth of it, PyTorch's default: activations shrink from layer to layer.",
        2 / n / 3: "It is a third of it: a uniform number within b has the variance b^2 / 3.",
        1.0: "It is not scaled at all.",
    }
    nearest = min(known, key=lambda v: abs(np.log(max(variance, 1e-30) / v)))
    if abs(variance * n / 2 - 1) > SIGMAS * np.sqrt(2 / weight.size):
        hint = known[nearest] if abs(variance / nearest - 1) < 0.12 else ""
        raise MistakeError(f"The variance is {variance:.3g} for n = {n}, expected 2 / n = {2 / n:.3g}. {hint}".strip())
    if abs(weight.mean()) > SIGMAS * np.sqrt(2 / n / weight.size):
        raise MistakeError(f"The mean is {weight.mean():.3g}, expected 0.")
    if (weight**4).mean() < 2.4 * variance**2:
        raise MistakeError("The numbers are not normal but as if uniform: use normal().")
    again = [mine.he_weight(kernel_size=k, in_channels=C, out_channels=O, rng=seed) for seed in (5, 6)]
    generator = np.random.default_rng(5)
    twice = [mine.he_weight(kernel_size=k, in_channels=C, out_channels=O, rng=generator) for _ in range(2)]
    if not np.array_equal(weight, again[0]):
        raise MistakeError("The same seed gives other weights: draw from np.random.default_rng(rng).")
    if np.array_equal(*again) or np.array_equal(*twice):
        raise MistakeError(
            "Another seed, or a second layer with the same Generator, gives the same weights: draw from rng."
        )


def check_cutout(mine):
    rng = np.random.default_rng(4)
    N, H, W, size, color = 300, 12, 7, 4, (1, 2, 3)
    images = rng.integers(10, 256, (N, H, W, 3)).astype(np.uint8)
    before = images.copy()

    def cut(images=images, key=1, epoch=2, start=0, size=size):
        out = call(mine.cutout, dict(images=images, key=key, epoch=epoch, start=start, size=size, color=color))
        unchanged("images", globals_of["images"], before)
        require_like("The result", out, images)
        return out

    globals_of = {"images": images}
    out = cut()
    given = f"for images {images.shape}, size={size}, color={color}"
    covered = (out == np.array(color)).all(-1)  # (N, H, W)
    if not covered.any():
        raise MistakeError(f"Nothing has the color {given}.")
    if not np.array_equal(out[~covered], images[~covered]):
        raise MistakeError(
            f"Pixels outside of the square have changed, or color is not used channel by channel {given}."
        )
    rows, cols = covered.any(2), covered.any(1)  # (N, H), (N, W)
    if not np.array_equal(covered, rows[:, :, None] & cols[:, None, :]):
        raise MistakeError(f"What is covered is no rectangle: it is the rows and the columns of the square {given}.")
    if (covered == covered[0]).all():
        raise MistakeError("All images are covered at the same pixels: draw for each image.")
    heights, widths = rows.sum(1), cols.sum(1)
    if (heights.max(), widths.max()) != (size, size):
        raise MistakeError(
            f"Squares are up to {heights.max()} rows and {widths.max()} columns large {given}, expected {size}."
        )
    never = [
        f"{what} {int(np.argmin(hit))}"
        for what, hit in (("row", rows.any(0)), ("column", cols.any(0)))
        if not hit.all()
    ]
    if never:
        raise MistakeError(
            f"{' and '.join(never)} is never covered {given}: the middle may be any pixel. Are H and W exchanged?"
        )
    if not covered.any((1, 2)).all():
        raise MistakeError(
            f"Some images are not covered at all {given}, though the middle of the square is in the image. A slice "
            "that begins below 0 counts from the end: begin it at max(top, 0)."
        )
    sides = ((heights, rows[:, 0]), (heights, rows[:, -1]), (widths, cols[:, 0]), (widths, cols[:, -1]))
    if any(extent[touching].min() == size for extent, touching in sides):
        raise MistakeError(
            "The square never reaches beyond the image: its middle may be any pixel, and what is outside is cut off."
        )
    if not covered.any(0).all():
        raise MistakeError(
            f"Some pixels are never covered {given}: are row and column of the middle drawn from the same number?"
        )
    if not np.array_equal(out, cut()):
        raise MistakeError("The same key and epoch cover other pixels the second time: draw from key and epoch.")
    if not np.array_equal(cut(images=images[100:200], start=100), out[100:200]):
        raise MistakeError(
            "An epoch cut into other batches covers other pixels: image n of a batch is number start + n."
        )
    for what, other in (("key", cut(key=2)), ("epoch", cut(epoch=3))):
        if np.array_equal(out, other):
            raise MistakeError(f"Another {what} covers the same pixels.")
    later = (cut(epoch=3) == np.array(color)).all(-1)
    if np.array_equal(later[:-1], covered[1:]):
        raise MistakeError(
            "Image n is covered as image n + 1 was an epoch before: draw from [key, epoch, start + n], and not from "
            "their sum."
        )
    if not np.array_equal(cut(size=0), images):
        raise MistakeError("A square of size 0 covers nothing.")
    if (cut(size=3) == np.array(color)).all(-1).sum((1, 2)).max() != 9:
        raise MistakeError("A square of size 3 should cover 9 pixels where all of it is in the image.")


# For the brave


def check_winograd_matrices(mine):
    found = call(mine.winograd_matrices, {})
    shapes = {"INPUT": (6, 6), "WEIGHT": (6, 3), "OUTPUT": (4, 6)}
    if not isinstance(found, tuple | list) or len(found) != 3:
        raise MistakeError("It should return three matrices: INPUT, WEIGHT, OUTPUT.")
    for (name, shape), matrix in zip(shapes.items(), found, strict=True):
        if np.shape(matrix) != shape:
            raise MistakeError(f"{name} has shape {np.shape(matrix)}, expected {shape}.")
    INPUT, WEIGHT, OUTPUT = (np.asarray(matrix, np.float64) for matrix in found)
    taken = np.einsum("ip,pj,pk->ijk", OUTPUT, WEIGHT, INPUT)  # (4, 3, 6): what y[i] has of g[j] x[k]
    expected = np.zeros((4, 3, 6))
    for i, j in np.ndindex(4, 3):
        expected[i, j, i + j] = 1
    if not np.allclose(taken, expected, atol=1e-4):
        hint = ""
        if np.allclose(taken, expected[:, ::-1], atol=1e-4):
            hint = " The taps are in the reverse order."
        elif np.allclose(np.abs(taken), expected, atol=1e-4):
            hint = " Only signs are wrong: compare WEIGHT's with those of q_a(a)."
        i, j, k = np.unravel_index(np.argmax(np.abs(taken - expected)), taken.shape)
        raise MistakeError(
            f"y[{i}] takes g[{j}] x[{k}] {taken[i, j, k]:.4g} times, and should {expected[i, j, k]:g} times.{hint}"
        )


def check_winograd_tile(mine):
    """With matrices that are no algorithm at all, so that only the formula gives the result."""
    rng = np.random.default_rng(6)
    arrays = {"x": (6, 6), "g": (3, 3), "INPUT": (6, 6), "WEIGHT": (6, 3), "OUTPUT": (4, 6)}
    arrays = {name: rng.standard_normal(shape) for name, shape in arrays.items()}
    given, before = types.SimpleNamespace(**arrays), copy.deepcopy(arrays)
    out = call(mine.winograd_tile, arrays)
    for name, array in before.items():
        unchanged(name, arrays[name], array)
    x, g, INPUT, WEIGHT, OUTPUT = arrays.values()
    u, v = WEIGHT @ g @ WEIGHT.T, INPUT @ x @ INPUT.T

    def suspects(a, e):
        yield "out", "The two (6, 6) are multiplied element by element, not as matrices.", OUTPUT @ (u @ v) @ OUTPUT.T
        yield (
            "out",
            "INPUT works on the rows too: times its transpose on the right.",
            (lambda: OUTPUT @ (u * (INPUT @ x)) @ OUTPUT.T),
        )
        yield (
            "out",
            "The matrix on the right is transposed: INPUT x INPUT.T.",
            (lambda: OUTPUT @ (u * (INPUT @ x @ INPUT)) @ OUTPUT.T),
        )
        yield (
            "out",
            "The matrix on the left is transposed: INPUT x INPUT.T.",
            (lambda: OUTPUT @ (u * (INPUT.T @ x @ INPUT)) @ OUTPUT.T),
        )

    diagnose(
        "out",
        out,
        reference().winograd_tile(**arrays),
        given,
        KERNELS["relu_forward"]._replace(suspects=suspects),
        "winograd_tile",
    )


def cuda_library():
    """Return CuPy where there is a GPU, else the stand-in for it of minires's tests."""
    try:
        return backend.gpu_library()
    except backend.GPUError:
        pass
    folder = str(PACKAGE.parent / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        import cuda_emulator
        import strict_array
    except Exception:
        raise NotCheckedError("needs a GPU, or the emulator in the folder tests of a clone of minires") from None
    if cuda_emulator.COMPILER is None:
        raise NotCheckedError("needs a GPU, or g++ on Linux for the emulator, and neither is here")
    return strict_array


def check_cuda(mine):
    xp = cuda_library()
    code = f'#line 1 "SGD_CUDA"\n{mine.SGD_CUDA.lstrip()}'
    with tempfile.TemporaryFile("w+") as said:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(said.fileno(), 2)  # what the compiler says
        try:
            kernel = xp.RawModule(code=code, options=("-std=c++17",), name_expressions=("sgd",)).get_function("sgd")
        except Exception as error:
            said.seek(0)
            lines = [line for line in f"{said.read()}\n{error}".splitlines() if "error" in line]
            emulated = xp.__name__ == "strict_array"
            if emulated and lines and not any("SGD_CUDA" in line for line in lines):  # not the learner's
                raise NotCheckedError("needs a GPU, or g++ on Linux for the emulator, and neither is here") from None
            raise MistakeError(f"It does not compile: {lines[0] if lines else error}") from None
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
    rng, solve, threads = np.random.default_rng(8), reference().sgd_update, 64
    base = {"lr": 0.1, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "grad_scale": 1.0}
    for size, options in (
        (150, {}),
        (150, {"momentum": 0.9}),
        (50, {"momentum": 0.9, "nesterov": True}),
        (150, {"momentum": 0.5, "weight_decay": 0.03, "grad_scale": 0.25}),
        (150, {"weight_decay": 0.03, "grad_scale": 0.25}),
        (150, {"momentum": 0.5, "nesterov": True, "weight_decay": 0.03, "grad_scale": 0.25}),
    ):
        options = base | options
        param, grad, velocity = rng.standard_normal((3, size)).astype(np.float32)
        velocity = velocity if options["momentum"] else None
        guarded = [np.append(array, np.full(threads, 77, np.float32)) for array in (param, grad)]
        sent = [xp.asarray(array) for array in guarded]
        sent.append(
            np.uint64(0) if velocity is None else xp.asarray(np.append(velocity, np.full(threads, 77, np.float32)))
        )
        names = ("grad_scale", "lr", "momentum", "nesterov", "weight_decay")
        numbers = [options[n] if n == "nesterov" else np.float32(options[n]) for n in names]
        kernel((-(-size // threads),), (threads,), (*sent, size, *numbers))
        moved, kept, *rest = (xp.asnumpy(array) for array in sent if not isinstance(array, np.uint64))
        given = types.SimpleNamespace(param=param, grad=grad, velocity=velocity, **options)
        told = f"for size={size} in blocks of {threads} threads, momentum={options['momentum']}"
        if any((array[size:] != 77).any() for array in (moved, *rest)):
            raise MistakeError(
                f"It writes beyond the end {told}: the last block has more threads than parameters, i >= size."
            )
        if not np.array_equal(kept, guarded[1]):
            raise MistakeError(f"It writes to grad {told}.")
        expected = {"param": param.copy(), "velocity": None if velocity is None else velocity.copy()}
        solve(expected["param"], grad, expected["velocity"], **options)
        if size > threads and np.array_equal(moved[threads:size], param[threads:]):
            raise MistakeError(f"Only the first block's parameters move {told}: where is blockIdx.x * blockDim.x?")
        for name, array in zip(("param", "velocity"), (moved, *rest), strict=False):
            if not close(np.float64(array[:size]), np.float64(expected[name]), 1e-5):
                hints = suspects_of_sgd(given, expected[name])
                pairs = [(what() if callable(what) else what, text) for n, text, what in hints if n == name]
                wrong = int((~np.isclose(array[:size], expected[name], rtol=1e-4, atol=1e-6)).sum())
                hint = matching(array[:size], pairs)
                raise MistakeError(f"{name} is wrong {told}: {wrong} of {size} numbers. {hint}".strip())


SPECIAL = {
    "dropout_mask": check_dropout_mask,
    "dropout_forward": check_dropout_forward,
    "dropout_backward": check_dropout_backward,
    "BasicBlock": check_block,
    "he_weight": check_he_weight,
    "cutout": check_cutout,
    "winograd_matrices": check_winograd_matrices,
    "winograd_tile": check_winograd_tile,
    "SGD_CUDA": check_cuda,
}
