"""Lesson 10: what is done to images, what is measured of confidence, and the numbers of the page."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import photographs
import pytest

from minires.augment import resize
from minires.training.weights import load_published

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "lessons" / "photographs.py"
PAGE = (ROOT / "examples" / "lessons" / "10_photographs.md").read_text("utf-8")


def run(*args):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, SCRIPT, *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def lines(out):
    """What a script prints, by what stands before the colon."""
    return dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)


def percentages(text):
    return [float(number) for number in re.findall(r"([\d.]+) ?%", text)]


def test_images_are_altered_as_is_said(rng):
    images = rng.integers(0, 256, (3, 32, 32, 3), np.uint8)
    before = images.copy()
    altered = dict(photographs.views(images, rng))
    assert all((out.shape, out.dtype) == (images.shape, np.uint8) for out in altered.values())
    np.testing.assert_array_equal(images, before)
    np.testing.assert_array_equal(altered["upside down"][:, 0, 0], images[:, 31, 31])
    small = resize(images, 16)
    on_grey, in_the_sky = altered["half as large on grey"], altered["half as large in the sky"]
    np.testing.assert_array_equal(on_grey[:, 8:24, 8:24], small)
    np.testing.assert_array_equal(in_the_sky[:, 8:24, 8:24], small)
    outside = np.ones((32, 32), bool)
    outside[8:24, 8:24] = False
    assert (on_grey[:, outside] == photographs.GREY).all()
    assert (in_the_sky[:, outside] == photographs.SKY).all()
    corner = altered["a quarter as large in a corner of the sky"]
    np.testing.assert_array_equal(corner[:, :8, :8], resize(images, 8))
    assert (corner[:, 8:] == photographs.SKY).all()
    assert (corner[:, :, 8:] == photographs.SKY).all()
    squares = altered["of 16x16 pixels, each a square of four"]
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        np.testing.assert_array_equal(squares[:, y::2, x::2], small)
    np.testing.assert_array_equal(altered["of 16x16 pixels, scaled smoothly"], resize(small, 32))
    middling = (images > 100) & (images < 155)  # which no noise brings to the end of the range
    noise = altered["with noise"][middling] - images[middling].astype(float)
    assert abs(noise.std() - photographs.NOISE) < 2


def test_a_temperature_moves_confidence_and_no_answer(rng):
    logits = rng.standard_normal((50, 10))
    plain, sure = photographs.softmax(logits), photographs.softmax(logits, 0.5)
    np.testing.assert_allclose(sure, plain**2 / (plain**2).sum(axis=1, keepdims=True), rtol=1e-12)
    np.testing.assert_array_equal(sure.argsort(axis=1), plain.argsort(axis=1))
    assert (sure.max(axis=1) > plain.max(axis=1)).all()


def test_confidence_by_hand(capsys):
    """Two images of confidence 0.65, both right, and two of 0.95, one right: (|1 - 0.65| + |0.5 - 0.95|) / 2 = 0.4."""
    logits = np.log([[0.65, 0.35], [0.35, 0.65], [0.95, 0.05], [0.95, 0.05]])
    photographs.tell_confidence(logits, np.array([0, 1, 0, 1]), np.log([[0.25, 0.75], [0.55, 0.45]]))
    told = lines(capsys.readouterr().out)
    assert told["as trained, confidence 60% to 70%"] == "100.0% of 2 are right, mean confidence 65.0%"
    assert told["as trained, confidence 90% to 100%"] == "50.0% of 2 are right, mean confidence 95.0%"
    assert told["as trained, mean confidence"] == "80.0%, and 75.0% are right"
    assert told["as trained, calibration error"] == "40.0%"
    passing = "50.0% of the test images pass, 50.0% of them right; "
    assert told["as trained, at least 70%"] == passing + "1 of 2 strangers pass"
    assert told["as trained, at least 80%"] == passing + "0 of 2 strangers pass"


def test_the_temperature_that_labels_were_drawn_with_is_found(rng, capsys):
    logits = 3 * rng.standard_normal((20_000, 10))
    cumulated = photographs.softmax(logits, 1.4).cumsum(axis=1)
    labels = (rng.random((20_000, 1)) > cumulated).sum(axis=1)
    photographs.tell_confidence(logits, labels, logits[:1])
    told = lines(capsys.readouterr().out)
    assert abs(float(told["temperature"]) - 1.4) < 0.04
    before, after = (percentages(told[f"{name}, calibration error"])[0] for name in ("as trained", "calibrated"))
    assert after < 2 < before


def test_a_picture_that_cannot_be_read_is_one_line(tmp_path):
    pytest.importorskip("PIL", reason="Pillow is not installed")
    (tmp_path / "text.png").write_text("no picture")
    for name, reason in (("gone.png", "is missing"), ("text.png", "is no picture")):
        done = run(tmp_path / name)
        assert done.returncode == 2
        assert re.fullmatch(rf"error: .*{name} {reason}.*\n", done.stderr)


def test_the_page_is_about_the_weights_that_come_with_minires():
    """With other weights, everything on the page has to be measured anew."""
    accuracy = 100 * load_published()[1]["test_accuracy"]
    said = re.findall(r"(?:with the weights of|is trained, and has) ([\d.]+) %", PAGE)
    assert said == [f"{accuracy:.2f}"] * 3


@pytest.mark.full
def test_the_tables_of_confidence_are_those_of_all_test_images(real_data):
    """The strangers of the page are not at hand; everything else in these tables is."""
    told = lines(run("--full").stdout)
    images, right = (
        re.search(rf"^\| {name} \| (\d.*) \|$", PAGE, re.MULTILINE)[1].split(" | ") for name in ("images", "right")
    )
    for k, (count, share) in enumerate(zip(images, right, strict=True), 3):
        line = told[f"as trained, confidence {10 * k}% to {10 * k + 10}%"]
        assert abs(percentages(line)[0] - percentages(share)[0]) <= 0.5, line
        counted = int(re.search(r"of ([\d,]+) are", line)[1].replace(",", ""))
        assert abs(counted - int(count.replace(",", ""))) <= 10, line
    for threshold in (80, 90):
        row = percentages(re.search(rf"^\| {threshold} % \| .*$", PAGE, re.MULTILINE)[0])[1:]
        measured = [
            p for name in ("as trained", "calibrated") for p in percentages(told[f"{name}, at least {threshold}%"])
        ]
        np.testing.assert_allclose(measured, row, atol=0.3)
    errors = [percentages(told[f"{name}, calibration error"])[0] for name in ("as trained", "calibrated")]
    claimed = (
        percentages(PAGE[PAGE.index("**calibration error**") :])[0],
        percentages(PAGE[PAGE.index("on the other images") :])[0],
    )
    np.testing.assert_allclose(errors, claimed, atol=0.2)
    assert abs(float(told["temperature"]) - float(re.search(r"every second image, ([\d.]+\d)\.", PAGE)[1])) <= 0.02
