"""The gradient check passes what is right and names what is wrong, the errors that people really make among them."""

import subprocess
import sys

import numpy as np
import pytest

from minires import BatchNorm2d, Conv2d, Linear, Module, ReLU, check_gradients


class Square(Module):
    def forward(self, x):
        self._keep(x)
        return x * x

    def backward(self, dout):
        (x,) = self._take_cache()
        return 2 * x * dout


def test_the_example_of_the_docstring_passes(rng):
    errors = check_gradients(Square(), rng.standard_normal((4, 5)))
    assert list(errors) == ["x"]
    assert errors["x"] < 1e-6


def test_a_factor_of_two_is_found(rng):
    class Half(Square):
        def backward(self, dout):
            return super().backward(dout) / 2

    with pytest.raises(AssertionError, match=r"Half: the gradient of x is wrong.*relative error 0\.5, tolerance 1e-06"):
        check_gradients(Half(), rng.standard_normal((4, 5)))


def test_one_wrong_element_among_many_is_found(rng):
    class OneWrong(Square):
        def backward(self, dout):
            dx = super().backward(dout)
            dx[3, 4] *= 1.01
            return dx

    with pytest.raises(AssertionError, match="the gradient of x is wrong"):
        check_gradients(OneWrong(), rng.standard_normal((40, 50)))


def test_a_batch_norm_that_forgets_the_statistics_is_found(rng):
    class Forgetful(BatchNorm2d):
        def backward(self, dout):
            _, _, _, var, _ = self._cache
            super().backward(dout)
            return dout * self.weight.data / np.sqrt(var + self.eps)

    with pytest.raises(AssertionError, match="the gradient of x is wrong"):
        check_gradients(Forgetful(3), rng.standard_normal((4, 5, 5, 3)))


def test_a_wrong_parameter_is_named(rng):
    class NoBias(Linear):
        def backward(self, dout):
            dx = super().backward(dout)
            self.bias.grad[:] = 0
            return dx

    with pytest.raises(AssertionError, match="NoBias: the gradient of bias is wrong") as error:
        check_gradients(NoBias(4, 3), rng.standard_normal((5, 4)))
    assert "of weight" not in str(error.value)


def test_writing_into_x_or_dout_is_found(rng):
    class WritesX(Square):
        def forward(self, x):
            out = super().forward(x.copy())
            x *= 1.5
            return out

    class WritesDout(Square):
        def backward(self, dout):
            dx = super().backward(dout)
            dout *= 0
            return dx

    with pytest.raises(AssertionError, match="WritesX: forward or backward changed x"):
        check_gradients(WritesX(), rng.standard_normal(3))
    with pytest.raises(AssertionError, match="WritesDout: backward changed dout"):
        check_gradients(WritesDout(), rng.standard_normal(3))


def test_a_gradient_of_the_wrong_shape_is_named(rng):
    class Flat(Square):
        def backward(self, dout):
            return super().backward(dout).reshape(-1)

    with pytest.raises(AssertionError, match=r"Flat: dx has shape \(6,\), x has \(2, 3\)"):
        check_gradients(Flat(), rng.standard_normal((2, 3)))


def test_the_layer_is_left_alone(rng):
    layer = Conv2d(3, 4, 3, rng=rng).eval()
    before = layer.state_dict()
    check_gradients(layer, rng.standard_normal((2, 5, 5, 3)).astype(np.float32))
    assert layer.weight.data.dtype == np.float32
    assert (layer.weight.grad == 0).all()
    assert not layer.training
    np.testing.assert_array_equal(layer.state_dict()["weight"], before["weight"])


def test_an_input_from_the_seed_of_the_check_is_not_its_own_dout():
    check_gradients(BatchNorm2d(6), np.random.default_rng(0).standard_normal((4, 8, 8, 6)))


def test_setting_the_gradient_instead_of_adding_is_found(rng):
    class Sets(Linear):
        def backward(self, dout):
            self.weight.grad[:] = 0
            return super().backward(dout)

    with pytest.raises(AssertionError, match="Sets: backward sets the gradient of weight; it should add to it"):
        check_gradients(Sets(4, 3), rng.standard_normal((5, 4)))


def test_a_gradient_that_is_not_finite_is_not_taken_for_one_that_is_set(rng):
    class Nan(Linear):
        def backward(self, dout):
            dx = super().backward(dout)
            self.weight.grad += np.nan
            return dx

    with pytest.raises(AssertionError, match=r"the gradient of weight is wrong: .* the backward says nan"):
        check_gradients(Nan(3, 2), rng.standard_normal((4, 3)))


def test_a_forward_that_returns_a_number_is_checked_and_one_that_returns_nothing_is_named(rng):
    class Total(Square):
        def forward(self, x):
            return float(np.sum(super().forward(x)))

    class Nothing(Square):
        def forward(self, x):
            super().forward(x)

    assert check_gradients(Total(), rng.standard_normal((4, 5)))["x"] < 1e-6
    with pytest.raises(AssertionError, match="Nothing: forward should return an array, and returned a NoneType"):
        check_gradients(Nothing(), rng.standard_normal((4, 5)))


def test_an_input_on_a_gpu_is_taken(strict_gpu, rng):
    check_gradients(Square(), strict_gpu.asarray(rng.standard_normal((4, 5))))


@pytest.mark.parametrize("dx", [None, ()])
def test_a_backward_that_returns_no_array_is_named(rng, dx):
    class Forgetful(Square):
        def backward(self, dout):
            super().backward(dout)
            return dx

    with pytest.raises(AssertionError, match="Forgetful: backward should return dx, an array, and returned a "):
        check_gradients(Forgetful(), rng.standard_normal((4, 5)))


def test_gradients_from_before_do_not_matter(rng):
    layer = Linear(4, 3, rng=rng)
    for parameter in layer.parameters():
        parameter.grad += 7
    check_gradients(layer, rng.standard_normal((5, 4)))


def test_an_input_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="x holds values that are not finite"):
        check_gradients(Square(), np.array([1.0, np.nan]))


def test_a_wrong_backward_is_refused_under_python_without_asserts():
    code = """
import numpy as np
from minires import Linear, check_gradients

class Sets(Linear):
    def backward(self, dout):
        self.weight.grad[:] = 0
        return super().backward(dout)

class NoGradient(Linear):
    def backward(self, dout):
        return 0 * super().backward(dout)

class WritesDout(Linear):
    def backward(self, dout):
        dx = super().backward(dout)
        dout *= 0
        return dx

for layer in (Sets(4, 3), NoGradient(4, 3), WritesDout(4, 3)):
    try:
        check_gradients(layer, np.ones((5, 4)))
    except AssertionError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert lines[0] == "Sets: backward sets the gradient of weight; it should add to it"
    assert lines[1].startswith("NoGradient: the gradient of x is wrong")
    assert lines[2] == "WritesDout: backward changed dout, which belongs to the caller"


def test_an_input_without_numbers_is_refused():
    with pytest.raises(ValueError, match=r"x must hold numbers, got \(0, 3\): there would be nothing to check"):
        check_gradients(ReLU(), np.zeros((0, 3)))
