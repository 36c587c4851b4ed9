"""Is a hand-written backward right? Compare it with what the forward does when its inputs move a little.

    from minires.gradcheck import check_gradients

    class Square(Module):
        def forward(self, x):
            self._keep(x)
            return x * x

        def backward(self, dout):
            (x,) = self._take_cache()
            return 2 * x * dout

    check_gradients(Square(), np.random.default_rng(0).standard_normal((4, 5)))
    # {'x': 2.5e-10}

Forget the 2 and it raises: "Square: the gradient of x is wrong: along a random direction the backward says -2.48579,
the forward does -4.97157 (relative error 0.5, tolerance 1e-06)".

Source      the directional derivative as a check: Maclaurin, Duvenaud and others, HIPS autograd, check_vjp
"""

import copy
import math
import numbers

import numpy as np

from minires.backend import to_device, to_numpy
from minires.module import Module


def check_gradients(layer, x, *args, tolerance=1e-6, steps=(1e-6, 1e-7, 1e-8), seed=0, device="cpu", dtype="float64"):
    """Check the backward of a layer, a network or a loss against central differences, in float64.

    For the input and for each parameter in turn, a random direction v is drawn. The backward's claim is <gradient, v>,
    the sum of the products; what the forward does is (L(+h) - L(-h)) / (2 h) along v, where L = <dout, forward(x)>, so
    that its gradient by the output is dout. That is random: ones hide errors, and BatchNorm's true gradient is then 0.
    A direction costs two forwards for a whole array, and a wrong element shows in it unless chance cancels it.

    A step h must be small where a ReLU is about to switch, and not so small that rounding shows. So several are tried,
    and the first that is within the tolerance counts: a wrong gradient is wrong at every h.

    The layer itself is left alone: copies in float64 do the work. Random layers draw the same numbers in each copy.

    Args        layer: what has forward and backward; x: its input, of any real dtype; args: further inputs of forward,
                passed on as they are; steps: the values of h, in units of the root mean square of the array that is
                moved (at least 0.1); seed: for dout and the directions; device: "cpu" or "gpu"; dtype: float32 checks
                the fast kernels, with a tolerance and steps to match: 1e-2 and (1e-2, 1e-3)
    Limits      one input array and one output array; not at a point where the function has a kink, as ReLU has at 0
    Returns     {"x": relative error, name of the parameter: relative error, ...}; an error is |claim - truth| over the
                larger of the two, or over |gradient|, the size to expect, where chance makes both small
    Raises      AssertionError that names the wrong gradients; also if forward writes to x, or backward to dout, or if
                it sets a parameter's gradient where it should add to it
                ValueError for an x that is not finite, or empty
    """
    title = type(layer).__name__
    layer = copy.deepcopy(layer)
    if isinstance(layer, Module):
        layer.train().to(device, dtype)
        for parameter in layer.parameters():
            parameter.grad[...] = 0
    x = np.array(to_numpy(x) if hasattr(x, "__array_function__") else x, dtype=dtype)  # images may be on a GPU
    if not x.size:
        raise ValueError(f"check_gradients: x must hold numbers, got {x.shape}: there would be nothing to check")
    if not np.isfinite(x).all():
        raise ValueError("check_gradients: x holds values that are not finite")
    rng = np.random.default_rng([seed, *b"check_gradients"])  # or an x drawn from the same seed would be its own dout

    worker = copy.deepcopy(layer)
    x_there = to_device(x, device)  # x itself on the CPU
    x_before = x.copy()
    out = worker.forward(x_there, *args)
    is_array = hasattr(out, "shape")  # else it may be a plain number, as a loss is
    told = f"{title}: forward should return an array, and returned a {type(out).__name__}"
    require(is_array or isinstance(out, numbers.Real), told)
    dout = np.asarray(rng.standard_normal(out.shape if is_array else ()), dtype)
    dout_there, dout_before = to_device(dout, device), dout.copy()
    gradients = {"x": worker.backward(dout_there)}
    same = [np.array_equal(to_numpy(a), b) for a, b in ((x_there, x_before), (dout_there, dout_before))]
    require(same[0], f"{title}: forward or backward changed x, which belongs to the caller")
    require(same[1], f"{title}: backward changed dout, which belongs to the caller")
    kind = type(gradients["x"]).__name__
    require(hasattr(gradients["x"], "shape"), f"{title}: backward should return dx, an array, and returned a {kind}")
    require(gradients["x"].shape == x.shape, f"{title}: dx has shape {gradients['x'].shape}, x has {x.shape}")
    if isinstance(layer, Module):
        gradients |= {name: parameter.grad for name, parameter in worker.named_parameters()}
        check_that_gradients_add_up(title, layer, worker, x_there, args, dout_there)

    errors, complaints = {}, []
    for name, gradient in gradients.items():
        array = x if name == "x" else to_numpy(dict(layer.named_parameters())[name].data)
        gradient = np.asarray(to_numpy(gradient), np.float64)
        unit = max(float(np.sqrt(np.mean(array**2))), 0.1)
        direction = unit * rng.standard_normal(array.shape)
        claim = np.sum(gradient * direction)
        errors[name] = math.inf
        for h in steps:
            ends = [loss_along(layer, x, args, dout, name, by * direction, device) for by in (h, -h)]
            truth = (ends[0] - ends[1]) / (2 * h)
            scale = max(abs(claim), abs(truth), unit * np.linalg.norm(gradient)) or 1.0
            errors[name] = min(errors[name], float(abs(claim - truth) / scale))
            if errors[name] <= tolerance:
                break
        else:
            complaints.append(
                f"the gradient of {name} is wrong: along a random direction the backward says {claim:.6g}, the forward "
                f"does {truth:.6g} (relative error {errors[name]:.2g}, tolerance {tolerance:.2g})"
            )
    require(not complaints, f"{title}: " + "; ".join(complaints))
    return errors


def require(condition, message):
    """Raise AssertionError with the message unless the condition holds: an assert would vanish under python -O."""
    if not condition:
        raise AssertionError(message)


def check_that_gradients_add_up(title, layer, worker, x, args, dout):
    """Start a second copy from the gradients of the first: its backward has to double them."""
    second = copy.deepcopy(layer)
    pairs = list(zip(worker.named_parameters(), second.parameters(), strict=True))
    for (name, once), twice in pairs:
        require(
            once.grad.shape == once.data.shape,
            f"{title}: the gradient of {name} has shape {once.grad.shape}, {name} has {once.data.shape}",
        )
        twice.grad = once.grad.copy()
    second.forward(x, *args)
    second.backward(dout)
    for (name, once), twice in pairs:
        require(
            np.allclose(to_numpy(twice.grad), 2 * to_numpy(once.grad), rtol=1e-6, equal_nan=True),
            f"{title}: backward sets the gradient of {name}; it should add to it",
        )


def loss_along(layer, x, args, dout, name, change, device):
    """Return <dout, forward(x)> with the change added to x, or to the parameter of that name."""
    layer, change = copy.deepcopy(layer), np.asarray(change, x.dtype)
    if name == "x":
        x = x + change
    else:
        dict(layer.named_parameters())[name].data += to_device(change, device)
    out = layer.forward(to_device(x, device), *args)
    return np.sum(dout * (to_numpy(out) if hasattr(out, "shape") else out), dtype=np.float64)
