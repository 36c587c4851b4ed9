"""Evaluation counts every image once, batch size or not, and leaves the model as it was."""

import numpy as np
import pytest

from minires import ResNet
from minires.cifar10 import MEAN, STD, load_sample
from minires.evaluate import confusion_matrix, evaluate, predict_logits


def test_the_batch_size_does_not_matter_and_the_mode_is_restored():
    data, model = load_sample(), ResNet((1,), (4,))
    images, labels = data.test_images[:50], data.test_labels[:50]
    logits = predict_logits(model, images, MEAN, STD, batch_size=50)
    np.testing.assert_allclose(predict_logits(model, images, MEAN, STD, batch_size=7), logits, rtol=1e-4, atol=1e-5)
    assert model.training
    model.bn1.eval()
    predict_logits(model, images[:2], MEAN, STD)
    assert model.training
    assert not model.bn1.training
    model.bn1.train()
    loss, accuracy = evaluate(model, images, labels, MEAN, STD, batch_size=7)
    assert accuracy == (logits.argmax(axis=1) == labels).mean()
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert loss == pytest.approx(-np.log(probabilities[np.arange(50), labels]).mean(), rel=1e-5)


def test_confusion_by_hand():
    matrix = confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 2, 1, 1]), 3)
    np.testing.assert_array_equal(matrix, [[1, 0, 1], [0, 1, 0], [0, 1, 0]])
