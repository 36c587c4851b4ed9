"""MPI without MPI: ranks that are threads of one process, for tests that need no launcher.

    results = run_ranks(3, function)     function(ranks) in three threads, each with its own `Processes`

It has what `Processes` asks of mpi4py, under the same names. Sums are added in the order of the ranks.
"""

# ruff: noqa: N802  (the names are MPI's)

import copy
import threading

import numpy as np

from minires.training.distributed import Processes

SECONDS = 60  # that a rank waits for the others


class Rank:
    """The communicator of one rank."""

    def __init__(self, rank, shared):
        self.rank, self.size, self.shared = rank, len(shared["given"]), shared

    def allgather(self, value):
        self.shared["given"][self.rank] = value
        self.shared["barrier"].wait(SECONDS)
        values = list(self.shared["given"])
        self.shared["barrier"].wait(SECONDS)
        return values

    def bcast(self, value):
        return copy.deepcopy(self.allgather(value)[0])

    def Allreduce(self, in_place, array, operation=np.add.reduce):
        array[...] = operation(np.stack(self.allgather(array.copy())), axis=0)

    def Iallreduce(self, in_place, array):
        self.Allreduce(in_place, array)

    def Split_type(self, kind):
        return self

    def Dup(self):
        return self


class MPI:
    """What `Processes` takes from the module mpi4py.MPI."""

    COMM_TYPE_SHARED, IN_PLACE, MAX = None, None, np.maximum.reduce

    class Request:
        Testall = Waitall = staticmethod(lambda requests: True)

    def __init__(self, rank, shared):
        self.COMM_WORLD = Rank(rank, shared)

    def Get_processor_name(self):
        return "here"


def run_ranks(count, function):
    """Call function(ranks) in `count` threads and return what they return; raise what the first that fails raises."""
    shared = {"given": [None] * count, "barrier": threading.Barrier(count)}
    results, errors = [None] * count, []

    def work(rank):
        try:
            results[rank] = function(Processes(MPI(rank, shared)))
        except Exception as error:
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            shared["barrier"].abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
