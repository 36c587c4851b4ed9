"""Weights go to disk and come back, and a file that cannot be used is named."""

import json

import numpy as np
import pytest
import safetensors.numpy

from minires import SGD, Adam, ResNet, WeightAverage
from minires.training import CheckpointError, load_model, save_weights, storage
from minires.training.checkpoint import load_checkpoint, restore_training_state, save_checkpoint, training_state


def test_weights_and_metadata_come_back(tmp_path, rng):
    model = ResNet((1, 1), (4, 6), seed=5)
    x = rng.standard_normal((2, 8, 8, 3)).astype(np.float32)
    model(x)
    path = tmp_path / "model.safetensors"
    save_weights(path, model, {"epoch": 3, "mean": (0.5, 0.25)})
    loaded, metadata = load_model(path)
    assert metadata == {"epoch": 3, "mean": [0.5, 0.25], "shortcut": True}
    assert not loaded.training
    np.testing.assert_array_equal(loaded(x), model.eval()(x))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_weights(path, ResNet((1,), (4,), seed=1))
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minires.training.storage.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(path, ResNet((1,), (4,), seed=2))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_cannot_be_used_are_named(tmp_path):
    missing, damaged, foreign = (tmp_path / name for name in ("missing", "damaged", "foreign"))
    with pytest.raises(CheckpointError, match="missing cannot be read"):
        load_model(missing)
    save_weights(damaged, ResNet((1,), (4,)))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged is no safetensors file, or a damaged one"):
        load_model(damaged)
    safetensors.numpy.save_file({"features.weight": np.zeros(3)}, foreign)
    with pytest.raises(
        CheckpointError, match=r"foreign holds no network.*: this is not the state of a minires\.ResNet"
    ):
        load_model(foreign)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear.weight": np.zeros((), np.float32)}, "holds no network that minires can build"),
        ({"layer1.0.conv1.weight": np.zeros((0, 4, 3, 3), np.float32)}, "holds no network that minires can build"),
        ({"bn1.bias": np.zeros(5, np.float32)}, r"bn1\.bias has shape \(5,\), expected \(4,\)"),
        ({"linear.bias": np.full(10, np.nan, np.float32)}, r"linear\.bias holds values that are not finite"),
        (
            {"linear.bias": np.zeros(10, np.int32)},
            r"linear\.bias holds numbers of type int32, expected one of float16, ",
        ),
        ({"linear.bias": np.zeros(10, np.bool_)}, r"linear\.bias holds numbers of type bool, expected .* as they were"),
        ({"bn1.num_batches_tracked": np.array(True)}, r"bn1\.num_batches_tracked holds numbers of type bool"),
        (
            {"bn1.running_var": np.full(4, -0.5, np.float32)},
            r"bn1\.running_var holds -0\.5, and a variance is at least 0",
        ),
    ],
)
def test_states_that_make_no_network_are_named(tmp_path, change, message):
    path = tmp_path / "odd.safetensors"
    safetensors.numpy.save_file(ResNet((1,), (4,)).state_dict() | change, path)
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_weights_of_each_floating_type_and_pytorchs_counts_are_taken(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    state = {name: array.astype(dtype) for name, array in ResNet((1,), (4,)).state_dict().items()}
    safetensors.numpy.save_file(state | {"bn1.num_batches_tracked": np.array(7)}, path)
    loaded = load_model(path)[0].state_dict()
    assert all((loaded[name] == array).all() for name, array in state.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", r"is damaged: its metadata are \[1, 2\], expected a JSON object"),
        ('"text"', 'is damaged: its metadata are "text", expected a JSON object'),
        ("[" * 100_000 + "]" * 100_000, "is damaged: its metadata are nested too deeply"),
    ],
)
def test_metadata_that_are_no_object_are_refused(tmp_path, text, message):
    path, state = tmp_path / "odd.safetensors", ResNet((1,), (4,)).state_dict()
    safetensors.numpy.save_file(state, path, {"minires": text, "sha256": storage._checksum(state, text)})
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


@pytest.mark.parametrize("shortcut", [True, False])
def test_a_network_of_one_stage_comes_back_with_or_without_shortcuts(tmp_path, rng, shortcut):
    model = ResNet((2,), (4,), shortcut=shortcut).eval()
    save_weights(tmp_path / "model", model)
    x = rng.standard_normal((2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(load_model(tmp_path / "model")[0](x), model(x))


def adam(model):
    return Adam(model.parameters())


def nesterov(model):
    return SGD(model.parameters(), 0.1, 0.9, nesterov=True)


def plain(model):
    return SGD(model.parameters(), 0.1)


@pytest.mark.parametrize("make", [adam, nesterov, plain])
@pytest.mark.parametrize("averaged", [True, False])
def test_all_that_changes_in_training_comes_back(rng, make, averaged):
    def build(seed):
        model = ResNet((1,), (4,), seed=seed)
        optimizer = make(model)
        return model, optimizer, WeightAverage(optimizer, 0.9) if averaged else None

    def steps(model, optimizer, average):
        for x in batches:
            optimizer.zero_grad()
            model.backward(model(x))
            optimizer.step()
            if average:
                average.update()

    first, second = build(1), build(1)
    second[0].linear.weight.data[...] = 7
    batches = rng.standard_normal((3, 2, 8, 8, 3)).astype(np.float32)
    steps(*first)
    state = {name: array.copy() for name, array in training_state(*first).items()}
    restore_training_state(*second, state)
    steps(*first)
    steps(*second)
    expected, actual = training_state(*first), training_state(*second)
    assert expected.keys() == actual.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def test_a_state_that_does_not_fit_is_refused_with_a_list():
    small, large = ResNet((1,), (4,)), ResNet((1,), (5,))
    state = training_state(small, adam(small))
    optimizer = nesterov(small)
    with pytest.raises(CheckpointError, match=r"missing optimizer\.velocity\.conv1\.weight; .* missing average\."):
        restore_training_state(small, optimizer, WeightAverage(optimizer, 0.9), state)
    with pytest.raises(CheckpointError, match=r"optimizer\.m\.bn1\.weight has shape \(4,\), expected \(5,\)"):
        restore_training_state(large, adam(large), None, state)
    with pytest.raises(CheckpointError, match=r"does not fit this network: .*bn1\.weight has shape \(4,\)"):
        restore_training_state(large, plain(large), None, state)


@pytest.mark.parametrize("order", [np.asfortranarray, lambda array: array.astype(array.dtype.newbyteorder(">"))])
def test_arrays_in_another_order_of_axes_or_bytes_come_back(tmp_path, order):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_checkpoint(tmp_path, {"w": order(array), "count": np.asarray(3)}, {})
    state, _ = load_checkpoint(tmp_path)
    np.testing.assert_array_equal(state["w"], array)
    assert state["count"].shape == ()


def test_a_checkpoint_in_place_of_weights_names_the_file_that_has_them(tmp_path):
    save_checkpoint(tmp_path, {"model.linear.weight": np.zeros((2, 3))}, {})
    with pytest.raises(CheckpointError, match=r"is a checkpoint, .*: name the weights, best\.safetensors in the same"):
        load_model(tmp_path / "checkpoint.safetensors")


@pytest.mark.parametrize(("name", "bits"), [("F8_E4M3", 8), ("BF16", 16)])
def test_numbers_that_numpy_does_not_have_are_named(tmp_path, name, bits):
    header = json.dumps({"linear.weight": {"dtype": name, "shape": [4], "data_offsets": [0, bits // 2]}}).encode()
    (tmp_path / "w").write_bytes(len(header).to_bytes(8, "little") + header + bytes(bits // 2))
    with pytest.raises(CheckpointError, match=r"holds numbers that NumPy cannot read .*: save it in float32"):
        load_model(tmp_path / "w")


def test_what_is_no_path_is_not_taken_for_a_file_of_other_numbers():
    with pytest.raises(TypeError, match=r"os\.PathLike object, not NoneType"):
        load_model(None)
