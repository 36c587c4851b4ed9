"""Sums of the arrays of several GPUs, by NCCL through CuPy; MPI starts the processes and brings NCCL's id to each.

Source      NVIDIA's documentation of NCCL; of CuPy, `cupy.cuda.nccl`
"""

import importlib

from minires import backend
from minires.training.folder import UsageError


class NCCL:
    """Sums on GPUs, by NCCL: in the order of the computation, or beside it."""

    def __init__(self, ranks):
        cupy = backend.gpu_library()
        try:
            nccl = importlib.import_module(f"{cupy.__name__}.cuda.nccl")
            identity = ranks.first(nccl.get_unique_id)
        except (ImportError, AttributeError) as error:  # AttributeError: CuPy's own stand-in for what is missing
            raise UsageError(
                f'to train on several GPUs takes NCCL ({error}): pip install -e ".[nccl]" (beside the extra cuda12: '
                "nvidia-nccl-cu12)"
            ) from error
        device = cupy.cuda.Device()
        gpus = ranks.gather((ranks.mpi.Get_processor_name(), device.pci_bus_id))
        if gpus.count(gpus[ranks.rank]) > 1:
            raise UsageError(
                f"there are more processes than GPUs on {gpus[ranks.rank][0]}: start at most "
                f"{cupy.cuda.runtime.getDeviceCount()} there, or add --device cpu"
            )
        self.communicator = nccl.NcclCommunicator(ranks.size, identity, ranks.rank)
        self.types = {"float32": nccl.NCCL_FLOAT32, "float64": nccl.NCCL_FLOAT64}
        self.add, self.cuda = nccl.NCCL_SUM, cupy.cuda
        self.stream = cupy.cuda.Stream(non_blocking=True)  # beside that of the computation
        self.under_way = False

    def sum(self, array, stream=None):
        where, kind = array.data.ptr, self.types[array.dtype.name]
        stream = stream or self.cuda.get_current_stream()
        self.communicator.allReduce(where, where, array.size, kind, self.add, stream.ptr)

    def start_sum(self, array):
        self.stream.wait_event(self.cuda.get_current_stream().record())
        self.sum(array, self.stream)
        self.under_way = True

    def finish_sums(self):
        if self.under_way:  # in a recorded step, a stream that has not joined in could not be waited for
            self.cuda.get_current_stream().wait_event(self.stream.record())
        self.under_way = False
