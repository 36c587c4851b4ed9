"""The contract that every layer and every network keeps: forward, backward, parameters, and nothing behind the scenes.

There is no autograd. A module computes its output in `forward`, keeps what it will need, and turns the gradient of its
output into the gradient of its input in `backward`. A network is a module that calls the forwards of its parts in
order, and their backwards in reverse.

Source      PyTorch, for the names; the rules are stated in `Module`
"""

from collections import deque
from collections.abc import Mapping, Set

import numpy as np

from minires.backend import array_module, to_device, to_numpy

# PyTorch counts a BatchNorm's batches in its state; nothing is computed from the count, and both sides do without it.
UNUSED_IN_PYTORCH_STATE = "num_batches_tracked"
TAKEN = "taken"  # a cache that backward has taken and dropped


class Buffer:
    """An array that belongs to a module's state but is not trained: running statistics.

    Args        data: the array; torch_axes: the order of its axes that gives PyTorch's layout, None if it is the same
    """

    def __init__(self, data, torch_axes=None):
        self.data = data
        self.torch_axes = torch_axes or tuple(range(data.ndim))

    def to(self, device=None, dtype=None):
        """Move to a device; a dtype is for real numbers alone, and integers stay what they are."""
        self.data = move(self.data, device, dtype if self.data.dtype.kind == "f" else None)


class Parameter(Buffer):
    """An array that is trained, and the gradient of the loss by it.

    Every backward adds into grad; `optimizer.zero_grad()` sets it back to 0. lr_factor times the optimizer's learning
    rate is that of this parameter: set it before the optimizer is made.
    """

    lr_factor = 1.0

    def __init__(self, data, torch_axes=None):
        super().__init__(data, torch_axes)
        self.grad = np.zeros_like(data)

    def to(self, device=None, dtype=None):
        super().to(device, dtype)
        self.grad = move(self.grad, device, dtype)


def real_array_of(model):
    """Return an array of the device and dtype that a model's input should have: its first parameter, or else its first
    buffer of real numbers, as a folded network has no parameters; an empty float32 one if there is neither.
    """
    arrays = [value.data for value in (*model.parameters(), *(buffer for _, buffer in model.named_state()))]
    return next((array for array in arrays if array.dtype.kind == "f"), np.zeros(0, np.float32))


def move(x, device, dtype):
    """Return x on the device and in the dtype; None leaves either as it is.

    Raises      ValueError for float16, in which small steps of training would be lost, and for what are no floats
    """
    if dtype is not None and np.dtype(dtype) not in (np.float32, np.float64):
        raise ValueError(
            f"parameters are float32 or float64, got {np.dtype(dtype)}: on a GPU, float32 ones take 16-bit images too"
        )
    x = x if device is None else to_device(x, device)
    return x if dtype is None else x.astype(dtype)


def check_array(name, x):
    """Raise TypeError for what is no array of NumPy or CuPy: a list, a number, a picture, another library's tensor."""
    if not hasattr(x, "__array_function__"):
        raise TypeError(f"{name} expects an array, got a {type(x).__name__}: np.array makes one")


class Module:
    """A layer, a block or a network. A subclass writes `forward` and `backward`; all else is here.

    forward(x)      returns the output in the dtype of x and never writes to x. In training mode it puts what backward
                    needs into self._cache; in evaluation mode it keeps nothing.
    backward(dout)  takes the cache and drops it: one forward, one backward. It never writes to dout (in a residual
                    block an array has two readers), adds the gradients of the parameters into their grad, and returns
                    the gradient of the input.

    Parameters, buffers and child modules are the attributes that are such, in the order in which they were set; those
    in lists, tuples, deques and dicts count as well, nested or not. Sets, which have no order, are refused. Their names
    are dotted paths: layer1.0.conv1.weight.
    """

    training = True
    _cache = None

    def forward(self, x):
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(self, dout):
        raise NotImplementedError(f"{type(self).__name__} has no backward")

    def __call__(self, *inputs):
        for x in inputs:
            if x is not None or x is inputs[0]:  # what comes second may be left out
                check_array(type(self).__name__, x)
        return self.forward(*inputs)

    def _keep(self, *cache):
        """Keep what backward needs, in training mode only."""
        self._cache = cache if self.training else None

    def _take_cache(self):
        """Return what forward kept, and drop it."""
        if isinstance(self._cache, str) and self._cache == TAKEN:  # not "is": a pickled module has a text of its own
            raise RuntimeError(
                f"{type(self).__name__}.backward: called twice after one forward; a layer that a network uses twice "
                "has to be two layers, as each keeps what one backward needs"
            )
        if self._cache is None:
            raise RuntimeError(f"{type(self).__name__}.backward: call forward in training mode first")
        cache, self._cache = self._cache, TAKEN
        return cache

    def attributes(self, kind):
        """Yield (name, value) for each attribute of a kind but the cache, and those in lists and dicts as (name.0,
        value), (name.key, value) and so on.
        """
        return _walk({name: value for name, value in vars(self).items() if name != "_cache"}, kind, "")

    def named_children(self):
        """Yield (name, module) for each direct part."""
        return self.attributes(Module)

    def named_modules(self, prefix="", seen=None):
        """Yield (dotted name, module) for this module and every part of it, each before its own parts.

        A part with two names counts once, by the first: `seen` are those that came before.
        """
        seen = set() if seen is None else seen
        if id(self) in seen:
            return
        seen.add(id(self))
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name, seen)

    def modules(self):
        return [module for _, module in self.named_modules()]

    def named_state(self):
        """Yield (dotted name, Parameter or Buffer) in the order of PyTorch's state_dict."""
        for prefix, module in self.named_modules():
            for name, value in module.attributes(Buffer):
                yield (f"{prefix}.{name}" if prefix else name), value

    def named_parameters(self):
        """Yield (dotted name, Parameter)."""
        return ((name, value) for name, value in self.named_state() if isinstance(value, Parameter))

    def parameters(self):
        return [parameter for _, parameter in self.named_parameters()]

    def num_parameters(self):
        """Return how many numbers are trained."""
        return sum(parameter.data.size for parameter in self.parameters())

    def train(self, mode=True):
        """Switch to training mode, in which forward prepares for backward, and return the module."""
        for module in self.modules():
            module.training = mode
            module._cache = None
        return self

    def eval(self):
        """Switch to evaluation mode: running statistics, no dropout, nothing kept. Return the module."""
        return self.train(False)

    def to(self, device=None, dtype=None):
        """Move every parameter and buffer, with its gradient, to "cpu" or "gpu" or into a dtype; return the module.

        An optimizer keeps the parameters in an array of its own: make it after the move.
        """
        for _, value in self.named_state():
            value.to(device, dtype)
        return self

    def state_dict(self):
        """Return copies of all parameters and buffers on the host, under PyTorch's names and in PyTorch's shapes."""
        return {
            name: np.array(to_numpy(value.data).transpose(value.torch_axes), order="C")
            for name, value in self.named_state()
        }

    def load_state_dict(self, state):
        """Take over the values of a state_dict, minires's or PyTorch's (as NumPy arrays or CPU tensors).

        Nothing is changed unless everything fits. Values are converted to the dtype and moved to the device in use.

        Raises      ValueError that lists every name that is missing, unexpected, of the wrong shape, no real numbers or
                    too large for the dtype in use; TypeError for what is no dict
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"load_state_dict expects a dict of arrays by name, got a {type(state).__name__}")
        state = {name: np.asarray(array) for name, array in state.items()}
        own = dict(self.named_state())
        errors, converted = [f"missing {name}" for name in own if name not in state], {}
        for name, array in state.items():
            if name in own:
                expected = tuple(own[name].data.shape[axis] for axis in own[name].torch_axes)
                if array.shape != expected:
                    errors.append(f"{name} has shape {array.shape}, expected {expected}")
                elif array.dtype.kind not in "fiub":
                    errors.append(f"{name} has dtype {array.dtype}, expected real numbers, such as float32")
                else:
                    dtype = own[name].data.dtype
                    with np.errstate(over="ignore"):  # told below
                        converted[name] = array.transpose(np.argsort(own[name].torch_axes)).astype(dtype, order="C")
                    if np.isfinite(array).all() and not np.isfinite(converted[name]).all():
                        errors.append(f"{name} holds {np.abs(array).max():.4g}, too large for {dtype}")
            elif name.rpartition(".")[2] != UNUSED_IN_PYTORCH_STATE:
                errors.append(f"unexpected {name}")
        if errors:
            raise ValueError(f"the state does not fit this {type(self).__name__}: " + "; ".join(errors))
        for name, value in own.items():
            value.data[...] = array_module(value.data).asarray(converted[name])


def _walk(collection, kind, prefix):
    """Yield (dotted name, value) for each value of a kind in a dict, and in the lists and dicts inside it."""
    for name, value in collection.items():
        if isinstance(value, kind):
            yield f"{prefix}{name}", value
        elif isinstance(value, Set) and any(isinstance(item, Module | Buffer) for item in value):
            raise TypeError(f"{prefix}{name} is a set, whose modules or parameters have no order: make it a list")
        elif isinstance(value, list | tuple | deque | dict):
            inside = value if isinstance(value, dict) else dict(enumerate(value))
            yield from _walk(inside, kind, f"{prefix}{name}.")


class Sequential(Module):
    """Modules one after the other; without any, the identity. The parts are named by their position: 0, 1, ...

    Args        layers: the modules, in order
    Raises      TypeError for anything else
    """

    def __init__(self, *layers):
        for i, layer in enumerate(layers):
            if not isinstance(layer, Module):
                raise TypeError(f"Sequential takes modules one after the other, got {layer!r} at position {i}")
            setattr(self, str(i), layer)

    def layers(self):
        return [layer for _, layer in self.named_children()]

    def forward(self, x):
        for layer in self.layers():
            x = layer(x)
        return x

    def backward(self, dout):
        for layer in reversed(self.layers()):
            dout = layer.backward(dout)
        return dout
