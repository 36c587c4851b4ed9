"""BatchNorm of the reference beside that of cpu.py: are they equal, and what is the one faster by?

    python examples/lessons/made_fast.py

The batch is that of the network's first stage: 128 images of 32x32 pixels with 64 channels, 34 MB in float32. What is
right is what the reference says in float64, where its rounding is half a billion times as fine.
"""

import argparse
import time

import numpy as np

from minires import kernels
from minires.kernels import cpu, reference
from minires.training.arguments import at_least
from minires.training.script import run_script

SHAPE, EPS, ROUNDS = (128, 32, 32, 64), 1e-5, 5


def make_steps(x, residual, dout, weight, bias):
    """Return {name: a function of a set of kernels}: what a layer with its residual and its ReLU does in a step."""
    mean, var = reference.batch_norm_statistics(x)
    out = reference.batch_norm_add_relu_forward(x, weight, bias, mean, var, EPS, residual, relu=True)
    g, *sums = reference.batch_norm_add_relu_backward_sums(dout, x, out, mean, var, EPS)
    return {
        "statistics": lambda k: k.batch_norm_statistics(x),
        "forward": lambda k: [k.batch_norm_add_relu_forward(x, weight, bias, mean, var, EPS, residual, relu=True)],
        "backward sums": lambda k: k.batch_norm_add_relu_backward_sums(dout, x, out, mean, var, EPS),
        "backward": lambda k: [k.batch_norm_backward(g, x, weight, mean, var, EPS, *sums)],
    }


def error(results, exact):
    """The largest difference of a result from what is right, by the length of both as vectors."""
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(results, exact, strict=True))


def race(step, contestants):
    """Return the milliseconds of each pair (set of kernels, threads): the least of some rounds, in turns.

    Other work on the machine makes a round longer, never shorter.
    """
    rounds = []
    for _ in range(ROUNDS):
        rounds.append([])
        for kernel_set, threads in contestants:
            kernels.set_num_threads(threads)
            start = time.perf_counter()
            step(kernel_set)
            rounds[-1].append(1000 * (time.perf_counter() - start))
    return np.min(rounds, axis=0)


def differing_numbers(step):
    """Count the numbers in the results of cpu.py that are not the same bits with one thread and with two."""
    results = []
    for threads in (1, 2):
        kernels.set_num_threads(threads)
        results.append(step(cpu))
    return sum(int((a != b).sum()) for a, b in zip(*results, strict=True))


def main():
    parser = argparse.ArgumentParser(description="BatchNorm made fast: equal, and how much faster.", allow_abbrev=False)
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of the numbers; default 0")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    args = parser.parse_args()

    rng = np.random.default_rng(args.seed)
    x, residual, dout = (rng.standard_normal(SHAPE, np.float32) for _ in range(3))
    x = 3 * x + rng.standard_normal(SHAPE[-1], np.float32)  # each channel with a mean of its own
    arrays = x, residual, dout, *rng.standard_normal((2, SHAPE[-1]), np.float32)
    steps, exact = make_steps(*arrays), make_steps(*(array.astype(np.float64) for array in arrays))

    threads = max(2, kernels.num_threads())
    contestants = {
        "reference": (reference, 1),
        "cpu.py, 1 thread": (cpu, 1),
        f"cpu.py, {threads} threads": (cpu, threads),
    }
    print(f"{'milliseconds, the least of five':32}" + "".join(f"{name:>20}" for name in contestants))
    errors, times, different = {reference: [], cpu: []}, [], 0
    for name, step in steps.items():
        right = exact[name](reference)
        for kernel_set, found in errors.items():
            found.append(error(step(kernel_set), right))
        times.append(race(step, contestants.values()))
        different += differing_numbers(step)
        print(f"    {name:28}" + "".join(f"{ms:20.1f}" for ms in times[-1]), flush=True)
    print(f"    {'all four':28}" + "".join(f"{ms:20.1f}" for ms in np.sum(times, axis=0)))
    for kernel_set, found in errors.items():
        print(f"largest relative error, {kernel_set.__name__.rpartition('.')[2]}.py: {max(found):.1e}")
    print(f"numbers that differ between one thread and two: {different}")

    # The mean of squares less the square of the mean, with sums in float64 and the two means in float32
    x = (1000 + 0.1 * rng.standard_normal((32, 32, 32, 64))).astype(np.float32)
    mean, squares = (array.mean(axis=(0, 1, 2), dtype=np.float64).astype(np.float32) for array in (x, x * x))
    wrong = np.abs(squares - mean * mean - 0.01) > 0.005
    print(f"channels of 64 with a wrong variance, mean of squares: {wrong.sum()}")
    for kernel_set in errors:
        found = kernel_set.batch_norm_statistics(x)[1].mean()
        print(f"variance of 1,000 plus or minus 0.1, {kernel_set.__name__.rpartition('.')[2]}.py: {found:.5f}")
    return 0


if __name__ == "__main__":
    run_script(main)
