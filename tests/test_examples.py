"""The examples as people run them: what they write, what they print, and how they end."""

import csv
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
from small_cifar10 import Server, status

from minires import SGD, Adam, ResNet, SoftmaxCrossEntropy, backend, cifar10, kernels, one_cycle, triangular
from minires.augment import alternating_flip, cutout, normalize, random_crop, random_flip
from minires.cifar10 import load_sample
from minires.evaluation import evaluate, measure_statistics
from minires.training import load_model, save_weights
from minires.training.storage import read_arrays

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
NO_PICTURES = pathlib.Path(__file__).parent / "without_pictures"
LIMITS = ["--data", "sample", "--device", "cpu", "--epochs", "2", "--batch-size", "20", "--limit-batches", "2"]
CHANNELS = (4, 6, 6, 8)
SMALL_RUN = [*LIMITS, "--channels", *map(str, CHANNELS)]
PARAMETERS = {blocks: ResNet(blocks, CHANNELS).num_parameters() for blocks in ((2, 1, 1, 1), (1, 1, 1, 1))}


def start(script, *args, env=os.environ, pictures=False, **kwargs):
    command = [sys.executable, EXAMPLES / script, *map(str, args)]
    if not pictures:
        env = {**env, "PYTHONPATH": os.pathsep.join(filter(None, [str(NO_PICTURES), env.get("PYTHONPATH")]))}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **kwargs)


def run(script, *args, **kwargs):
    """Return (exit code, standard output, standard error)."""
    process = start(script, *args, **kwargs)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    code, out, err = run("train_cifar.py", *SMALL_RUN, "--out", folder, pictures=True)
    assert code == 0, err
    return folder, out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_weights(path, ResNet((1,), (8,)))
    return path


@pytest.mark.slow
def test_a_run_writes_its_folder(small_run):
    folder, out = small_run
    written = {path.name for path in folder.iterdir()}
    expected = {"config.json", "log.csv", "best.safetensors", "checkpoint.safetensors", "result.json", "report.html"}
    pictures = {"curves.png", "images.png"} if importlib.util.find_spec("matplotlib") else set()
    assert written == expected | pictures
    config = json.loads((folder / "config.json").read_text())
    assert (config["batch_size"], config["device"], config["parameters"]) == (20, "cpu", PARAMETERS[2, 1, 1, 1])
    with open(folder / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    result = json.loads((folder / "result.json").read_text())
    best = min(rows, key=lambda row: float(row["validation_loss"]))
    assert result["best_epoch"] == int(best["epoch"])
    assert result["validation_loss"] == float(best["validation_loss"])
    assert result["test_images"] == 40
    assert f"test accuracy {result['test_accuracy']:.2%} on 40 images" in out
    assert load_model(folder / "best.safetensors")[1]["epoch"] == result["best_epoch"]


@pytest.mark.slow
def test_a_run_prints_an_aligned_row_for_each_epoch(small_run):
    lines = small_run[1].splitlines()
    header = next(line for line in lines if line.startswith("epoch"))
    rows = [line for line in lines if line.lstrip()[0].isdigit() and "|" in line]
    assert len(rows) == 2
    for row in rows:
        assert [i for i, c in enumerate(row) if c == "|"] == [i for i, c in enumerate(header) if c == "|"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(small_run, tmp_path):
    code, _, err = run("train_cifar.py", *SMALL_RUN, "--out", tmp_path / "again")
    assert code == 0, err
    first, again = (load_model(folder / "best.safetensors")[0] for folder in (small_run[0], tmp_path / "again"))
    for name, array in first.state_dict().items():
        np.testing.assert_array_equal(array, again.state_dict()[name], err_msg=name)


def test_the_variants_that_the_report_studies(tmp_path):
    variant = ["--blocks", "1", "1", "1", "1", "--no-shortcut", "--no-batch-norm", "--dropout", "0", "--no-augment"]
    rate = ["--schedule", "one-cycle", "--lr", "0.01"]
    code, _, err = run("train_cifar.py", *SMALL_RUN, "--epochs", "1", *variant, *rate, "--out", tmp_path / "run")
    assert code == 0, err
    model, _ = load_model(tmp_path / "run" / "best.safetensors")
    names = list(model.state_dict())
    assert not any(".shortcut." in name or "running" in name or name.startswith("layer1.1") for name in names)


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """Run train_cifar.py in this process, where parts of it can be replaced; returns the run folder."""
    import train_cifar

    def train(*args):
        monkeypatch.setattr(sys, "argv", ["train_cifar.py", *args, "--out", str(tmp_path / "run")])
        assert train_cifar.main() == 0
        return tmp_path / "run"

    with warnings.catch_warnings():
        yield train


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["report", "hour", "fast", "best"])
def test_training_on_the_stand_in_for_a_gpu(strict_gpu, in_process, capsys, recipe):
    with kernels.use("reference"):  # the fast ones would run on the emulator, for minutes
        in_process(*SMALL_RUN, "--recipe", recipe, "--epochs", "1", "--device", "gpu")
    assert "device gpu" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["hour", "fast", "best"])
def test_each_recipe_from_start_to_end(recipe, tmp_path):
    code, out, err = run("train_cifar.py", *SMALL_RUN, "--recipe", recipe, "--out", tmp_path / "run")
    assert code == 0, err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    expected = {"recipe": recipe, "epochs": 2, "tta": True, "full_train": True} | {
        "hour": {"optimizer": "muon", "early_size": 24, "bias_lr": 8, "crop": 2, "flip": "alternating"},
        "fast": {"optimizer": "sgd", "early_size": 0, "bias_lr": 1, "crop": 4, "flip": "alternating"},
        "best": {"optimizer": "sgd", "trivial_augment": True, "crop": 4, "flip": "random"},
    }[recipe]
    assert config | expected == config
    with open(tmp_path / "run" / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["validation_loss"] for row in rows] == ["", ""]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["best_epoch"], result["validation_loss"], result["test_images"]) == (2, None, 40)
    assert "1,000 training, 0 validation" in out
    tta = f"{result['test_accuracy_tta']:.2%} with their mirror images"
    assert f"test accuracy {result['test_accuracy']:.2%} on 40 images, {tta}" in out
    model, _ = load_model(tmp_path / "run" / "best.safetensors")
    images, labels = load_sample().test_images[:40], load_sample().test_labels[:40]
    expected = evaluate(model, images, labels, cifar10.MEAN, cifar10.STD, tta=True)
    assert (result["test_loss_tta"], result["test_accuracy_tta"]) == pytest.approx(expected, rel=1e-5)


def test_what_is_given_overrides_no_augment():
    from recipes import parse_arguments

    args, given = parse_arguments(["--recipe", "best", "--no-augment", "--cutout", "3"])
    assert (args.crop, args.flip, args.cutout, args.trivial_augment) == (0, "none", 3, False)
    assert given == {"recipe": "best", "no_augment": True, "cutout": 3}


def test_an_option_overrides_its_recipe(tmp_path):
    options = ["--recipe", "fast", "--no-full-train", "--no-tta", "--cutout", "0", "--lr", "0.02", "--clip", "1"]
    code, _, err = run("train_cifar.py", *SMALL_RUN, *options, "--out", tmp_path / "run")
    assert code == 0, err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config | {"cutout": 0, "lr": 0.02, "clip": 1.0, "tta": False, "full_train": False, "ema": 0.995} == config
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "test_accuracy_tta" not in result
    assert result["validation_accuracy"] is not None


def test_a_run_of_the_fast_recipe_does_what_a_loop_written_apart_from_it_does(tmp_path):
    """The last weights of all, averaged, with statistics of their own; decay, smoothing, alternating flip, cutout."""
    batch = ["--limit-batches", "3", "--clip", "0.5"]
    code, _, err = run("train_cifar.py", *SMALL_RUN, "--recipe", "fast", "--seed", 3, *batch, "--out", tmp_path / "run")
    assert code == 0, err

    data, model = load_sample(), ResNet(channels=CHANNELS, seed=3)
    loss_function, step = SoftmaxCrossEntropy(0.1), 0
    optimizer = SGD(model.parameters(), 0.2, 0.9, True, weight_decay=5e-4, decay_vectors=False, max_norm=0.5)
    model.dropout.p = 0.0
    average = [p.data.copy() for p in model.parameters()]
    for epoch in (1, 2):
        order = np.random.default_rng([3, epoch]).permutation(1000)[:60]
        images = random_crop(data.train_images[order], 3, epoch)
        images = cutout(alternating_flip(images, order, 3, epoch), 3, epoch, size=8)
        batches = np.split(normalize(images, cifar10.MEAN, cifar10.STD), 3)
        for x, labels in zip(batches, np.split(data.train_labels[order], 3), strict=True):
            optimizer.zero_grad()
            loss_function(model(x), labels)
            model.backward(loss_function.backward())
            optimizer.lr = triangular(step, 6, 0.2)
            optimizer.step()
            step += 1
            decay = (1 + step) / (10 + step)
            average = [decay * a + (1 - decay) * p.data for a, p in zip(average, model.parameters(), strict=True)]
    for p, a in zip(model.parameters(), average, strict=True):
        p.data[...] = a
    measure_statistics(model, batches)
    found = load_model(tmp_path / "run" / "best.safetensors")[0].state_dict()
    for name, expected in model.state_dict().items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_run_does_what_a_loop_written_apart_from_it_does(tmp_path):
    """Zeroed gradients, augmentation by place, a new order each epoch, the schedule, running statistics."""
    rate = ["--schedule", "one-cycle", "--lr", "0.01"]
    code, _, err = run("train_cifar.py", *SMALL_RUN, *rate, "--seed", 3, "--out", tmp_path / "run")
    assert code == 0, err
    with open(tmp_path / "run" / "log.csv") as file:
        rows = list(csv.DictReader(file))

    data = load_sample()
    training, validation = cifar10.split(1000, 0.2, seed=3)
    model, loss_function = ResNet(channels=CHANNELS, seed=3), SoftmaxCrossEntropy()
    optimizer = Adam(model.parameters())
    step = 0
    for epoch in (1, 2):
        order = training[np.random.default_rng([3, epoch]).permutation(800)]
        losses = []
        for start in (0, 20):
            batch = order[start : start + 20]
            images = random_flip(random_crop(data.train_images[batch], 3, epoch, start), 3, epoch, start)
            for parameter in model.parameters():
                parameter.grad[...] = 0
            logits = model(normalize(images, cifar10.MEAN, cifar10.STD))
            losses.append(float(loss_function(logits, data.train_labels[batch])))
            model.backward(loss_function.backward())
            optimizer.lr = one_cycle(step, 4, 0.01)
            optimizer.step()
            step += 1
        row = rows[epoch - 1]
        assert float(row["lr"]) == optimizer.lr
        assert float(row["train_loss"]) == pytest.approx(np.mean(losses), rel=1e-6)
        part = data.train_images[validation[:40]], data.train_labels[validation[:40]]
        expected = evaluate(model, *part, cifar10.MEAN, cifar10.STD)
        assert (float(row["validation_loss"]), float(row["validation_accuracy"])) == pytest.approx(expected, rel=1e-5)


def test_the_test_is_that_of_the_best_weights(in_process, monkeypatch):
    """Let validation say that the first epoch was the better one, and see which weights the test is given."""
    import train_cifar

    from minires.training import distributed

    measured, predict_logits = [], distributed.predict_logits

    def measure(model, *_, **__):
        measured.append(model.state_dict())
        return float(len(measured)), 0.5

    def predict(model, *args, **kwargs):
        measured.append(model.state_dict())
        return predict_logits(model, *args, **kwargs)

    monkeypatch.setattr(train_cifar, "evaluate", measure)
    monkeypatch.setattr(distributed, "predict_logits", predict)
    folder = in_process(*SMALL_RUN)
    first, second, test = measured
    assert all((test[name] == first[name]).all() for name in test)
    assert (test["linear.bias"] != second["linear.bias"]).any()
    result = json.loads((folder / "result.json").read_text())
    assert result["best_epoch"] == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "/nowhere"], "error: /nowhere does not exist, expected the folder with the six files"),
        (["--data", "sample", "--out", EXAMPLES], f"error: --out {EXAMPLES} exists and is not an empty folder"),
        (["--batch-size", "0"], "--batch-size: expected an integer of at least 2, got 0"),
        (["--seed", str(2**64)], f"--seed: expected an integer of at least 0 and below {2**64}, got {2**64}"),
        (["--epochs", "x"], "--epochs: expected an integer of at least 1, got x"),
        (["--lr", "-1"], "--lr: expected a number above 0, got -1"),
        (["--dropout", "1"], "--dropout: expected a number from 0 to below 1, got 1"),
        (["--recipe", "fast", "--ema", "1"], "--ema: expected a number from 0 to below 1, got 1"),
        (["--weight-decay", "-1"], "--weight-decay: expected a number of at least 0, got -1"),
        (["--recipe", "fast", "--momentum", "0"], "--momentum 0 has no Nesterov form: add --no-nesterov"),
        (["--recipe", "hour", "--momentum", "0"], "--optimizer muon needs a --momentum above 0, got 0"),
    ],
)
def test_mistakes_end_with_one_line_and_exit_code_2(args, message):
    code, _, err = run("train_cifar.py", *args)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize("script", ["train_cifar.py", "evaluate.py"])
def test_where_there_are_no_data_and_no_network_the_ways_out_are_named(tmp_path, checkpoint, script):
    args = [checkpoint] if script == "evaluate.py" else ["--device", "cpu"]
    name = "cifar-10-python.tar.gz"
    with Server({name: b""}, [status(404)]) as server:
        own = {"MINIRES_DATA": str(tmp_path), "MINIRES_CIFAR10_URL": f"{server.url}/{name}", "no_proxy": "*"}
        code, out, err = run(script, *args, env={**os.environ, **own})
    assert (code, out) == (1, "")
    announced, error = err.splitlines()
    assert announced == f"CIFAR-10 is not in {tmp_path}: downloading it"
    assert error.startswith("error: CIFAR-10 could not be downloaded (127.0.0.1: HTTP 404 Not Found). By hand: get ")
    assert error.endswith(f"python -m minires.cifar10 download {tmp_path}")


@pytest.fixture
def cause():
    """Why there is no GPU here."""
    try:
        backend.gpu_library()
    except backend.GPUError as error:
        cause = str(error)
    else:
        pytest.skip("there is a GPU here")
    return cause


def test_asking_for_a_gpu_that_is_not_there_names_the_cause(tmp_path, cause):
    code, _, err = run("train_cifar.py", *SMALL_RUN, "--device", "gpu", "--out", tmp_path / "run")
    assert (code, err) == (2, f"error: {cause}\n")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    code, _, err = run("train_cifar.py", *SMALL_RUN, "--lr", "1e30", "--out", tmp_path / "run")
    assert code == 1
    assert err.splitlines()[-1].startswith("error: in epoch 1, step 2 the loss is nan: the first number that is not ")
    assert "there is no checkpoint yet; try a smaller --lr than 1e+30" in err


def test_evaluate_prints_accuracy_and_confusion(checkpoint):
    code, out, err = run("evaluate.py", checkpoint, "--data", "sample")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("500 images, loss ")
    counts = np.array([line.split()[2:] for line in lines[3:]], int)
    assert counts.shape == (10, 10)
    np.testing.assert_array_equal(counts.sum(axis=1), [50] * 10)
    accuracies = [float(line.split()[1].rstrip("%")) for line in lines[3:]]
    np.testing.assert_allclose(accuracies, 2 * counts.diagonal())
    assert f"accuracy {counts.trace() / 500:.2%}" in lines[0]


def test_evaluate_with_mirror_images(checkpoint):
    code, out, err = run("evaluate.py", checkpoint, "--data", "sample", "--tta")
    assert code == 0, err
    data, model = load_sample(), load_model(checkpoint)[0]
    loss, accuracy = evaluate(model, data.test_images, data.test_labels, cifar10.MEAN, cifar10.STD, tta=True)
    assert out.startswith(f"500 images, loss {loss:.4f}, accuracy {accuracy:.2%}\n")


def test_a_network_with_other_classes_is_refused(tmp_path):
    path = tmp_path / "five.safetensors"
    save_weights(path, ResNet((1,), (8,), num_classes=5))
    code, _, err = run("evaluate.py", path, "--data", "sample")
    assert (code, err) == (2, f"error: {path} tells 5 classes apart, CIFAR-10 has 10: name another one\n")


@pytest.mark.parametrize("script", ["evaluate.py", "predict.py"])
def test_a_checkpoint_that_is_none_is_named(script, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"no checkpoint")
    images = []
    if script == "predict.py":
        pytest.importorskip("PIL.Image").new("RGB", (32, 32)).save(tmp_path / "black.png")
        images = [tmp_path / "black.png"]
    code, _, err = run(script, path, *images)
    assert code == 2
    assert err.startswith(f"error: {path} is no safetensors file, or a damaged one")


@pytest.mark.parametrize("script", ["evaluate.py", "predict.py"])
def test_logits_that_are_not_finite_are_told_in_one_line(script, tmp_path):
    path, model = tmp_path / "huge.safetensors", ResNet((1,), (8,))
    for parameter in model.parameters():
        parameter.data[...] = 3e38
    save_weights(path, model)
    args, count = ["--data", "sample"], 500
    if script == "predict.py":
        pytest.importorskip("PIL.Image").new("RGB", (32, 32)).save(tmp_path / "black.png")
        args, count = [tmp_path / "black.png"], 1
    code, out, err = run(script, path, *args)
    assert (code, out) == (2, "")
    assert err == (
        f"error: {path} gives logits that are not finite for {count} of {count} images: its weights are too large to "
        "compute with, name another one\n"
    )


@pytest.mark.slow
def test_gradcheck_prints_a_row_for_every_layer_and_the_network():
    code, out, err = run("gradcheck.py")
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == 18
    assert lines[-1].startswith("ResNet, 4,977,226 parameters")
    for line in lines[1:]:
        assert float(line.split()[-2]) < 1e-6


def test_the_picture_of_the_augmentations_is_drawn(tmp_path):
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    code, _, err = run("augmentations.py", "--out", tmp_path / "picture.png", pictures=True)
    assert code == 0, err
    assert 20_000 < (tmp_path / "picture.png").stat().st_size < 150_000


@pytest.mark.full
def test_the_first_training_learns():
    code, out, err = run("first_training.py")
    assert (code, err) == (0, "")
    assert float(out.splitlines()[-1].split()[3].rstrip("%")) >= 30


@pytest.mark.full
def test_a_loop_of_ones_own_is_stopped_and_killed_and_ends_with_the_same_bits(tmp_path):
    """As in resumable_training.py, whose checkpoints are ten minutes apart: a signal writes one, a kill does not."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    one_thread = os.environ | {"MINIRES_NUM_THREADS": "1"}
    never_stopped = start("resumable_training.py", whole, env=one_thread)  # meanwhile
    for number, expected in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        process = start("resumable_training.py", stopped, env=one_thread)
        while "valid" not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.readline()  # the row of an epoch
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == expected
    code, resumed, err = run("resumable_training.py", stopped)
    assert code == 0, err
    out, err = never_stopped.communicate(timeout=300)
    assert never_stopped.returncode == 0, err
    assert "resuming after step" in resumed
    assert resumed.splitlines()[-1] == out.splitlines()[-1]
    for name in ("best.safetensors", "checkpoint.safetensors"):
        expected, actual = (read_arrays(folder / name)[0] for folder in (whole, stopped))
        assert expected.keys() == actual.keys()
        assert all((array == actual[key]).all() for key, array in expected.items())


SMALL_STUDY = [*SMALL_RUN, "--epochs", "1", "--batch-size", "10", "--limit-batches", "1"]


@pytest.mark.slow
def test_an_ablation_makes_a_table_and_goes_on_where_it_was_stopped(tmp_path):
    study = [*SMALL_STUDY, "--variants", "report", "blocks 1 1 1 1", "--out", tmp_path / "study"]
    code, out, err = run("ablation.py", *study, "--seeds", 1)
    assert code == 0, err
    assert "run 2 of 2: blocks 1 1 1 1, seed 0" in out
    table = (tmp_path / "study" / "table.md").read_text()
    assert out.endswith(table)
    report, small = table.splitlines()[2:]
    assert report.startswith(f"| report | {PARAMETERS[2, 1, 1, 1]:,} | 1 | ")
    assert small.startswith(f"| blocks 1 1 1 1 | {PARAMETERS[1, 1, 1, 1]:,} | 1 | ")
    result = json.loads((tmp_path / "study" / "report" / "seed-0" / "result.json").read_text())
    assert f"| {100 * result['validation_accuracy']:.2f} % |" in report

    (tmp_path / "study" / "blocks-1-1-1-1" / "seed-0" / "result.json").unlink()  # as if it had been cut off
    before = (tmp_path / "study" / "report" / "seed-0" / "result.json").stat()
    code, out, err = run("ablation.py", *study, "--seeds", 1)
    assert code == 0, err
    assert "seed 0" in out
    assert "report, seed 0" not in out
    assert (tmp_path / "study" / "report" / "seed-0" / "result.json").stat() == before
    assert (tmp_path / "study" / "table.md").read_text().splitlines()[2] == report

    code, out, err = run("ablation.py", *study, "--seeds", 2, "--batch-size", 20)
    assert (code, out) == (2, "")  # told before anything is trained
    different = "--batch-size is 10 there and 20 now"
    assert err == (
        f"error: {tmp_path / 'study' / 'report' / 'seed-0'} was made with other settings: {different}. Name another "
        "--out\n"
    )
    code, out, err = run("ablation.py", *study[-2:], *study[:-2], "--seeds=1", "--epochs=1")
    assert (code, out, err) == (0, table_of(tmp_path / "study"), "")  # in another order, with another spelling
    folder = [option for option in study if option not in ("--data", "sample")]
    code, _, err = run("ablation.py", *folder, "--data", tmp_path)
    assert (code, err.partition("settings: ")[2]) == (
        2,
        f"--data is sample there and {tmp_path} now. Name another --out\n",
    )

    free = ["--device", "auto", "--checkpoint-every", "3", "--debug"]
    free_study = [option for option in study if option not in ("--device", "cpu")]
    code, out, err = run("ablation.py", *free_study, "--seeds", 1, *free)
    assert (code, out, err) == (0, table_of(tmp_path / "study"), "")

    settings = tmp_path / "study" / "report" / "seed-0" / "config.json"
    result = tmp_path / "study" / "report" / "seed-0" / "result.json"
    for path, text, message in (
        (result, "{", f"{result} is damaged ("),
        (result, "[]", f"{result} is damaged (got []): remove {result.parent}, and the run is made anew"),
        (settings, "{}", f"{settings} is damaged (it lacks seed, blocks, epochs and others): start the run anew in "),
    ):
        before = path.read_text()
        path.write_text(text)
        code, _, err = run("ablation.py", *study, "--seeds", 1)
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith(f"error: {message}")
        path.write_text(before)


@pytest.mark.slow
def test_a_study_of_the_recipes_has_their_test_accuracies(tmp_path):
    study = ["--study", "recipes", "--seeds", "1", *SMALL_STUDY, "--out", tmp_path]
    code, _, err = run("ablation.py", *study, pictures=True)
    assert code == 0, err
    for row, recipe in zip(table_of(tmp_path).splitlines()[2:], ("report", "hour", "fast", "best"), strict=True):
        result = json.loads((tmp_path / recipe / "seed-0" / "result.json").read_text())
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert cells[:3] == [recipe, f"{PARAMETERS[2, 1, 1, 1]:,}", "1"]
        assert cells[5] == f"{100 * result['test_accuracy']:.2f} %"
        if recipe != "report":  # trained on all images, and measured on mirrored ones
            assert cells[3:5] == ["", ""]
            assert cells[6] == f"{100 * result['test_accuracy_tta']:.2f} %"
    assert (tmp_path / "ablation.png").exists() == (importlib.util.find_spec("matplotlib") is not None)


@pytest.mark.parametrize("options", [["--recipe=best"], ["--full-train"], ["--seed", "1"], ["--resume", "runs/a"]])
def test_what_a_study_decides_by_itself_is_refused(options):
    code, _, err = run("ablation.py", *options)
    flag = options[0].partition("=")[0]
    message = f"{flag} is for train_cifar.py: a study has a recipe and seeds of its own (--seeds)"
    assert (code, err.splitlines()[-1]) == (2, f"ablation.py: error: {message}")


def table_of(study):
    return (study / "table.md").read_text()


@pytest.mark.slow
def test_a_variant_is_what_it_says_whatever_all_are_given(tmp_path):
    study = ["--study", "fast", *SMALL_STUDY, "--blocks", "1", "1", "1", "1", "--out", tmp_path]
    shared = ["--cutout", "16", "--ema=0.9"]
    code, _, err = run("ablation.py", *study, "--variants", "fast", "no cutout", "no average", "--seeds", 1, *shared)
    assert code == 0, err
    for folder, expected in (("fast", (16, 0.9)), ("no-cutout", (0, 0.9)), ("no-average", (16, 0))):
        config = json.loads((tmp_path / folder / "seed-0" / "config.json").read_text())
        assert (config["cutout"], config["ema"]) == expected

    code, _, err = run("ablation.py", *study, "--variants", "no cutout", "--seeds", 2, *shared)
    assert code == 0, err
    rows = [row.split("|")[1:4] for row in table_of(tmp_path).splitlines()[2:]]
    small = f" {PARAMETERS[1, 1, 1, 1]:,} "
    expected = (("fast", 1), ("no cutout", 2), ("no average", 1))
    assert rows == [[f" {name} ", small, f" {runs} "] for name, runs in expected]

    code, _, err = run("ablation.py", *study, "--variants", "random flip", *shared, "--cutout", "8")
    assert code == 2  # the new run would stand in one table with others
    assert err.startswith(
        f"error: {tmp_path / 'fast' / 'seed-0'} was made with other settings: --cutout is 16 there and 8 "
    )


@pytest.mark.usefixtures("hangups_count")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_study_that_is_stopped_waits_for_the_checkpoint_of_its_run(tmp_path, number, code):
    study = [*SMALL_RUN, "--epochs", "1000", "--variants", "blocks 1 1 1 1", "--seeds", "1", "--out", tmp_path]
    process = start("ablation.py", *study)
    assert process.stdout.readline().startswith("run 1 of 1")
    assert "run folder" in process.stdout.readline()
    assert process.stdout.readline().startswith("epoch")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "to resume" in out
    folder = tmp_path / "blocks-1-1-1-1" / "seed-0"
    assert (folder / "checkpoint.safetensors").exists()
    assert "Traceback" not in err


def test_a_run_that_is_still_being_made_is_left_alone(tmp_path):
    from minires.training.folder import locked

    study = [*SMALL_STUDY, "--variants", "report", "--seeds", "1", "--out", tmp_path]
    folder = tmp_path / "report" / "seed-0"
    assert run("ablation.py", *study, "--limit-batches", "2")[0] == 0
    (folder / "result.json").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with locked(folder):
        code, _, err = run("ablation.py", *study, "--limit-batches", "2")
    assert code == 2
    assert err == f"error: {folder} is in use by another process: wait until it ends, or stop it\n"
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


EVERY_SCRIPT = ["ablation.py", "augmentations.py", "benchmark.py", "evaluate.py", "gradcheck.py", "predict.py"]
EVERY_SCRIPT += ["ranks.py", "report.py"]


@pytest.mark.parametrize("script", EVERY_SCRIPT)
def test_every_script_tells_its_errors_in_one_line(script, checkpoint):
    args = {"evaluate.py": [checkpoint], "predict.py": [checkpoint, "x.png"], "report.py": ["x"]}.get(script, [])
    for name, value in (("MINIRES_KERNELS", "foo"), ("MINIRES_NUM_THREADS", "0")):
        code, out, err = run(script, *args, env={**os.environ, name: value})
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"error: {name} must be ")
    code, out, err = run(script, *args, "--debug", env={**os.environ, "MINIRES_KERNELS": "foo"})
    assert code == 1
    assert "Traceback" in err


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("script", [*EVERY_SCRIPT, "train_cifar.py"])
def test_an_output_that_is_full_or_closed_is_told_in_one_line_or_none(script):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, EXAMPLES / script, "--help"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.stderr in ("", "error: standard output: No space left on device\n")
    process = start(script, "--help")
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait(timeout=60)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="there is no /dev/full")
def test_results_that_cannot_be_printed_are_an_error(checkpoint):
    command = [sys.executable, EXAMPLES / "evaluate.py", checkpoint, "--data", "sample"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: standard output: No space left on device\n")
    process = start("evaluate.py", checkpoint, "--data", "sample")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141
    process.stderr.close()


def test_an_empty_name_for_the_data_is_refused(checkpoint):
    code, _, err = run("evaluate.py", checkpoint, "--data", "")
    assert code == 2
    assert "--data: expected sample or a folder, got an empty name" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch-size", "0"], "--batch-size: expected an integer of at least 1, got 0"),
        (["--rounds", "0"], "--rounds: expected an integer of at least 1, got 0"),
        (["--steps", "-2"], "--steps: expected an integer of at least 1, got -2"),
    ],
)
def test_numbers_that_leave_nothing_to_time_are_refused(args, message):
    code, _, err = run("benchmark.py", *args)
    assert code == 2
    assert message in err.splitlines()[-1]


def test_a_benchmark_on_a_gpu_that_is_not_there_names_the_cause(cause):
    code, _, err = run("benchmark.py", "--device", "gpu")
    assert (code, err) == (2, f"error: {cause}\n")


def test_an_interrupted_script_says_nothing():
    process = start("gradcheck.py")
    process.stdout.readline()  # it runs
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


class Failing:
    """A contestant that cannot be."""

    def __init__(self, *args):
        raise MemoryError("no room")


def test_what_ends_a_contestant_is_told_by_the_benchmark():
    from benchmark import Worker

    with pytest.raises(MemoryError, match="no room"):
        Worker(Failing, 2, 1).ask("version")


def test_a_variant_that_does_not_end_well_does_not_end_the_study(tmp_path, monkeypatch, capsys):
    import ablation

    made = []

    def train(args, variant, seed):
        folder = ablation.folder_of(args, variant, seed)
        made.append(folder)
        folder.mkdir(parents=True)
        config = vars(ablation.recipes.parse_arguments(ablation.options_of(args, variant, seed))[0])
        (folder / "config.json").write_text(json.dumps(config | {"out": None, "parameters": 1000}))
        if "plain" in variant:
            return 1
        (folder / "result.json").write_text(json.dumps({name: 0.75 + 0.01 * seed for name in ablation.COLUMNS}))
        return 0

    monkeypatch.setattr(ablation, "train", train)
    monkeypatch.setattr(ablation, "draw", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--seeds", "3", "--out", str(tmp_path)])
    assert ablation.main() == 1
    assert len(made) == 3 * len(ablation.STUDIES["report"])
    out, err = capsys.readouterr()
    assert "plain, without shortcuts, seed 2, did not end well" in err
    accuracy, loss = "76.00 ± 1.00 %", "0.7600 ± 0.0100"
    assert f"| SGD | 1,000 | 3 | {accuracy} | {loss} | {accuracy} | {accuracy} | {loss} | 1 |" in out
    assert "| plain, without shortcuts |" not in out


def test_an_option_that_the_training_script_refuses_ends_the_study(tmp_path):
    code, out, err = run("ablation.py", "--out", tmp_path, "--epochs", "0")
    assert (code, out) == (2, "")
    assert "--epochs: expected an integer of at least 1, got 0" in err.splitlines()[-1]


def test_a_variant_that_there_is_not_is_named():
    code, _, err = run("ablation.py", "--variants", "no luck")
    assert code == 2
    assert "--variants: 'no luck' is not in the study report, which has report; blocks 1 1 1 1; " in err


def test_every_variant_is_understood_by_the_training_script(monkeypatch):
    import ablation
    import train_cifar

    for study, variants in ablation.STUDIES.items():
        for name, options in variants.items():
            monkeypatch.setattr(sys, "argv", ["train_cifar.py", *options])
            args, _ = train_cifar.parse_arguments()
            assert args.recipe == (name if study == "recipes" else study), name
            assert args.full_train == (study == "recipes" and name != "report"), name
