"""Memory that the fast CPU kernels use again.

Large fresh memory comes from the operating system, which fills it with zeros first. In a training step of the default
network that would be about a gigabyte, and would take as long as a stage's convolutions. So memory is kept: working
space of a thread from call to call (`scratch`), and the memory of a result until the last array that shows it is gone
(`fresh`).
"""

import math
import os
import threading

import numpy as np

SMALLEST = 2**20  # bytes from which memory is kept; for less, Python's own allocator does the same

_of_this_thread = threading.local()
_taking = threading.Lock()
_idle = []  # memory without a reader, the one that waits longest first


def scratch(name, shape):
    """Return float32 memory of this thread, with whatever it holds.

    It is good until the thread asks for the same name again, and must not be handed out.
    """
    buffers = vars(_of_this_thread)
    count = math.prod(shape)
    if name not in buffers or buffers[name].size < count:
        buffers[name] = np.empty(count, np.float32)
    return buffers[name][:count].reshape(shape)


def padded_images(x, padding, height, width):
    """Copy images into scratch memory, at (padding, padding) of a frame of zeros.

    Shapes      x (n, H, W, C)  ->  (n, height, width, C)
    """
    n, H, W, C = x.shape
    padded = scratch("padded", (n, height, width, C))
    padded[:, :padding] = 0
    padded[:, padding + H :] = 0
    padded[:, padding : padding + H, :padding] = 0
    padded[:, padding : padding + H, padding + W :] = 0
    padded[:, padding : padding + H, padding : padding + W] = x
    return padded


def add_product(a, b, total, first):
    """Add a @ b to the total, or put it there if it is the first."""
    if first:
        np.matmul(a, b, out=total)
    else:
        total += np.matmul(a, b, out=scratch("product", total.shape))


def fresh(shape):
    """Return a float32 array with whatever it holds, for a result: what `np.empty` does, from memory that is kept.

    Memory is given out again only after the array and every view of it are gone, which Python's count of references
    tells. What waits does not add to the peak of such arrays: before new memory is asked for, as much of another
    size is let go.
    """
    size = math.prod(shape)
    if size * 4 < SMALLEST:
        return np.empty(shape, np.float32)
    return np.asarray(_Loan(_take(size))).reshape(shape)


def _take(size):
    with _taking:  # meanwhile others only append to _idle, so an index into it stays right
        for i in range(len(_idle) - 1, -1, -1):  # the newest first: a cache may still hold some of it
            if _idle[i].size == size:
                return _idle.pop(i)
        let_go = 0
        while _idle and let_go < size:
            let_go += _idle.pop(0).size
    return np.empty(size, np.float32)


def _forget_the_lock():
    """After a fork, the child's copy of the lock may be held by a thread that it does not have."""
    global _taking
    _taking = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_the_lock)


class _Loan:
    """The owner of an array's memory, as NumPy sees it: every view refers to it, and it goes when the last one does."""

    def __init__(self, memory):
        self.memory = memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self, idle=_idle):  # as a default, for the names of the module may be gone when the program ends
        idle.append(self.memory)
