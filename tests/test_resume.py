"""A run that was stopped and goes on gives the same bits as one that never was, wherever it was stopped."""

import concurrent.futures
import csv
import errno
import json
import os
import pathlib
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import train_cifar
from test_examples import start as start_script

from minires import ResNet, evaluation, kernels
from minires.training import CheckpointError, Interrupted, Run, UsageError, load_model, output, storage
from minires.training.checkpoint import CHECKPOINT, DAMAGED, PREVIOUS, load_checkpoint, save_checkpoint
from minires.training.folder import check_space, locked, new_folder
from minires.training.script import explain
from minires.training.signals import interrupts
from minires.training.weights import save_weights

SCRIPT = pathlib.Path(train_cifar.__file__)
EPOCHS, STEPS = 2, 3  # of a run, and of each epoch
FLAGS = (
    f"--data sample --epochs {EPOCHS} --batch-size 10 --limit-batches {STEPS} --device cpu --schedule one-cycle "
    "--channels 4 6 6 8"
)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    without_pictures(monkeypatch)
    with warnings.catch_warnings():
        yield


def without_pictures(monkeypatch):
    for module in (train_cifar, sys.modules["minires.training.run"]):
        monkeypatch.setattr(module, "draw", lambda *_: None)


def code_of_main():
    """Run the main of train_cifar.py in this process; return its exit code."""
    try:
        return train_cifar.main()
    except Interrupted as end:
        return end.code


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Run train_cifar.py in this process; returns its exit code."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["train_cifar.py", *map(str, args)])
        return code_of_main()

    return run


@pytest.fixture
def begin(train, tmp_path):
    return lambda *args: train(*FLAGS.split(), "--out", tmp_path / "run", *args)


@pytest.fixture
def go_on(train, tmp_path):
    return lambda *args: train("--resume", tmp_path / "run", *args)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that nobody has stopped leaves."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        without_pictures(patch)
        patch.setattr(sys, "argv", ["train_cifar.py", *FLAGS.split(), "--out", str(folder)])
        assert train_cifar.main() == 0
    return content(folder)


def content(folder):
    """All that a finished run leaves, but for the seconds and the settings."""
    state, position = load_checkpoint(folder)
    best, row = load_model(folder / "best.safetensors")
    with open(folder / "log.csv") as file:
        log = list(csv.DictReader(file))
    result = json.loads((folder / "result.json").read_text())
    assert "seconds" not in row
    for seconds in (position, *position["history"], *log, result):
        seconds.pop("seconds", None)
    for settings in ("epoch_seconds", "config"):
        position.pop(settings)
    bits = {name: (array.dtype, array.shape, array.tobytes()) for name, array in state.items()}
    return bits, position, {name: array.tobytes() for name, array in best.state_dict().items()}, row, log, result


def stop_at_step(monkeypatch, step, number=signal.SIGINT, times=1):
    """Send this process a signal in the middle of a step, counted from 0."""

    def one_cycle(current, *args):
        if current == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return train_cifar.minires.one_cycle(current, *args)

    monkeypatch.setitem(train_cifar.SCHEDULES, "one-cycle", one_cycle)


def stop_at_batch(monkeypatch, batch):
    """Send this process a signal before the given batch, counted from 0, of all that are validated or tested."""
    seen = []

    def predict(images, *args):
        seen.append(images)
        if len(seen) == batch + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return normalize(images, *args)

    normalize = evaluation.normalize
    monkeypatch.setattr(evaluation, "normalize", predict)


@pytest.mark.parametrize("step", range(EPOCHS * STEPS))
def test_stopped_in_any_step(begin, go_on, whole, tmp_path, monkeypatch, capsys, step):
    with monkeypatch.context() as patch:
        stop_at_step(patch, step)
        assert begin() == 130
    out, _ = capsys.readouterr()
    assert f"interrupted in epoch {step // STEPS + 1}, after step {step + 1} of 6; to resume:" in out
    assert load_checkpoint(tmp_path / "run")[1]["step"] == step + 1
    assert go_on() == 0
    assert f"resuming after step {step + 1} of 6" in capsys.readouterr().out
    assert content(tmp_path / "run") == whole


@pytest.mark.slow
@pytest.mark.parametrize("full", ["--full-train", "--no-full-train"])
def test_stopped_anywhere_with_averaged_weights(train, tmp_path, monkeypatch, full):
    """Momentum, the average and its statistics; the last weights of all images, or the best by validation."""
    flags = [*FLAGS.split(), "--recipe", "fast", full]
    assert train(*flags, "--out", tmp_path / "whole") == 0
    for step in range(EPOCHS * STEPS):
        with monkeypatch.context() as patch:
            stop_at_step(patch, step)
            assert train(*flags, "--out", tmp_path / f"run {step}") == 130
        assert train("--resume", tmp_path / f"run {step}") == 0
        assert content(tmp_path / f"run {step}") == content(tmp_path / "whole")


@pytest.mark.parametrize("full", ["--full-train", "--no-full-train"])
def test_a_log_that_is_ahead_of_the_checkpoint_is_set_back(train, tmp_path, monkeypatch, full):
    def stopped_at(step, *args):
        with monkeypatch.context() as patch:
            stop_at_step(patch, step)
            assert train(*args) == 130

    stopped_at(STEPS, *FLAGS.split(), full, "--out", tmp_path / "run")
    log = (tmp_path / "run" / "log.csv").read_text()
    (tmp_path / "run" / "log.csv").write_text(log + log.splitlines()[-1] + "\n")  # as if killed after another epoch
    stopped_at(STEPS + 1, "--resume", tmp_path / "run")
    assert (tmp_path / "run" / "log.csv").read_text() == log


def test_best_weights_that_are_ahead_of_the_checkpoint_are_set_back(begin, go_on, tmp_path, monkeypatch):
    def stopped_at(step, run):
        with monkeypatch.context() as patch:
            stop_at_step(patch, step)
            assert run() == 130
        model, row = load_model(tmp_path / "run" / "best.safetensors")
        return {name: array.tobytes() for name, array in model.state_dict().items()}, row

    best = stopped_at(STEPS, begin)
    save_weights(tmp_path / "run" / "best.safetensors", ResNet((1,), (2,)))  # as if killed after another epoch
    assert stopped_at(STEPS + 1, go_on) == best


@pytest.mark.slow
def test_averaging_and_validating_leave_the_training_as_it_is(train, tmp_path):
    def training_losses(ema):
        folder = tmp_path / ema
        assert train(*FLAGS.split(), "--recipe", "fast", "--no-full-train", "--ema", ema, "--out", folder) == 0
        with open(folder / "log.csv") as file:
            return [row["train_loss"] for row in csv.DictReader(file)]

    assert training_losses("0.5") == training_losses("0")


@pytest.mark.slow
def test_stopped_while_statistics_are_measured_and_averaged_weights_validated_and_tested(train, tmp_path, monkeypatch):
    """Three batches give the statistics and one is validated in each epoch; the ninth batch is the test's."""
    flags = [*FLAGS.split(), "--recipe", "fast", "--no-full-train"]
    assert train(*flags, "--out", tmp_path / "whole") == 0
    pool = train_cifar.minires.GlobalAvgPool2d.forward
    for batch in range(9):
        seen = []

        def counted(self, x, seen=seen, batch=batch):
            if not self.training:
                seen.append(x)
                if len(seen) == batch + 1:
                    os.kill(os.getpid(), signal.SIGTERM)
            return pool(self, x)

        with monkeypatch.context() as patch:
            patch.setattr(train_cifar.minires.GlobalAvgPool2d, "forward", counted)
            assert train(*flags, "--out", tmp_path / f"run {batch}") == 143
        assert train("--resume", tmp_path / f"run {batch}") == 0
        assert content(tmp_path / f"run {batch}") == content(tmp_path / "whole")


@pytest.mark.slow
def test_stopped_after_every_step(begin, go_on, whole, tmp_path, monkeypatch):
    for step in range(EPOCHS * STEPS):
        with monkeypatch.context() as patch:
            stop_at_step(patch, step, signal.SIGTERM)
            assert (go_on() if step else begin("--checkpoint-every", "0")) == 143
    assert go_on() == 0
    assert content(tmp_path / "run") == whole


@pytest.mark.parametrize("batch", range(EPOCHS + 1))
def test_stopped_in_validation_or_in_the_test(begin, go_on, whole, tmp_path, monkeypatch, capsys, batch):
    original = evaluation.predict_logits.__defaults__
    monkeypatch.setattr(evaluation.predict_logits, "__defaults__", (10, *original[1:]))
    monkeypatch.setattr(evaluation.evaluate, "__defaults__", (10, *original[1:]))  # three batches instead of one
    with monkeypatch.context() as patch:
        stop_at_batch(patch, 3 * batch + 1)
        assert begin() == 143
    step = min(batch + 1, EPOCHS) * STEPS
    assert f"after step {step} of 6; to resume:" in capsys.readouterr().out
    assert go_on() == 0
    expected, actual = whole, content(tmp_path / "run")
    assert actual[0].keys() == expected[0].keys()
    assert {name for name in actual[0] if actual[0][name] != expected[0][name]} == set()


@pytest.mark.parametrize("threads", [1, 3])
def test_gone_on_with_another_number_of_threads(begin, go_on, whole, tmp_path, monkeypatch, threads):
    with monkeypatch.context() as patch:
        stop_at_step(patch, 2)
        assert begin() == 130
    try:
        kernels.set_num_threads(threads)
        assert go_on() == 0
    finally:
        kernels.set_num_threads(None)
    assert content(tmp_path / "run") == whole


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("cpu", "gpu"), ("gpu", "cpu"), ("gpu", "gpu")])
def test_from_one_device_to_the_other(strict_gpu, train, tmp_path, monkeypatch, capsys, first, second):
    """With the reference kernels, which serve both, the bits are the same."""
    with kernels.use("reference"):
        assert train(*FLAGS.split(), "--out", tmp_path / "whole") == 0
        with monkeypatch.context() as patch:
            stop_at_step(patch, 1)
            assert train(*FLAGS.split(), "--device", first, "--out", tmp_path / "run") == 130
        capsys.readouterr()
        assert train("--resume", tmp_path / "run", "--device", second) == 0
    out, err = capsys.readouterr()
    assert f"device {second}" in out
    assert (f"note: device {first} then, {second} now: last digits may differ" in err) == (first != second)
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(begin, go_on, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_step(patch, 3)
        assert begin("--checkpoint-every", "0") == 130
    path = tmp_path / "run" / CHECKPOINT
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=r"checkpoint\.safetensors is damaged.*resuming from .*previous\.safetensors"):
        assert go_on() == 0
    assert (tmp_path / "run" / DAMAGED).read_bytes() == data
    assert content(tmp_path / "run") == whole


def test_two_damaged_checkpoints_are_not_taken_for_a_run_that_has_none(begin, go_on, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_step(patch, 3)
        begin("--checkpoint-every", "0")
    for name in (CHECKPOINT, PREVIOUS):
        (tmp_path / "run" / name).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used: .*checkpoint.*; .*previous"):
        go_on()


def test_a_run_killed_before_its_first_checkpoint_begins_again(begin, go_on, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_step(patch, 2)
        assert begin() == 130
    (tmp_path / "run" / CHECKPOINT).unlink()
    (tmp_path / "run" / "log.csv.minires-part").write_text("half")
    assert go_on() == 0
    assert content(tmp_path / "run") == whole
    assert not list((tmp_path / "run").glob("*part"))


def test_a_finished_run_says_so(begin, go_on, tmp_path, capsys):
    assert begin() == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    assert go_on() == 0
    run = tmp_path / "run"
    assert capsys.readouterr().out == f"the run in {run} is finished, see {run / 'result.json'}\n"
    assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before


@pytest.fixture
def stopped(begin, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_step(patch, 0)
        assert begin() == 130
    return tmp_path / "run"


def test_other_flags_are_refused_with_the_list_of_differences(stopped, go_on):
    flags = ["--lr", "0.1", "--epochs", "2", "--no-shortcut", "--out", "/elsewhere", "--blocks", "1", "1", "1", "1"]
    with pytest.raises(UsageError) as caught:
        go_on(*flags)
    assert str(caught.value) == (
        f"the run in {stopped} was begun otherwise: "
        "--blocks is [2, 1, 1, 1] in the run and [1, 1, 1, 1] on the command line; "
        "--no-shortcut is False in the run and True on the command line; "
        "--lr is 0.001 in the run and 0.1 on the command line; "
        f"--out is {stopped} in the run and /elsewhere on the command line. Leave the flags out"
    )


def test_a_default_that_is_given_counts_as_given(stopped, go_on):
    with pytest.raises(UsageError, match="--batch-size is 10 in the run and 128 on the command line"):
        go_on("--batch-size", "128")


def test_the_same_flags_and_the_free_ones_are_taken(stopped, go_on, whole):
    assert go_on(*FLAGS.split(), "--out", stopped, "--checkpoint-every", "3") == 0
    assert content(stopped) == whole


def test_other_images_are_refused(stopped, go_on, monkeypatch):
    data = train_cifar.cifar10.load_sample()
    data.train_images[0, 0, 0, 0] ^= 1
    monkeypatch.setattr(train_cifar.cifar10, "load_sample", lambda: data)
    with pytest.raises(UsageError, match=r"the images are not those that the run in .* began with"):
        go_on()


def test_a_run_folder_that_another_process_holds_is_refused(stopped, go_on):
    with locked(stopped), pytest.raises(UsageError, match="is in use by another process"):
        go_on()


def test_a_folder_without_a_run_is_named(train, tmp_path):
    with pytest.raises(UsageError, match=f"there is no run in {tmp_path}, for .*config.json cannot be read"):
        train("--resume", tmp_path)
    with pytest.raises(UsageError, match=r"there is no run in .*none: No such file"):
        train("--resume", tmp_path / "none")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json is damaged .* start the run anew"):
        train("--resume", tmp_path)


def test_a_changed_version_is_told(stopped, go_on, monkeypatch, capsys):
    monkeypatch.setattr(np, "__version__", "9.9")
    assert go_on() == 0
    assert f"note: numpy {np.version.version} then, 9.9 now: last digits may differ" in capsys.readouterr().err


def test_the_seconds_of_a_run_are_those_it_has_computed(stopped, go_on):
    state, position = load_checkpoint(stopped)
    save_checkpoint(stopped, state, position | {"seconds": 5000.0, "epoch_seconds": 4000.0})
    assert go_on() == 0
    assert 5000 <= json.loads((stopped / "result.json").read_text())["seconds"] < 5100
    with open(stopped / "log.csv") as file:
        first, second = (float(row["seconds"]) for row in csv.DictReader(file))
    assert 4000 <= first < 4100
    assert second < 100


# What is not finite


@pytest.mark.parametrize("layer", ["conv1", "layer2.0.conv2", "layer3.0.shortcut.1", "linear"])
def test_a_nan_in_the_weights_of_a_layer_is_reported_with_its_name(begin, tmp_path, monkeypatch, layer):
    def one_cycle(step, *args):
        if step == 4:
            dict(model[0].named_parameters())[f"{layer}.weight"].data[..., 0] = np.nan
        return train_cifar.minires.one_cycle(step, *args)

    model = []
    to = ResNet.to
    monkeypatch.setattr(ResNet, "to", lambda self, device: model.append(self) or to(self, device))
    monkeypatch.setitem(train_cifar.SCHEDULES, "one-cycle", one_cycle)
    with pytest.raises(FloatingPointError) as caught:
        begin("--checkpoint-every", "0")
    assert str(caught.value) == (
        "in epoch 2, step 5 the loss is nan: the first number that is not finite is in the output of "
        f"{layer}, whose weights are not finite; the checkpoint after step 4 is kept; try a smaller --lr than 0.001"
    )
    state, position = load_checkpoint(tmp_path / "run")
    assert position["step"] == 4
    assert all(np.isfinite(array).all() for array in state.values())


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_move(begin, tmp_path, monkeypatch):
    backward = train_cifar.minires.Linear.backward

    def overflowing(self, dout):
        dx = backward(self, dout)
        self.weight.grad[0, 0] = np.inf
        return dx

    monkeypatch.setattr(train_cifar.minires.Linear, "backward", overflowing)
    with pytest.raises(
        FloatingPointError, match=r"in epoch 1, step 1 a gradient is not finite: .* the gradient of linear"
    ):
        begin("--checkpoint-every", "0")
    assert load_checkpoint(tmp_path / "run") is None


def test_a_state_that_is_not_finite_is_never_saved(begin, tmp_path, monkeypatch):
    """Adam's second moment overflows where the gradient, which is squared, does not."""
    backward = train_cifar.minires.Linear.backward

    def large(self, dout):
        dx = backward(self, dout)
        if self.weight.grad is linear[0]:
            self.weight.grad[0, 0] = 1e30
        return dx

    linear = [None]

    def one_cycle(step, *args):
        linear[0] = model[0].linear.weight.grad if step == 1 else None
        return train_cifar.minires.one_cycle(step, *args)

    model = []
    to = ResNet.to
    monkeypatch.setattr(ResNet, "to", lambda self, device: model.append(self) or to(self, device))
    monkeypatch.setattr(train_cifar.minires.Linear, "backward", large)
    monkeypatch.setitem(train_cifar.SCHEDULES, "one-cycle", one_cycle)
    with pytest.raises(
        FloatingPointError, match=r"step 2 optimizer\.v\.linear\.weight holds values that are not finite"
    ):
        begin("--checkpoint-every", "0")
    assert load_checkpoint(tmp_path / "run")[1]["step"] == 1


def test_a_validation_loss_that_is_not_finite_names_the_layer(begin, monkeypatch):
    to = ResNet.to

    def poisoned(self, device):
        self.bn1.running_var.data[:] = np.inf
        self.bn1.running_mean.data[:] = np.inf
        return to(self, device)

    monkeypatch.setattr(ResNet, "to", poisoned)
    with pytest.raises(
        FloatingPointError, match=r"the validation loss is nan: .* is in the output of bn1; there is no"
    ):
        begin()


# As people meet it


def start(*args, **kwargs):
    return start_script(SCRIPT, *args, **kwargs)


@pytest.mark.slow
@pytest.mark.usefixtures("hangups_count")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_command_that_is_printed_goes_on_with_the_run_from_any_folder(tmp_path, number, code):
    process = start(*FLAGS.split(), "--epochs", "8", "--out", "my run", cwd=tmp_path)
    for _ in range(3):  # it has begun; the table's header; the first epoch
        process.stdout.readline()
    process.send_signal(number)
    if number == signal.SIGHUP:  # from the terminal and from the shell
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert err == "\nending after this step; Ctrl-C again ends at once, without saving\n"
    assert "interrupted in epoch" in out
    command = shlex.split(out.splitlines()[-1])
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert "test accuracy" in done.stdout


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_harms_nothing(tmp_path):
    flags = ["--data", "sample", "--device", "cpu", "--batch-size", "60", "--checkpoint-every", "0"]
    process = start(*flags, "--blocks", "1", "1", "1", "1", "--out", tmp_path / "run")
    while process.poll() is None and not (tmp_path / "run" / CHECKPOINT).exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.stderr.readline()
    assert process.stderr.readline().startswith("ending after this step")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert load_checkpoint(tmp_path / "run")[1]["step"] >= 1


@pytest.mark.parametrize(
    ("flags", "environment", "code", "line"),
    [
        (["--resume", "/nowhere"], {}, 2, "error: there is no run in /nowhere: No such file or directory"),
        (["--data", "sample"], {"MINIRES_NUM_THREADS": "x"}, 2, "error: MINIRES_NUM_THREADS must be an integer"),
        (["--data", "sample"], {"MINIRES_KERNELS": "x"}, 2, "error: MINIRES_KERNELS must be 'fast' or 'reference'"),
        (
            ["--data", "sample", "--out", "/dev/null/x"],
            {},
            2,
            "error: --out /dev/null/x cannot be made: Not a directory",
        ),
        (["--checkpoint-every", "-1"], {}, 2, "--checkpoint-every: expected a number of at least 0, got -1"),
        (
            ["--data", ""],
            {},
            2,
            "--data: expected sample or a folder, got an empty name; leave --data out for the default",
        ),
    ],
)
def test_mistakes_end_with_one_line(flags, environment, code, line):
    done = subprocess.run(
        [sys.executable, SCRIPT, *flags], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code
    assert line in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            OSError(28, "No space left on device", "elsewhere/picture.png"),
            1,
            "elsewhere/picture.png: No space left on device$",
        ),
        (BrokenPipeError(32, "Broken pipe"), 141, "$"),
        (MemoryError("9 GB"), 1, "out of memory: 9 GB$"),
        (MemoryError(), 1, "out of memory: no more memory$"),
        (KeyError("x"), 1, r"KeyError: 'x' \(--debug shows the place\)"),
        (CheckpointError("x is damaged"), 2, "x is damaged"),
    ],
)
def test_errors_become_an_exit_code_and_a_line(error, code, line):
    assert explain(error)[0] == code
    assert re.match(line, explain(error)[1])


def test_debug_shows_the_traceback(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--resume", "/nowhere", "--debug"], capture_output=True, text=True)
    assert "Traceback" in done.stderr
    assert done.returncode == 1


# The output, the disk, the folder


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_any_more_ends_with_a_checkpoint(tmp_path):
    process = start(*FLAGS.split(), "--epochs", "3", "--out", "run", cwd=tmp_path)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141
    process.stderr.close()
    position = load_checkpoint(tmp_path / "run")[1]
    assert (position["step"], len(position["history"])) == (3, 1)
    done = subprocess.run([sys.executable, SCRIPT, "--resume", tmp_path / "run"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_row_that_cannot_be_printed_does_not_lose_its_epoch(begin, go_on, whole, tmp_path, monkeypatch):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        written = sys.stdout

        def write_log(*args):  # from now on, output is in vain
            patch.setattr(sys, "stdout", full)
            original(*args)

        run = sys.modules["minires.training.run"]
        original = run.write_log
        patch.setattr(run, "write_log", write_log)
        with pytest.warns(UserWarning, match="standard output: No space left on device; ending after this step"):
            assert begin() == 141
        patch.setattr(sys, "stdout", written)
    assert len(load_checkpoint(tmp_path / "run")[1]["history"]) == 1
    assert go_on() == 0
    assert content(tmp_path / "run") == whole


def test_a_hangup_does_not_end_what_nohup_has_begun():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts() as interrupted:
            os.kill(os.getpid(), signal.SIGHUP)
        assert interrupted == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_best_weights_and_what_is_said_of_them_are_the_same_in_a_run_that_was_stopped(
    begin, go_on, train, tmp_path, monkeypatch
):
    assert train(*FLAGS.split(), "--out", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_at_step(patch, 4)
        assert begin() == 130
    assert go_on() == 0
    (whole, told), (stopped, told_of_stopped) = (
        load_model(tmp_path / name / "best.safetensors") for name in ("whole", "run")
    )
    assert told == told_of_stopped
    for name, array in whole.state_dict().items():
        np.testing.assert_array_equal(stopped.state_dict()[name], array)


def test_a_disk_without_room_for_a_run_is_told_before_it_begins(begin, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100_000, "total": 10**9})
    monkeypatch.setattr("minires.training.folder.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UsageError) as caught:
        begin()
    message = str(caught.value)
    assert message.startswith(f"the disk of {tmp_path / 'run'} has 0 MB free, and the run needs 1 MB: make room, or ")
    assert message.endswith(" on another disk by --out")
    assert not (tmp_path / "run").exists()


def test_the_room_that_a_run_needs_is_that_of_three_checkpoints_and_the_weights(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 0, "total": 10**9})
    monkeypatch.setattr("minires.training.folder.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UsageError, match="has 0 MB free, and the run needs 261 MB"):
        check_space(tmp_path / "new" / "run", 80_000_000, 20_000_000)
    for name, size in ((CHECKPOINT, 80), (PREVIOUS, 80), ("best.safetensors", 20)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size * 1_000_000)
    with pytest.raises(UsageError, match="has 0 MB free, and the run needs 81 MB"):
        check_space(tmp_path, 80_000_000, 20_000_000)
    usage.free = 82_000_000
    check_space(tmp_path, 80_000_000, 20_000_000)


def test_a_full_disk_names_the_folder_to_go_on_with(stopped):
    code, line = explain(OSError(28, "No space left on device", str(stopped / "log.csv")))
    assert code == 1
    assert line == (
        f"{stopped / 'log.csv'}: No space left on device; what was there before is unharmed. Once the cause is mended, "
        f"resume the run by --resume {stopped}"
    )


def test_folders_that_cannot_be_written_to_are_refused(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("minires.training.folder.tempfile.TemporaryFile", refuse)
        with pytest.raises(UsageError, match="out cannot be written to: Permission denied; name another"):
            new_folder(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("minires.training.folder.pathlib.Path.mkdir", refuse)
        with pytest.raises(UsageError, match=r"/runs/.* cannot be made: Permission denied; name a folder$"):
            new_folder(None)
    (tmp_path / "runs").write_text("no folder")
    with pytest.raises(UsageError, match=r"/runs/.* cannot be made: .*; name a folder by --out"):
        new_folder(None, "--out")
    with pytest.raises(UsageError, match=r"^the run folder .*: name another, nothing is overwritten$"):
        new_folder(tmp_path)  # as a program without such options is told


def test_a_relative_data_folder_is_kept_as_an_absolute_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for given, kept in (("d3", str(tmp_path / "d3")), ("sample", "sample"), ("./sample", str(tmp_path / "sample"))):
        monkeypatch.setattr(sys, "argv", ["train_cifar.py", "--data", given])
        args, flags = train_cifar.parse_arguments()
        assert (args.data, flags["data"]) == (kept, kept)


def test_data_that_have_gone_can_be_named_anew(stopped, go_on, train):
    with pytest.raises(train_cifar.cifar10.DataError, match=r"/gone does not exist.*; or name its data by --data DIR$"):
        go_on("--data", "/gone")
    with pytest.raises(train_cifar.cifar10.DataError) as caught:
        train("--data", "/gone")
    assert "or name its data" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[]",
            r"config\.json is damaged \(expected an object, got \[\]\): start the run anew",
        ),
        ('"abc"', r"config\.json is damaged \(expected an object, got abc\)"),
        ("{}", r"config\.json is damaged \(it lacks seed, blocks, epochs and others\)"),
        ("[" * 100_000, r"config\.json is damaged \(.*\): start the run anew"),
        (b"\xff\xfe", r"config\.json is damaged \(.*\): start the run anew"),
    ],
)
def test_settings_that_are_none_are_refused(train, tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message):
        train("--resume", tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", "x", "--epochs: expected an integer of at least 1, got x"),
        ("epochs", None, "--epochs is null"),
        ("epochs", True, "--epochs: expected one argument"),
        ("lr", -1, "--lr: expected a number above 0, got -1"),
        ("blocks", [1, 2], "--blocks: expected 4 arguments"),
        ("blocks", 3, "--blocks: expected 4 arguments"),
        ("schedule", "none", "--schedule: invalid choice: 'none'"),
        ("graph", 7, "--graph.*: ignored explicit argument"),
        ("optimizer", {}, "--optimizer: invalid choice"),
    ],
)
def test_settings_that_cannot_be_are_refused(stopped, go_on, name, value, message):
    (stopped / CHECKPOINT).unlink()
    config = json.loads((stopped / "config.json").read_text())
    (stopped / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(UsageError) as caught:
        go_on()
    assert re.search(message, str(caught.value))
    assert str(caught.value).startswith(f"the settings of the run in {stopped} are damaged (")
    assert str(caught.value).endswith("): start the run anew elsewhere")


def test_a_checkpoint_of_another_program_is_refused(tmp_path, train):
    save_checkpoint(tmp_path, {"a": np.zeros(3)}, {"step": 500})
    with pytest.raises(CheckpointError, match=r"is not one of a Run: it lacks config, history, seen, .*; name"):
        train("--resume", tmp_path)


# Niceties that end no run

ONE_STEP = [*FLAGS.split(), "--epochs", "1", "--limit-batches", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nosuch"])
def test_a_backend_of_matplotlib_that_is_not_there_ends_no_run(tmp_path, backend):
    process = start(*ONE_STEP, "--out", tmp_path / "run", env=os.environ | {"MPLBACKEND": backend}, pictures=True)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err


def test_a_picture_that_cannot_be_drawn_is_told_and_ends_no_run(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("no ink")

    monkeypatch.setattr("minires.plots.plot_curves", fail)
    output.draw("plot_curves", [], tmp_path / "curves.png")
    assert capsys.readouterr().err == f"no picture {tmp_path / 'curves.png'}: no ink\n"


@pytest.mark.slow
def test_a_process_without_standard_error_trains(tmp_path):
    command = [sys.executable, str(SCRIPT), *ONE_STEP, "--out", str(tmp_path / "run")]
    done = subprocess.run(["sh", "-c", shlex.join(command) + " 2>&-"], stdout=subprocess.PIPE, timeout=100)
    assert done.returncode == 0
    assert (tmp_path / "run" / "result.json").exists()


def test_a_signal_to_a_process_without_standard_error_is_written_into_no_file(tmp_path):
    """The first file that such a process opens gets the number 2."""
    code = """
import os, signal, sys
from minires.training.signals import interrupts
from minires.training.weights import save_weights
sys.stderr = None
with interrupts() as arrived:
    os.kill(os.getpid(), signal.SIGTERM)
sys.exit(arrived != [signal.SIGTERM])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_names_that_the_outputs_encoding_lacks_end_no_run(tmp_path, encoding):
    env = os.environ | {"PYTHONIOENCODING": encoding}
    process = start(*ONE_STEP, "--epochs", "50", "--out", "运行", cwd=tmp_path, env=env)
    process.stdout.readline(), process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert r"\u8fd0\u884c" in out
    code = "from minires.training.output import say; say('运行', [])"  # a loop of one's own
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, rb"\u8fd0\u884c")


def test_a_log_that_another_program_holds_open_is_written_next_time(begin, tmp_path, monkeypatch):
    original, calls = storage.os.replace, []

    def replace(source, target):
        if pathlib.Path(target).name == "log.csv":
            calls.append(target)
            if len(calls) == 1:
                raise PermissionError(13, "The process cannot access the file", str(target))
        return original(source, target)

    monkeypatch.setattr(storage.os, "replace", replace)
    with pytest.warns(UserWarning, match=r"log\.csv: The process cannot access the file; all rows are written next"):
        assert begin() == 0
    with open(tmp_path / "run" / "log.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


def test_a_disk_that_does_not_tell_its_size_is_not_taken_for_full(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 0, "total": 0})
    monkeypatch.setattr("minires.training.folder.shutil.disk_usage", lambda _: usage)
    check_space(tmp_path, 80_000_000, 20_000_000)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_share_that_knows_no_fsync_of_folders_keeps_checkpoints(tmp_path, monkeypatch, number):
    original = storage.os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        original(descriptor)

    monkeypatch.setattr(storage.os, "fsync", fsync)
    save_checkpoint(tmp_path, {"a": np.zeros(3)}, {"step": 1})
    assert load_checkpoint(tmp_path)[1]["step"] == 1


def test_the_home_folder_may_be_written_as_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    args, _ = train_cifar.parse_arguments(["--out=~/a", "--data=~/d"])
    assert (args.out, args.data) == (tmp_path / "a", str(tmp_path / "d"))


def test_a_run_in_a_thread_trains(begin, whole, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        assert thread.submit(begin).result() == 0
    assert content(tmp_path / "run") == whole


def test_the_script_finds_its_recipes_wherever_python_looks(tmp_path):
    args = [*ONE_STEP, "--help"]
    for command, env in (
        ([sys.executable, "-m", "examples.train_cifar"], {"PYTHONPATH": str(SCRIPT.parent.parent)}),
        ([sys.executable, str(SCRIPT)], {"PYTHONSAFEPATH": "1"}),
    ):
        done = subprocess.run(
            [*command, *args], cwd=SCRIPT.parent.parent, env=os.environ | env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", ["~nosuchuser/x", "~nosuchuser"])
def test_a_home_folder_that_is_unknown_makes_no_folder_of_that_name(text, capsys):
    with pytest.raises(SystemExit):
        train_cifar.parse_arguments([f"--out={text}"])
    assert f"there is no home folder for {text}: name it, or write ./{text}" in capsys.readouterr().err


def test_a_folder_with_a_space_is_quoted_where_it_can_be_resumed(train, tmp_path):
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "a").touch()
    with pytest.raises(UsageError, match=re.escape(f"(--resume '{folder}' resumes a run)")):
        train(*FLAGS.split(), "--out", folder)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG])
def test_a_folder_that_cannot_be_asked_ends_in_one_line(tmp_path, monkeypatch, number):
    """Path.exists raises then, and what explains errors asked it once more."""

    def stat(path, *args, **options):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "stat", stat)
    assert not Run(tmp_path / "run").resumed
    path = tmp_path / "run" / "x"
    assert explain(OSError(number, os.strerror(number), str(path))) == (1, f"{path}: {os.strerror(number)}")


def test_a_name_that_is_too_long_is_refused_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, *ONE_STEP, "--out", tmp_path / ("x" * 300)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*x{300} cannot be made: File name too long; name another folder\n", done.stderr)
