"""How weights move: SGD and Adam, and the learning rate as a plain function of the step.

    optimizer = Adam(model.parameters(), lr=1e-3)
    for step in range(total_steps):
        optimizer.lr = cosine(step, total_steps, 1e-3)
        optimizer.zero_grad()
        loss = ...                      # forward and backward fill every grad
        optimizer.step()
"""

import math

from minires.backend import array_module
from minires.kernels import kernels_for


class SGD:
    """Stochastic gradient descent, with momentum, Nesterov's variant and weight decay.

    Update      see `kernels.reference.sgd_update`
    Args        params: a list of Parameters; lr: learning rate; momentum: 0 to below 1; weight_decay: added to the
                gradient, times the parameter
    Raises      ValueError for values outside these ranges
    Source      PyTorch's SGD, without dampening
    """

    def __init__(self, params, lr, momentum=0.0, nesterov=False, weight_decay=0.0):
        _check_range("SGD", "lr", lr, 0, math.inf)
        _check_range("SGD", "momentum", momentum, 0, 1)
        _check_range("SGD", "weight_decay", weight_decay, 0, math.inf)
        if nesterov and not momentum:
            raise ValueError("SGD: nesterov needs a momentum above 0")
        self.params = _checked_list("SGD", params)
        self.lr, self.momentum, self.nesterov, self.weight_decay = lr, momentum, nesterov, weight_decay
        self.velocity = [_zeros_like(p) if momentum else None for p in self.params]

    def zero_grad(self):
        _zero_grad(self.params)

    def step(self):
        for p, velocity in zip(self.params, self.velocity, strict=True):
            kernels_for(p.data).sgd_update(
                p.data, p.grad, velocity, self.lr, self.momentum, self.nesterov, self.weight_decay
            )


class Adam:
    """Adaptive moments: each number moves by about lr, whatever the scale of its gradient.

    Update      see `kernels.reference.adam_update`
    Args        params: a list of Parameters; lr: learning rate; betas: how slowly the two moments forget, each 0 to
                below 1; eps: added to the denominator; weight_decay: added to the gradient, times the parameter
    Raises      ValueError for values outside these ranges
    Source      Kingma and Ba 2015; arithmetic of PyTorch's Adam
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        _check_range("Adam", "lr", lr, 0, math.inf)
        _check_range("Adam", "betas[0]", betas[0], 0, 1)
        _check_range("Adam", "betas[1]", betas[1], 0, 1)
        _check_range("Adam", "eps", eps, 0, math.inf)
        _check_range("Adam", "weight_decay", weight_decay, 0, math.inf)
        self.params = _checked_list("Adam", params)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.m = [_zeros_like(p) for p in self.params]
        self.v = [_zeros_like(p) for p in self.params]
        self.steps = 0

    def zero_grad(self):
        _zero_grad(self.params)

    def step(self):
        self.steps += 1
        for p, m, v in zip(self.params, self.m, self.v, strict=True):
            kernels_for(p.data).adam_update(
                p.data, p.grad, m, v, self.steps, self.lr, self.betas, self.eps, self.weight_decay
            )


def _zeros_like(parameter):
    return array_module(parameter.data).zeros_like(parameter.data)


def _zero_grad(params):
    for p in params:
        p.grad[...] = 0


def _checked_list(optimizer, params):
    params = list(params)
    if not params:
        raise ValueError(f"{optimizer}: params is empty, there is nothing to train")
    return params


def _check_range(optimizer, name, value, least, below):
    if not least <= value < below:
        raise ValueError(f"{optimizer}: {name} must be at least {least} and below {below}, got {value}")


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
