"""The learning rate as a plain function of the step.

    for step in range(total_steps):
        optimizer.lr = cosine(step, total_steps, 1e-3)
        ...

Why it changes at all: with a large rate the weights travel far, but the noise of the gradients keeps them at a distance
from the minimum that grows with the rate. So every schedule but `constant` ends near 0, and the weights settle. The
first steps start from weights that chance has drawn, where the gradient is large and says little about what lies a
step ahead: `one_cycle` and `triangular` warm up, from a small rate to the largest.

A schedule of your own is a function with the same arguments. step counts from 0, lr is the largest rate, and the result
is the rate of that step. A run that goes on beyond total_steps keeps the last rate.
"""

import math


def constant(step, total_steps, lr):
    """The same learning rate at every step."""
    return lr


def cosine(step, total_steps, lr, final_lr=0.0):
    """Half a cosine, from lr at step 0 down to final_lr at step total_steps.

    Raises      ValueError for total_steps below 1
    Source      Loshchilov and Hutter 2017, "SGDR", eq. 5, without restarts
    """
    check_total("cosine", total_steps)
    return half_cosine(min(step, total_steps), total_steps, lr, final_lr)


def one_cycle(step, total_steps, lr, warmup=0.3, start_factor=1 / 25, final_factor=1 / 250_000):
    """Up to lr in the first part of the run and down to almost nothing in the rest, each as half a cosine.

    The peak is at step warmup total_steps - 1, the last value at step total_steps - 1.

    Args        warmup: the part of the run that goes up, 0 to below 1; start_factor, final_factor: first and last rate
                as parts of lr
    Raises      ValueError for total_steps below 1, or another warmup
    Source      Smith and Topin 2018, "Super-convergence", in the form and with the defaults of PyTorch's OneCycleLR
    """
    check_total("one_cycle", total_steps)
    check_warmup("one_cycle", warmup)
    step, peak = min(step, total_steps - 1), warmup * total_steps - 1
    if step < peak:
        return half_cosine(step, peak, start_factor * lr, lr)
    return half_cosine(step - peak, total_steps - 1 - peak, lr, final_factor * lr)


def triangular(step, total_steps, lr, warmup=0.2):
    """Up to lr on a straight line in the first part of the run, and down to almost nothing on another in the rest.

    The peak is at step warmup total_steps, rounded down; the lines reach 0 one step before the first and one after the
    last.

    Args        warmup: the part of the run that goes up, 0 to below 1
    Raises      ValueError for total_steps below 1, or another warmup
    Source      Page 2018, "How to train your ResNet", whose 5 epochs of 24 give the default
    """
    check_total("triangular", total_steps)
    check_warmup("triangular", warmup)
    step, peak = min(step, total_steps - 1), int(warmup * total_steps)
    if step < peak:
        return lr * ((step + 1) / (peak + 1))
    return lr * ((total_steps - step) / (total_steps - peak))


def half_cosine(step, steps, start, end):
    """Go from start at step 0 to end at step `steps`, slowly at both ends and fastest halfway.

    Why         (1 + cos a) / 2 falls from 1 to 0 while the angle a goes from 0 to pi. It is flat at both: the rate
                stays large for a while, and near its end for a while.
    """
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def check_total(schedule, total_steps):
    if not total_steps >= 1:
        raise ValueError(f"{schedule}: total_steps must be at least 1, got {total_steps}")


def check_warmup(schedule, warmup):
    if not 0 <= warmup < 1:
        raise ValueError(f"{schedule}: warmup must be at least 0 and below 1, got {warmup}")
