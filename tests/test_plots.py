"""Pictures are drawn where matplotlib is installed."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from minires.plots import plot_curves, plot_images, plot_runs
from minires.training.output import draw

if importlib.util.find_spec("matplotlib") is None:
    pytest.skip("matplotlib is not installed", allow_module_level=True)


def test_curves_and_images_become_png_files(tmp_path):
    keys = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
    plot_curves([{"epoch": epoch, **dict.fromkeys(keys, 1 / epoch)} for epoch in (1, 2, 3)], tmp_path / "curves.png")
    plot_images(np.zeros((12, 32, 32, 3), np.uint8), ["cat"] * 12, tmp_path / "images.png")
    plot_runs({"a variant": [90.1, 90.3], "another": [88.0]}, "accuracy, %", tmp_path / "runs.png")
    nothing = {"validation_loss": None, "validation_accuracy": None}
    plot_curves([{"epoch": 1, "train_loss": 1.0, "train_accuracy": 0.5, **nothing}], tmp_path / "training only.png")
    for name in ("curves.png", "images.png", "runs.png", "training only.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_in_some_epochs_is_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axes, *points, **options: drawn.append(points[:2]))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda axes: None)
    row = {"train_loss": 2.0, "train_accuracy": 0.5}
    rows = [row | {"epoch": e, "validation_loss": v, "validation_accuracy": v} for e, v in ((1, None), (2, 1))]
    plot_curves(rows, tmp_path / "curves.png")
    assert drawn == [((1, 2), (2.0, 2.0)), ((2,), (1,)), ((1, 2), (0.5, 0.5)), ((2,), (1,))]


@pytest.mark.parametrize("loss", [1.0, float("nan"), float("inf")])
def test_curves_of_one_epoch(tmp_path, loss):
    row = {"epoch": 1, "train_loss": loss, "validation_loss": loss, "train_accuracy": 0.5, "validation_accuracy": 0.5}
    plot_curves([row], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


DRAW = """
import os, sys
from minires.plots import plot_runs
plot_runs({"a": [1.0, 2.0]}, "title", sys.argv[1])
import matplotlib
print(os.environ["MPLBACKEND"], matplotlib.rcParams["backend"] if sys.argv[2:] else "")
"""


def draw_under(backend, path, *more):
    command, env = [sys.executable, "-c", DRAW, path, *more], {**os.environ, "MPLBACKEND": backend}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stderr == ""
    assert path.read_bytes().startswith(b"\x89PNG")
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["nosuch", "module://matplotlib_inline.backend_inline", "module://nosuch.backend"])
def test_a_backend_that_cannot_be_had_does_not_matter(tmp_path, backend):
    assert draw_under(backend, tmp_path / "runs.png") == [backend]


def test_a_backend_that_can_be_had_stays_chosen(tmp_path):
    assert draw_under("svg", tmp_path / "runs.png", "ask") == ["svg", "svg"]


def test_without_matplotlib_the_way_to_have_it_is_named(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match=r'pictures need matplotlib: pip install -e "\.\[plot\]"'):
        plot_images(np.zeros((1, 2, 2, 3), np.uint8), ["a"], tmp_path / "a.png")
    draw("plot_images", np.zeros((1, 2, 2, 3), np.uint8), ["a"], tmp_path / "a.png")  # a run goes on without a word
    assert capsys.readouterr().err == ""


class Missing:
    def find_spec(self, name, *_):
        if name == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name=name)
