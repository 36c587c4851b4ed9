"""The arithmetic: pure functions, arrays in and arrays out, in sets that offer the same names.

A layer keeps state and asks `kernels_for(x)` for the set that serves its arrays. `reference` is the mathematics and
serves every array, NumPy's and CuPy's alike. A faster set offers the same names with the same arguments, takes from
the reference what it has no better version of, and is held equal to it by a test: `cpu` serves NumPy's float32, `gpu`
CuPy's float32 and float16.

To step through the mathematics, or to see what the speed costs in digits, run with MINIRES_KERNELS=reference, or in
Python:

    with minires.kernels.use("reference"):
        ...

MINIRES_NUM_THREADS or `minires.kernels.set_num_threads(n)` says how many cores the fast kernels use; without, all.
"""

import contextlib
import os

import numpy as np

from minires.backend import array_module
from minires.kernels import cpu, gpu, reference
from minires.kernels.threads import num_threads, set_num_threads  # noqa: F401  (part of what this package offers)

CHOICES = ("fast", "reference")
_chosen = None


def kernels_for(x):
    """Return the set of kernels that serves the array x. An empty one has nothing to cut into pieces."""
    if not x.size or chosen() == "reference":
        return reference
    if type(x) is np.ndarray:
        return cpu if x.dtype == np.float32 else reference
    return gpu if x.dtype in (np.float32, np.float16) and gpu.is_for(array_module(x)) else reference


def chosen():
    """Return "fast" or "reference": what `use` has set, else MINIRES_KERNELS, else "fast".

    Raises      ValueError for another value of MINIRES_KERNELS
    """
    if _chosen is not None:
        return _chosen
    return _checked("MINIRES_KERNELS", os.environ.get("MINIRES_KERNELS", "fast"))


@contextlib.contextmanager
def use(choice):
    """Take the fast kernels ("fast") or the mathematics ("reference") inside a with block.

    Raises      ValueError for another choice
    """
    global _chosen
    before, _chosen = _chosen, _checked("kernels.use", choice)
    try:
        yield
    finally:
        _chosen = before


def _checked(name, choice):
    if choice not in CHOICES:
        raise ValueError(f"{name} must be 'fast' or 'reference', got {choice!r}")
    return choice
