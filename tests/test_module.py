"""The contract of a module: names, modes, state, and a backward that needs its forward."""

import collections
import pickle

import numpy as np
import pytest

from minires import (
    BatchNorm2d,
    Bias2d,
    Buffer,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool2d,
    Linear,
    MaxPool2d,
    Module,
    Parameter,
    ReLU,
    Sequential,
)

LAYERS = [
    (lambda rng: ReLU(), (2, 5, 5, 3)),
    (lambda rng: Dropout(0.4, rng=rng), (2, 5, 5, 3)),
    (lambda rng: Linear(3, 4, rng=rng), (2, 3)),
    (lambda rng: GlobalAvgPool2d(), (2, 5, 5, 3)),
    (lambda rng: Flatten(), (2, 5, 5, 3)),
    (lambda rng: MaxPool2d(3, stride=2), (2, 5, 5, 3)),
    (lambda rng: BatchNorm2d(3), (2, 5, 5, 3)),
    (lambda rng: BatchNorm2d(3, relu=True), (2, 5, 5, 3)),
    (lambda rng: Bias2d(3, relu=True), (2, 5, 5, 3)),
    (lambda rng: Conv2d(3, 4, 3, padding=1, rng=rng), (2, 5, 5, 3)),
    (lambda rng: Sequential(Conv2d(3, 4, 3, rng=rng), ReLU()), (2, 5, 5, 3)),
]
each_layer = pytest.mark.parametrize(("make", "shape"), LAYERS, ids=[type(make(0)).__name__ for make, _ in LAYERS])


@each_layer
def test_float32_stays_float32(rng, make, shape):
    layer = make(rng)
    out = layer(rng.standard_normal(shape).astype(np.float32))
    assert out.dtype == np.float32
    assert layer.backward(np.ones_like(out)).dtype == np.float32
    for _, value in layer.named_state():
        assert value.data.dtype == np.float32
    for parameter in layer.parameters():
        assert parameter.grad.dtype == np.float32


@each_layer
def test_x_and_dout_are_left_as_they_were(rng, make, shape):
    layer = make(rng)
    x = rng.standard_normal(shape).astype(np.float32)
    x_before = x.copy()
    out = layer(x)
    dout = rng.standard_normal(out.shape).astype(np.float32)
    dout_before = dout.copy()
    layer.backward(dout)
    np.testing.assert_array_equal(x, x_before)
    np.testing.assert_array_equal(dout, dout_before)


@each_layer
def test_one_forward_one_backward(rng, make, shape):
    layer = make(rng)
    x = rng.standard_normal(shape).astype(np.float32)
    dout = np.ones_like(layer(x))
    layer.backward(dout)
    with pytest.raises(RuntimeError, match="backward: called twice after one forward; a layer that"):
        layer.backward(dout)
    layer.train()
    with pytest.raises(RuntimeError, match="backward: call forward in training mode first"):
        layer.backward(dout)
    layer.eval()(x)
    with pytest.raises(RuntimeError, match="backward: call forward in training mode first"):
        layer.backward(dout)


@each_layer
def test_gradients_add_up(rng, make, shape):
    layer = make(rng)
    layer.to(dtype=np.float64)
    x = rng.standard_normal(shape)
    dout = rng.standard_normal(layer(x).shape)
    layer.backward(dout)
    once = [parameter.grad.copy() for parameter in layer.parameters()]
    layer(x)
    layer.backward(dout)
    for parameter, grad in zip(layer.parameters(), once, strict=True):
        np.testing.assert_allclose(parameter.grad, 2 * grad)
        assert np.abs(grad).max() > 0


def test_nothing_is_kept_in_evaluation(rng):
    layer = Sequential(Conv2d(3, 4, 3, rng=rng), BatchNorm2d(4, relu=True), Dropout(rng=rng)).eval()
    layer(np.ones((2, 5, 5, 3), np.float32))
    assert all(module._cache is None for module in layer.modules())


def test_a_change_of_mode_drops_what_was_kept(rng):
    layer = Linear(3, 2, rng=rng)
    layer(np.ones((4, 3), np.float32))
    layer.eval().train()
    with pytest.raises(RuntimeError, match="call forward in training mode first"):
        layer.backward(np.ones((4, 2), np.float32))


@pytest.mark.parametrize("part", [[ReLU()], ReLU, 3])
def test_a_sequential_takes_modules_only(part):
    with pytest.raises(TypeError, match=r"takes modules one after the other, got .* at position 1"):
        Sequential(ReLU(), part)


class Nested(Module):
    def __init__(self):
        self.scale = Parameter(np.ones(2))
        self.branches = [Linear(2, 3), Sequential(Linear(3, 2, bias=False))]
        self.shifts = [Parameter(np.zeros(4)), Buffer(np.zeros(5))]
        self.note = "not a part"


class Deeper(Module):
    """Parts in a dict, in lists of lists, and in both."""

    def __init__(self):
        self.branches = {"left": Linear(2, 3), "right": Linear(2, 3, bias=False)}
        self.blocks = [(Linear(3, 4, bias=False), [Dropout(), Linear(4, 5, bias=False)])]
        self.tables = {"scales": [Parameter(np.zeros(6))], 7: {"mean": Buffer(np.zeros(7))}, "title": "none"}


def test_a_part_with_two_names_counts_once_by_its_first():
    class Twice(Module):
        def __init__(self):
            self.conv, self.relu = Linear(3, 4, rng=0), ReLU()
            self.layers, self.whole = [self.conv, self.relu], self

    model = Twice()
    assert [name for name, _ in model.named_modules()] == ["", "conv", "relu"]
    assert list(model.state_dict()) == ["conv.weight", "conv.bias"]
    assert model.num_parameters() == 16


def test_integers_stay_integers_in_another_dtype():
    model = Sequential(Linear(3, 4, rng=0))
    model.index = Buffer(np.arange(4))
    model.to(dtype="float64")
    assert (model.index.data.dtype, model.layers()[0].weight.grad.dtype) == (np.int64, np.float64)


def test_a_parameter_that_is_kept_for_backward_is_there_once():
    class Keeps(Module):
        def __init__(self):
            self.weight = Parameter(np.ones(3))

        def forward(self, x):
            self._keep(x, self.weight)
            return x * self.weight.data

    module = Keeps()
    module(np.ones(3))
    assert [name for name, _ in module.named_parameters()] == list(module.state_dict()) == ["weight"]


def test_names_are_dotted_paths_through_attributes_lists_and_sequentials():
    assert [name for name, _ in Nested().named_parameters()] == [
        "scale",
        "shifts.0",
        "branches.0.weight",
        "branches.0.bias",
        "branches.1.0.weight",
    ]
    assert Nested().num_parameters() == 2 + 4 + 6 + 3 + 6
    assert "shifts.1" in Nested().state_dict()


def test_parts_in_dicts_and_nested_lists_count_with_dotted_names(strict_gpu):
    model = Deeper()
    expected = {
        "tables.scales.0": 6,
        "tables.7.mean": 7,
        "branches.left.weight": 6,
        "branches.left.bias": 3,
        "branches.right.weight": 6,
        "blocks.0.0.weight": 12,
        "blocks.0.1.1.weight": 20,
    }
    assert {name: array.size for name, array in model.state_dict().items()} == expected
    assert model.num_parameters() == sum(expected.values()) - 7
    assert not any(module.training for module in model.eval().modules())
    assert len(model.modules()) == 6
    values = {name: np.full_like(array, 3) for name, array in model.state_dict().items()}
    model.load_state_dict(values)
    assert (model.branches["right"].weight.data == 3).all()
    model.to("gpu")
    assert type(model.blocks[0][1][1].weight.data) is strict_gpu.StrictArray


def test_train_and_eval_reach_every_part_and_return_self():
    model = Nested()
    assert model.eval() is model
    assert not any(module.training for module in model.modules())
    assert model.train() is model
    assert all(module.training for module in model.modules())


def test_an_empty_sequential_is_the_identity(rng):
    x = rng.standard_normal((2, 3))
    assert Sequential()(x) is x
    assert Sequential().backward(x) is x


def test_state_has_the_shapes_of_pytorch_and_is_a_copy(rng):
    model = Sequential(Conv2d(3, 5, 2, rng=rng), BatchNorm2d(5), Linear(5, 4, rng=rng))
    state = model.state_dict()
    assert {name: array.shape for name, array in state.items()} == {
        "0.weight": (5, 3, 2, 2),
        "0.bias": (5,),
        "1.weight": (5,),
        "1.bias": (5,),
        "1.running_mean": (5,),
        "1.running_var": (5,),
        "2.weight": (4, 5),
        "2.bias": (4,),
    }
    assert all(array.flags.c_contiguous for array in state.values())
    state["1.weight"][:] = 7
    assert (model.state_dict()["1.weight"] == 1).all()


def test_state_goes_round(rng):
    def make(seed):
        return Sequential(Conv2d(3, 5, 2, rng=seed), BatchNorm2d(5), GlobalAvgPool2d(), Linear(5, 4, rng=seed))

    x = rng.standard_normal((2, 4, 4, 3)).astype(np.float32)
    model, other = make(1), make(2)
    model(x)
    arrays = [value.data for _, value in other.named_state()]
    other.load_state_dict(model.state_dict() | {"1.num_batches_tracked": np.array(3)})
    np.testing.assert_array_equal(other.eval()(x), model.eval()(x))
    for array, (_, value) in zip(arrays, other.named_state(), strict=True):
        assert value.data is array


def test_a_state_that_does_not_fit_is_listed_and_changes_nothing():
    model = Linear(3, 2, rng=0)
    before = model.state_dict()
    with pytest.raises(ValueError, match="does not fit this Linear") as error:
        model.load_state_dict({"weight": np.zeros((3, 2)), "gain": np.zeros(2)})
    for part in ("missing bias", "unexpected gain", r"weight has shape (3, 2), expected (2, 3)"):
        assert part in str(error.value)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_to_keeps_the_parameters_and_replaces_their_arrays(strict_gpu):
    model = Linear(3, 2, rng=0)
    parameters = model.parameters()
    assert model.to(dtype=np.float64) is model
    assert model.weight.data.dtype == model.weight.grad.dtype == np.float64
    model.to("gpu")
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert type(model.weight.data) is type(model.weight.grad) is strict_gpu.StrictArray
    assert type(model.to("cpu").weight.data) is np.ndarray


def test_parameters_in_16_bits_are_refused():
    with pytest.raises(ValueError, match="parameters are float32 or float64, got float16"):
        Linear(3, 2).to(dtype="float16")


@each_layer
def test_a_gradient_of_another_dtype_is_refused(rng, make, shape):
    """A float64 convolution given a float32 gradient would compute in float32 without a word."""
    layer = make(rng).to(dtype=np.float64)
    dout = np.ones_like(layer(rng.standard_normal(shape)), np.float32)
    with pytest.raises(ValueError, match="gradient in the dtype of its output, float64, got float32"):
        layer.backward(dout)


def test_a_list_in_place_of_an_array_is_named():
    with pytest.raises(TypeError, match=r"ReLU expects an array, got a list: np\.array makes one"):
        ReLU()([[1.0, 2.0]])


@pytest.mark.parametrize(
    "array", [np.array([None, None, None]), np.zeros(3, complex), np.zeros(3, "V2"), np.array(["a", "b", "c"])]
)
def test_a_state_of_what_are_no_real_numbers_changes_nothing(array):
    model = Linear(2, 3, rng=0)
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"bias has dtype .*, expected real numbers, such as float32"):
        model.load_state_dict({"weight": np.zeros((3, 2)), "bias": array})
    for name, kept in model.state_dict().items():
        np.testing.assert_array_equal(kept, before[name])


@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool", "longdouble"])
def test_parameters_are_no_integers(dtype):
    with pytest.raises(ValueError, match=f"parameters are float32 or float64, got {np.dtype(dtype)}"):
        Linear(3, 2).to(dtype=dtype)


@pytest.mark.parametrize("x", [[[1.0, 2.0]], 1.0, None, memoryview(b"12")])
def test_what_is_no_array_is_named_in_forward_and_backward(x):
    message = rf"expects an array, got a {type(x).__name__}: np\.array makes one"
    layer = ReLU()
    with pytest.raises(TypeError, match=f"^ReLU {message}"):
        layer(x)
    layer(np.ones((1, 2)))
    with pytest.raises(TypeError, match=rf"^ReLU\.backward {message}"):
        layer.backward(x)


def test_a_state_whose_numbers_are_too_large_changes_nothing():
    model = Linear(2, 3, rng=0)
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"bias holds 1e\+300, too large for float32"):
        model.load_state_dict({"weight": np.zeros((3, 2)), "bias": np.array([0, -1e300, 0])})
    for name, kept in model.state_dict().items():
        np.testing.assert_array_equal(kept, before[name])
    model.load_state_dict({"weight": np.zeros((3, 2)), "bias": np.array([0, np.inf, np.nan])})  # as they were saved
    assert model.bias.data[1] == np.inf


@pytest.mark.parametrize("state", [None, "best.safetensors", ({}, {})])
def test_what_is_no_state_is_named(state):
    with pytest.raises(TypeError, match=f"expects a dict of arrays by name, got a {type(state).__name__}"):
        Linear(2, 3).load_state_dict(state)


def test_layers_in_a_deque_count_and_in_a_set_are_refused():
    class Network(Module):
        def __init__(self, parts):
            self.parts = parts

    layers = [Linear(2, 3, rng=0), Linear(3, 1, rng=0)]
    assert Network(collections.deque(layers)).num_parameters() == 13
    for parts in (set(layers), frozenset(layers), [{"a": set(layers)}]):
        with pytest.raises(TypeError, match=r"parts.* is a set, whose modules or parameters have no order: make it"):
            Network(parts).parameters()
    assert Network({"a name", 1}).parameters() == []


def test_a_module_that_was_pickled_still_says_that_it_was_used_twice():
    layer, x = ReLU(), np.ones((2, 3))
    layer.backward(layer(x))
    with pytest.raises(RuntimeError, match=r"ReLU\.backward: called twice after one forward"):
        pickle.loads(pickle.dumps(layer)).backward(x)


def test_a_module_of_ones_own_may_keep_an_array_without_a_tuple():
    class Square(Module):
        def forward(self, x):
            self._cache = x
            return x * x

        def backward(self, dout):
            return 2 * self._take_cache() * dout

    layer = Square()
    layer(np.array([1.0, 3.0]))
    np.testing.assert_array_equal(layer.backward(np.array([1.0, 1.0])), [2.0, 6.0])
    with pytest.raises(RuntimeError, match="called twice after one forward"):
        layer.backward(np.array([1.0, 1.0]))
