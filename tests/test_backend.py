"""The probe names each cause why a GPU cannot be used, and arrays go where they are sent."""

import sys
import types

import numpy as np
import pytest

from minires import backend
from minires.backend import GPUError, array_module, choose_device, to_device, to_numpy


@pytest.fixture
def fake_cupy(monkeypatch):
    """A CuPy that works, made of NumPy; a test breaks one part of it."""
    cupy = types.ModuleType("cupy")
    cupy.float32 = np.float32
    cupy.ones = np.ones
    cupy.asarray = np.asarray
    runtime = types.SimpleNamespace(driverGetVersion=lambda: 13000, getDeviceCount=lambda: 1)
    cupy.cuda = types.SimpleNamespace(runtime=runtime, Device=lambda: types.SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    backend.gpu_library.cache_clear()
    yield cupy
    backend.gpu_library.cache_clear()


def fail(error):
    def failing(*args, **kwargs):
        raise error

    return failing


def test_a_working_gpu_is_taken(fake_cupy):
    assert choose_device("gpu") == "gpu"
    assert choose_device("auto") == "gpu"


def test_without_cupy_the_message_gives_the_pip_command(fake_cupy, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(GPUError, match=r'not installed: pip install -e "\.\[gpu\]" \(or "\.\[cuda12\]" '):
        choose_device("gpu")
    assert choose_device("auto") == "cpu"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError("/nowhere/.cupy"), "cache folder .*/nowhere/.cupy.*CUPY_CACHE_DIR"),
        (ImportError("libfoo.so is missing"), "does not load .*libfoo.so is missing.*pip install"),
    ],
)
def test_an_import_that_fails_is_told_from_a_missing_package(fake_cupy, monkeypatch, error, message):
    monkeypatch.setattr(backend.importlib, "import_module", fail(error))
    with pytest.raises(GPUError, match=message):
        choose_device("gpu")


def test_no_cuda_runtime(fake_cupy):
    fake_cupy.cuda.runtime.driverGetVersion = fail(RuntimeError("libcudart is missing"))
    with pytest.raises(GPUError, match=r"CUDA runtime .*libcudart is missing"):
        choose_device("gpu")


def test_no_driver(fake_cupy):
    fake_cupy.cuda.runtime.driverGetVersion = lambda: 0
    with pytest.raises(GPUError, match="no NVIDIA driver found"):
        choose_device("gpu")


def test_a_driver_that_is_too_old(fake_cupy):
    fake_cupy.cuda.runtime.driverGetVersion = lambda: 11080
    fake_cupy.cuda.runtime.getDeviceCount = fail(RuntimeError("cudaErrorInsufficientDriver"))
    with pytest.raises(GPUError, match=r"CUDA 11\.8.*cudaErrorInsufficientDriver.*update the driver, or .*fresh"):
        choose_device("gpu")


@pytest.mark.parametrize(
    "device_count", [lambda: 0, fail(RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected"))]
)
def test_no_device(fake_cupy, device_count):
    fake_cupy.cuda.runtime.getDeviceCount = device_count
    with pytest.raises(GPUError, match=r"shows no GPU.*CUDA_VISIBLE_DEVICES"):
        choose_device("gpu")


def test_a_kernel_that_does_not_compile(fake_cupy):
    fake_cupy.ones = fail(RuntimeError("nvrtc: error\nmore lines"))
    with pytest.raises(GPUError, match=r"compile and run a kernel \(RuntimeError: nvrtc: error\)"):
        choose_device("gpu")


def test_a_product_that_fails(fake_cupy):
    class NoProduct(np.ndarray):
        def __matmul__(self, other):
            raise RuntimeError("libcublas is missing")

    fake_cupy.ones = lambda shape, dtype: np.ones(shape, dtype).view(NoProduct)
    with pytest.raises(GPUError, match=r"multiply matrices .*libcublas is missing"):
        choose_device("gpu")


def test_a_product_that_is_wrong(fake_cupy):
    fake_cupy.ones = lambda shape, dtype: np.full(shape, 2, dtype)
    with pytest.raises(GPUError, match="wrong matrix product"):
        choose_device("gpu")


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="device must be 'cpu' or 'gpu', got 'tpu'"):
        choose_device("tpu")
    with pytest.raises(ValueError, match="got 'cuda'"):
        to_device(np.zeros(3), "cuda")


def test_arrays_know_their_library_and_move(strict_gpu):
    x = np.arange(3.0)
    assert array_module(x) is np
    assert array_module(x.sum()) is np
    assert to_device(x, "cpu") is x
    moved = to_device(x, "gpu")
    assert array_module(moved) is strict_gpu
    np.testing.assert_array_equal(to_numpy(moved), x)
