"""A stand-in for CuPy that computes with NumPy but refuses to mix with NumPy's arrays, as a GPU's memory would.

A subclass of ndarray cannot do this: NumPy accepts it everywhere. A StrictArray is no ndarray, every conversion that
NumPy could try raises, and each function of this module refuses arguments that are host arrays. As in CuPy, a sum over
everything is a 0-d array, and only `asnumpy` brings numbers back.
"""

import operator
import types

import numpy as np
from cuda_emulator import RawModule  # noqa: F401  (part of what the stand-in offers)


class MixedArraysError(TypeError):
    """A host array came where a device array was expected, or the other way round."""


class StrictArray:
    def __init__(self, host):
        self._host = host

    def _refuse(self, *args, **kwargs):
        raise MixedArraysError("a device array was given to NumPy")

    __array__ = __array_ufunc__ = __array_function__ = _refuse

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self._host.ctypes.data)

    def __getattr__(self, name):
        if name.startswith("__array"):  # NumPy's other ways to the memory
            raise AttributeError(name)
        value = getattr(self._host, name)
        if callable(value):
            return lambda *args, **kwargs: wrap(value(*unwrap(args), **unwrap(kwargs)))
        return wrap(value)

    def __getitem__(self, index):
        return wrap(self._host[unwrap(index)])

    def __setitem__(self, index, value):
        self._host[unwrap(index)] = unwrap(value)

    def __len__(self):
        return len(self._host)

    def __float__(self):
        return float(self._host)

    def __int__(self):
        return int(self._host)

    def __bool__(self):
        return bool(self._host)


def _operator(function, reflected=False):
    def method(self, other):
        operands = (unwrap(other), self._host) if reflected else (self._host, unwrap(other))
        return wrap(function(*operands))

    return method


def _in_place(function):
    def method(self, other):
        self._host = function(self._host, unwrap(other))
        return self

    return method


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "xor",
    "and",
    "or",
    "rshift",
    "lshift",
):
    _function = getattr(operator, f"__{_name}__")
    setattr(StrictArray, f"__{_name}__", _operator(_function))
    setattr(StrictArray, f"__r{_name}__", _operator(_function, reflected=True))
    setattr(StrictArray, f"__i{_name}__", _in_place(getattr(operator, f"__i{_name}__")))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(StrictArray, f"__{_name}__", _operator(getattr(operator, f"__{_name}__")))
StrictArray.__neg__ = lambda self: wrap(-self._host)
StrictArray.__hash__ = None


def wrap(value):
    return StrictArray(np.asarray(value)) if isinstance(value, np.ndarray | np.generic) else value


def unwrap(value):
    if isinstance(value, StrictArray):
        return value._host
    if isinstance(value, np.ndarray):
        raise MixedArraysError("a host array was given to device code")
    if isinstance(value, tuple | list):
        return type(value)(map(unwrap, value))
    if isinstance(value, dict):
        return {key: unwrap(item) for key, item in value.items()}
    return value


def asarray(value, dtype=None):
    """From host to device, the one way in."""
    return StrictArray(np.array(value._host if isinstance(value, StrictArray) else value, dtype=dtype))


def asnumpy(array):
    """From device to host, the one way out."""
    return array._host.copy()


def _wrapped(function):
    def wrapped(*args, **kwargs):
        return wrap(function(*unwrap(args), **unwrap(kwargs)))

    if isinstance(function, np.ufunc):
        wrapped.at = lambda *args: function.at(*unwrap(args))
    return wrapped


lib = types.SimpleNamespace(
    stride_tricks=types.SimpleNamespace(
        sliding_window_view=_wrapped(np.lib.stride_tricks.sliding_window_view),
    )
)


def __getattr__(name):
    value = getattr(np, name)
    return value if isinstance(value, type) or not callable(value) else _wrapped(value)
