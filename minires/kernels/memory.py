"""Memory that the fast CPU kernels use again.

Large fresh memory comes from the operating system, which fills it with zeros first. In a training step of the default
network that would be about a gigabyte, and would take as long as a stage's convolutions. So memory is kept: working
space of a thread from call to call (`scratch`), with the views of it that a kernel works with (`workspace`), and the
memory of a result until the last array that shows it is gone (`fresh`).
"""

import contextlib
import math
import mmap
import os
import threading
from typing import NamedTuple

import numpy as np

SMALLEST = 2**20  # bytes from which memory is kept; for less, Python's own allocator does the same
LARGE_PAGE, LINE = 2**21, 64  # bytes, of memory and of a cache
MOST_VIEWS = 1000  # that a thread keeps; the default network has about 100

_taking = threading.Lock()
_idle = []  # memory without a reader, the one that waits longest first


class _OfThisThread(threading.local):
    """What one thread works in."""

    def __init__(self):
        self.memory = {}  # by name
        self.views = {}  # what `scratch` and `workspace` have returned, by what was asked for
        self.framed = None  # the Frame that was filled last


_mine = _OfThisThread()


def scratch(name, shape):
    """Return float32 memory of this thread, with whatever it holds.

    It is good until the thread asks for the same name again, and must not be handed out.
    """
    view = _mine.views.get((name, shape))
    if view is None:
        count = math.prod(shape)
        if name not in _mine.memory or _mine.memory[name].size < count:
            _mine.views.clear()  # or they would hold the smaller memory as well
            place = [*_mine.memory, name].index(name)  # the name's own, also when its memory grows
            _mine.memory[name] = _in_large_pages(count, first_line=37 * place)
        view = _keep((name, shape), _mine.memory[name][:count].reshape(shape))
    return view


def _in_large_pages(count, first_line):
    """Return memory for float32 numbers, in pages of 2 MB where Linux has them to give.

    Why         A processor keeps a table of the pages that it used last. Of those of 4 kB, it holds less than a task
                works in, and in a virtual machine a page that is not in the table costs most.

    Args        first_line: of the page, or all memory would want the same part of a cache first
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(count, np.float32)
    size = first_line * LINE + count * 4
    try:
        memory = mmap.mmap(-1, 2 * LARGE_PAGE + size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # out of memory, if NumPy finds none either: it says so with a MemoryError
        return np.empty(count, np.float32)
    array = np.frombuffer(memory, np.uint8)
    start = -array.ctypes.data % LARGE_PAGE  # what lies before it is never written to, and takes no memory
    pages = max(1, round(size / LARGE_PAGE))  # after the first, less than half a page at the end is left to small ones
    with contextlib.suppress(OSError):  # a Linux built without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, pages * LARGE_PAGE)
    return array[start : start + size][first_line * LINE :].view(np.float32)


def workspace(make, *shape):
    """Return make(*shape), views of scratch memory, which are made once in each thread and kept.

    Why         A task's data push the interpreter's own out of the cache. To make a few views then takes as long as
                copying an image, and keeps Python's lock from the other threads.

    Args        make: a function of a module; a lambda would be another one each time
    """
    views = _mine.views.get((make, shape))
    return _keep((make, shape), make(*shape)) if views is None else views


def _keep(key, views):
    if len(_mine.views) >= MOST_VIEWS:
        _mine.views.clear()
    _mine.views[key] = views
    return views


class Frame(NamedTuple):
    """Scratch memory for images with zeros around them."""

    padded: np.ndarray  # (n, height, width, C)
    inside: np.ndarray  # (n, H, W, C), a view of it, from (padding, padding)

    def fill(self, x):
        """Copy images inside."""
        if _mine.framed is not self:  # else the zeros are still there
            self.padded[...] = 0
            _mine.framed = self
        self.inside[...] = x


def frame(x_shape, padding, height, width):
    """Return a Frame for images of x_shape. It is good until the thread fills another one.

    Args        padding: rows of zeros above, and columns of zeros on the left; height, width: with all zeros
    """
    n, H, W, C = x_shape
    padded = scratch("padded", (n, height, width, C))
    return Frame(padded, padded[:, padding : padding + H, padding : padding + W])


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
