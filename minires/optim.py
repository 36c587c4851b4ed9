"""How weights move: SGD, Muon, Adam, and an average of the weights.

The gradient of a batch says in which direction the loss grows fastest at the current weights. An optimizer takes a step
against it, of a length that the learning rate sets, see `schedules`. How the layers fill the gradients is none of its
business: it knows a list of parameters.

    optimizer = Adam(model.parameters(), lr=1e-3)
    for step in range(total_steps):
        optimizer.lr = cosine(step, total_steps, 1e-3)
        optimizer.zero_grad()
        loss = ...                      # forward and backward fill every grad
        optimizer.step()

Source      PyTorch, for the names and the arithmetic
"""

import math
import numbers
from collections.abc import Iterable

from minires.backend import array_module
from minires.kernels import kernels_for
from minires.module import Parameter

# A parameter starts at a multiple of this many numbers: a GPU's convolutions read weights 16 bytes at a time, and a
# warp of 32 threads reads whole lines of the cache, of 128 bytes. In the default network this adds 54 numbers.
ALIGNMENT = 64
COLOURS = 3  # input channels up to which a filter is one of the first layer


class SGD:
    """Stochastic gradient descent, with momentum, Nesterov's variant and weight decay.

    Update      see `kernels.reference.sgd_update`, where momentum and Nesterov's variant are derived

    Why         Momentum: the loss is often a narrow valley, in which the steepest way down points at the other wall.
                The velocity, a sum of past gradients, forgets what changes its sign from step to step (the walls, and
                the noise of single batches), and gathers speed along the valley.
                Nesterov: the velocity will carry the weights on in any case, so the gradient is taken where they will
                be. A velocity that is about to overshoot is slowed down one step earlier.
                Weight decay: each step makes the weights a little smaller, by lr weight_decay param. Only those that
                the data keep asking for stay large, and a network of small weights overfits less.

    Args        params: a list of Parameters, which are moved into one array, see `FlatParameters`; lr: learning rate;
                momentum: 0 to below 1; weight_decay: added to the gradient, times the parameter; decay_vectors: False
                keeps the weight decay from biases and BatchNorm's parameters; max_norm: gradients that are longer than
                this, all of them taken as one vector, are shortened to it before the step
    Raises      ValueError for values outside these ranges, and for nesterov without a momentum
    Source      PyTorch's SGD, without dampening; its clip_grad_norm_ for max_norm
    """

    def __init__(
        self, params, lr, momentum=0.0, nesterov=False, weight_decay=0.0, decay_vectors=True, max_norm=math.inf
    ):
        _check_range("SGD", "lr", lr, 0, math.inf)
        _check_range("SGD", "momentum", momentum, 0, 1)
        _check_range("SGD", "weight_decay", weight_decay, 0, math.inf)
        _check_above_0("SGD", "max_norm", max_norm)
        if nesterov and not momentum:
            raise ValueError("SGD: nesterov needs a momentum above 0")
        self.params = _checked_list("SGD", params)
        self.lr, self.momentum, self.nesterov, self.weight_decay = lr, momentum, nesterov, weight_decay
        self.decay_vectors, self.max_norm = decay_vectors, max_norm
        self.flat = FlatParameters("SGD", self.params)
        self.flat_velocity = self.flat.zeros() if momentum else None

    def zero_grad(self):
        self.flat.zero_grad()

    def step(self, grad_scale=1.0):
        """Move every parameter. The gradients are multiplied by grad_scale first, and shortened to max_norm."""
        self.flat.clip(self.max_norm, grad_scale)
        self._descend(grad_scale)

    def _descend(self, grad_scale, but=()):
        for part, weight_decay, lr_factor in self.flat.parts(self.weight_decay, self.decay_vectors, but):
            kernels_for(self.flat.data).sgd_update(
                self.flat.data[part],
                self.flat.grad[part],
                None if self.flat_velocity is None else self.flat_velocity[part],
                float(self.lr * lr_factor),  # a np.float64 would make the arithmetic that of float64
                self.momentum,
                self.nesterov,
                weight_decay,
                grad_scale,
            )

    def state(self):
        """Return what a step leaves behind for the next: {name: arrays in the order of the parameters}.

        The arrays are views: to resume from a saved state, write into them.
        """
        return {} if self.flat_velocity is None else {"velocity": self.flat.views(self.flat_velocity)}


class Muon(SGD):
    """Momentum, orthogonalised: hidden filters move in all directions alike, everything else as by `SGD`.

    Update      of a filter: see `kernels.reference.muon_update`, where it is derived

    Args        params, lr, momentum (above 0 here), nesterov, weight_decay, decay_vectors: as in `SGD`, for all but the
                filters; max_norm: as in `SGD`, over all gradients, those of the filters among them; filter_lr: the
                share of a filter that a step replaces, in parts of lr; filter_momentum: 0 to below 1
    Limits      hidden filters are those of all convolutions with more than three input channels (a first one's are
                colours). BatchNorm has to follow each: without it, their norms, which are held fixed, would matter.
                They take filter_lr in the place of an lr_factor of their own
    Raises      ValueError for values outside these ranges
    Source      see `kernels.reference.muon_update`
    """

    def __init__(
        self,
        params,
        lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=0.0,
        decay_vectors=True,
        max_norm=math.inf,
        filter_lr=0.25,
        filter_momentum=0.6,
    ):
        _check_range("Muon", "filter_lr", filter_lr, 0, math.inf)
        _check_range("Muon", "filter_momentum", filter_momentum, 0, 1)
        if not momentum:
            raise ValueError(f"Muon: momentum must be above 0, got {momentum}")
        super().__init__(params, lr, momentum, nesterov, weight_decay, decay_vectors, max_norm)
        self.filter_lr, self.filter_momentum = filter_lr, filter_momentum
        self.filters = [i for i, p in enumerate(self.params) if p.data.ndim == 4 and p.data.shape[2] > COLOURS]

    def _descend(self, grad_scale):
        super()._descend(grad_scale, but=self.filters)
        velocities = self.flat.views(self.flat_velocity)
        filters = [(self.params[i].data, self.params[i].grad, velocities[i]) for i in self.filters]
        if filters:
            kernels_for(self.flat.data).muon_update(
                *zip(*filters, strict=True), float(self.lr * self.filter_lr), self.filter_momentum, grad_scale
            )


class Adam:
    """Adaptive moments: each number moves by about lr, whatever the scale of its gradient.

    Update      see `kernels.reference.adam_update`, where it is derived

    Why         Gradients differ in scale from layer to layer, and one learning rate would be too large for some numbers
                and too small for others. Adam divides the running mean of each number's gradient, m, by its usual size,
                sqrt(v). Both averages start at 0 and are too small at first, by a known factor, which is corrected.

    Args        params: a list of Parameters, which are moved into one array, see `FlatParameters`; lr: learning rate;
                betas: how slowly the two moments forget, each 0 to below 1; eps: added to the denominator;
                weight_decay, decay_vectors, max_norm: as in `SGD`
    Raises      ValueError for values outside these ranges, and for an eps that is 0 in the dtype of the parameters
    Source      Kingma and Ba 2015; arithmetic of PyTorch's Adam
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        decay_vectors=True,
        max_norm=math.inf,
    ):
        _check_range("Adam", "lr", lr, 0, math.inf)
        if not isinstance(betas, list | tuple) or len(betas) != 2:
            raise TypeError(f"Adam: betas must be two numbers, got {betas!r}")
        _check_range("Adam", "betas[0]", betas[0], 0, 1)
        _check_range("Adam", "betas[1]", betas[1], 0, 1)
        _check_above_0("Adam", "eps", eps)
        _check_range("Adam", "weight_decay", weight_decay, 0, math.inf)
        _check_above_0("Adam", "max_norm", max_norm)
        self.params = _checked_list("Adam", params)
        dtype = self.params[0].data.dtype
        if not dtype.type(eps):  # a gradient that has always been 0 would give 0 / 0
            raise ValueError(f"Adam: eps must be above 0 in the {dtype} of the parameters, where {eps} is 0")
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.decay_vectors, self.max_norm = decay_vectors, max_norm
        self.flat = FlatParameters("Adam", self.params)
        self.flat_m, self.flat_v = self.flat.zeros(), self.flat.zeros()
        self.steps = 0

    def zero_grad(self):
        self.flat.zero_grad()

    def step(self, grad_scale=1.0):
        """Move every parameter. The gradients are multiplied by grad_scale first, and shortened to max_norm."""
        self.flat.clip(self.max_norm, grad_scale)
        self.steps += 1
        for part, weight_decay, lr_factor in self.flat.parts(self.weight_decay, self.decay_vectors):
            kernels_for(self.flat.data).adam_update(
                self.flat.data[part],
                self.flat.grad[part],
                self.flat_m[part],
                self.flat_v[part],
                self.steps,
                float(self.lr * lr_factor),  # a np.float64 would make the arithmetic that of float64
                self.betas,
                self.eps,
                weight_decay,
                grad_scale,
            )

    def state(self):
        """Return what a step leaves behind for the next: {name: arrays in the order of the parameters}; see `SGD`.

        The number of steps, which belongs to it, is the attribute `steps`.
        """
        return {"m": self.flat.views(self.flat_m), "v": self.flat.views(self.flat_v)}


class WeightAverage:
    """An exponential moving average (EMA) of the weights, which is often better than the weights of any one step.

    Update      average = d average + (1 - d) weights, with d = min(decay, (1 + t) / (10 + t)) at the t-th update

    Why         The last steps are taken with noisy gradients around a minimum, and their noise averages out. About the
                last 1 / (1 - decay) steps count. The first updates forget faster, or the initial weights would stay
                in the average for long.
                The running statistics of BatchNorm are not averaged: they belong to the activations of the weights of
                each step. Averaged weights are smaller, as their noise is gone, and so are their activations.
                Measure the statistics anew with the averaged weights in place, see `evaluation.measure_statistics`.

    Args        optimizer: whose parameters; decay: 0 to below 1
    Source      Polyak and Juditsky 1992; Tarvainen and Valpola 2017, "Mean teachers are better role models"; the first
                steps as in TensorFlow's ExponentialMovingAverage. Izmailov et al. 2018, "Averaging weights leads to
                wider optima", section 3.2, for the statistics
    """

    def __init__(self, optimizer, decay):
        if not hasattr(optimizer, "flat"):
            raise TypeError(
                f"WeightAverage: expected an optimizer, whose parameters count, got a {type(optimizer).__name__}"
            )
        _check_range("WeightAverage", "decay", decay, 0, 1)
        self.flat, self.decay, self.updates = optimizer.flat, decay, 0
        self.flat_average = self.flat.zeros()
        self.flat_average[...] = self.flat.data

    def update(self):
        """Take the weights into the average; to be called after each step of the optimizer."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        kernels_for(self.flat.data).average_update(self.flat_average, self.flat.data, decay)

    def swap(self):
        """Exchange the weights and the average: once to evaluate the average, and again to continue training."""
        self.flat.check()
        weights = self.flat.data.copy()
        self.flat.data[...] = self.flat_average
        self.flat_average[...] = weights

    def state(self):
        """Return {name: arrays in the order of the parameters}, as views; the number `updates` belongs to it."""
        return {"average": self.flat.views(self.flat_average)}


class FlatParameters:
    """All parameters of an optimizer end to end in one array, and their gradients in another.

    Each Parameter's data and grad become views of these arrays, in its shape. Layers do not notice; a step, a
    zero_grad or an average is one pass over one array instead of one over each of 44. On a GPU that is one launch.

    Matrices come first and vectors (biases, BatchNorm's parameters) last, and among them those with one lr_factor side
    by side, so that all that are treated alike are one slice. Between the parameters there are zeros, and whatever an
    optimizer does to a parameter of 0 with a gradient of 0 leaves them 0.

    A copy (copy.deepcopy, pickle) is made anew from copies of the parameters, whose data and grad are then views of its
    own arrays. Copy a model and its optimizer together, copy.deepcopy((model, optimizer)): alone, an optimizer takes
    along copies of the parameters that belong to no model, and a model leaves its optimizer behind.

    Limits      a Parameter lives in one such array. If it is moved (model.to) or given to another optimizer, or if its
                data or grad is replaced, it leaves, and the next step, zero_grad or copy says so
    Raises      ValueError for parameters on several devices or of several dtypes, or one that is given twice
    """

    def __init__(self, owner, params):
        self.owner, self.params = owner, params
        if len(set(map(id, params))) < len(params):
            raise ValueError(f"{owner}: params holds the same Parameter twice")
        kinds = {(array_module(p.data).__name__, str(p.data.dtype)) for p in params}
        if len(kinds) > 1:
            raise ValueError(
                f"{owner}: params must be on one device and of one dtype, got "
                + ", ".join(f"{library} {dtype}" for library, dtype in sorted(kinds))
            )
        self.xp, self.dtype = array_module(params[0].data), params[0].data.dtype
        self.order = sorted(range(len(params)), key=lambda i: (params[i].data.ndim < 2, params[i].lr_factor))
        self.offsets, self.size = [0] * len(params), 0
        for i in self.order:
            self.offsets[i] = self.size
            self.size += math.ceil(params[i].data.size / ALIGNMENT) * ALIGNMENT
        vectors = [offset for p, offset in zip(params, self.offsets, strict=True) if p.data.ndim < 2]
        self.vectors_start = min(vectors, default=self.size)
        self.data, self.grad = self.zeros(), self.zeros()
        self.data_views, self.grad_views = self.views(self.data), self.views(self.grad)
        for p, data, grad in zip(params, self.data_views, self.grad_views, strict=True):
            data[...], grad[...] = p.data, p.grad
            p.data, p.grad = data, grad

    def __reduce__(self):
        self.check()
        return FlatParameters, (self.owner, self.params)

    def zeros(self):
        """Return an array of zeros laid out like the parameters."""
        return self.xp.zeros(self.size, self.dtype)

    def views(self, array):
        """Return the parts of a flat array that belong to the parameters, in their order and shapes."""
        return [
            array[offset : offset + p.data.size].reshape(p.data.shape)
            for p, offset in zip(self.params, self.offsets, strict=True)
        ]

    def parts(self, weight_decay, decay_vectors, but=()):
        """Return slices that cover all parameters, each with its weight decay and lr_factor: as few as there can be.

        Args        but: the indices of parameters to leave out
        """
        parts = []
        for i, end in zip(self.order, [*(self.offsets[i] for i in self.order[1:]), self.size], strict=True):
            p, start = self.params[i], self.offsets[i]
            settings = (weight_decay if decay_vectors or p.data.ndim >= 2 else 0.0, p.lr_factor)
            if i in but:
                continue
            if parts and parts[-1] == (slice(parts[-1][0].start, start), *settings):
                parts[-1] = (slice(parts[-1][0].start, end), *settings)
            else:
                parts.append((slice(start, end), *settings))
        return parts

    def zero_grad(self):
        self.check()
        self.grad[...] = 0

    def clip(self, max_norm, grad_scale=1.0):
        """Multiply the gradients by max_norm / (norm + 1e-6), if that is below 1; their norm is taken after grad_scale.

        The factor stays on the device, so nothing waits for it.

        Source      Pascanu, Mikolov and Bengio 2013, "On the difficulty of training recurrent neural networks", with
                    the 1e-6 of PyTorch's clip_grad_norm_
        """
        self.check()
        if max_norm < math.inf:
            norm = self.xp.sqrt(kernels_for(self.grad).sum_of_squares(self.grad)) * grad_scale
            self.grad *= self.xp.minimum(max_norm / (norm + 1e-6), 1).astype(self.dtype)

    def check(self):
        """Raise if a parameter no longer lives here: a step would move a copy that nobody reads."""
        for i, (p, data, grad) in enumerate(zip(self.params, self.data_views, self.grad_views, strict=True)):
            name = f"params[{i}], of shape {data.shape},"
            if p.data is not data and p.grad is not grad:
                raise RuntimeError(
                    f"{self.owner}: {name} was moved, cast or given to another optimizer after this one was made: make "
                    "the optimizer after model.to, and one for each parameter"
                )
            if p.grad is not grad:
                raise RuntimeError(
                    f"{self.owner}: the grad of {name} was replaced: add into it in place, w.grad += g or "
                    "w.grad[...] = g"
                )
            if p.data is not data:
                raise RuntimeError(f"{self.owner}: the data of {name} was replaced: write into it, w.data[...] = x")


def _checked_list(optimizer, params):
    if isinstance(params, Parameter) or not isinstance(params, Iterable):
        raise TypeError(f"{optimizer}: params must be a list, as model.parameters() is, got {type(params).__name__}")
    params = list(params)
    if not params:
        raise ValueError(f"{optimizer}: params is empty, there is nothing to train")
    for p in params:
        if not isinstance(p, Parameter):
            raise TypeError(f"{optimizer}: params must be Parameters, as in model.parameters(), got {type(p).__name__}")
    return params


def _check_number(optimizer, name, value):
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{optimizer}: {name} must be a number, got {value!r}")


def _check_range(optimizer, name, value, least, below):
    _check_number(optimizer, name, value)
    if not least <= value < below:
        raise ValueError(f"{optimizer}: {name} must be at least {least} and below {below}, got {value}")


def _check_above_0(optimizer, name, value):
    _check_number(optimizer, name, value)
    if not value > 0:
        raise ValueError(f"{optimizer}: {name} must be above 0, got {value}")
