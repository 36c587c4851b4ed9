"""What the tests share: a seeded generator, the real data where it is at hand, and a device without a GPU."""

import os
import signal

import numpy as np
import pytest
import strict_array

from minires import backend, cifar10


def pytest_collection_modifyitems(items):
    """Skip what takes long, unless it is asked for, and what needs a GPU, with the reason, where there is none."""
    if not os.environ.get("MINIRES_TEST_FULL"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="takes long; MINIRES_TEST_FULL=1 runs it, as CI does"))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    try:
        backend.gpu_library()
    except backend.GPUError as error:
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason=str(error)))


@pytest.fixture
def rng():
    return np.random.default_rng(12345)


@pytest.fixture(scope="session")
def real_data():
    """The whole of CIFAR-10."""
    try:
        return cifar10.load()
    except cifar10.DataError as error:
        pytest.skip(str(error))


@pytest.fixture
def strict_gpu(monkeypatch):
    """Let "gpu" mean arrays that refuse to mix with NumPy's, so that host arrays in device code are caught."""
    monkeypatch.setattr(backend, "gpu_library", lambda: strict_array)
    return strict_array


def relative_error(actual, expected):
    """The norm of the difference over the norm of what was expected."""
    difference = np.linalg.norm(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    return difference / max(np.linalg.norm(np.asarray(expected, np.float64)), 1e-300)


@pytest.fixture
def hangups_count():
    """Let processes that a test starts hear a hangup, also where the tests run under nohup, which has it ignored."""
    before = signal.signal(signal.SIGHUP, lambda *_: None)  # whoever is started gets the system's own way instead
    yield
    signal.signal(signal.SIGHUP, before)
