"""Which processes were started together? Those of mpiexec or srun, found by the variables that these set.

MPI is imported where there are several, or where it is asked for. Rank 0 alone prints. A process that ends by an error
of its own ends the others and says its rank.
"""

import functools
import hashlib
import os
import sys
import time
import traceback
import warnings

import numpy as np

from minires.training.distributed import OneProcess, Processes
from minires.training.folder import UsageError

INSTALL = 'pip install -e ".[mpi]"'
LAUNCHERS = (  # how many processes there are and which one this is: by Open MPI, by MPICH and its kin, by Slurm's srun
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
GRACE = 1.5  # seconds in which all have come to an end as well, or one ends the others
PASSED_ON = 0.5  # seconds in which a launcher passes on what was printed: MPICH's throws away the rest in an Abort


def processes(distributed=False):
    """Return the processes that this one was started with by mpiexec or srun; they are one where it was started alone.

    Where there are several, an error that nobody catches ends them all.

    Args        distributed: True takes MPI also where no launcher is seen
    Raises      UsageError, in one of them, where MPI is missing or is not the launcher's
    """
    counts = {name: _number(name) for name, _ in LAUNCHERS if _number(name) > 1}
    if not counts and not distributed:
        return OneProcess()
    name = next(iter(counts), "--distributed")
    try:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the wrong launcher, which is told below
                from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # RuntimeError: the library itself is not there
            reason = str(error).splitlines()[0]
            raise UsageError(
                f"{name} asks for several processes, which takes mpi4py ({reason}): {INSTALL}, which brings an mpiexec "
                "as well"
            ) from error
        if counts and MPI.COMM_WORLD.size not in counts.values():
            library = " ".join(MPI.Get_library_version().split()[:3])
            raise UsageError(
                f"by {name} this is one of {counts[name]} processes, but mpi4py's MPI ({library}) sees "
                f"{MPI.COMM_WORLD.size}: start them by the mpiexec of that MPI, which {INSTALL} puts into "
                f"{os.path.dirname(sys.executable)}, or unset {name} to train in one process"
            )
    except UsageError:
        if counts and all(_number(rank) for size, rank in LAUNCHERS if size in counts):  # rank 0 says it
            sys.exit(2)
        raise
    return _world(MPI)


def _number(variable):
    """Return the integer that an environment variable holds, or 0."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0


@functools.cache
def _world(mpi):
    ranks = Processes(mpi)
    ranks.leaving = ranks.world.Dup()  # for `leave`, whatever the others wait for

    def end_all(kind, error, trace):
        traceback.print_exception(kind, error, trace, file=sys.__stderr__)
        print(f"error: rank {ranks.rank}: {kind.__name__}: {error}", file=sys.__stderr__, flush=True)
        end_world(ranks, 1)

    sys.excepthook = end_all
    if ranks.rank:
        sys.stdout = sys.stderr = open(os.devnull, "w", errors="replace")  # noqa: SIM115  (until the process ends)
    return ranks


def end_world(ranks, code):
    """End all processes, once the launcher has passed on their last lines. Abort may come back before it is done."""
    time.sleep(PASSED_ON)
    ranks.world.Abort(code)
    time.sleep(GRACE)
    os._exit(code)


def leave(ranks, code, line):
    """Before a process ends with an exit code and perhaps a line: return the line, or "" where rank 0 says the same.

    If the others do not come to an end within GRACE, all are ended at once.
    """
    if not code or ranks.size == 1:
        return line
    ends = np.zeros(ranks.size, np.int64)
    end = np.frombuffer(hashlib.sha256(f"{code} {line}".encode()).digest(), np.int64, 1)
    request, deadline = ranks.leaving.Iallgather(end, ends), time.monotonic() + GRACE
    while not request.Test():
        if time.monotonic() > deadline:
            print(f"error: rank {ranks.rank}: {line or f'exit code {code}'}", file=sys.__stderr__, flush=True)
            end_world(ranks, code)
        time.sleep(0.01)
    if ranks.rank == 0 or not line:
        return line
    sys.stderr = sys.__stderr__
    return "" if ends[0] == end[0] else f"rank {ranks.rank}: {line}"
