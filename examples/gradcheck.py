"""Check every backward of minires, and that of the whole network, against central differences in float64.

    python examples/gradcheck.py

The relative error of each gradient is printed; above 1e-6 the check fails and says which one is wrong.
"""

import argparse

import numpy as np

from minires import (
    BasicBlock,
    BatchNorm2d,
    Bias2d,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool2d,
    Linear,
    MaxPool2d,
    ReLU,
    ResNet,
    SoftmaxCrossEntropy,
    check_gradients,
)
from minires.training.script import run_script


def main():
    parser = argparse.ArgumentParser(description="Check every backward of minires.", allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    parser.parse_args()
    rng = np.random.default_rng(0)
    images = rng.standard_normal((4, 8, 8, 6))
    checks = [
        ("ReLU", ReLU(), images),
        ("Dropout, p 0.3", Dropout(0.3, rng=rng), images),
        ("Linear", Linear(20, 10, rng=rng), rng.standard_normal((8, 20))),
        ("Flatten", Flatten(), images),
        ("GlobalAvgPool2d", GlobalAvgPool2d(), images),
        ("MaxPool2d 2x2", MaxPool2d(2), images),
        ("MaxPool2d 3x3, stride 2", MaxPool2d(3, stride=2), images),
        ("BatchNorm2d", BatchNorm2d(6), images),
        ("BatchNorm2d with ReLU", BatchNorm2d(6, relu=True), images),
        ("Bias2d with ReLU", Bias2d(6, relu=True), images),
        ("Conv2d 3x3", Conv2d(6, 5, 3, padding=1, rng=rng), images),
        ("Conv2d 3x3, stride 2", Conv2d(6, 5, 3, stride=2, padding=1, rng=rng), images),
        ("Conv2d 1x1, stride 2", Conv2d(6, 5, 1, stride=2, rng=rng), images),
        ("BasicBlock", BasicBlock(6, 6, rng=rng), images),
        ("BasicBlock with projection", BasicBlock(6, 8, stride=2, rng=rng), images),
        ("SoftmaxCrossEntropy", SoftmaxCrossEntropy(0.1), rng.standard_normal((8, 10)), rng.integers(0, 10, 8)),
        ("ResNet, 4,977,226 parameters", ResNet(), rng.standard_normal((2, 16, 16, 3))),
    ]
    print(f"{'layer':<30} {'gradients':>9}  {'largest error':>13}  of")
    for title, layer, *inputs in checks:
        errors = check_gradients(layer, *inputs)
        worst = max(errors, key=errors.get)
        print(f"{title:<30} {len(errors):>9}  {errors[worst]:>13.1e}  {worst}", flush=True)


if __name__ == "__main__":
    run_script(main)
