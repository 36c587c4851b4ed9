"""How the fast CPU kernels share their work among cores.

NumPy's functions run on one core, but release Python's lock while they compute, so plain threads can run several at a
time. A kernel cuts its work into tasks (`blocks`, `chunks_of_images`) and hands them to `run`. Two rules make the
results the same bits for any number of threads: the shape of the problem alone decides where it is cut, and what
several tasks add up is kept apart until all are done, then added in the order of the tasks (`groups_of`,
`sum_of_groups`).

Matrix products have threads of their own, in the BLAS library that NumPy calls. `one_blas_thread` holds it to one, so
that the two kinds do not fight for the cores.
"""

import collections
import concurrent.futures
import contextlib
import contextvars
import ctypes
import functools
import math
import numbers
import os
import pathlib
import threading

import numpy as np

# How large the pieces are, found by trying on AMD; on Intel nothing was better by more than 3 % (examples/RESULTS.md).
# They decide in which order sums are added.
BLOCK = 2**19  # numbers in a piece for elementwise work: with smaller ones, threads wait for Python's lock too often
SMALLEST_BLOCK = 2**18  # a piece is an eighth of all if that is less than BLOCK, for more threads; but not below this
GROUPS = 16  # sums that are kept apart: as many threads can share the work, and no more

_calls = threading.RLock()  # one kernel at a time: the BLAS library has one number of threads for the whole process
_chosen = None
_pool = None
_blas_before = None  # the number of BLAS threads to go back to, while a kernel runs


def num_threads():
    """Return how many threads the kernels use.

    Without `set_num_threads`, that is MINIRES_NUM_THREADS, and without that the number of cores this process may use.

    Raises      ValueError if MINIRES_NUM_THREADS is no integer of at least 1
    """
    global _chosen
    if _chosen is None:
        text = os.environ.get("MINIRES_NUM_THREADS")
        _chosen = usable_cores() if text is None else _integer("MINIRES_NUM_THREADS", text)
    return _chosen


def set_num_threads(n):
    """Let the kernels use n threads; None goes back to MINIRES_NUM_THREADS or the cores at hand."""
    global _chosen, _pool
    with _calls:
        _chosen = None if n is None else _integer("set_num_threads: n", n)
        if _pool:
            _pool.shutdown()
        _pool = None


def _integer(name, value):
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or not isinstance(value, str | numbers.Integral):
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return number


def usable_cores(cgroup="/sys/fs/cgroup"):
    """Return how many cores this process may use: those it is bound to, and no more than its container is granted.

    A container's grant is a quota of processor time per period, which Linux keeps in files: cpu.max in version 2 of
    control groups, two files in version 1. A share of a core counts as a whole one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):
            quota, period = " ".join(pathlib.Path(cgroup, file).read_text() for file in files).split()
            if int(quota) > 0:  # "max", or -1 in version 1: no limit
                cores = min(cores, math.ceil(int(quota) / int(period)))
    return cores


def run(work, tasks):
    """Call work(task) for every task, several at a time, and return the results in the order of the tasks.

    The threads, of which the caller is one, take the next task whenever they are free. A task must not call `run`.
    """
    tasks = list(tasks)
    results = [None] * len(tasks)
    waiting = collections.deque(enumerate(tasks))

    def take_tasks():
        while waiting:
            try:
                i, task = waiting.popleft()
            except IndexError:  # another thread was quicker
                return
            try:
                results[i] = work(task)
            except BaseException:
                waiting.clear()
                raise

    others = []
    with one_blas_thread():
        try:
            for _ in range(min(num_threads(), len(tasks)) - 1):
                context = contextvars.copy_context()  # np.errstate of the caller, which a thread does not inherit
                others.append(_threads().submit(context.run, take_tasks))
            take_tasks()
            concurrent.futures.wait(others)
        except BaseException:  # Ctrl-C among them
            waiting.clear()
            raise
        finally:
            # again, as the first wait may have been interrupted: none may go on writing
            concurrent.futures.wait(others)
        for other in others:
            other.result()  # raises what the thread has raised
    return results


def blocks(rows, row_size, size=None):
    """Cut rows of row_size numbers into slices of about `size` numbers, by default a size for elementwise work."""
    size = size or min(BLOCK, max(SMALLEST_BLOCK, rows * row_size // 8))
    step = max(1, size // row_size)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def chunks_of_images(N, rows_per_image, rows):
    """Cut N images into slices of about `rows` rows."""
    n = max(1, rows // rows_per_image)
    return [slice(start, min(start + n, N)) for start in range(0, N, n)]


def groups_of(chunks):
    """Share chunks out to at most GROUPS lists of neighbours."""
    size = -(-len(chunks) // GROUPS)
    return [chunks[start : start + size] for start in range(0, len(chunks), size)]


def sum_of_groups(partial):
    """Add the partial sums of groups, in their order.

    Shapes      partial (groups, ...)  ->  (...)
    """
    flat = partial.reshape(len(partial), -1)
    total = np.empty(flat.shape[1], flat.dtype)
    run(lambda part: np.add.reduce(flat[:, part], axis=0, out=total[part]), blocks(total.size, 1))
    return total.reshape(partial.shape[1:])


def _threads():
    global _pool
    if _pool is None:
        _pool = concurrent.futures.ThreadPoolExecutor(max(1, num_threads() - 1), "minires")
    return _pool


def _forget_threads():
    """After a fork, the child has none of the threads, which may have held the lock and BLAS to one thread."""
    global _pool, _calls, _blas_before
    _pool, _calls = None, threading.RLock()
    if _blas_before:
        _blas_threads()[1](_blas_before)
        _blas_before = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


@contextlib.contextmanager
def one_blas_thread():
    """Hold NumPy's matrix products to one thread, and other callers of the kernels back, until the block is left."""
    global _blas_before
    get, put = _blas_threads()
    with _calls:
        before, outer = get(), _blas_before
        try:
            _blas_before = outer or before
            put(1)
            yield
        finally:
            put(before)
            _blas_before = outer


@functools.cache
def _blas_threads():
    """Return the functions that tell and set the number of threads of the OpenBLAS in NumPy's wheels.

    With another BLAS they do nothing: there the user sets its environment variable, such as MKL_NUM_THREADS=1.
    """
    package = pathlib.Path(np.__file__).parent
    for path in [*package.parent.glob("numpy.libs/*openblas*"), *package.glob(".dylibs/*openblas*")]:
        for ending in ("64_", ""):
            with contextlib.suppress(OSError, AttributeError):
                library = ctypes.CDLL(str(path))
                return (
                    getattr(library, f"scipy_openblas_get_num_threads{ending}"),
                    getattr(library, f"scipy_openblas_set_num_threads{ending}"),
                )
    return (lambda: 1), (lambda n: None)
