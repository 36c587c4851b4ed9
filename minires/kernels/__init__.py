"""The arithmetic: pure functions, arrays in and arrays out, in sets that offer the same names.

A layer keeps state and asks `kernels_for(x)` for the set that serves its arrays. `reference` is the mathematics and
serves every array, NumPy's and CuPy's alike. A faster set offers the same names with the same arguments, only where it
is faster; what it lacks is the reference's. A test holds the two equal. `cpu` serves NumPy's float32, `gpu` CuPy's
float32 and float16.

To step through the mathematics, or to see what the speed costs in digits, run with MINIRES_KERNELS=reference, or in
Python:

    with minires.kernels.use("reference"):
        ...

To try a kernel of your own, give it the name and the arguments of the one in reference.py, and hand over the module, or
any object, that has it:

    with minires.kernels.use(mine):
        ...

MINIRES_NUM_THREADS or `minires.kernels.set_num_threads(n)` says how many cores the fast kernels use; without, all.
"""

import contextlib
import importlib.util
import inspect
import os

import numpy as np

from minires.backend import array_module
from minires.kernels import cpu, gpu, reference
from minires.kernels.threads import num_threads, set_num_threads  # noqa: F401  (part of what this package offers)

CHOICES = ("fast", "reference")
_chosen = None  # what `use` has set: one of CHOICES, or an object with kernels
_own = None  # the reference with the kernels of that object in place


def kernels_for(x):
    """Return the set of kernels that serves the array x. An empty one has nothing to cut into pieces."""
    if _own is not None:
        return _own
    if not x.size or chosen() == "reference":
        return reference
    xp = array_module(x)
    if xp is np:
        return cpu if x.dtype == np.float32 else reference
    return gpu if x.dtype in (np.float32, np.float16) and gpu.is_for(xp) else reference


def chosen():
    """Return "fast" or "reference": what `use` has set, else MINIRES_KERNELS, else "fast"; of other kernels, the name.

    Raises      ValueError for another value of MINIRES_KERNELS
    """
    if _own is not None:
        return getattr(_chosen, "__name__", type(_chosen).__name__)
    if _chosen is not None:
        return _chosen
    return _checked("MINIRES_KERNELS", os.environ.get("MINIRES_KERNELS", "fast"))


@contextlib.contextmanager
def use(choice):
    """Inside a with block, take the fast kernels ("fast"), the mathematics ("reference") or kernels of one's own.

    Kernels of one's own serve all arrays, of any dtype and device. What they lack comes from the reference, whose
    functions then call them in turn: with an im2col alone, convolutions are the reference's around this im2col.

    Args        choice: "fast", "reference", or a module or another object, whose public names are kernels
    Raises      ValueError for another word, and for an object without a single name of the reference
    """
    global _chosen, _own
    own = None if isinstance(choice, str) else _reference_with(choice)
    before = _chosen, _own
    _chosen, _own = choice if own else _checked("kernels.use", choice), own
    try:
        yield
    finally:
        _chosen, _own = before


def _reference_with(own):
    """Return a copy of the reference in which the public names of an object stand in place of its own."""
    kernels = {name: getattr(own, name) for name in dir(own) if not name.startswith("_")}
    if not any(inspect.isfunction(getattr(reference, name, None)) for name in kernels):
        raise ValueError(f"kernels.use must be 'fast', 'reference' or have kernels of the reference, got {own!r}")
    copy = importlib.util.module_from_spec(reference.__spec__)
    reference.__spec__.loader.exec_module(copy)  # its functions look names up in the copy, so they find the new ones
    changed = {name: kernel for name, kernel in kernels.items() if kernel is not getattr(reference, name, None)}
    vars(copy).update(changed)  # those that `import *` has brought stay the copy's, or they would look up the old ones
    return copy


def _checked(name, choice):
    if choice not in CHOICES:
        raise ValueError(f"{name} must be 'fast' or 'reference', got {choice!r}")
    return choice
