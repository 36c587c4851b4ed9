"""CuPy's RawModule on a CPU: CUDA source compiled as C++ beside cuda_emulator.h, and called through ctypes.

It serves the stand-in of strict_array.py, so that gpu.py runs whole without a GPU: what it launches, with which
arguments and how large, and what the kernels then do.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).parent
COMPILER = shutil.which("g++") if sys.platform == "linux" else None  # elsewhere <ucontext.h> is missing, or refuses
OPTIONS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w")
if platform.machine() == "x86_64":
    OPTIONS += ("-mf16c",)
if COMPILER:
    check = [COMPILER, "-xc++", "-fsyntax-only", "-"]
    if subprocess.run(check, input=b"_Float16 x;", capture_output=True).returncode:
        COMPILER = None  # one that is too old


class RawModule:
    def __init__(self, code, options=(), name_expressions=()):
        self.names = list(name_expressions)
        launchers = "".join(
            f'extern "C" void launch_{i}(const unsigned* blocks, const unsigned* threads, void** arguments) '
            f"{{ emulator::launch({name}, blocks, threads, arguments); }}\n"
            for i, name in enumerate(self.names)
        )
        code = code.replace("extern __shared__", "extern")  # here __shared__ means static, and both at once cannot be
        self.compiled = build(f'#include "cuda_emulator.h"\n{code}\n{launchers}')

    def get_function(self, name):
        return Kernel(getattr(self.compiled, f"launch_{self.names.index(name)}"))


@functools.cache
def build(code):
    """Compile and load; kept on disk, since it takes half a minute."""
    key = hashlib.sha256((code + (HERE / "cuda_emulator.h").read_text()).encode()).hexdigest()[:20]
    library = pathlib.Path(tempfile.gettempdir(), f"minires-cuda-emulator-{os.getuid()}", f"{key}.so")
    if not library.exists():
        library.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            source, result = pathlib.Path(folder, "kernels.cpp"), pathlib.Path(folder, "kernels.so")
            source.write_text(code)
            command = [COMPILER, *OPTIONS, f"-I{HERE}", str(source), "-o", str(result)]
            subprocess.run(command, check=True, env={**os.environ, "LC_ALL": "C"})  # errors in English, for the lessons
            os.replace(result, library)
    return ctypes.CDLL(str(library))


class Kernel:
    def __init__(self, function):
        self.function = function
        self.max_dynamic_shared_size_bytes = 48 * 2**10

    def __call__(self, blocks, threads, arguments, *, shared_mem=0):
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        assert np.prod(threads) <= 1024
        values = [as_argument(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        sizes = ((ctypes.c_uint * 3)(*size, *[1] * (3 - len(size))) for size in (blocks, threads))
        self.function(*sizes, pointers)


def as_argument(value):
    """What CuPy puts where the driver finds an argument: an array's address, or the number in its width."""
    if hasattr(value, "data") and hasattr(value.data, "ptr"):
        return np.array([value.data.ptr], np.uint64)
    if isinstance(value, bool | int):
        return np.array([value], np.bool_ if isinstance(value, bool) else np.int64)
    assert isinstance(value, np.generic), f"{value!r} has no width of its own"
    return np.array([value])
