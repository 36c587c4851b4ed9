"""The weights that come with minires: what they know, that no other file is taken for them, and how they are made."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import minires
from minires import cifar10
from minires.augment import normalize
from minires.evaluation import evaluate, predict_logits
from minires.training import CheckpointError, load_weights, weights
from minires.training.weights import PUBLISHED, PUBLISHED_SHA256

ROOT = pathlib.Path(__file__).parent.parent


def run(*args, root=ROOT):
    """Return (exit code, standard output, standard error) of a script, with the package beside it."""
    done = subprocess.run(
        [sys.executable, root / "examples" / args[0], *map(str, args[1:])],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def model():
    return minires.pretrained()


def test_the_network_is_ready_to_classify(model):
    assert sum(p.data.size for p in model.parameters()) == 4_977_226
    assert not any(module.training for module in model.modules())
    assert {p.data.dtype for p in model.parameters()} == {np.dtype(np.float32)}
    assert PUBLISHED.stat().st_size <= 10_000_000
    assert {array.dtype for array in load_weights(PUBLISHED)[0].values()} == {np.dtype(np.float16)}
    data = cifar10.load_sample()
    _, accuracy = evaluate(model, data.test_images, data.test_labels, cifar10.MEAN, cifar10.STD)
    assert accuracy > 0.9


@pytest.mark.full
def test_the_accuracy_is_the_one_that_is_told(model, real_data):
    result = json.loads(PUBLISHED.with_name("result.json").read_text())
    loss, accuracy = evaluate(model, *real_data[2:], cifar10.MEAN, cifar10.STD)
    assert accuracy == pytest.approx(result["test_accuracy"], abs=5e-4)
    assert loss == pytest.approx(result["test_loss"], abs=1e-3)
    told = load_weights(PUBLISHED)[1]["test_accuracy"]
    assert accuracy == pytest.approx(told, abs=1e-4)
    assert re.search(rf"float16, as published \| [\d.]+ \| {told:.2%} ", PUBLISHED.with_name("README.md").read_text())


def test_where_they_are_from_is_told_beside_them():
    text = PUBLISHED.with_name("README.md").read_text()
    assert PUBLISHED_SHA256 in text
    assert "MIT license" in text
    config = json.loads(PUBLISHED.with_name("config.json").read_text())
    rows = PUBLISHED.with_name("log.csv").read_text().splitlines()
    assert len(rows) == 1 + config["epochs"]
    assert not {"data", "out"} & set(config)
    from recipes import FREE_IN_A_RESUMED_RUN, parse_arguments

    (command,) = re.findall(r"^    python examples/train_cifar\.py (.*)$", text, re.MULTILINE)
    flags = vars(parse_arguments(command.split())[0])
    told = set(config) & set(flags) - set(FREE_IN_A_RESUMED_RUN)  # no result depends on those
    assert len(told) > 20
    assert {name: flags[name] for name in told} == {name: config[name] for name in told}


def test_pytorch_loads_the_same_file_and_says_the_same(model):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file
    from torch_resnet import TorchResNet

    twin = TorchResNet().eval()
    twin.load_state_dict({name: array.float() for name, array in load_file(PUBLISHED).items()}, strict=True)
    images = cifar10.load_sample().test_images[:100]
    x = normalize(images, cifar10.MEAN, cifar10.STD)
    with torch.no_grad():
        expected = twin(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    found = predict_logits(model, images, cifar10.MEAN, cifar10.STD)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_no_other_file_is_taken_for_them(tmp_path, monkeypatch):
    other = tmp_path / "other.safetensors"
    monkeypatch.setattr(weights, "PUBLISHED", other)
    with pytest.raises(CheckpointError, match=r"other\.safetensors cannot be read: No such file.*install minires anew"):
        minires.pretrained()
    content = bytearray(PUBLISHED.read_bytes())
    content[5_000_000] ^= 1
    other.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"has SHA-256 [0-9a-f]{{64}}, expected {PUBLISHED_SHA256}"):
        minires.pretrained()


def test_scripts_use_them_where_no_checkpoint_is_named_and_say_so(tmp_path):
    told = (
        f"weights that come with minires: {load_weights(PUBLISHED)[1]['test_accuracy']:.2%} of CIFAR-10's test images"
    )
    code, out, err = run("evaluate.py", "--data", "sample")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith(told)
    assert lines[1].startswith("500 images, loss ")

    data, path = cifar10.load_sample(), tmp_path / "ship.png"
    pytest.importorskip("PIL.Image").fromarray(data.test_images[data.test_labels == 8][0]).save(path)
    code, out, err = run("predict.py", path)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith(told)
    assert lines[1].startswith(f"{path}: ship ")


def test_a_network_without_a_picture_and_two_networks_are_refused():
    assert run("predict.py", PUBLISHED) == (
        2,
        "",
        f"error: expected pictures, got {PUBLISHED} alone: name a picture after it\n",
    )
    code, out, err = run("predict.py", "a.safetensors", "b.safetensors", "x.png")
    line = "error: expected at most one .safetensors file of weights, got a.safetensors and b.safetensors\n"
    assert (code, out, err) == (2, "", line)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package without its weights, and a run that has ended."""
    root = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__", "weights")
    shutil.copytree(ROOT / "examples", root / "examples", ignore=ignore)
    shutil.copytree(ROOT / "minires", root / "minires", ignore=ignore)
    flags = [
        "--recipe",
        "fast",
        "--epochs",
        "1",
        "--channels",
        "4",
        "6",
        "6",
        "8",
        "--batch-size",
        "50",
        "--no-nesterov",
    ]
    code, _, err = run("train_cifar.py", "--data", "sample", *flags, "--out", root / "run", root=root)
    assert code == 0, err
    return root


@pytest.mark.slow
def test_a_run_is_published_by_one_command(copy):
    code, out, err = run("publish.py", copy / "run", "--data", "sample", "--note", "a test", root=copy)
    assert code == 0, err
    folder = copy / "minires" / "weights"
    result = json.loads((copy / "run" / "result.json").read_text())
    assert f"{result['test_accuracy']:.2%}, " in out
    assert {path.name for path in folder.iterdir()} == {
        PUBLISHED.name,
        "README.md",
        "config.json",
        "log.csv",
        "result.json",
    }
    for name in ("log.csv", "result.json"):
        assert (folder / name).read_bytes() == (copy / "run" / name).read_bytes()
    text = (folder / "README.md").read_text()
    assert "a test" in text
    flags = "--recipe fast --precision float32 --channels 4 6 6 8 --epochs 1 --batch-size 50 --no-nesterov\n"
    assert f"    python examples/train_cifar.py {flags}" in text
    assert str(copy) not in text + (folder / "config.json").read_text()
    state, _ = load_weights(folder / PUBLISHED.name)
    for name, array in load_weights(copy / "run" / "best.safetensors")[0].items():
        np.testing.assert_array_equal(state[name], array.astype(np.float16), err_msg=name)
    code, out, err = run("evaluate.py", "--data", "sample", root=copy)
    assert code == 0, err
    assert f"accuracy {result['test_accuracy']:.2%}" in out.splitlines()[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("result.json", None, "has no result.json: publish a run that has ended"),
        ("result.json", {"test_accuracy": 0.5}, "50.00% by result.json of"),
        ("result.json", {"test_images": 40}, "was measured on 40 of 500 test images"),
        ("config.json", {"data_sha256": "0"}, "the images are not those that"),
    ],
)
def test_a_run_that_is_not_what_it_says_is_not_published(copy, tmp_path, name, changes, message):
    folder = shutil.copytree(copy / "run", tmp_path / "run")
    path, source = folder / name, copy / "minires" / "training" / "weights.py"
    before = source.read_bytes()
    if changes is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    code, out, err = run("publish.py", folder, "--data", "sample", root=copy)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err
    assert source.read_bytes() == before
