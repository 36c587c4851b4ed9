"""Which kernels serve an array, kernels of one's own among them, and what a new layer has to touch."""

import os
import pathlib
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

import minires
from minires import Conv2d, ResNet, kernels
from minires.kernels import cpu, gpu, reference


def test_float64_and_other_arrays_go_to_the_reference(rng):
    assert kernels.kernels_for(np.zeros(1)) is reference
    assert kernels.kernels_for(np.zeros(1, np.float16)) is reference
    with kernels.use("fast"):
        assert kernels.kernels_for(np.zeros(1, np.float32)) is cpu


def test_the_reference_can_be_forced(monkeypatch):
    x = np.zeros(1, np.float32)
    with kernels.use("reference"):
        assert kernels.kernels_for(x) is reference
    monkeypatch.setenv("MINIRES_KERNELS", "reference")
    assert kernels.kernels_for(x) is reference
    with kernels.use("fast"):
        assert kernels.kernels_for(x) is cpu
    monkeypatch.setenv("MINIRES_KERNELS", "slow")
    with pytest.raises(ValueError, match=r"MINIRES_KERNELS must be 'fast' or 'reference', got 'slow'"):
        kernels.kernels_for(x)
    with pytest.raises(ValueError, match=r"must be 'fast' or 'reference', got 'quick'"), kernels.use("quick"):
        pass
    with kernels.use(types.SimpleNamespace(relu_forward=abs)):
        with pytest.raises(ValueError, match="got 'fats'"), kernels.use("fats"):
            pass
        assert kernels.kernels_for(x).relu_forward is abs


@pytest.mark.parametrize(("fast", "mixed"), [(cpu, ()), (gpu, (("float16", "float32"),))])
def test_what_a_fast_set_lacks_is_the_references(fast, mixed):
    assert fast.max_pool2d_forward is reference.max_pool2d_forward
    assert mixed == fast.MIXED_DTYPES
    with pytest.raises(AttributeError, match="has no attribute 'no_such_kernel'"):
        _ = fast.no_such_kernel


def test_a_kernel_of_ones_own_is_called_by_what_a_star_has_imported():
    mine, called = types.ModuleType("mine"), []
    vars(mine).update(vars(reference))

    def im2col(*args):
        called.append(args)
        return reference.im2col(*args)

    mine.im2col = im2col
    with kernels.use(mine):
        Conv2d(3, 4, 3, rng=0)(np.ones((1, 5, 5, 3), np.float32))
    assert called


class Subclass(np.ndarray):
    """A user's own kind of array, which is NumPy's all the same."""


def test_images_in_a_file_and_arrays_of_a_subclass_work_as_any_others(rng, tmp_path):
    x = rng.standard_normal((6, 8, 8, 3)).astype(np.float32)
    np.save(tmp_path / "images.npy", x)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    model = ResNet((1, 1), (4, 16), dropout=0.0)
    expected = model(x[:4])
    dx = model.backward(np.ones_like(expected))
    for images in (mapped[:4], x[:4].view(Subclass)):
        assert kernels.kernels_for(images) is cpu
        assert minires.backend.array_module(images) is np
        np.testing.assert_array_equal(model(images), expected)
        np.testing.assert_array_equal(model.backward(np.ones_like(expected)), dx)
    np.testing.assert_array_equal(model.eval()(mapped), model(x))


def test_a_kernel_of_ones_own_serves_all_arrays_and_the_reference_the_rest(rng):
    calls = []

    def relu_forward(x):
        calls.append(x.dtype)
        return reference.relu_forward(x)

    own = types.SimpleNamespace(relu_forward=relu_forward)
    layer = minires.ReLU()
    for dtype in (np.float32, np.float64):
        x = rng.standard_normal((3, 4)).astype(dtype)
        with kernels.use(own):
            np.testing.assert_array_equal(layer(x), np.maximum(x, 0))
            np.testing.assert_array_equal(layer.backward(x), np.where(x > 0, x, 0))
        layer(x)
    assert calls == [np.float32, np.float64]


def test_the_references_functions_call_kernels_of_ones_own(rng):
    """With an im2col alone, convolutions are the reference's around this im2col."""

    class Mine:
        count = 0

        def im2col(self, x, kernel_size, stride, padding):
            self.count += 1
            return 2 * reference.im2col(x, kernel_size, stride, padding)

    x, mine = rng.standard_normal((2, 5, 5, 3)), Mine()
    layer = Conv2d(3, 4, 3, bias=False, rng=0).to(dtype=np.float64)
    expected = layer(x)
    with kernels.use(mine):
        np.testing.assert_allclose(layer(x), 2 * expected)
        layer.backward(expected)
    assert mine.count == 2
    np.testing.assert_array_equal(layer(x), expected)
    assert reference.im2col(x, (3, 3), 1, 0).sum() != mine.im2col(x, (3, 3), 1, 0).sum()


def test_every_kernel_of_batch_norm_can_be_ones_own(rng):
    x, residual = rng.standard_normal((2, 3, 4, 4, 2))
    for name in ("batch_norm_statistics", "batch_norm_forward", "batch_norm_backward_sums", "batch_norm_backward"):
        called = []

        def own(*arguments, name=name, called=called):
            called.append(name)
            return getattr(reference, name)(*arguments)

        layer = minires.BatchNorm2d(2, relu=True).to(dtype=np.float64)
        with kernels.use(types.SimpleNamespace(**{name: own})):
            layer.backward(layer(x, residual))
        assert called == [name]


def test_the_choice_has_a_name_and_ends_with_its_block():
    module = types.ModuleType("my_kernels")
    module.relu_forward = reference.relu_forward
    before = kernels.chosen()
    with kernels.use(module):
        assert kernels.chosen() == "my_kernels"
        with kernels.use("reference"):
            assert kernels.chosen() == "reference"
            assert kernels.kernels_for(np.zeros(1, np.float32)) is reference
        assert kernels.chosen() == "my_kernels"
    with kernels.use(types.SimpleNamespace(relu_forward=reference.relu_forward)):
        assert kernels.chosen() == "SimpleNamespace"
    assert kernels.chosen() == before


@pytest.mark.parametrize("choice", [None, 3, types.SimpleNamespace(relu_foward=len), types])
def test_what_has_no_kernels_is_refused(choice):
    with pytest.raises(ValueError, match=r"have kernels of the reference, got"), kernels.use(choice):
        pass


LEAKY = {
    "kernels/reference.py": """

def leaky_relu_forward(x, slope):
    return array_module(x).where(x > 0, x, slope * x)


def leaky_relu_backward(dout, x, slope):
    return array_module(x).where(x > 0, dout, slope * dout)
""",
    "layers.py": """

class LeakyReLU(Module):
    def __init__(self, slope=0.1):
        self.slope = slope

    def forward(self, x):
        self._keep(x)
        return kernels_for(x).leaky_relu_forward(x, self.slope)

    def backward(self, dout):
        (x,) = self._take_cache()
        return kernels_for(dout).leaky_relu_backward(dout, x, self.slope)
""",
    "__init__.py": "\nfrom minires.layers import LeakyReLU\n",
}
TRAIN_WITH_IT = """
import numpy as np
import minires
from minires import *

rng = np.random.default_rng(0)
check_gradients(minires.LeakyReLU(), rng.standard_normal((4, 5)))
model = Sequential(Conv2d(3, 16, 3, padding=1, rng=1), minires.LeakyReLU(), Flatten(), Linear(576, 4, rng=2))
x, labels = rng.standard_normal((8, 6, 6, 3)).astype(np.float32), np.arange(8) % 4
assert kernels.kernels_for(x) is kernels.cpu
loss_function, optimizer, losses = SoftmaxCrossEntropy(), Adam(model.parameters(), 0.01), []
for _ in range(30):
    optimizer.zero_grad()
    losses.append(loss_function(model(x), labels))
    model.backward(loss_function.backward())
    optimizer.step()
assert model.layers()[1](x).dtype == np.float32
print(minires.__file__, losses[0] > 2 * losses[-1])
"""


def test_a_new_layer_is_reference_layers_and_init_and_trains_in_float32(tmp_path):
    package = pathlib.Path(minires.__file__).parent
    shutil.copytree(package, tmp_path / "minires", ignore=shutil.ignore_patterns("__pycache__"))
    for name, code in LEAKY.items():
        with open(tmp_path / "minires" / name, "a") as file:
            file.write(code)
    run = subprocess.run(
        [sys.executable, "-c", TRAIN_WITH_IT],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("MINIRES_")} | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip().rsplit(" ", 1) == [str(tmp_path / "minires" / "__init__.py"), "True"], run.stderr
