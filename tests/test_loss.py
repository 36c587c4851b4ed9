"""The loss as a module would use it: gradients, scaling, and labels that do not fit."""

import re

import numpy as np
import pytest

from minires import SoftmaxCrossEntropy, check_gradients


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_gradient_agrees_with_finite_differences(rng, label_smoothing):
    labels = rng.integers(0, 7, 5)
    check_gradients(SoftmaxCrossEntropy(label_smoothing), 3 * rng.standard_normal((5, 7)), labels)


def test_equal_scores_cost_log_of_the_number_of_classes():
    loss = SoftmaxCrossEntropy()(np.zeros((3, 10), np.float32), np.array([1, 2, 3]))
    assert loss.dtype == np.float32
    np.testing.assert_allclose(loss, np.log(10), rtol=1e-6)


def test_float32_stays_float32():
    loss = SoftmaxCrossEntropy(0.1)
    assert loss(np.zeros((3, 10), np.float32), np.array([1, 2, 3])).dtype == np.float32
    assert loss.backward().dtype == np.float32


def test_one_forward_one_backward():
    loss = SoftmaxCrossEntropy()
    with pytest.raises(RuntimeError, match="call forward first"):
        loss.backward()
    loss(np.zeros((2, 3)), np.array([0, 1]))
    loss.backward()
    with pytest.raises(RuntimeError, match="call forward first"):
        loss.backward()


def test_a_numpy_number_does_not_promote():
    loss = SoftmaxCrossEntropy(np.float64(0.1))
    assert loss(np.zeros((3, 10), np.float32), np.array([1, 2, 3])).dtype == np.float32


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 10]), "labels from 0 to 9, got 0 to 10"),
        (np.array([-1, 3]), "labels from 0 to 9, got -1 to 3"),
        (np.array([0, 1, 2]), r"got \(2, 10\) and \(3,\)"),
        (np.array([0.0, 1.0]), "labels that are integers, got float64"),
        ([0, 1], r"expects labels as an array \(N,\), got list"),
        (3, r"expects labels as an array \(N,\), got int"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxCrossEntropy()(np.zeros((2, 10)), labels)


@pytest.mark.parametrize("dloss", [np.ones(10, np.float32), np.ones((4, 1)), np.ones((3, 4, 10)), np.ones(1)])
def test_a_dloss_that_is_no_number_is_refused(dloss):
    loss = SoftmaxCrossEntropy()
    loss(np.zeros((4, 10), np.float32), np.arange(4))
    with pytest.raises(ValueError, match=re.escape(f"dloss must be a number, got an array of {dloss.shape}")):
        loss.backward(dloss)


def test_a_dloss_of_numpy_does_not_promote():
    for dloss in (np.float64(2), np.array(2.0)):
        loss = SoftmaxCrossEntropy()
        loss(np.zeros((4, 10), np.float32), np.arange(4))
        assert loss.backward(dloss).dtype == np.float32


def test_label_smoothing_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"label_smoothing must be from 0 to 1, got 1\.5"):
        SoftmaxCrossEntropy(1.5)


def test_a_batch_without_images_is_named():
    with pytest.raises(ValueError, match=r"expects at least one image, got logits \(0, 10\)"):
        SoftmaxCrossEntropy()(np.zeros((0, 10), np.float32), np.zeros(0, int))


@pytest.mark.parametrize("smoothing", [None, "0.1"])
def test_a_smoothing_that_is_no_number_is_named(smoothing):
    with pytest.raises(TypeError, match=f"label_smoothing must be a number, got {smoothing!r}"):
        SoftmaxCrossEntropy(smoothing)


def test_logits_in_a_list_are_named():
    with pytest.raises(TypeError, match="SoftmaxCrossEntropy expects an array, got a list"):
        SoftmaxCrossEntropy()([[1.0, 2.0]], np.array([0]))


def test_a_forward_of_ones_own_is_called():
    class Doubled(SoftmaxCrossEntropy):
        def forward(self, logits, labels):
            return 2 * super().forward(logits, labels)

    logits, labels = np.zeros((2, 10)), np.zeros(2, int)
    assert Doubled()(logits, labels) == 2 * SoftmaxCrossEntropy()(logits, labels)
