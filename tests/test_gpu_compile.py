"""Every CUDA kernel compiles for the GPUs of three generations and keeps its numbers in registers; no GPU is needed.

NVRTC compiles gpu.cu with the options and headers that CuPy gives it on a GPU, so that a header that the wheels lack is
missed here too. A kernel that needs more registers than a thread may have spills the rest to memory, and an array whose
index only the run knows lies in memory from the start, in a stack frame. Either is silent and slow; ptxas, the last
stage of NVRTC, says so in its log.

Sources     NVRTC documentation, "Supported Compile Options"; CUDA Compiler Driver NVCC, --ptxas-options=-v. CuPy's own
            way to NVRTC, cupy.cuda.compiler.compile_using_nvrtc, asks the driver for a GPU first
"""

import functools
import pathlib
import re

import pytest

from minires.kernels import gpu

SOURCE = pathlib.Path(gpu.__file__).parent / "gpu.cu"
ARCHITECTURES = ("80", "90", "100")  # A100, H100 and H200, B200
SPILLS = r"Function properties for (\w+)\s.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"


@functools.cache
def nvrtc():
    """CuPy's binding of NVRTC and the options it always gives; a skip where either is not installed."""
    try:
        from cupy._core.core import assemble_cupy_compiler_options
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:  # CuPy is missing, or the library that it loads
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        pytest.skip(f'needs CuPy and NVRTC: pip install -e ".[gpu]" ({reason})')
    return nvrtc, assemble_cupy_compiler_options(("-std=c++17", "--device-as-default-execution-space"))


def bytes_in_memory(code, names, architecture):
    """Compile, and return for each function the bytes (of the stack frame, that spills store, that spills load)."""
    binding, options = nvrtc()
    program = binding.createProgram(code, "gpu.cu", (), ())
    try:
        for name in names:
            binding.addNameExpression(program, name)
        try:
            binding.compileProgram(program, (*options, f"-arch=sm_{architecture}", "--ptxas-options=-v"))
        except binding.NVRTCError:
            pytest.fail(binding.getProgramLog(program)[:3000])
        log = binding.getProgramLog(program)
        functions = {binding.getLoweredName(program, name): name for name in names}
    finally:
        binding.destroyProgram(program)
    sizes = {functions.get(name, name): tuple(map(int, rest)) for name, *rest in re.findall(SPILLS, log)}
    assert set(names) <= set(sizes), f"the log does not speak of {set(names) - set(sizes)}:\n{log[:1000]}"
    assert "warning" not in log, log
    return sizes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_and_stays_in_registers(architecture):
    sizes = bytes_in_memory(SOURCE.read_text(), gpu.kernel_names(), architecture)
    assert {name: size for name, size in sizes.items() if size != (0, 0, 0)} == {}


def test_an_array_with_an_index_that_only_the_run_knows_would_be_seen():
    code = """
    __global__ void looks_up(const int* index, float* out) {
        float table[100];
        for (int i = 0; i < 100; ++i) table[index[i]] = i;
        out[threadIdx.x] = table[threadIdx.x];
    }"""
    assert bytes_in_memory(code, ["looks_up"], "90") == {"looks_up": (400, 0, 0)}


def test_numbers_that_find_no_register_would_be_seen():
    code = """
    __global__ void __launch_bounds__(1024) keeps(const float* x, float* out) {  // 64 registers for each thread
        float kept[200];
        #pragma unroll
        for (int i = 0; i < 200; ++i) kept[i] = x[i * 1024 + threadIdx.x];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 200; ++i) out[i * 1024 + threadIdx.x] = kept[i] * kept[(i + 100) % 200];
    }"""
    assert 0 not in bytes_in_memory(code, ["keeps"], "90")["keeps"]
