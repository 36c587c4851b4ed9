"""The sanity checks: a sound network passes all six, and each fault is found by the check that is meant for it."""

import importlib.util
import math
import os
import pathlib
import subprocess
import sys
import warnings

import numpy as np
import pytest
from lessons import sanity

from minires import BatchNorm2d, Bias2d, Conv2d, GlobalAvgPool2d, Linear, Module, Parameter, Sequential, cifar10
from minires.augment import normalize
from minires.training import UsageError

NAMES = ("step 0", "overfitted", "falls", "zeroed", "explodes", "scale")
LR = 0.01


class Small(Sequential):
    """Two convolutions, which learn something of images of 16x16 pixels in no time."""

    norm, head = BatchNorm2d, Linear

    def __init__(self):
        super().__init__(
            Conv2d(3, 8, 3, stride=2, padding=1, rng=0),
            self.norm(8, relu=True),
            Conv2d(8, 32, 3, stride=2, padding=1, rng=0),
            self.norm(32, relu=True),
            GlobalAvgPool2d(),
            self.head(32, 10, rng=0),
        )


@pytest.fixture(scope="module")
def images_and_labels():
    data = cifar10.load_sample()
    return normalize(data.train_images[:320, ::2, ::2], cifar10.MEAN, cifar10.STD), data.train_labels[:320]


def failures(make_model, images, labels, lr=LR, until=NAMES[-1]):
    """Run the checks up to one of them; return {which one: cause} for those that fail, and the scales."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # as the script does: some checks look for overflows
        batches = sanity.batches(images, labels, sanity.STEPS)
        trained, scales = sanity.train(make_model(), batches, lr, measured=(1, sanity.STEPS))
        checks = sanity.checks(make_model, images, labels, lr, trained, scales)
        found = dict(zip(NAMES[: NAMES.index(until) + 1], checks, strict=False))
    assert all(name in what for name, (what, _, _) in found.items())
    return {name: cause for name, (_, _, cause) in found.items() if cause}, scales


def test_a_sound_network_passes_and_its_scales_are_measured(images_and_labels):
    wrong, (first, after) = failures(Small, *images_and_labels)
    assert not wrong
    assert [scale.name for scale in first] == ["0", "1", "2", "3", "4", "5"]
    assert first[0].activation == pytest.approx(math.sqrt(2), rel=0.2)  # He's weights, images of variance 1
    assert [scale.ratio is not None for scale in first] == [True, False, True, False, False, True]
    assert all(1e-4 < scale.ratio < 0.1 for scale in after if scale.ratio is not None)
    assert all(scale.gradient > 0 for scale in (*first, *after))


class LoudHead(Linear):
    def __init__(self, *sizes, rng):
        super().__init__(*sizes, rng=rng)
        self.weight.data *= 100


class NoGradient(Linear):
    def backward(self, dout):
        dx = super().backward(dout)
        self.weight.grad[...] = 0
        return dx


class Uphill(Linear):
    def backward(self, dout):
        return super().backward(-dout)


class NoEps(BatchNorm2d):
    def __init__(self, num_features, relu):
        super().__init__(num_features, relu=relu)
        self.eps = 0.0


class Deaf(BatchNorm2d):
    def forward(self, x):
        return super().forward(np.zeros_like(x))


class Shrinking(Bias2d):
    def forward(self, x):
        return super().forward(x * np.float32(1e-4))


FAULTS = {
    "a head with large weights": (LoudHead, BatchNorm2d, "step 0", "last layer's weights are too large"),
    "weights without a gradient": (NoGradient, BatchNorm2d, "scale", "the weights of 5 do not move"),
    "steps uphill": (Uphill, BatchNorm2d, "overfitted", "steps go up the gradient"),
    "no eps": (Linear, NoEps, "zeroed", "is there an eps"),
    "a layer that hears nothing": (Linear, Deaf, "zeroed", "gives the same whatever comes in"),
    "a scale that shrinks": (Linear, Shrinking, "scale", "the scale changes from layer to layer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_with_its_usual_cause(images_and_labels, fault):
    head, norm, check, cause = FAULTS[fault]
    faulty = type("Faulty", (Small,), {"head": head, "norm": norm})
    wrong, _ = failures(faulty, *images_and_labels, until=check)
    assert cause in wrong[check]


def test_a_rate_that_does_nothing_is_found(images_and_labels):
    wrong, _ = failures(Small, *images_and_labels, lr=1e-7)
    assert set(wrong) >= {"overfitted", "falls", "explodes", "scale"}
    assert "lr is too small" in wrong["scale"]


def test_a_way_back_that_is_left_out_is_found():
    class Block(Module):
        def __init__(self):
            self.a, self.b = Linear(4, 4, rng=0), Linear(4, 4, rng=1)

        def forward(self, x):
            return self.a(x) + self.b(x)

        def backward(self, dout):
            return self.a.backward(dout)

    batch = np.ones((2, 4), np.float32), np.array([0, 1])
    _, scales = sanity.train(Block(), [batch], LR, measured=(1,))
    assert sanity.wrong_scales(scales).startswith("nothing flows back to b:")


def test_a_layer_that_is_asked_for_no_dx_is_watched(images_and_labels):
    class Mine(Module):
        def __init__(self):
            self.conv, self.pool, self.linear = Conv2d(3, 4, 3, rng=0), GlobalAvgPool2d(), Linear(4, 10, rng=1)

        def forward(self, x):
            return self.linear(self.pool(self.conv(x)))

        def backward(self, dout):
            return self.conv.backward(self.pool.backward(self.linear.backward(dout)), need_dx=False)

    images, labels = images_and_labels
    _, scales = sanity.train(Mine(), sanity.batches(images, labels, 1), LR, measured=(1,))
    assert all(scale.gradient > 0 for scale in scales[0])


class FromZero(Small):
    """The weights of the last layer start at 0: at the first step nothing flows back through it."""

    def __init__(self):
        super().__init__()
        self.layers()[-1].weight.data[...] = 0


def test_weights_that_start_at_0_are_no_fault(images_and_labels):
    assert failures(FromZero, *images_and_labels)[0] == {}


def test_parameters_in_a_list_have_a_scale(images_and_labels):
    class Listed(Module):
        def __init__(self):
            self.weights = [Parameter(np.random.default_rng(0).standard_normal((3, 10)))]

        def forward(self, x):
            x = x.mean((1, 2))
            self._keep(x)
            return x @ self.weights[0].data

        def backward(self, dout):
            (x,) = self._take_cache()
            self.weights[0].grad += x.T @ dout
            return dout @ self.weights[0].data.T

    images, labels = images_and_labels
    _, (scales,) = sanity.train(Listed(), sanity.batches(images, labels, 1), LR, measured=(1,))
    assert [(scale.name, scale.ratio > 0) for scale in scales] == [("model", True)]


def test_watching_leaves_a_model_as_it_was(images_and_labels):
    images, labels = images_and_labels
    models = Small(), Small()
    for model, measured in zip(models, ((), (1, 2)), strict=True):
        sanity.train(model, sanity.batches(images, labels, 2), LR, measured)
    a, b = (model.state_dict() for model in models)
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert not {"forward", "backward"} & {name for layer in models[1].modules() for name in vars(layer)}


MINE = """
from minires import Conv2d, GlobalAvgPool2d, Linear, Module, Sequential

class Mine(Sequential):
    def __init__(self):
        super().__init__(
            Conv2d(3, 8, 3, stride=4, rng=0), GlobalAvgPool2d(), Linear(8, 10, rng=0)
        )

class Broken(Mine):
    def forward(self, x):
        return super().forward(x[:, :, :, :2])

NUMBER = 3
"""


def run(*args, **kwargs):
    command = [sys.executable, sanity.__file__, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_a_module_of_ones_own_is_checked_and_its_scales_shown(mine, tmp_path):
    picture = tmp_path / "pictures" / "scales.png"
    code, out, err = run("--module", f"{mine}:Mine", "--images", 64, "--picture", picture)
    assert (code, err) == (1, "")  # a straight line through eight averages does not overfit 32 images
    assert "WRONG  32 images are overfitted" in out
    assert "ok     the loss at step 0" in out
    rows = [line.split() for line in out.partition("\nat step")[2].splitlines()]
    assert [row[0] for row in rows[1:4]] == ["0", "1", "2"]
    if importlib.util.find_spec("matplotlib"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_the_table(mine, tmp_path):
    no_pictures = pathlib.Path(__file__).parent / "without_pictures"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(no_pictures), os.environ.get("PYTHONPATH", "")])}
    code, out, err = run("--module", f"{mine}:Mine", "--images", 32, cwd=tmp_path, env=environment)
    assert (code, err) == (1, "")
    assert "update / weight" in out
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["mine.py"]


def test_an_error_in_it_is_told_with_its_line(mine):
    code, _, err = run("--module", f"{mine}:Broken")
    assert code == 1
    assert err.startswith("error: mine.py, line 12, in forward: return super().forward(x[:, :, :, :2])\n")
    assert "Conv2d expects images" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["mine.py:Nobody", "mine.py:NUMBER", "mine.py", "nobody.py:Mine", "mine.txt:Mine"])
def test_what_is_no_module_is_refused(mine, name, monkeypatch):
    monkeypatch.chdir(mine.parent)
    mine.with_suffix(".txt").write_text("no Python")
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(UsageError, match="--module"):
        sanity.load_class(name)


@pytest.mark.full
def test_the_built_in_network_passes(tmp_path):
    code, out, err = run("--picture", tmp_path / "scales.png")
    assert (code, err) == (0, "")
    assert out.count("\nok ") == len(NAMES) - 1
    assert "layer3.0.shortcut.0" in out
