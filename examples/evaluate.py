"""Measure a trained network: loss, accuracy, accuracy of each class, and which classes it takes for which.

    python examples/evaluate.py
    python examples/evaluate.py runs/my-run/best.safetensors --data sample

The weights are in a safetensors file of minires, or one that PyTorch wrote from the same network; without one, the
weights that come with minires serve.
"""

import argparse
import pathlib

from minires import cifar10
from minires.backend import choose_device
from minires.evaluation import confusion_matrix
from minires.loss import SoftmaxCrossEntropy
from minires.training.arguments import data_folder, read_data
from minires.training.script import run_script
from minires.training.weights import load_or_published, logits_of


def main():
    parser = argparse.ArgumentParser(description="Measure a trained network on CIFAR-10.", allow_abbrev=False)
    parser.add_argument(
        "weights", nargs="?", type=pathlib.Path, help="a safetensors file; default: minires.pretrained()"
    )
    parser.add_argument(
        "--data", type=data_folder, metavar="sample|DIR", help="default: $MINIRES_DATA or ~/.cache/minires"
    )
    parser.add_argument("--part", choices=["test", "train"], default="test", help="which images, default test")
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--tta", action="store_true", help="the mean of the logits of each image and its mirror image")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    args = parser.parse_args()

    device = choose_device(args.device)
    model, path = load_or_published(args.weights)
    data = read_data(args.data)
    images, labels = (data.test_images, data.test_labels) if args.part == "test" else data[:2]

    logits = logits_of(model.to(device), images, path, args.tta)
    loss = float(SoftmaxCrossEntropy().forward(logits, labels))
    matrix = confusion_matrix(labels, logits.argmax(axis=1), len(cifar10.CLASSES))

    print(f"{len(images):,} images, loss {loss:.4f}, accuracy {matrix.trace() / matrix.sum():.2%}\n")
    print(f"{'':12} accuracy   taken for " + " ".join(f"{name[:5]:>5}" for name in cifar10.CLASSES))
    for k, name in enumerate(cifar10.CLASSES):
        accuracy = matrix[k, k] / matrix[k].sum()
        print(f"{name:12} {accuracy:8.2%}   {'':9} " + " ".join(f"{count:5}" for count in matrix[k]))
    return 0


if __name__ == "__main__":
    run_script(main)
