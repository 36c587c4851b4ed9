"""More than one process: each takes a part of every batch, and the training is that of one process.

    ranks = processes()                                  from launch.py: those that mpiexec has started, or one
    ranks.distribute(model, optimizer, loss_function)    once; then the loop is as ever
    for images, labels in Batches(..., ranks=ranks):     its part of each batch

What a network does to an image depends on no other image, but for three places, in which numbers are exchanged:

    BatchNorm   mean and variance are over the batch: two sums for each channel in forward, two in backward
    the loss    is the mean over the batch: one sum
    gradients   of the weights are sums over images. They lie in one array (see `FlatParameters`), which is summed in
                buckets, each as soon as the backward of its layers is done, while that of the layers before goes on

All else is computed by every process for itself, from equal numbers, so all hold the same bits at each step.

Sums are MPI's (mpi4py), on GPUs NCCL's (CuPy). Both add in an order that the number of processes and the size of an
array decide, and every process is given the same bits; `check_same` looks whether it is so.

Source      Message Passing Interface Forum 2021, "MPI: A Message-Passing Interface Standard, Version 4.0", chapter 6
"""

import contextlib
import hashlib
import math
import os

import numpy as np

from minires import backend
from minires.backend import array_module, to_numpy
from minires.evaluation import checked_batch_size, predict_logits
from minires.kernels import num_threads, set_num_threads
from minires.layers import BatchNorm2d, Dropout
from minires.module import Parameter
from minires.training.folder import UsageError
from minires.training.gradients import GradientSums
from minires.training.nccl import NCCL


class RanksDifferError(RuntimeError):
    """The processes hold different numbers where they must be equal; the message names the rank and the array."""


class OneProcess:
    """A single process, which has all of each batch: nothing is exchanged."""

    rank, size = 0, 1
    total = None  # the number of images in the batch at hand, in all processes, where there are several

    def __bool__(self):
        return type(self) is not OneProcess  # which is as good as None, and layers have None

    def distribute(self, model, optimizer, loss_function, local_batch_norm=False):
        """Let forward, backward and loss be those of the whole batch, and the weights those of rank 0.

        Args        local_batch_norm: BatchNorm takes the statistics of each process's part of the batch by itself
        Limits      a gradient is summed when backward returns: one backward after each zero_grad. A WeightAverage is
                    made afterwards, or it would begin with the weights of each process
        """

    def choose_device(self, device):
        """See `backend.choose_device`; each process of a machine gets a GPU of its own."""
        return backend.choose_device(device)

    def part(self, count):
        """Return the slice of `count` things that is this process's; those of two processes differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, array):
        """Add up the arrays of all processes, in place, and return it."""
        return array

    def largest(self, number):
        """Return the largest of the integers that the processes give."""
        return number

    def gather(self, value):
        """Return a list of what each process gives, by rank."""
        return [value]

    def first(self, function, *args):
        """Call a function in rank 0 alone; what it returns or raises, all processes return or raise."""
        return function(*args)

    def check_same(self, arrays, when):
        """Raise RanksDifferError if the arrays, which are given by name, differ in any bit."""

    def same_statistics(self, model):
        """With local BatchNorm, let all have the running statistics of rank 0."""

    def predict_logits(self, *args, **options):
        """See `minires.predict_logits`; each process does its share of the images, and has the logits of all."""
        return predict_logits(*args, **options)


class Processes(OneProcess):
    """The processes of MPI.COMM_WORLD."""

    def __init__(self, mpi):
        self.mpi, self.world = mpi, mpi.COMM_WORLD
        self.rank, self.size = self.world.rank, self.world.size
        self.neighbours = self.world.Split_type(mpi.COMM_TYPE_SHARED)  # on the same machine
        self.nccl, self.local_batch_norm, self.under_way = None, False, []
        if "MINIRES_NUM_THREADS" not in os.environ:
            cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
            sharing = self.neighbours.allgather(cores).count(cores)  # a launcher may have given others other cores
            set_num_threads(max(1, num_threads() // sharing))

    def distribute(self, model, optimizer, loss_function, local_batch_norm=False):
        loss_function.ranks, self.local_batch_norm = self, local_batch_norm
        self._broadcast(value for _, value in model.named_state())
        for module in model.modules():
            if isinstance(module, Dropout):
                module.key, module.ranks = self.world.bcast(module.key), self
            if isinstance(module, BatchNorm2d) and not local_batch_norm:
                module.ranks = self
        GradientSums(self, model, optimizer.flat)

    def choose_device(self, device):
        if device != "cpu":
            with contextlib.suppress(Exception):  # `backend.choose_device` says what is wrong
                import cupy

                cupy.cuda.Device(self.neighbours.rank % cupy.cuda.runtime.getDeviceCount()).use()
        device = backend.choose_device(device)
        if len(set(devices := self.gather(device))) > 1:
            raise UsageError(f"by rank, the devices are {', '.join(devices)}: name one for all by --device")
        if device == "gpu":
            self.nccl = NCCL(self)
        return device

    def __reduce_ex__(self, _):
        raise TypeError("a model that several processes train cannot be copied: load its state_dict() into another one")

    # What the layers and the loss ask

    @property
    def start(self):
        return self.part(self.total or 0).start  # the position in the batch of the first image that this process has

    def share(self, count):
        """Return which share of the batch the `count` images are that this process has."""
        part = self.part(self.total or 0)
        if not self.total or count != part.stop - part.start:
            raise RuntimeError(
                f"rank {self.rank} of {self.size} has {count} images of a batch of {self.total}: take batches from "
                "Batches(..., ranks=ranks), or set ranks.total to the size of each batch and cut it by ranks.part"
            )
        return count / self.total

    def mean(self, value, count):
        """Return the mean over the batch of what has the mean `value` over the images of this process."""
        total = array_module(value).asarray(value, dtype="float64").reshape(1) * self.share(count)
        return self.sum(total)[0].astype(value.dtype)

    def statistics(self, x, mean, var):
        """Return mean, variance and number of rows of the whole batch, from mean and variance of x.

        Why         E[x^2] - mean^2 loses digits where the mean is large; they are float64's, and x has float32's.
        """
        moments = array_module(x).stack([mean, var]).astype("float64")  # (2, C)
        moments[1] += moments[0] ** 2
        mean_of_all, squares = self.sum(moments * self.share(len(x)))
        var_of_all = array_module(x).maximum(squares - mean_of_all**2, 0)
        return mean_of_all.astype(mean.dtype), var_of_all.astype(var.dtype), self.total * math.prod(x.shape[1:-1])

    def backward_sums(self, x, *sums):
        """Return sums over the whole batch, times the share of it that x has: what they meet is divided by x's rows."""
        total = self.sum(array_module(x).stack(sums).astype("float64")) * self.share(len(x))
        return tuple(total.astype(sums[0].dtype))

    # Exchanges

    def sum(self, array):
        if isinstance(array, np.ndarray):
            self.world.Allreduce(self.mpi.IN_PLACE, array)
        else:
            self.nccl.sum(array)
        return array

    def start_sum(self, array):
        """Begin to add up the arrays of all processes, in place, and return at once; see `finish_sums`."""
        if isinstance(array, np.ndarray):
            self.under_way.append(self.world.Iallreduce(self.mpi.IN_PLACE, array))
        else:
            self.nccl.start_sum(array)

    def progress(self):
        """Let MPI go on with the sums that have begun: its messages move only while it is called."""
        self.mpi.Request.Testall(self.under_way)

    def finish_sums(self):
        """Wait until the sums that have begun are there; on a GPU the computation waits, and not Python."""
        self.mpi.Request.Waitall(self.under_way)
        self.under_way.clear()
        if self.nccl:
            self.nccl.finish_sums()

    def largest(self, number):
        number = np.array([number])
        self.world.Allreduce(self.mpi.IN_PLACE, number, self.mpi.MAX)
        return int(number[0])

    def gather(self, value):
        return self.world.allgather(value)

    def first(self, function, *args):
        result = error = None
        if self.rank == 0:
            try:
                result = function(*args)
            except Exception as raised:
                error = raised
        told = self.world.bcast((result, error))
        result, error = told if self.rank else (result, error)
        if error:
            raise error
        return result

    def _broadcast(self, values):
        for value in values:
            value.data[...] = array_module(value.data).asarray(self.world.bcast(to_numpy(value.data)))

    def check_same(self, arrays, when):
        digests = {name: hashlib.sha256(np.ascontiguousarray(array)).digest() for name, array in arrays.items()}
        right = self.world.bcast(digests)
        different = next((name for name in digests if digests[name] != right[name]), None)
        for rank, (name, machine) in enumerate(self.gather((different, self.mpi.Get_processor_name()))):
            if name:
                raise RanksDifferError(
                    f"after {when}, rank {rank} (on {machine}) has other numbers than rank 0, the first in {name}: its "
                    "processor is of another kind, which rounds clipping and Muon otherwise, or its memory fails: do "
                    "without that machine"
                )

    def same_statistics(self, model):
        if self.local_batch_norm:
            self._broadcast(value for _, value in model.named_state() if not isinstance(value, Parameter))

    def predict_logits(self, model, images, mean, std, batch_size=200, tta=False, stop=lambda: None):
        self.same_statistics(model)
        batch_size, logits = checked_batch_size(images, batch_size), []
        for start in range(0, len(images), batch_size * self.size):
            stop()  # as often in each process
            batch = images[start : start + batch_size * self.size]
            batch = batch[self.part(len(batch))]
            parts = self.gather(predict_logits(model, batch, mean, std, batch_size, tta) if len(batch) else None)
            logits += [part for part in parts if part is not None]
        return np.concatenate(logits)
