"""Evaluation counts every image once, batch size or not, and leaves the model as it was."""

import numpy as np
import pytest

from minires import Conv2d, GlobalAvgPool2d, ResNet, Sequential, fold_batch_norm, summary
from minires.augment import normalize
from minires.cifar10 import MEAN, STD, load_sample
from minires.evaluation import confusion_matrix, evaluate, measure_statistics, predict_logits
from minires.layers import BatchNorm2d, Dropout, Flatten
from minires.module import Buffer


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


def test_a_network_in_float64_is_evaluated_in_float64():
    images, labels = load_sample().test_images[:20], load_sample().test_labels[:20]
    model = ResNet((1,), (4,))
    loss, accuracy = evaluate(model, images, labels, MEAN, STD)
    loss64, accuracy64 = evaluate(model.to(dtype="float64"), images, labels, MEAN, STD)
    assert predict_logits(model, images, MEAN, STD).dtype == np.float64
    assert accuracy64 == accuracy
    assert abs(loss64 - loss) < 1e-6


def test_confusion_by_hand():
    matrix = confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 2, 1, 1]), 3)
    np.testing.assert_array_equal(matrix, [[1, 0, 1], [0, 1, 0], [0, 1, 0]])


def test_test_time_augmentation_is_the_mean_over_an_image_and_its_mirror_image():
    data, model = load_sample(), ResNet((1,), (4,))
    images, labels = data.test_images[:30], data.test_labels[:30]
    plain, mirrored = (predict_logits(model, part, MEAN, STD) for part in (images, images[:, :, ::-1]))
    logits = predict_logits(model, images, MEAN, STD, batch_size=7, tta=True)
    np.testing.assert_allclose(logits, (plain + mirrored) / 2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(predict_logits(model, images[:, :, ::-1], MEAN, STD, tta=True), logits, atol=1e-5)
    assert evaluate(model, images, labels, MEAN, STD, tta=True)[1] == (logits.argmax(axis=1) == labels).mean()


def test_statistics_are_the_means_over_the_batches_by_hand():
    norm, dropout = BatchNorm2d(1), Dropout(0.5)
    model = Sequential(norm, dropout)
    dropout.eval()
    batches = [np.array([value, value + 2], np.float32).reshape(1, 1, 2, 1) for value in (0, 4, 11)]
    measure_statistics(model, iter(batches))
    np.testing.assert_allclose(norm.running_mean.data, [6.0])  # of 1, 5 and 12
    np.testing.assert_allclose(norm.running_var.data, [2.0])  # each batch's, unbiased
    assert norm.running_mean.data.dtype == np.float32
    assert (norm.momentum, norm._cache) == (0.1, None)
    assert model.training
    assert norm.training
    assert not dropout.training


def test_measuring_statistics_leaves_training_as_it_was():
    """Weights, modes and the dropout's place in its sequence of masks stay; evaluation sees the new statistics."""
    data, model = load_sample(), ResNet((1,), (4,))
    x = normalize(data.train_images[:20], MEAN, STD)
    before, steps = model.state_dict(), model.dropout.step
    measure_statistics(model, [x, x])
    after = model.state_dict()
    for name in before:
        assert (before[name] == after[name]).all() == ("running" not in name), name
    assert model.dropout.step == steps
    assert all(module.training and module._cache is None for module in model.modules())
    logits = predict_logits(model, data.train_images[:20], MEAN, STD)
    model.dropout.eval()
    np.testing.assert_allclose(logits, model(x), atol=1e-3)  # the statistics of x, but for the biased variance


def test_a_short_batch_counts_by_its_images(rng):
    norm = BatchNorm2d(2)
    batches = [rng.standard_normal((n, 3, 3, 2)).astype(np.float32) for n in (4, 4, 1)]
    measure_statistics(norm, batches)
    np.testing.assert_allclose(norm.running_mean.data, np.concatenate(batches).mean((0, 1, 2)), rtol=1e-4)


def test_classes_in_bytes_are_counted_where_they_belong():
    matrix = confusion_matrix(np.uint8([99, 3]), [99, 98], np.uint8(100))
    assert (matrix[99, 99], matrix[3, 98], matrix.sum()) == (1, 1, 2)


def test_images_that_are_none_or_lie_otherwise_are_named():
    model, images = ResNet((1,), (4,)), load_sample().test_images[:2]
    for wrong in (images[:0], images[0]):
        with pytest.raises(ValueError, match=r"predict_logits expects images \(N, H, W, C\), at least one .*, got \("):
            predict_logits(model, wrong, MEAN, STD)
    with pytest.raises(ValueError, match=r"normalize expects a mean .* each channel of \(2, 3, 32, 32\)"):
        predict_logits(model, images.transpose(0, 3, 1, 2), MEAN, STD)
    with pytest.raises(ValueError, match="expected at least one batch of images, got none"):
        measure_statistics(model, [])
    assert model.training


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([3], [12], "predictions that are integers from 0 to 9, got 12 to 12, int64"),
        ([-1, 1], [1, 1], "labels that are integers from 0 to 9, got -1 to 1, int64"),
        ([1], [1.7], r"predictions that are integers from 0 to 9, got 1\.7 to 1\.7, float64"),
        (["cat"], ["dog"], "labels that are integers from 0 to 9, got <U3"),
        ([1, 2], [1], r"expects \(N,\) twice, got \(2,\) and \(1,\)"),
    ],
)
def test_what_are_no_classes_is_counted_nowhere(labels, predictions, message):
    """3 taken for 12 would be counted as 4 taken for 2."""
    with pytest.raises(ValueError, match=message):
        confusion_matrix(labels, predictions, 10)
    assert confusion_matrix([], [], 2).sum() == 0


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, None])
def test_a_batch_size_that_is_none_is_named(batch_size):
    images = load_sample().test_images[:2]
    with pytest.raises(ValueError, match=f"batch_size must be an integer of at least 1, got {batch_size}"):
        predict_logits(ResNet((1,), (4,)), images, MEAN, STD, batch_size=batch_size)


def test_a_batch_size_in_numpys_small_integers_loses_no_image():
    model, images = ResNet((1,), (4,)), load_sample().test_images[:300]
    logits = predict_logits(model, images, MEAN, STD, batch_size=np.uint8(200))
    np.testing.assert_array_equal(logits, predict_logits(model, images, MEAN, STD, batch_size=200))


def test_a_network_without_parameters_of_its_own_is_run_in_the_type_of_its_numbers():
    model = Sequential(Conv2d(3, 10, 3, rng=1), BatchNorm2d(10), GlobalAvgPool2d()).to(dtype="float64").eval()
    folded, images = fold_batch_norm(model), load_sample().test_images[:3]
    assert not folded.parameters()
    np.testing.assert_allclose(
        predict_logits(folded, images, MEAN, STD), predict_logits(model, images, MEAN, STD), rtol=1e-12
    )
    model.layers()[0].seen = Buffer(np.zeros((), np.int64))  # comes first, and says nothing of the images
    assert predict_logits(model, images, MEAN, STD).dtype == np.float64
    assert summary(model).count("\n") == summary(folded).count("\n") + 2  # the rows of two layers with parameters


def test_images_in_a_list_and_batches_without_images_are_named():
    model, images = ResNet((1,), (4,)), load_sample().test_images[:2]
    with pytest.raises(TypeError, match="predict_logits expects an array, got a list"):
        predict_logits(model, images.tolist(), MEAN, STD)
    with pytest.raises(ValueError, match=r"measure_statistics: expected images in each batch, got \(0, 32, 32, 3\)"):
        measure_statistics(model, [normalize(images[:0], MEAN, STD)])


def test_a_model_without_parameters_can_be_asked():
    images = load_sample().test_images[:3]
    np.testing.assert_array_equal(
        predict_logits(Flatten(), images, MEAN, STD, batch_size=2), normalize(images, MEAN, STD).reshape(3, -1)
    )
