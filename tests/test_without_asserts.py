"""What minires checks by itself, it also checks under python -O, where assert statements do nothing."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
REFUSALS = {"AssertionError", "RuntimeError", "ValueError", "CheckpointError", "DataError", "FloatingPointError"}
CHECKS = {
    "a wrong backward": """
        class Halved(minires.Linear):
            def backward(self, dout):
                return super().backward(dout) / 2
        minires.check_gradients(Halved(3, 2, rng=0), np.ones((4, 3)))
    """,
    "a backward without a forward": "minires.ReLU().backward(np.ones((2, 3)))",
    "a gradient of another shape": """
        layer = minires.Linear(3, 2, rng=0)
        layer(np.ones((4, 3), np.float32))
        layer.backward(np.ones((4, 1), np.float32))
    """,
    "a label that there is not": "minires.SoftmaxCrossEntropy()(np.ones((2, 3)), np.array([0, 3]))",
    "weights of another network": "minires.ResNet((1,), (4,)).load_state_dict(minires.ResNet((1,), (5,)).state_dict())",
    "a damaged file": """
        path = pathlib.Path(sys.argv[1], "w")
        save_weights(path, minires.ResNet((1,), (4,)))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        load_model(path)
    """,
    "a state that is not finite": "save_checkpoint(sys.argv[1], {'w': np.array([np.nan])}, {})",
    "images that are not those of CIFAR-10": """
        for name in cifar10.files.OFFICIAL:
            pathlib.Path(sys.argv[1], name).write_bytes(bytes(30_730_000))
        cifar10.load(sys.argv[1])
    """,
}


def test_no_check_of_the_package_is_an_assert():
    for path in ROOT.glob("minires/**/*.py"):
        asserts = [node.lineno for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Assert)]
        assert not asserts, f"{path}, lines {asserts}"


@pytest.mark.parametrize("what", CHECKS)
def test_it_is_refused_without_asserts_too(what, tmp_path):
    code = f"""
import pathlib, sys, textwrap
import numpy as np
import minires
from minires import cifar10
from minires.training import load_model, save_weights
from minires.training.checkpoint import save_checkpoint
try:
    exec(textwrap.dedent({CHECKS[what]!r}))
except Exception as error:
    print(type(error).__name__, error)
    sys.exit(42)
"""
    done = subprocess.run([sys.executable, "-O", "-c", code, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 42, f"{what} passed: {done.stderr}"
    assert done.stdout.split()[0] in REFUSALS, done.stdout
