"""A loop of one's own, with a Run around it, for a network that is no ResNet: counted, kept, stopped and resumed."""

import copy
import errno
import itertools
import json
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from minires import Adam, BatchNorm2d, Conv2d, Dropout, GlobalAvgPool2d, Linear, Sequential, SoftmaxCrossEntropy
from minires.training import CheckpointError, Interrupted, Run, UsageError, load_weights, storage
from minires.training import run as run_module
from minires.training.checkpoint import load_checkpoint

IMAGES = np.random.default_rng(0).standard_normal((12, 6, 6, 3)).astype(np.float32)
LABELS = np.arange(12) % 4
EPOCHS, STEPS = 2, 3


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(run_module, "draw", lambda *_: None)


def network():
    return Sequential(
        Conv2d(3, 5, 3, rng=1), BatchNorm2d(5, relu=True), GlobalAvgPool2d(), Dropout(0.3, rng=2), Linear(5, 4, rng=3)
    )


def batches(epoch, count=STEPS):
    order = np.random.default_rng(epoch).permutation(12)
    return [(IMAGES[order[i : i + 4]], LABELS[order[i : i + 4]]) for i in range(0, 4 * count, 4)]


def train(folder, during_step=lambda run: None, batches=batches, validate=True, **options):
    model, loss_function = network(), SoftmaxCrossEntropy()
    optimizer = Adam(model.parameters(), lr=0.01)
    with Run(folder) as run:
        run.track(model, optimizer, epochs=EPOCHS, steps_per_epoch=STEPS, **options)
        for epoch in run.epochs():
            for images, labels in run.steps(batches(epoch)):
                optimizer.lr = 0.01 / (1 + run.step)
                optimizer.zero_grad()
                logits = model(images)
                loss = loss_function(logits, labels)
                model.backward(loss_function.backward())
                run.count(loss, logits, labels)
                during_step(run)
                run.check(loss)
                optimizer.step()
            if validate:
                run.validate(lambda: (1.0 / epoch, 0.5))  # noqa: B023
        return run.finish({"test_loss": 1.0})


def content(folder):
    """What a run leaves, but for the seconds."""
    state, position = load_checkpoint(folder)
    weights, metadata = load_weights(folder / "best.safetensors")
    for seconds in (position, *position["history"]):
        seconds.pop("seconds")
    position.pop("epoch_seconds"), position.pop("config")
    bits = {name: array.tobytes() for part in (state, weights) for name, array in part.items()}
    return bits, position, metadata


def stop_in(step):
    return lambda run: os.kill(os.getpid(), signal.SIGTERM) if run.step == step else None


def test_stopped_in_any_step_and_run_again_it_ends_with_the_same_bits(tmp_path):
    train(tmp_path / "whole")
    for step in range(EPOCHS * STEPS):
        with pytest.raises(Interrupted) as end:
            train(tmp_path / str(step), stop_in(step))
        assert end.value.code == 143
        assert load_checkpoint(tmp_path / str(step))[1]["step"] == step + 1
        train(tmp_path / str(step))
        assert content(tmp_path / str(step)) == content(tmp_path / "whole")


def test_the_log_counts_every_image_once_and_keeps_the_best_weights(tmp_path):
    result = train(tmp_path, settings={"lr": 0.01})
    history = load_checkpoint(tmp_path)[1]["history"]
    assert [row["epoch"] for row in history] == [1, 2]
    assert all(0 <= row["train_accuracy"] * 12 <= 12 and row["train_accuracy"] * 12 % 1 == 0 for row in history)
    assert [row["lr"] for row in history] == [0.01 / 3, 0.01 / 6]
    assert (result["best_epoch"], result["validation_loss"]) == (2, 0.5)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.01


def test_without_validation_the_last_weights_are_kept(tmp_path):
    train(tmp_path, validate=False)
    weights, metadata = load_weights(tmp_path / "best.safetensors")
    assert (metadata["epoch"], metadata["validation_loss"]) == (2, None)
    state = load_checkpoint(tmp_path)[0]
    assert all((array == state[f"model.{name}"]).all() for name, array in weights.items())


def test_a_run_that_was_begun_otherwise_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path, stop_in(1), settings={"lr": 0.1, "note": "a"})
    with pytest.raises(UsageError, match=r"was begun otherwise: lr is 0\.1 in the run and 0\.2 now\. Name another"):
        train(tmp_path, settings={"lr": 0.2, "note": "b"}, free=["note"])
    train(tmp_path, settings={"lr": 0.1, "note": "b"}, free=["note"])


def test_a_run_with_other_batches_than_it_began_with_is_refused(tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        train(tmp_path, stop_in(4))
    monkeypatch.setattr(sys.modules[__name__], "STEPS", 2)
    with pytest.raises(UsageError, match=r"has done 5 steps in 1 epochs and a part, which have not 2 steps each"):
        train(tmp_path)


def test_a_checkpoint_of_another_network_is_refused(tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        train(tmp_path, stop_in(1))
    monkeypatch.setattr(sys.modules[__name__], "network", lambda: Sequential(GlobalAvgPool2d(), Linear(3, 4, rng=3)))
    with pytest.raises(CheckpointError, match=r"does not fit .*: optimizer\.m\.1\.weight has shape \(5,\)"):
        train(tmp_path)


@pytest.mark.parametrize(("count", "got"), [(2, "got 2"), (4, "got more")])
def test_another_number_of_batches_than_was_said_is_named(tmp_path, count, got):
    images = np.concatenate([IMAGES, IMAGES])
    with pytest.raises(ValueError, match=f"expected 3 batches in an epoch, {got}"):
        train(tmp_path, batches=lambda epoch: [(images[:4], LABELS[:4])] * count)


def test_an_epoch_that_is_left_before_its_end_is_an_error(tmp_path):
    model = network()
    with Run(tmp_path) as run:
        run.track(model, Adam(model.parameters(), lr=0.01), epochs=EPOCHS, steps_per_epoch=STEPS)
        epochs = run.epochs()
        for _ in run.steps(batches(next(epochs))):
            if run.step == 1:
                break
        with pytest.raises(RuntimeError, match=r"epoch 1 was left after 1 of 3 steps: let the loop over Run\.steps"):
            next(epochs)


def test_a_checkpoint_between_the_first_validation_and_the_end_of_its_epoch_can_be_resumed(tmp_path, monkeypatch):
    train(tmp_path / "whole")
    validate = Run.validate

    def stopped_after(run, measure):
        validate(run, measure)
        run.save()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "validate", stopped_after)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run")
    train(tmp_path / "run")
    assert content(tmp_path / "run") == content(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_loss_that_is_a_number_is_checked_like_an_array(tmp_path):
    model = network()
    with Run(tmp_path) as run:
        run.track(model, Adam(model.parameters(), lr=0.01), epochs=EPOCHS, steps_per_epoch=STEPS)
        for images, _ in itertools.chain.from_iterable(run.steps(batches(epoch)) for epoch in run.epochs()):
            model(images)
            run.check(0.5)
            with pytest.raises(FloatingPointError, match="the loss is nan"):
                run.check(float("nan"))
            break


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("layer", ["0", "4"])
def test_a_number_that_is_not_finite_is_found_in_its_layer(tmp_path, layer):
    def poison(run):
        if run.step == 4:
            dict(run.model.named_parameters())[f"{layer}.weight"].data[..., 0] = np.nan

    with pytest.raises(FloatingPointError) as caught:
        train(tmp_path, poison)
    assert str(caught.value) == (
        "in epoch 2, step 6 the loss is nan: the first number that is not finite is in the output of "
        f"{layer}, whose weights are not finite; there is no checkpoint yet"
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_where_the_loss_is_looked_at_seldom_the_line_says_so(tmp_path):
    def poison(run):
        if run.step == 2:
            dict(run.model.named_parameters())["4.weight"].data[..., 0] = np.nan

    with pytest.raises(FloatingPointError, match=r"epoch 2, step 5 the loss is nan: .* \(looked at every 2 steps\);"):
        train(tmp_path, poison, check_every=2)


def test_a_run_that_ends_early_counts_its_last_epoch(tmp_path):
    model, losses = network(), {1: 2.0, 2: 1.0}
    with Run(tmp_path) as run:
        run.track(model, Adam(model.parameters(), lr=0.01), epochs=5, steps_per_epoch=STEPS)
        for epoch in run.epochs():
            for _ in run.steps(batches(epoch)):
                pass
            run.validate(lambda: (losses[epoch], 0.5))  # noqa: B023
            if epoch == 2:
                break
        result = run.finish({})
    assert (result["best_epoch"], result["validation_loss"]) == (2, 1.0)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3
    assert load_checkpoint(tmp_path)[1]["step"] == 2 * STEPS


def test_a_run_without_validation_that_ends_early_keeps_its_last_weights(tmp_path):
    model = network()
    with Run(tmp_path) as run:
        run.track(model, Adam(model.parameters(), lr=0.01), epochs=5, steps_per_epoch=STEPS)
        for epoch in run.epochs():
            for _ in run.steps(batches(epoch)):
                pass
            if epoch == 2:
                break
        assert run.finish({})["best_epoch"] == 2
    weights, metadata = load_weights(tmp_path / "best.safetensors")
    assert metadata["epoch"] == 2
    assert all((array == model.state_dict()[name]).all() for name, array in weights.items())


def test_a_run_without_validation_that_is_prolonged_keeps_its_new_last_weights(tmp_path, monkeypatch):
    train(tmp_path, validate=False)
    monkeypatch.setattr(sys.modules[__name__], "EPOCHS", 3)
    result = train(tmp_path, validate=False)
    weights, metadata = load_weights(tmp_path / "best.safetensors")
    state = load_checkpoint(tmp_path)[0]
    assert (result["best_epoch"], metadata["epoch"]) == (3, 3)
    assert all((array == state[f"model.{name}"]).all() for name, array in weights.items())


def test_settings_that_the_run_writes_itself_are_its_own(tmp_path):
    settings = {"device": "auto", "out": "elsewhere", "lr": 0.1}
    with pytest.raises(Interrupted):
        train(tmp_path, stop_in(1), settings=settings)
    train(tmp_path, settings=settings)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["device"], config["out"], config["lr"]) == ("cpu", str(tmp_path), 0.1)


def test_the_optimizer_of_another_model_is_refused(tmp_path):
    with Run(tmp_path) as run, pytest.raises(ValueError, match="the optimizer has parameters that are not the model's"):
        run.track(network(), Adam(network().parameters(), lr=0.01), epochs=1, steps_per_epoch=1)


def test_an_output_that_is_no_terminal_has_a_line_now_and_then(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minires.training.output.SECONDS_BETWEEN_LINES", -1)
    train(tmp_path)
    out = capsys.readouterr()
    lines = [line for line in (out.out + out.err).splitlines() if ", batch " in line]
    assert [line.partition(":")[0] for line in lines] == [f"epoch {e}/2, batch {b}/3" for e in (1, 2) for b in (1, 2)]
    assert re.search(r": loss \d\.\d{4}, accuracy \d+\.\d%, \d+ images/s$", lines[0])


def test_the_curves_are_drawn_while_the_run_goes_on(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(run_module, "draw", lambda plot, history, path: drawn.append((plot, len(history), path.name)))
    monkeypatch.setattr(run_module, "SECONDS_BETWEEN_PICTURES", 0)
    train(tmp_path)
    assert drawn[:2] == [("plot_curves", 1, "curves.png"), ("plot_curves", 2, "curves.png")]


def test_a_program_that_catches_nothing_ends_as_the_signal_asks(tmp_path):
    code = """
import os, signal, sys
from test_run import train, stop_in
train("run", stop_in(2))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 143
    assert "Traceback" not in done.stderr
    assert "interrupted in epoch 1, after step 3 of 6; to resume:" in done.stdout


def test_numpys_numbers_paths_and_tuples_are_written_and_compared_as_what_they_are(tmp_path):
    """A float32 for a rate ended the run at its first checkpoint, a tuple among the settings at its resumption."""
    settings = {"blocks": (1, 2), "count": np.int64(3), "data": pathlib.Path("d"), "none": float("nan")}
    part = np.float32(0.5)

    def rate_in_float32(run):
        run.optimizer.lr = np.float32(0.5)

    options = {"settings": settings, "checkpoint_every": 0, "during_step": rate_in_float32}
    with pytest.raises(Interrupted):
        train(tmp_path / "run", **options | {"during_step": lambda run: (rate_in_float32(run), stop_in(4)(run))})
    assert train(tmp_path / "run", **options)["test_loss"] == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["blocks"] == [1, 2]
    storage.write_atomically(tmp_path / "x", storage.pack({}, {"a": part, "b": np.array(2)}))
    assert storage.read_arrays(tmp_path / "x")[1] == {"a": 0.5, "b": 2}
    with pytest.raises(TypeError, match=r"JSON cannot hold a ndarray, \[0\. 0\.\]: numbers, texts, lists, dicts"):
        storage.to_json({"a": np.zeros(2)})


def test_a_validation_in_numpys_numbers_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "validate", lambda run, measure, old=Run.validate: old(run, lambda: np.float32(measure())))
    assert train(tmp_path / "run")["validation_accuracy"] == 0.5


@pytest.mark.parametrize(("name", "value"), [("EPOCHS", 0), ("EPOCHS", 1.5), ("STEPS", 0)])
def test_a_run_of_no_epochs_or_steps_is_refused(tmp_path, monkeypatch, name, value):
    monkeypatch.setitem(globals(), name, value)
    with pytest.raises(ValueError, match=rf"Run\.track: .* must be an integer of at least 1, got {value}"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_run_is_not_copied(tmp_path, copied):
    with pytest.raises(TypeError, match="a Run holds its folder for this process alone, and cannot be copied"):
        copied(Run(tmp_path / "run"))


def test_a_program_without_a_file_is_not_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["-c"])
    with pytest.raises(Interrupted):
        train(tmp_path / "run", stop_in(1))
    assert f"to resume:\n    the same program, on the folder {tmp_path / 'run'}" in capsys.readouterr().out


def test_a_clock_that_stands_still_ends_no_run(tmp_path, monkeypatch):
    """That of Windows goes in steps of 16 ms."""
    monkeypatch.setattr("minires.training.output.time.monotonic", lambda: 5.0)
    train(tmp_path / "run")


def test_an_error_stream_that_is_no_file_hears_of_a_signal(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", type("Logger", (), {"write": lambda *_: None, "flush": lambda _: None})())
    with pytest.raises(Interrupted):
        train(tmp_path / "run", stop_in(1))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EBUSY, errno.EIO])
def test_a_log_that_cannot_be_written_ends_no_run_whatever_warnings_do(tmp_path, monkeypatch, capsys, number):
    def write_log(path, history):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(run_module, "write_log", write_log)
    train(tmp_path / "run")  # pytest makes errors of warnings, as -W error does
    assert f"warning: {tmp_path / 'run' / 'log.csv'}: {os.strerror(number)}; all rows are" in capsys.readouterr().err
