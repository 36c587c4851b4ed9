"""What happens to checkpoints when the machine does its worst: killed, full, damaged, lied to."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import safetensors.numpy

from minires import ResNet
from minires.training import CheckpointError, checkpoint, load_model, save_weights, storage
from minires.training.checkpoint import CHECKPOINT, DAMAGED, PREVIOUS, load_checkpoint, save_checkpoint
from minires.training.storage import PART

MUTATIONS = int(os.environ.get("MINIRES_TEST_MUTATIONS", "2000"))


def numbered(number):
    """A checkpoint, small and unlike those of other numbers."""
    state = {"model.weight": np.full((2, 3), number, np.float32), "steps.optimizer": np.asarray(number)}
    return state | {"empty": np.zeros((0, 2), np.float32)}, {"step": number, "history": [{"loss": 0.1 * number}]}


def save(folder, number):
    save_checkpoint(folder, *numbered(number))


def same(loaded, number):
    state, metadata = numbered(number)
    return loaded[1] == metadata | {"format": 1} and same_arrays(loaded[0], state)


def same_arrays(actual, expected):
    return actual.keys() == expected.keys() and all(
        (actual[name].dtype, actual[name].shape, actual[name].tobytes()) == (array.dtype, array.shape, array.tobytes())
        for name, array in expected.items()
    )


def load_quietly(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_checkpoint(folder)


class Faults:
    """Stands in for the system calls with which a checkpoint is written; at the one numbered `at`, fault() is called.

    The file is written a few bytes at a time, so that there are many writes.
    """

    def __init__(self, monkeypatch, at, fault):
        self.count, self.at, self.fault, self.names = 0, at, fault, []
        calls = {name: self.calling(name, getattr(os, name)) for name in ("fsync", "replace", "open", "close")}
        monkeypatch.setattr(storage, "os", types.SimpleNamespace(**{**vars(os), **calls}))
        monkeypatch.setattr(storage, "open", self.opening, raising=False)

    def calling(self, name, function):
        def call(*args):
            self.names.append(name)
            self.count += 1
            if self.count - 1 == self.at:
                self.fault()
            return function(*args)

        return call

    def opening(self, path, mode):
        class SmallWrites(io.FileIO):
            write = self.calling("write", lambda file, data: io.FileIO.write(file, memoryview(data)[:25]))

        return io.BufferedWriter(self.calling("create", SmallWrites)(path, mode), 25)


def number_of_calls(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        (tmp_path / "count").mkdir()
        save(tmp_path / "count", 1)
        faults = Faults(patch, None, None)
        save(tmp_path / "count", 2)
    assert set(faults.names) == {"create", "write", "fsync", "replace", "open", "close"}
    assert faults.names.count("write") > 5
    return faults.count


def run_folders(tmp_path):
    """Yield (name, a folder, the number of the checkpoint that is loaded from it) for each state a folder can be in."""
    for name in ("one", "two", "newest damaged", "newest missing"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        save(folder, 1)
        if name != "one":
            save(folder, 2)
        if name == "newest damaged":
            (folder / CHECKPOINT).write_bytes((folder / CHECKPOINT).read_bytes()[:-1])
            load_quietly(folder)
        if name == "newest missing":
            (folder / CHECKPOINT).unlink()
        yield name, folder, 2 if name == "two" else 1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_each_system_call_of_a_save(tmp_path, monkeypatch):
    calls = number_of_calls(tmp_path, monkeypatch)
    for at in range(calls):
        for name, folder, number in run_folders(tmp_path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads; the child needs none
                child = os.fork()
            if not child:
                Faults(monkeypatch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
                save(folder, 3)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) or (at == calls - 1 and "newest" in name)  # where there is one to keep less
            loaded = load_quietly(folder)
            assert same(loaded, number) or same(loaded, 3), f"{name}, killed at call {at}"
            storage.remove_parts(folder)
            assert not list(folder.glob(f"*{PART}"))
            save(folder, 4)
            assert same(load_checkpoint(folder), 4)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_an_error_at_each_system_call_of_a_save(tmp_path, monkeypatch, number):
    def fault():
        raise OSError(number, os.strerror(number))

    for at in range(number_of_calls(tmp_path, monkeypatch)):
        for name, folder, before in run_folders(tmp_path):
            with monkeypatch.context() as patch:
                faults = Faults(patch, at, fault)
                met = None
                try:
                    save(folder, 3)
                except OSError as error:
                    met = error.errno, error.filename
            assert met == (number, str(folder / CHECKPOINT)) or faults.count <= at, f"{name}, error at call {at}"
            loaded = load_quietly(folder)
            assert same(loaded, before) or same(loaded, 3), f"{name}, error at call {at}"
            assert not list(folder.glob(f"*{PART}"))


def test_weights_are_there_after_an_error_at_any_system_call(tmp_path, monkeypatch):
    """Before a file of weights there is none that could stand in for it: the old one or the new one is there, whole."""
    old, new = (ResNet((1,), (2,), seed=seed) for seed in (1, 2))
    states, path, at, failed = [old.state_dict(), new.state_dict()], tmp_path / "best.safetensors", 0, True

    def fault():
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    while failed:
        save_weights(path, old)
        with monkeypatch.context() as patch:
            Faults(patch, at, fault)
            try:
                save_weights(path, new)
                failed = False
            except OSError:
                at += 1
        assert path.exists(), f"no weights after an error at call {at}"
        loaded = load_model(path)[0].state_dict()
        assert any(same_arrays(loaded, state) for state in states)
    assert at > 10
    assert same_arrays(loaded, states[1])


def test_the_disk_has_a_file_before_the_file_has_its_name(tmp_path, monkeypatch):
    """Otherwise a machine that loses its power could leave a name with nothing behind it."""
    save(tmp_path, 1)
    faults = Faults(monkeypatch, None, None)
    save(tmp_path, 2)
    order = [name for name in faults.names if name != "write"]
    assert order == [
        "create",
        "fsync",
        "replace",
        "replace",
        "open",
        "fsync",
        "close",
    ]  # the folder last, with the names


def test_a_file_system_that_ends_at_each_byte(tmp_path):
    """The system itself refuses to write beyond a size."""
    resource = pytest.importorskip("resource")
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in range((tmp_path / CHECKPOINT).stat().st_size):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(OSError, match="File too large") as caught:
                save(tmp_path, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.filename == str(tmp_path / CHECKPOINT)
        assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    assert same(load_checkpoint(tmp_path), 1)


def test_the_good_one_survives_the_saves_after_a_damaged_one(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / CHECKPOINT).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=rf"kept as {DAMAGED}\); resuming from .*{PREVIOUS}, the checkpoint before it"):
        assert same(load_checkpoint(tmp_path), 1)
    save(tmp_path, 3)
    assert same(load_checkpoint(tmp_path), 3)
    (tmp_path / CHECKPOINT).unlink()
    with pytest.warns(UserWarning, match=r"checkpoint\.safetensors cannot be read: No such file.*; resuming from"):
        assert same(load_checkpoint(tmp_path), 1)


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)

    def refuse(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(storage, "open", refuse, raising=False)
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors cannot be read: Permission denied"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / DAMAGED).exists()


def test_a_checkpoint_of_another_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save(tmp_path, 1)
    monkeypatch.undo()
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(CheckpointError, match="has format 2, this minires reads 1"):
        load_checkpoint(tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_file_of_weights_is_no_checkpoint(tmp_path):
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / CHECKPOINT)
    with pytest.raises(CheckpointError, match="is no checkpoint of a run, or a damaged one: it has no metadata"):
        load_checkpoint(tmp_path)


def test_metadata_that_could_not_be_read_again_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"the header of a file can have 4,194,304 bytes, got metadata of 5,000,0\d\d"):
        save_checkpoint(tmp_path, {}, {"note": "x" * 5_000_000})
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(FloatingPointError, match="a holds values that are not finite"):
        save_checkpoint(tmp_path, {"a": np.array([1, np.nan])}, {})
    assert same(load_checkpoint(tmp_path), 1)


# Damage to the content


def outcome(load, path, data):
    """What comes back from a file with these bytes, or the error's text."""
    path.write_bytes(data)
    try:
        return load(path.parent if path.name == CHECKPOINT else path)
    except CheckpointError as error:
        text = str(error)
    assert str(path) in text
    return text


@pytest.mark.slow
def test_each_byte_of_a_checkpoint_flipped(tmp_path):
    save(tmp_path, 1)
    data = (tmp_path / CHECKPOINT).read_bytes()
    refused = 0
    for i in range(len(data)):
        for mask in (0xFF, 0x01, 0x20, 0x80):
            damaged = data[:i] + bytes([data[i] ^ mask]) + data[i + 1 :]
            result = outcome(load_checkpoint, tmp_path / CHECKPOINT, damaged)
            refused += isinstance(result, str)
            assert isinstance(result, str) or same(result, 1), f"byte {i}"
    assert refused > 0.95 * 4 * len(data)  # what is not, is space between the header's words


@pytest.mark.slow
def test_each_byte_of_a_model_flipped(tmp_path):
    path = tmp_path / "model"
    model = ResNet((1,), (1,), num_classes=2)
    save_weights(path, model, {"epoch": 1})
    data = path.read_bytes()
    for i in range(len(data)):
        result = outcome(load_model, path, data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :])
        assert isinstance(result, str) or (
            result[1] == {"epoch": 1, "shortcut": True} and same_arrays(result[0].state_dict(), model.state_dict())
        ), f"byte {i}"


def mutated(data, rng):
    """Damage bytes at random, as disks, networks, editors and fuzzers do."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        i, j = sorted(rng.integers(0, len(data) + 1, 2))
        k = int(rng.integers(0, 9))
        if k == 0 and i < len(data):
            data[i] ^= 1 << int(rng.integers(8))
        elif k == 1:
            data[i:j] = rng.bytes(int(j - i))
        elif k == 2:
            data[i:j] = bytes(int(j - i))
        elif k == 3:
            del data[i:j]
        elif k == 4:
            data[i:i] = data[i:j]
        elif k == 5:
            data[i:i] = rng.bytes(int(rng.integers(1, 20)))
        elif k == 6:
            del data[i:]
        elif k == 7:
            data[:8] = int(rng.choice([0, 1, 8, len(data), 2**31, 2**62, 2**22, int(rng.integers(2**16))])).to_bytes(
                8, "little"
            )
        else:  # one number in the header becomes another
            header = data[8 : 8 + int.from_bytes(data[:8], "little")]
            numbers = [number.span() for number in re.finditer(rb"[0-9]+", header)]
            if numbers:
                start, end = numbers[rng.integers(len(numbers))]
                data[8 + start : 8 + end] = str(rng.integers(10**9)).encode()
        data = data or bytearray(b"x")
    return bytes(data)


@pytest.mark.slow
def test_thousands_of_mutations_of_a_checkpoint(tmp_path, rng):
    save(tmp_path, 1)
    data = (tmp_path / CHECKPOINT).read_bytes()
    for i in range(MUTATIONS):
        result = outcome(load_checkpoint, tmp_path / CHECKPOINT, mutated(data, rng))
        assert isinstance(result, str) or same(result, 1), f"mutation {i}"


def test_a_thousand_mutations_of_a_model(tmp_path, rng):
    path = tmp_path / "model"
    model = ResNet((1,), (1,), num_classes=2)
    save_weights(path, model, {"epoch": 1})
    data = path.read_bytes()
    for i in range(MUTATIONS // 10):
        result = outcome(load_model, path, mutated(data, rng))
        assert isinstance(result, str) or same_arrays(result[0].state_dict(), model.state_dict()), f"mutation {i}"


def header_of(content, length=None):
    text = json.dumps(content).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def liars():
    """Files whose headers ask for a great deal of memory."""
    f32 = {"dtype": "F32", "data_offsets": [0, 0]}
    state = ResNet((1,), (1,)).state_dict()
    yield b"\xff" * 8 + b"{}"
    yield (99_000_000).to_bytes(8, "little") + b"{" + b" " * 98_999_998 + b"}"
    yield header_of({"a": f32 | {"shape": [2**40, 2**40]}})
    yield header_of({"a": f32 | {"shape": [2**62, 0]}})
    yield header_of({"a": f32 | {"shape": [0] * 100_000}})
    yield header_of({str(i): f32 | {"shape": [0]} for i in range(50_000)})
    yield header_of({"__metadata__": {"minires": "[" * 1_000_000}})
    yield safetensors.numpy.save({"a": np.zeros(1)}, {"minires": "[" * 1_000_000})
    for name, shape in [
        ("linear.weight", (10**9, 0)),
        ("layer1.0.conv1.weight", (10**9, 0, 3, 3)),
        ("layer1.0.conv1.weight", (50_000, 1, 1, 1)),
        ("layer1.1.conv1.weight", (50_000, 1, 1, 1)),
        ("layer2.0.conv1.weight", (50_000, 1, 1, 1)),
        ("conv1.weight", (50_000, 1, 1, 1)),
    ]:
        yield safetensors.numpy.save(state | {name: np.zeros(shape, np.float32)})
        wide = {f"layer1.0.conv{k}.weight": np.zeros((9_000, 1, 1, 1), np.float32) for k in (1, 2)}
        yield safetensors.numpy.save(state | wide | {name: np.zeros(shape, np.float32)})


def test_headers_that_lie_take_no_memory(tmp_path):
    pytest.importorskip("resource")
    for count, data in enumerate(liars()):
        (tmp_path / f"{count}.safetensors").write_bytes(data)
    code = """
import pathlib, resource, sys
from minires import ResNet
from minires.training import CheckpointError, load_model, save_weights
save_weights("good", ResNet((1,), (4,)))
load_model("good")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(pathlib.Path().glob("*.safetensors")):
    try:
        load_model(path)
    except CheckpointError as error:
        print(len(str(error)) < 2000 and path.name in str(error))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 2**10))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *named, memory = done.stdout.split()
    assert named == ["True"] * (count + 1)
    assert int(memory) < 100e6
