"""Weights go to disk and come back, and a file that cannot be used is named."""

import numpy as np
import pytest

from minires import ResNet
from minires.checkpoint import CheckpointError, load_model, save_weights


def test_weights_and_metadata_come_back(tmp_path, rng):
    model = ResNet((1, 1), (4, 6), seed=5)
    x = rng.standard_normal((2, 8, 8, 3)).astype(np.float32)
    model(x)
    path = tmp_path / "model.safetensors"
    save_weights(path, model, {"epoch": 3, "mean": (0.5, 0.25)})
    loaded, metadata = load_model(path)
    assert metadata == {"epoch": 3, "mean": [0.5, 0.25]}
    assert not loaded.training
    np.testing.assert_array_equal(loaded(x), model.eval()(x))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_weights(path, ResNet((1,), (4,), seed=1))
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minires.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(path, ResNet((1,), (4,), seed=2))
    assert path.read_bytes() == before


def test_files_that_cannot_be_used_are_named(tmp_path):
    missing, damaged, foreign = (tmp_path / name for name in ("missing", "damaged", "foreign"))
    with pytest.raises(CheckpointError, match="missing cannot be read"):
        load_model(missing)
    save_weights(damaged, ResNet((1,), (4,)))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged is no safetensors file, or a damaged one"):
        load_model(damaged)
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    safetensors_numpy.save_file({"features.weight": np.zeros(3)}, foreign)
    with pytest.raises(CheckpointError, match=r"foreign: this is not the state of a minires\.ResNet"):
        load_model(foreign)
