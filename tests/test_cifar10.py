"""The data set: read right, its constants recomputed, and every fault of a file named."""

import hashlib
import re

import numpy as np
import pytest

from minires import cifar10
from minires.cifar10 import CLASSES, MEAN, STD, DataError


def write_files(directory, records=2, change=None):
    """Write six small files of made-up images, after `change` has had its way with the first one's bytes."""
    rng = np.random.default_rng(0)
    for name in cifar10.files.OFFICIAL:
        data = rng.integers(0, 256, (records, 3073), dtype=np.uint8)
        data[:, 0] %= 10
        content = data.tobytes()
        (directory / name).write_bytes(change(content) if change and name == "data_batch_1.bin" else content)
    return directory


@pytest.fixture
def two_records(monkeypatch):
    """Let files be of two images, and of any two."""
    monkeypatch.setattr(cifar10.files, "OFFICIAL", dict.fromkeys(cifar10.files.OFFICIAL, (2, None)))


def test_a_record_by_hand(tmp_path, two_records):
    red, green, blue = (np.arange(1024).reshape(32, 32) // divisor for divisor in (4, 8, 16))
    record = bytes([7]) + b"".join(plane.astype(np.uint8).tobytes() for plane in (red, green, blue))
    write_files(tmp_path, change=lambda content: content[:3073] + record)
    data = cifar10.load(tmp_path)
    assert [part.shape for part in data] == [(10, 32, 32, 3), (10,), (2, 32, 32, 3), (2,)]
    assert data.train_labels[1] == 7
    np.testing.assert_array_equal(data.train_images[1], np.stack([red, green, blue], axis=-1))


def test_the_folder_of_the_archive_is_found_inside_the_one_named(tmp_path, two_records):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    write_files(folder)
    np.testing.assert_array_equal(cifar10.load(tmp_path).train_images, cifar10.load(folder).train_images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], r"data_batch_1\.bin has 6,145 bytes, expected 6,146 \(2 records of 3,073\)"),
        (lambda content: content + b"x", "has 6,147 bytes, expected 6,146"),
        (lambda content: b"", "has 0 bytes, expected 6,146"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, two_records, change, message):
    with pytest.raises(DataError, match=message):
        cifar10.load(write_files(tmp_path, change=change))


def test_a_missing_file_is_named(tmp_path, two_records):
    write_files(tmp_path)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}: data_batch_4.bin is missing; ")):
        cifar10.load(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path, two_records):
    write_files(tmp_path)
    (tmp_path / "test_batch.bin").unlink()
    (tmp_path / "test_batch.bin").mkdir()
    with pytest.raises(DataError, match=r"test_batch\.bin is no plain file, expected one of 6,146 bytes"):
        cifar10.load(tmp_path)


def test_an_empty_folder_inside_does_not_hide_the_files(tmp_path, two_records):
    (tmp_path / "cifar-10-batches-bin").mkdir()
    assert len(cifar10.load(write_files(tmp_path)).train_images) == 10


def test_the_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIRES_DATA", str(tmp_path))
    assert cifar10.default_directory() == tmp_path
    monkeypatch.delenv("MINIRES_DATA")
    assert cifar10.default_directory().parts[-2:] == (".cache", "minires")


def test_the_sample_has_100_and_50_images_of_each_class():
    data = cifar10.load_sample()
    assert data.train_images.dtype == data.test_images.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(data.train_labels), [100] * 10)
    np.testing.assert_array_equal(np.bincount(data.test_labels), [50] * 10)


def test_the_sample_is_what_its_page_says():
    folder = cifar10.pathlib.Path(cifar10.__file__).parent / "sample"
    page = (folder / "README.md").read_text()
    for name in ("data_batch_1.bin", "test_batch.bin"):
        content = (folder / name).read_bytes()
        assert f"{len(content):,} | {hashlib.md5(content).hexdigest()}" in page


def test_the_sample_is_the_first_images_of_each_class(real_data):
    sample = cifar10.load_sample()
    for images, labels, count, part in (
        (real_data.train_images, real_data.train_labels, 100, sample[:2]),
        (real_data.test_images, real_data.test_labels, 50, sample[2:]),
    ):
        first = np.sort(np.concatenate([np.flatnonzero(labels == k)[:count] for k in range(10)]))
        np.testing.assert_array_equal(part[0], images[first])
        np.testing.assert_array_equal(part[1], labels[first])


def test_the_real_files_hold_what_is_known_of_them(real_data):
    assert real_data.train_images.shape == (50_000, 32, 32, 3)
    assert real_data.test_images.shape == (10_000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(real_data.train_labels), [5000] * 10)
    np.testing.assert_array_equal(np.bincount(real_data.test_labels), [1000] * 10)
    assert [CLASSES[k] for k in real_data.train_labels[:5]] == ["frog", "truck", "truck", "deer", "automobile"]


def test_the_real_files_pass_for_right():
    try:
        place = cifar10.files.verify(cifar10.default_directory())
    except DataError as error:
        pytest.skip(str(error))
    assert place.name == "cifar-10-batches-bin"


def test_the_constants_are_the_statistics_of_the_training_images(real_data):
    mean, std = cifar10.statistics(real_data.train_images)
    np.testing.assert_array_equal(np.round(mean, 8), MEAN)
    np.testing.assert_array_equal(np.round(std, 8), STD)


def test_statistics_are_mean_and_deviation_of_each_channel(rng):
    images = rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    mean, std = cifar10.statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)))


def test_a_split_divides_shuffles_and_repeats():
    train, validation = cifar10.split(50_000, seed=3)
    assert (len(train), len(validation)) == (40_000, 10_000)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(50_000))
    assert (np.diff(train) < 0).mean() > 0.4
    np.testing.assert_array_equal(cifar10.split(50_000, seed=3)[0], train)
    assert (cifar10.split(50_000, seed=4)[0] != train).any()


def test_a_split_rounds_to_whole_images():
    assert [len(part) for part in cifar10.split(14)] == [11, 3]


@pytest.mark.parametrize("fraction", [0.0, 1.0, 0.01])
def test_a_split_with_an_empty_part_is_refused(fraction):
    with pytest.raises(ValueError, match=f"fraction {fraction} of 10 images leaves one of the two parts empty"):
        cifar10.split(10, fraction)


def test_a_fraction_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="fraction nan of 10 images leaves one of the two parts empty"):
        cifar10.split(10, float("nan"))


@pytest.mark.parametrize("images", [np.zeros((0, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.float32)])
def test_statistics_of_no_bytes_are_refused(images):
    with pytest.raises(ValueError, match=r"statistics expects images of uint8, at least one, got \(.* of "):
        cifar10.statistics(images)
