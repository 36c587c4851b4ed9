"""CPU or GPU: which array library an array belongs to, and how arrays move between the two.

minires computes with NumPy on the CPU and with CuPy on the GPU. Code that builds on this file asks an array for its
library (`xp = array_module(x)`) and does not import CuPy itself. CuPy is imported on the first use of the GPU, since
the import alone takes seconds and touches the disk.

Source      CuPy's installation guide, for the packages and the environment variables named in the messages
"""

import functools
import importlib
import re
import sys

import numpy as np

DEVICES = ("cpu", "gpu")
INSTALL = 'pip install -e ".[gpu]" (or ".[cuda12]" where nvidia-smi shows CUDA Version 12)'
NO_GPU = "the NVIDIA driver shows no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES, or use the CPU"


class GPUError(RuntimeError):
    """The GPU cannot be used; the message names the cause and the way out."""


def array_module(x):
    """Return the library, NumPy or CuPy, that the array x belongs to: the top package of its type.

    A subclass of NumPy's array is NumPy's, wherever it is defined: np.memmap, for one, which reads from a file.
    """
    if isinstance(x, np.ndarray):
        return np
    return sys.modules[type(x).__module__.partition(".")[0]]


@functools.cache
def gpu_library():
    """Return CuPy once it has been seen to work on this machine.

    Importing CuPy succeeds on machines where nothing runs, so each thing that training needs is tried once:
    the driver, a device, a kernel compiled on the spot, and a matrix product.

    Raises      GPUError with one line for the first cause found
    """
    try:
        cupy = importlib.import_module("cupy")
    except ModuleNotFoundError as error:
        raise GPUError(f"the GPU needs CuPy, which is not installed: {INSTALL}") from error
    except OSError as error:  # CuPy creates its cache folder when it is imported
        raise GPUError(
            f"CuPy could not create its cache folder ({error}): set CUPY_CACHE_DIR to a writable folder"
        ) from error
    except ImportError as error:
        raise GPUError(f"CuPy is installed but does not load ({_first_line(error)}): {INSTALL}") from error

    try:
        driver = cupy.cuda.runtime.driverGetVersion()
    except Exception as error:
        raise GPUError(f"CuPy does not reach the CUDA runtime ({_first_line(error)}): {INSTALL}") from error
    if driver == 0:
        raise GPUError("no NVIDIA driver found: install one, see that nvidia-smi lists the GPU, or use the CPU")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        if "cudaErrorNoDevice" in str(error):
            raise GPUError(NO_GPU) from error
        raise GPUError(
            f"the NVIDIA driver (CUDA {driver // 1000}.{driver % 1000 // 10}) does not serve this CuPy "
            f"({_first_line(error)}): update the driver, or make a fresh virtual environment, where a CuPy for another "
            f"CUDA is not in the way, and {INSTALL}"
        ) from error
    if count == 0:
        raise GPUError(NO_GPU)

    try:
        ones = cupy.ones((16, 16), dtype=cupy.float32) + 1.0
        cupy.cuda.Device().synchronize()
    except Exception as error:
        raise GPUError(
            f"CuPy cannot compile and run a kernel ({_first_line(error)}); the CUDA compiler NVRTC and its headers "
            f"come with {INSTALL}"
        ) from error
    try:
        product = float((ones @ ones).sum())  # 16 * 16 sums of 16 products 2 * 2
    except Exception as error:
        raise GPUError(f"CuPy cannot multiply matrices ({_first_line(error)}); cuBLAS comes with {INSTALL}") from error
    if product != 16 * 16 * 16 * 2 * 2:
        raise GPUError(f"the GPU computed a wrong matrix product ({product}, expected 16384): update the driver")
    return cupy


def _first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]


def choose_device(device="auto"):
    """Return "cpu" or "gpu"; "auto" takes the GPU where there is a usable one.

    Raises      GPUError if "gpu" is asked for and cannot be used: there is no silent way back to the CPU; ValueError
                for another word
    """
    if device == "auto":
        try:
            gpu_library()
        except GPUError:
            return "cpu"
        return "gpu"
    _check_device(device)
    if device == "gpu":
        gpu_library()
    return device


def to_device(x, device):
    """Return x as an array of the device, "cpu" or "gpu"; an array that is there already is returned itself."""
    _check_device(device)
    return to_numpy(x) if device == "cpu" else gpu_library().asarray(x)


def to_numpy(x):
    """Return x as a NumPy array on the host; one that is there already is returned itself."""
    return np.asarray(x) if array_module(x) is np else array_module(x).asnumpy(x)


def memory_shortage(error):
    """Say in words what a MemoryError was about: NumPy's message, or on a GPU the bytes wanted and the bytes free."""
    wanted = re.search(r"allocating ([\d,]+) bytes", str(error))
    if "cupy" not in type(error).__module__ or not wanted:
        return str(error) or "no more memory"
    cupy = gpu_library()
    cupy.get_default_memory_pool().free_all_blocks()
    sizes = int(wanted[1].replace(",", "")), cupy.cuda.runtime.memGetInfo()[0]
    return "{:,.0f} MB more were wanted, {:,.0f} MB of the GPU are free".format(*(size / 2**20 for size in sizes))


def _check_device(device):
    if device not in DEVICES:
        raise ValueError(f"device must be 'cpu' or 'gpu', got {device!r}")
