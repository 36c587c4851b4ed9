"""Publish the weights of a run: from now on they are the ones that come with minires, `minires.pretrained()`.

    python examples/publish.py runs/my-run --note "two cores of an Intel Xeon"

The run must have ended, on the data that --data names. Its weights are written in float16, half the size; they are
measured on the test images, and must be as good as the run says. Beside them goes where they are from: the command,
settings, log and result of the run. Their SHA-256 is written into minires/training/weights.py, so that no other file
is taken for them.
"""

import argparse
import hashlib
import json
import pathlib
import re
import shlex
import sys

import numpy as np

from minires import cifar10
from minires.backend import choose_device
from minires.evaluation import evaluate
from minires.training import UsageError, load_weights, weights
from minires.training.arguments import data_folder, read_data
from minires.training.folder import LOG, RESULT, SETTINGS, read_settings, versions, write_json
from minires.training.script import run_script
from minires.training.storage import pack, write_atomically
from minires.training.weights import PUBLISHED, WEIGHTS, network_of

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for recipes.py, also under python -m and PYTHONSAFEPATH
from recipes import FREE_IN_A_RESUMED_RUN, parse_arguments

LARGEST = 10_000_000  # bytes
TOLERANCE = 0.0005  # of the accuracy, 5 of 10,000 images
FOLDERS = ("data", "out", "resume")  # of the machine that trained
TERMS = """\
The weights are published under the MIT license, as minires is. They were trained on CIFAR-10 (Krizhevsky 2009,
"Learning multiple layers of features from tiny images"), photographs collected from the web, which has no license of
its own; whoever publishes work that uses it, or these weights, is asked to cite that report
(https://www.cs.toronto.edu/~kriz/cifar.html). The network knows its ten classes and nothing else.
"""


def main():
    parser = argparse.ArgumentParser(description="Publish the weights of a run.", allow_abbrev=False)
    parser.add_argument("run", type=pathlib.Path, help="the folder of a run that has ended")
    parser.add_argument(
        "--data", type=data_folder, metavar="sample|DIR", help="default: $MINIRES_DATA or ~/.cache/minires"
    )
    parser.add_argument("--note", default="", help="what the run does not know of itself: processor, commit")
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    args = parser.parse_args()

    config, result = read_settings(args.run), read_result(args.run)
    state, metadata = load_weights(args.run / WEIGHTS)  # finite, or it raises
    data = read_data(args.data)
    if data.sha256() != config["data_sha256"]:
        raise UsageError(f"the images are not those that {args.run} was trained on: name its data by --data")
    if result["test_images"] != len(data.test_images):
        raise UsageError(
            f"{args.run} was measured on {result['test_images']:,} of {len(data.test_images):,} test images"
        )

    half = {name: array.astype(np.float16) if array.dtype.kind == "f" else array for name, array in state.items()}
    device, shortcut = choose_device(args.device), metadata.get("shortcut")
    kept, published = (measure(network_of(arrays, shortcut).to(device), data) for arrays in (state, half))
    if not abs(published[1] - result["test_accuracy"]) <= TOLERANCE:
        raise UsageError(
            f"in float16 {published[1]:.2%} of the test images are right, {result['test_accuracy']:.2%} by {RESULT} of "
            f"{args.run}: more than {TOLERANCE:.2%} apart, nothing is published"
        )
    content = pack(half, {"test_accuracy": published[1], "test_accuracy_tta": published[3], "shortcut": shortcut})
    if len(content) > LARGEST:
        raise UsageError(f"in float16 the weights take {len(content):,} bytes, {LARGEST:,} at most are published")
    sha256 = hashlib.sha256(content).hexdigest()

    PUBLISHED.parent.mkdir(exist_ok=True)
    write_atomically(PUBLISHED, content)
    write_json(PUBLISHED.with_name(SETTINGS), {name: config[name] for name in config if name not in FOLDERS})
    for name in (LOG, RESULT):
        write_atomically(PUBLISHED.with_name(name), (args.run / name).read_bytes())
    text = provenance(config, result, kept, published, sha256, args.note)
    write_atomically(PUBLISHED.with_name("README.md"), text.encode())
    source = pathlib.Path(weights.__file__)
    pinned = re.sub(
        '(?m)^PUBLISHED_SHA256 = "[0-9a-f]{64}"', f'PUBLISHED_SHA256 = "{sha256}"', source.read_text("utf-8")
    )
    write_atomically(source, pinned.encode())
    print(f"{PUBLISHED}: {len(content):,} bytes, {published[1]:.2%}, {published[3]:.2%} with mirror images")
    return 0


def read_result(run):
    try:
        result = json.loads((run / RESULT).read_bytes())
        return {name: result[name] for name in ("test_images", "test_accuracy", "seconds")}
    except FileNotFoundError:
        raise UsageError(f"{run} has no {RESULT}: publish a run that has ended") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{run / RESULT} is damaged ({error}): publish another run") from error


def measure(model, data):
    """Return loss and accuracy on the test images, then both with mirror images."""
    test = data.test_images, data.test_labels, cifar10.MEAN, cifar10.STD
    return *evaluate(model, *test), *evaluate(model, *test, tta=True)


def command(config):
    """Return the command of a run, from its settings: the recipe, and each flag that is not as in the recipe."""
    recipe = ["--recipe", config["recipe"]]
    words = ["python", "examples/train_cifar.py", *recipe]
    for name, default in vars(parse_arguments(recipe)[0]).items():
        value, flag = config.get(name, default), f"--{name.replace('_', '-')}"
        if value == default or name in FREE_IN_A_RESUMED_RUN:
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def provenance(config, result, kept, published, sha256, note):
    """Return what README.md says beside the weights."""

    def row(name, numbers):
        return f"| {name} | {numbers[0]:.4f} | {numbers[1]:.2%} | {numbers[2]:.4f} | {numbers[3]:.2%} |"

    return f"""\
# The weights that come with minires

`minires.pretrained()` loads [{PUBLISHED.name}]({PUBLISHED.name}): the network after the run of

    {command(config)}

on the device {config["device"]} of {config["machine"]}, with minires {config["minires"]}, NumPy {config["numpy"]} and \
Python {config["python"]}, begun {config["started"]}, {result["seconds"]:,.0f} s{f" ({note})" if note else ""}. \
[{SETTINGS}]({SETTINGS}), [{LOG}]({LOG}) and [{RESULT}]({RESULT}) are those of the run.

The numbers are kept in float16, in PyTorch's names and shapes. What that costs, on all {result["test_images"]:,} test \
images:

| weights | loss | accuracy | loss with mirror images | accuracy with mirror images |
|---|---|---|---|---|
{row("float32, as trained", kept)}
{row("float16, as published", published)}

Measured by `python examples/publish.py` with NumPy {versions()["numpy"]}; `python examples/evaluate.py`, and with \
`--tta`, shows the second row again. SHA-256, which minires checks before it loads the file:

    {sha256}

In PyTorch, with the network of examples/torch_resnet.py:

    state = safetensors.torch.load_file("{PUBLISHED.name}")
    TorchResNet().load_state_dict({{name: array.float() for name, array in state.items()}})

## Who may use them

{TERMS}"""


if __name__ == "__main__":
    run_script(main)
