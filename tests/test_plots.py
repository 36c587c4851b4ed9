"""Pictures are drawn where matplotlib is installed."""

import numpy as np
import pytest

from minires.plots import plot_curves, plot_images, plot_runs

pytest.importorskip("matplotlib")


def test_curves_and_images_become_png_files(tmp_path):
    keys = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
    plot_curves([{"epoch": epoch, **dict.fromkeys(keys, 1 / epoch)} for epoch in (1, 2, 3)], tmp_path / "curves.png")
    plot_images(np.zeros((12, 32, 32, 3), np.uint8), ["cat"] * 12, tmp_path / "images.png")
    plot_runs({"a variant": [90.1, 90.3], "another": [88.0]}, "accuracy, %", tmp_path / "runs.png")
    nothing = {"validation_loss": None, "validation_accuracy": None}
    plot_curves([{"epoch": 1, "train_loss": 1.0, "train_accuracy": 0.5, **nothing}], tmp_path / "training only.png")
    for name in ("curves.png", "images.png", "runs.png", "training only.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
