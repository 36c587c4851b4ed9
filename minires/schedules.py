"""The learning rate as a plain function of the step.

    for step in range(total_steps):
        optimizer.lr = cosine(step, total_steps, 1e-3)
        ...

Why it changes at all: a large rate covers ground, but its steps jump from side to side of the valley that they should
run down, and the noise of the gradients keeps the weights at a distance from the minimum that grows with the rate. So
every schedule but `constant` ends near 0, and what a step with noise has put wrong is settled at the end. The first
steps are taken with weights that chance has drawn, where the gradient is large and says little about the step after
it: `one_cycle` and `triangular` warm up, from a small rate to the largest.

A schedule of your own is a function with the same arguments: step (0 at the first), total_steps, lr (the largest rate)
-> the rate of that step.
"""

import math


def constant(step, total_steps, lr):
    """The same learning rate at every step."""
    return lr


def cosine(step, total_steps, lr, final_lr=0.0):
    """Half a cosine, from lr at step 0 down to final_lr at step total_steps.

    Source      Loshchilov and Hutter 2017, "SGDR", eq. 5, without restarts
    """
    return final_lr + (lr - final_lr) * (1 + math.cos(math.pi * step / total_steps)) / 2


def one_cycle(step, total_steps, lr, warmup=0.3, start_factor=1 / 25, final_factor=1 / 250_000):
    """Up to lr in the first part of the run and down to almost nothing in the rest, each as half a cosine.

    The peak is at step warmup total_steps - 1, the last value at step total_steps - 1.

    Args        warmup: the part of the run that goes up, 0 to below 1; start_factor, final_factor: first and last rate
                as parts of lr
    Source      Smith and Topin 2018, "Super-convergence", in the form and with the defaults of PyTorch's OneCycleLR
    """
    peak = warmup * total_steps - 1
    if step < peak:
        return cosine(step, peak, start_factor * lr, lr)
    return cosine(step - peak, total_steps - 1 - peak, lr, final_factor * lr)


def triangular(step, total_steps, lr, warmup=0.2):
    """Up to lr on a straight line in the first part of the run, and down to almost nothing on another in the rest.

    The peak is at step warmup total_steps, rounded down; the lines meet 0 one step before the first and one after the
    last.

    Args        warmup: the part of the run that goes up, 0 to below 1
    Source      Page 2018, "How to train your ResNet", whose 5 epochs of 24 give the default
    """
    peak = int(warmup * total_steps)
    if step < peak:
        return lr * ((step + 1) / (peak + 1))
    return lr * ((total_steps - step) / (total_steps - peak))
