"""The optimizers against scalars computed by hand."""

import copy
import math
import pickle

import numpy as np
import pytest

from minires import SGD, Adam, Linear, Muon, Parameter, WeightAverage
from minires.kernels import reference


def parameter(value, dtype=np.float64):
    return Parameter(np.array([value], dtype))


def test_sgd_goes_down_the_gradient():
    p = parameter(1.0)
    p.grad[:] = 4.0
    SGD([p], lr=0.1).step()
    np.testing.assert_allclose(p.data, 0.6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_three_steps_by_hand(nesterov):
    p = parameter(1.0)
    optimizer = SGD([p], lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    w, velocity = 1.0, 0.0
    for grad in (2.0, -1.0, 0.5):
        p.grad[:] = grad
        optimizer.step()
        g = grad + 0.01 * w
        velocity = 0.9 * velocity + g
        w -= 0.1 * (g + 0.9 * velocity if nesterov else velocity)
        np.testing.assert_allclose(p.data, w)


def test_adam_moves_by_lr_each_step_on_a_constant_gradient():
    for grad in (1e-3, 1.0, 1e3):
        p = parameter(0.0)
        optimizer = Adam([p], lr=0.01, eps=1e-30)
        for step in range(1, 6):
            p.grad[:] = grad
            optimizer.step()
            np.testing.assert_allclose(p.data, -0.01 * step)


def test_adam_three_steps_by_hand():
    p = parameter(1.0)
    optimizer = Adam([p], lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.01)
    w, m, v = 1.0, 0.0, 0.0
    for t, grad in enumerate((2.0, -1.0, 0.5), start=1):
        p.grad[:] = grad
        optimizer.step()
        g = grad + 0.01 * w
        m = 0.8 * m + 0.2 * g
        v = 0.95 * v + 0.05 * g * g
        w -= 0.1 * (m / (1 - 0.8**t)) / (math.sqrt(v / (1 - 0.95**t)) + 1e-3)
        np.testing.assert_allclose(p.data, w)


@pytest.mark.parametrize("make", [lambda p: SGD([p], 0.1, 0.9, True, 0.01), lambda p: Adam([p], weight_decay=0.01)])
def test_float32_stays_float32_and_the_gradient_is_left_alone(make):
    p = parameter(1.0, np.float32)
    p.grad[:] = 3.0
    optimizer = make(p)
    array = p.data
    optimizer.step()
    optimizer.step()
    assert p.data is array
    assert p.data.dtype == np.float32
    assert p.grad[0] == 3.0
    assert all(array.dtype == np.float32 for arrays in optimizer.state().values() for array in arrays)


def test_zero_grad_clears_in_place():
    p = parameter(1.0)
    optimizer = SGD([p], lr=0.1)
    p.grad[:] = 3.0
    grad = p.grad
    optimizer.zero_grad()
    assert p.grad is grad
    assert grad[0] == 0


def several_parameters(rng, dtype=np.float32):
    """A bias before matrices and after them, and sizes that are and are no multiples of the alignment."""
    shapes = [(5,), (3, 3, 2, 7), (64, 2), (130,), (), (4, 4)]  # no filter of these is one of Muon's
    parameters = [Parameter(rng.standard_normal(shape).astype(dtype)) for shape in shapes]
    for p in parameters:
        p.grad[...] = rng.standard_normal(p.data.shape)
    return parameters


MAKE = {
    "SGD": lambda p, **settings: SGD(p, 0.1, 0.9, nesterov=True, weight_decay=0.01, **settings),
    "Adam": lambda p, **settings: Adam(p, 0.1, weight_decay=0.01, **settings),
    "Muon": lambda p, **settings: Muon(p, 0.1, weight_decay=0.01, **settings),
}
each_optimizer = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


@each_optimizer
def test_parameters_become_aligned_views_of_one_array_and_keep_their_values(make, rng):
    parameters = several_parameters(rng)
    before = [(p.data.copy(), p.grad.copy()) for p in parameters]
    flat = make(parameters).flat
    assert flat.size == 64 * (2 + 2 + 1 + 1 + 3 + 1)
    assert sorted(flat.offsets) == [0, 128, 256, 320, 384, 576]
    for p, (data, grad), offset in zip(parameters, before, flat.offsets, strict=True):
        np.testing.assert_array_equal(p.data, data)
        np.testing.assert_array_equal(p.grad, grad)
        np.testing.assert_array_equal(flat.data[offset : offset + data.size], data.reshape(-1))
        assert np.shares_memory(p.data, flat.data)
        assert np.shares_memory(p.grad, flat.grad)
        assert p.data.flags.c_contiguous


@each_optimizer
def test_all_parameters_together_move_as_each_alone(make, rng):
    together = several_parameters(rng)
    alone = [Parameter(p.data.copy()) for p in together]
    optimizer, optimizers = make(together), [make([p]) for p in alone]
    for _ in range(3):
        optimizer.zero_grad()
        for p, q in zip(together, alone, strict=True):
            p.grad += rng.standard_normal(p.data.shape)
            q.grad[...] = p.grad
        optimizer.step()
        for q in optimizers:
            q.step()
    for p, q in zip(together, alone, strict=True):
        np.testing.assert_array_equal(p.data, q.data)


@each_optimizer
def test_the_padding_stays_zero(make, rng):
    optimizer = make(several_parameters(rng), max_norm=1.0)
    for _ in range(3):
        optimizer.step(grad_scale=0.5)
    flat = optimizer.flat
    between = np.ones(flat.size, bool)
    for view in flat.views(between):
        view[...] = False
    assert between.sum() == flat.size - sum(p.data.size for p in optimizer.params) > 0
    assert not flat.data[between].any()
    assert not flat.grad[between].any()


@each_optimizer
def test_vectors_can_be_kept_from_weight_decay(make, rng):
    parameters = several_parameters(rng)
    for p in parameters:
        p.grad[...] = 0
    before = [p.data.copy() for p in parameters]
    make(parameters, decay_vectors=False).step()
    for p, data in zip(parameters, before, strict=True):
        assert (p.data == data).all() == (data.ndim < 2)
    make(parameters).step()
    assert not any((p.data == data).all() for p, data in zip(parameters, before, strict=True))


@pytest.mark.parametrize("decay_vectors", [False, True])
@each_optimizer
def test_a_parameter_with_a_learning_rate_of_its_own(make, decay_vectors, rng):
    parameters = several_parameters(rng)
    parameters[0].lr_factor = parameters[5].lr_factor = 8.0  # a vector and a matrix
    same, others = [Parameter(p.data.copy()) for p in parameters], make(parameters, decay_vectors=decay_vectors)
    for p, q in zip(parameters, same, strict=True):
        q.grad[...] = p.grad
    optimizers = [make([q], decay_vectors=decay_vectors) for q in same]
    optimizers[0].lr, optimizers[5].lr = 8 * others.lr, 8 * others.lr
    for _ in range(2):
        others.step()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(parameters, same, strict=True):
        np.testing.assert_array_equal(p.data, q.data)


def test_muon_replaces_a_share_of_a_filter_and_keeps_its_norm(rng):
    """Two steps by hand, with gradients Q and R that are orthogonal matrices, and orthogonal to each other.

    Then the velocity is Q, later 0.6 Q + R, and what is orthogonalised is 1.6 Q, later R + 0.6 (0.6 Q + R): a multiple
    of an orthogonal matrix, of which about that matrix is left.
    """
    Q, R = np.split(np.linalg.qr(rng.standard_normal((36, 12)))[0], 2, axis=1)
    filters = Parameter(3 * rng.standard_normal((3, 3, 4, 6)))
    vector = Parameter(rng.standard_normal(6))
    expected_vector, p = Parameter(vector.data.copy()), filters.data.reshape(36, 6).copy()
    optimizer = Muon([filters, vector], lr=0.4, weight_decay=0.1, filter_lr=0.25, filter_momentum=0.6)
    scaled = Parameter(filters.data.copy())
    of_scaled = Muon([scaled], lr=0.4, filter_lr=0.25, filter_momentum=0.6)
    sgd = SGD([expected_vector], lr=0.4, momentum=0.9, nesterov=True, weight_decay=0.1)
    for grad, direction in ((Q, Q), (R, (1.6 * R + 0.36 * Q) / np.hypot(1.6, 0.36))):
        filters.grad[...], vector.grad[...], expected_vector.grad[...] = grad.reshape(3, 3, 4, 6), 0.5, 0.5
        scaled.grad[...] = 1024 * filters.grad
        optimizer.step()
        of_scaled.step(1 / 1024)
        sgd.step()
        p = p * np.sqrt(6) / np.linalg.norm(p) - 0.1 * gain(6) * direction
    np.testing.assert_allclose(filters.data.reshape(36, 6), p, rtol=1e-9)
    np.testing.assert_array_equal(vector.data, expected_vector.data)
    np.testing.assert_array_equal(scaled.data, filters.data)


@pytest.mark.parametrize("make", [SGD, Adam, Muon])
def test_a_rate_of_numpy_gives_the_same_bits(rng, make):
    start, grad = rng.standard_normal((2, 3, 3, 4, 6)).astype(np.float32)
    results = []
    for lr in (0.1, np.float64(0.1)):
        parameter = Parameter(start.copy())
        optimizer = make([parameter], lr=lr)
        parameter.grad[...] = grad
        optimizer.step()
        results.append(parameter.data)
    np.testing.assert_array_equal(*results)


def test_muon_leaves_a_filter_of_zeros_or_without_gradient_finite():
    filters = Parameter(np.zeros((3, 3, 4, 6), np.float32))
    optimizer = Muon([filters], lr=0.4)
    optimizer.step()
    np.testing.assert_array_equal(filters.data, 0)
    filters.grad[...] = np.random.default_rng(0).standard_normal(filters.data.shape)
    optimizer.step()
    for _ in range(200):  # the velocity falls below what a float can square
        optimizer.zero_grad()
        optimizer.step()
    assert np.isfinite(filters.data).all()


def gain(columns):
    """What three steps make of the singular values of an orthogonal matrix, which begin at 1 / sqrt(columns)."""
    s = columns**-0.5
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize("shape", [(36, 8), (8, 36), (5, 5), (7, 1)])
def test_orthogonalize_keeps_singular_vectors_and_brings_singular_values_close_to_1(rng, shape):
    U, S, V = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    X = reference.orthogonalize(U * S @ V)
    mixed = U.T @ X @ V.T
    np.testing.assert_allclose(mixed, np.diag(np.diag(mixed)), atol=1e-12)
    assert (np.diag(mixed) > 0.68).all()
    assert (np.diag(mixed) < 1.21).all()


def test_a_gradient_of_0_stays_0():
    np.testing.assert_array_equal(reference.orthogonalize(np.zeros((4, 3), np.float32)), 0)


@pytest.mark.parametrize("shapes", [[(3,), (1,)], [(2, 2)]], ids=["vectors", "matrices"])
@each_optimizer
def test_parameters_of_one_kind_alone(make, shapes):
    parameters = [Parameter(np.ones(shape)) for shape in shapes]
    make(parameters, decay_vectors=False).step()
    assert all((p.data == 1).all() == (p.data.ndim < 2) for p in parameters)


@each_optimizer
def test_the_gradient_is_multiplied_by_its_scale_before_all_else(make, rng):
    plain, scaled = several_parameters(rng), several_parameters(np.random.default_rng(12345))
    for p, q in zip(plain, scaled, strict=True):
        q.data[...] = p.data
        q.grad[...] = 1024 * p.grad
    for max_norm in (math.inf, 0.5):
        make(plain, max_norm=max_norm).step()
        make(scaled, max_norm=max_norm).step(grad_scale=1 / 1024)
        for p, q in zip(plain, scaled, strict=True):
            np.testing.assert_allclose(p.data, q.data, rtol=1e-6)


def test_long_gradients_are_shortened_to_max_norm():
    p, q = Parameter(np.zeros((1, 2))), Parameter(np.zeros(1))
    optimizer = SGD([p, q], lr=1.0, max_norm=2.0)
    p.grad[...], q.grad[...] = [[2.0, 3.0]], [6.0]  # of length 7
    optimizer.step()
    np.testing.assert_allclose(p.data, [[-4 / 7, -6 / 7]], rtol=1e-6)
    np.testing.assert_allclose(q.data, [-12 / 7], rtol=1e-6)
    optimizer.zero_grad()
    p.grad[...] = 0.5
    optimizer.step()  # of length 0.71, which stays
    np.testing.assert_allclose(p.data, [[-4 / 7 - 0.5, -6 / 7 - 0.5]], rtol=1e-6)


@each_optimizer
def test_a_state_written_into_the_views_goes_on_as_if_never_interrupted(make, rng):
    first = several_parameters(rng)
    optimizer = make(first)
    optimizer.step()
    second = [Parameter(p.data.copy()) for p in first]
    resumed = make(second)
    for name, arrays in optimizer.state().items():
        for array, view in zip(arrays, resumed.state()[name], strict=True):
            view[...] = array
    resumed.steps = getattr(optimizer, "steps", None)
    for p, q in zip(first, second, strict=True):
        q.grad[...] = p.grad
    optimizer.step()
    resumed.step()
    for p, q in zip(first, second, strict=True):
        np.testing.assert_array_equal(p.data, q.data)


def test_loading_a_state_dict_reaches_the_optimizer(rng):
    model, other = Linear(3, 2, rng=rng), Linear(3, 2, rng=rng)
    optimizer = SGD(model.parameters(), lr=1.0)
    model.load_state_dict(other.state_dict())
    model.weight.grad[...] = 1.0
    optimizer.step()
    np.testing.assert_array_equal(model.weight.data, other.weight.data - 1)


@pytest.mark.parametrize(
    "change",
    [lambda model: model.to(dtype=np.float64), lambda model: Adam(model.parameters())],
    ids=["cast", "another optimizer"],
)
@pytest.mark.parametrize("method", ["step", "zero_grad"])
def test_an_optimizer_whose_parameters_went_elsewhere_says_so(rng, change, method):
    model = Linear(3, 2, rng=rng).to(dtype=np.float32)
    optimizer = SGD(model.parameters(), lr=1.0)
    change(model)
    message = (
        r"^SGD: params\[0\], of shape \(3, 2\), was moved, cast or given to another optimizer after this one was made: "
        r"make the optimizer after model\.to, and one for each parameter$"
    )
    with pytest.raises(RuntimeError, match=message):
        getattr(optimizer, method)()


def test_parameters_that_cannot_share_an_array_are_refused():
    p, q = parameter(1.0, np.float32), parameter(1.0, np.float64)
    with pytest.raises(ValueError, match="on one device and of one dtype, got numpy float32, numpy float64"):
        SGD([p, q], lr=1.0)
    with pytest.raises(ValueError, match="Adam: params holds the same Parameter twice"):
        Adam([p, p])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SGD([p], lr=-1), r"SGD: lr must be at least 0 and below inf, got -1"),
        (lambda p: SGD([p], lr=1, momentum=1), r"SGD: momentum must be at least 0 and below 1, got 1"),
        (lambda p: SGD([p], lr=1, nesterov=True), "nesterov needs a momentum above 0"),
        (lambda p: Adam([p], betas=(0.9, 1.0)), r"Adam: betas\[1\] must be at least 0 and below 1, got 1.0"),
        (lambda p: Adam([p], lr=float("nan")), "Adam: lr must be .* got nan"),
        (lambda p: Adam([p], eps=0.0), r"Adam: eps must be above 0, got 0.0"),
        (lambda p: SGD([p], lr=1, max_norm=0), r"SGD: max_norm must be above 0, got 0"),
        (lambda p: SGD([p], lr=math.inf), r"SGD: lr must be at least 0 and below inf, got inf"),
        (lambda p: Adam([p], eps=float("nan")), r"Adam: eps must be above 0, got nan"),
        (lambda p: Adam([]), "Adam: params is empty"),
        (lambda p: Muon([p], 0.1, momentum=0), "Muon: momentum must be above 0, got 0"),
        (lambda p: Muon([p], 0.1, filter_lr=-1), "Muon: filter_lr must be at least 0 and below inf, got -1"),
        (lambda p: Muon([p], 0.1, filter_momentum=1), "Muon: filter_momentum must be at least 0 and below 1, got 1"),
    ],
)
def test_values_outside_their_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(parameter(1.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SGD([p], lr=None), "SGD: lr must be a number, got None"),
        (lambda p: SGD([p], lr=1, momentum=None), "SGD: momentum must be a number, got None"),
        (lambda p: SGD([p], lr=1, weight_decay="0.1"), "SGD: weight_decay must be a number, got '0.1'"),
        (lambda p: SGD([p], lr=1, max_norm=None), "SGD: max_norm must be a number, got None"),
        (lambda p: Adam([p], lr=[0.1]), r"Adam: lr must be a number, got \[0.1\]"),
        (lambda p: Adam([p], eps=None), "Adam: eps must be a number, got None"),
        (lambda p: Adam([p], betas=0.9), "Adam: betas must be two numbers, got 0.9"),
        (lambda p: Adam([p], betas=(0.9,)), r"Adam: betas must be two numbers, got \(0.9,\)"),
        (lambda p: Adam([p], betas=(0.9, None)), r"Adam: betas\[1\] must be a number, got None"),
        (lambda p: WeightAverage(SGD([p], lr=1), None), "WeightAverage: decay must be a number, got None"),
        (lambda p: Adam([np.zeros(3)]), r"Adam: params must be Parameters, as in model\.parameters\(\), got ndarray"),
        (lambda p: Adam(p), r"Adam: params must be a list, as model\.parameters\(\) is, got Parameter"),
        (lambda p: SGD(None, lr=1), r"SGD: params must be a list, as model\.parameters\(\) is, got NoneType"),
    ],
)
def test_what_is_no_number_and_no_parameter_is_named(make, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        make(parameter(1.0))


@pytest.mark.parametrize("lr", [1, np.float32(0.5), np.int64(1), np.float64(0.5)])
def test_numbers_of_numpy_are_numbers(lr):
    p = parameter(2.0, np.float32)
    p.grad[:] = 1.0
    SGD([p], lr=lr, momentum=np.float32(0.5)).step()
    assert p.data.dtype == np.float32
    assert p.data[0] == 2 - lr


def test_an_eps_that_is_0_in_the_dtype_of_the_parameters_is_refused():
    with pytest.raises(
        ValueError, match="Adam: eps must be above 0 in the float32 of the parameters, where 1e-46 is 0"
    ):
        Adam([parameter(1.0, np.float32)], eps=1e-46)
    for dtype, eps in ((np.float32, 1e-44), (np.float64, 1e-46)):
        p = parameter(1.0, dtype)
        Adam([p], eps=eps).step()  # a gradient of 0
        assert p.data[0] == 1


def replace_grad(w):
    w.grad = w.grad + 1


def lose_grad(w):
    w.grad = None


def replace_data(w):
    w.data = w.data - 1


@pytest.mark.parametrize("method", ["step", "zero_grad"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            replace_grad,
            r"the grad of params\[1\], .* was replaced: add into it in place, w\.grad \+= g or w\.grad\[\.\.\.\] = g",
        ),
        (lose_grad, r"the grad of params\[1\], .* was replaced: add into it in place"),
        (replace_data, r"the data of params\[1\], of shape \(2,\), was replaced: write into it, w\.data\[\.\.\.\] = x"),
    ],
)
def test_an_array_that_was_replaced_is_told_from_a_parameter_that_was_moved(rng, change, message, method):
    model = Linear(3, 2, rng=rng)
    optimizer = SGD(model.parameters(), lr=1.0)
    change(model.bias)
    with pytest.raises(RuntimeError, match="SGD: " + message):
        getattr(optimizer, method)()


def test_an_average_of_three_steps_by_hand():
    p = parameter(8.0)
    optimizer = SGD([p], lr=1.0)
    average = WeightAverage(optimizer, decay=0.2)  # the first update forgets faster: 2/11, then 3/12 is above 0.2
    p.grad[:] = 11.0
    optimizer.step()
    average.update()
    np.testing.assert_allclose(average.state()["average"][0], 2 / 11 * 8 + 9 / 11 * -3)  # -1
    optimizer.step()
    average.update()
    np.testing.assert_allclose(average.state()["average"][0], 0.2 * -1 + 0.8 * -14)  # -11.4
    average.swap()
    np.testing.assert_allclose([p.data[0], average.state()["average"][0][0]], [-11.4, -14])
    average.swap()
    np.testing.assert_allclose([p.data[0], average.state()["average"][0][0]], [-14, -11.4])


def test_an_average_of_several_parameters(rng):
    parameters = several_parameters(rng)
    optimizer = Adam(parameters, lr=0.1)
    average, expected = WeightAverage(optimizer, decay=0.9), [p.data.astype(np.float64) for p in parameters]
    for t in range(1, 200):
        optimizer.step()
        average.update()
        decay = min(0.9, (1 + t) / (10 + t))
        expected = [decay * e + (1 - decay) * p.data for e, p in zip(expected, parameters, strict=True)]
    for view, e in zip(average.state()["average"], expected, strict=True):
        assert view.dtype == np.float32
        np.testing.assert_allclose(view, e, rtol=1e-4, atol=1e-6)


def test_an_average_refuses_a_decay_that_never_forgets_and_weights_that_went_elsewhere():
    p = parameter(1.0)
    optimizer = SGD([p], lr=1.0)
    with pytest.raises(ValueError, match=r"WeightAverage: decay must be at least 0 and below 1, got 1\.0"):
        WeightAverage(optimizer, 1.0)
    average = WeightAverage(optimizer, 0.5)
    SGD([p], lr=1.0)
    with pytest.raises(RuntimeError, match="was moved, cast or given to another optimizer"):
        average.swap()


def forward_and_backward(model, optimizer, x):
    optimizer.zero_grad()
    model.backward(model(x) - 1)


COPY = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda things: pickle.loads(pickle.dumps(things)),
    "deepcopy, the optimizer first": lambda things: copy.deepcopy(things[::-1])[::-1],
    "pickle, the optimizer first": lambda things: pickle.loads(pickle.dumps(things[::-1]))[::-1],
}


@pytest.mark.parametrize("copied", COPY.values(), ids=COPY)
@each_optimizer
def test_a_copy_of_model_optimizer_and_average_trains_on_with_the_same_bits(make, copied, rng):
    model, x = Linear(3, 2, rng=rng), rng.standard_normal((5, 3)).astype(np.float32)
    optimizer = make(model.parameters())
    things = model, optimizer, WeightAverage(optimizer, 0.9)

    def train(model, optimizer, average):
        forward_and_backward(model, optimizer, x)
        optimizer.step()
        average.update()

    train(*things)
    before = model.state_dict()
    others = copied(things)
    for _ in range(2):
        train(*others)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])  # what the copy does does not reach the original
    for _ in range(2):
        train(*things)
    other, its_optimizer, its_average = others
    for name, array in model.state_dict().items():
        assert (array != before[name]).all()
        np.testing.assert_array_equal(other.state_dict()[name], array)
    for ours, theirs in ((optimizer, its_optimizer), (things[2], its_average)):
        for name, arrays in ours.state().items():
            for array, its_array in zip(arrays, theirs.state()[name], strict=True):
                np.testing.assert_array_equal(its_array, array)
    assert its_average.flat is its_optimizer.flat
    for p, q in zip(other.parameters(), its_optimizer.params, strict=True):
        assert p is q
        assert np.shares_memory(p.data, its_optimizer.flat.data)
        assert np.shares_memory(p.grad, its_optimizer.flat.grad)
        assert not np.shares_memory(p.data, optimizer.flat.data)


@each_optimizer
def test_a_copy_of_the_optimizer_or_of_the_model_alone_leaves_the_other_where_it_is(make, rng):
    model, x = Linear(3, 2, rng=rng), rng.standard_normal((5, 3)).astype(np.float32)
    optimizer = make(model.parameters())
    forward_and_backward(model, optimizer, x)
    before = model.state_dict()
    copy.deepcopy(optimizer).step()
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data += 1
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    optimizer.step()
    assert (model.weight.data != before["weight"].T).all()


def test_an_optimizer_whose_parameters_went_elsewhere_is_not_copied():
    p = parameter(1.0)
    optimizer = SGD([p], lr=1.0)
    Adam([p])
    with pytest.raises(RuntimeError, match=r"SGD: params\[0\], of shape \(1,\), was moved, cast or given to another"):
        copy.deepcopy(optimizer)


def test_an_average_of_what_is_no_optimizer_is_named():
    with pytest.raises(TypeError, match="WeightAverage: expected an optimizer, whose parameters count, got a Linear"):
        WeightAverage(Linear(2, 2), 0.9)
