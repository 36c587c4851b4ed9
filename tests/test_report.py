"""The page about a run: what it says is true, what it shows can be seen, and no name in it is taken for HTML."""

import base64
import html.parser
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import page
import pytest
import report

from minires import ResNet, cifar10
from minires.evaluation import confusion_matrix, evaluate
from minires.training import CheckpointError, UsageError, load_model, save_weights
from minires.training.folder import LOG, RESULT, SETTINGS, write_json, write_log
from minires.training.weights import WEIGHTS, logits_of

EXAMPLES = pathlib.Path(report.__file__).parent
SECTIONS = ["Curves", "Accuracy by class", "Confusion matrix", "Mistakes", "First-layer filters", "Layers", "Result"]
SETTINGS_OF_A_RUN = {"data": "sample", "recipe": "report", "epochs": 3, "channels": [8, 8], "clip": None, "tta": False}
VOID = ("meta", "img")
NO_PICTURES = pathlib.Path(__file__).parent / "without_pictures"
SAMPLE = cifar10.load_sample()


class Page(html.parser.HTMLParser):
    """Reads a page: its elements as (tag, attributes), and the text of each section; all that is opened is closed."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.open, self.section, self.texts = [], [], "", {"": []}
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open
        self.texts = {name: " ".join(" ".join(words).split()) for name, words in self.texts.items()}

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attributes)["id"]
            self.texts[self.section] = []

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts[self.section].append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def titles(self):
        return re.findall("<h2>(.*)</h2>", self.source)


def rows(epochs, **values):
    """Return rows as a Run keeps them; values: {column: a number for each epoch}."""
    row = {"epoch": 0, "lr": 1e-3, "train_loss": 2.5, "train_accuracy": 0.1}
    row |= {"validation_loss": 2.0, "validation_accuracy": 0.25, "seconds": 1.0}
    return [row | {"epoch": e} | {name: value[e - 1] for name, value in values.items()} for e in range(1, epochs + 1)]


def make_run(folder, model=None, history=None, result=True, settings=None, count=500):
    """Write what a run leaves; return the images, labels and logits of its test."""
    model = model or ResNet((1, 1), (8, 8))
    images, labels = SAMPLE.test_images[:count], SAMPLE.test_labels[:count]
    folder.mkdir()
    write_json(folder / SETTINGS, SETTINGS_OF_A_RUN | (settings or {}))
    write_log(folder / LOG, history or rows(3, validation_loss=[2.0, 1.5, 1.75], validation_accuracy=[0.25, 0.5, 0.4]))
    save_weights(folder / WEIGHTS, model)
    logits = logits_of(model, images, folder)
    if result:
        loss, accuracy = evaluate(model, images, labels, cifar10.MEAN, cifar10.STD)
        numbers = {"test_loss": loss, "test_accuracy": accuracy, "test_images": count, "seconds": 3725.2}
        write_json(folder / RESULT, numbers)
    return images, labels, logits


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "run"
    return folder, make_run(folder)


@pytest.fixture
def run(made, tmp_path):
    """The folder of a run that has ended; the images, labels and logits of its test."""
    return shutil.copytree(made[0], tmp_path / "run"), *made[1]


def written(folder, *test, **options):
    report.write_report(folder, *test, **options)
    return Page(folder / "report.html")


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, args)])
    return report.main()


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(run):
    found = written(*run)
    assert found.titles == [*SECTIONS, "Settings"]
    ids = [attributes["id"] for attributes in found.all("section")]
    assert [link["href"] for link in found.all("a")] == [f"#{name}" for name in ids]
    assert found.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in found.all("meta")
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in found.elements)
    assert all(image["src"].startswith("data:image/png;base64,") for image in found.all("img"))
    assert not re.search(r"https?:|url\(|@import| on\w+=", re.sub('base64,[^"]*', "", found.source))
    assert all(heading["scope"] in ("row", "col") for heading in found.all("th"))
    assert "cannot" not in found.source
    assert "There is no" not in found.texts[""]


def test_its_numbers_are_those_of_evaluate(run):
    folder, images, labels, logits = run
    found = written(*run)
    loss, accuracy = evaluate(load_model(folder / WEIGHTS)[0], images, labels, cifar10.MEAN, cifar10.STD)
    matrix = confusion_matrix(labels, logits.argmax(axis=1), 10)
    assert f"test accuracy {accuracy:.2%} 500 images; 95% interval" in found.texts[""]
    assert f"test loss {loss:.4f}" in found.texts[""]
    assert "validation accuracy 50.00% of the weights that are kept" in found.texts[""]
    assert "time 1:02:05" in found.texts[""]
    assert f"{matrix.trace()} of 500 test images are right, {accuracy:.2%}" in found.texts["confusion-matrix"]
    for name, counts, called in zip(cifar10.CLASSES, matrix, matrix.sum(axis=0), strict=True):
        right = counts[cifar10.CLASSES.index(name)]
        assert f"{name} {' '.join(map(str, counts))}" in found.texts["confusion-matrix"]
        precision = f"{right / called:.1%}" if called else "–"  # noqa: RUF001
        assert f"{name} {right / 50:.1%} {right} 50 {precision}" in found.texts["accuracy-by-class"]
    assert "dashed line is at the one whose weights are kept, 2." in found.texts["curves"]
    assert "3 1.00e-03 2.5000 10.00% 1.7500 40.00% 1.0" in found.texts["curves"]
    assert "loss over 3 epochs: training from 2.5 to 2.5, validation from 2 to 1.75" in found.source
    assert "channels 8 8" in found.texts["settings"]
    assert "clip – tta no" in found.texts["settings"]  # noqa: RUF001
    assert f"all {load_model(folder / WEIGHTS)[0].num_parameters():,}" in found.texts["layers"]


def test_the_mistakes_are_the_most_confident_ones_with_their_images(run):
    image_library = pytest.importorskip("PIL.Image")
    _, images, labels, logits = run
    found = written(*run)
    exp = np.exp(logits.astype(np.float64))
    probabilities = exp / exp.sum(axis=1, keepdims=True)
    wrong = [n for n in range(500) if logits[n].argmax() != labels[n]]
    expected = sorted(wrong, key=lambda n: -probabilities[n].max())[:30]
    pictures = [image for image in found.all("img") if image["alt"]]
    assert len(pictures) == 30
    for n, shown in zip(expected, pictures, strict=True):
        best = np.argsort(-probabilities[n])[:3]
        label, taken = cifar10.CLASSES[labels[n]], cifar10.CLASSES[best[0]]
        assert shown["alt"] == f"test image {n}: {label}, taken for {taken}"
        content = base64.b64decode(shown["src"].partition(",")[2])
        np.testing.assert_array_equal(np.asarray(image_library.open(io.BytesIO(content))), images[n])
        answers = " ".join(f"{cifar10.CLASSES[k]} {probabilities[n, k]:.1%}" for k in best)
        assert f"{label} {n} {answers}" in found.texts["mistakes"]


def test_the_filters_are_the_first_weights_with_the_strongest_first(run):
    image_library = pytest.importorskip("PIL.Image")
    weight = load_model(run[0] / WEIGHTS)[0].conv1.weight.data  # (3, 3, 3, 8)
    strongest = weight[..., (weight**2).sum(axis=(0, 1, 2)).argmax()]
    shown = [image["src"] for image in written(*run).all("img") if not image["alt"]]
    assert len(shown) == 8
    content = base64.b64decode(shown[0].partition(",")[2])
    first = np.asarray(image_library.open(io.BytesIO(content))).astype(float)  # (3, 3, 3)
    np.testing.assert_allclose(first / 127.5 - 1, strongest / np.abs(weight).max(), atol=0.005)


def test_what_html_would_read_as_its_own_is_escaped(tmp_path):
    name, classes = '<b>&"x', [f"<i>'{k}\"&amp;</td>" for k in range(10)]
    settings = {"<script>": "</dd><script>alert(1)</script>", "recipe": "<u>", "epochs": "<s>"}
    found = written(tmp_path / name, *make_run(tmp_path / name, settings=settings), classes=classes)
    assert {"b", "i", "u", "s", "script"} & {tag for tag, _ in found.elements} == {"b"}
    assert f"A run of minires {name} recipe <u>" in found.texts[""]
    assert "of <s>" in found.texts[""]
    assert "<script> </dd><script>alert(1)</script>" in found.texts["settings"]
    for section in ("accuracy-by-class", "confusion-matrix", "mistakes"):
        assert classes[3] in found.texts[section]
    assert f"{classes[0]}, taken for {classes[1]}" in [span.get("title") for span in found.all("span")]


def test_without_a_mistake_it_says_so(tmp_path):
    images, labels, _ = make_run(tmp_path / "run")
    found = written(tmp_path / "run", images, labels, 20 * np.eye(10, dtype=np.float32)[labels])
    assert found.texts["mistakes"] == "Mistakes There is none: all 500 test images are right."
    assert "airplane 100.0% 50 50 100.0% –" in found.texts["accuracy-by-class"]  # noqa: RUF001


@pytest.mark.parametrize("blocks", [dict(batch_norm=False), dict(shortcut=False), dict(channels=(3, 5), blocks=(1, 2))])
def test_networks_of_other_kinds_and_a_few_images(tmp_path, monkeypatch, capsys, blocks):
    model = ResNet(**{"blocks": (1,), "channels": (4,)} | blocks)
    make_run(tmp_path / "run", model, settings={"limit_batches": 2, "batch_size": 6}, count=12)
    assert command(monkeypatch, tmp_path / "run") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'report.html'}\n"
    found = Page(tmp_path / "run" / "report.html")
    assert "of 12 test images are right" in found.texts["confusion-matrix"]
    assert f"all {model.num_parameters():,}" in found.texts["layers"]


def test_a_run_that_has_not_ended_shows_what_there_is(tmp_path, monkeypatch):
    """And nothing of the test images, which are looked at once."""
    folder = tmp_path / "run"
    make_run(folder, result=False)
    command(monkeypatch, folder)
    found = Page(folder / "report.html")
    assert found.titles == ["Curves", "First-layer filters", "Layers", "Settings"]
    assert "The run has not ended. The test images are looked at once, at its end" in found.texts[""]
    (folder / WEIGHTS).unlink()
    (folder / LOG).unlink()
    command(monkeypatch, folder)
    found = Page(folder / "report.html")
    assert found.titles == ["Settings"]
    assert "There is no best.safetensors in the folder" in found.texts[""]
    assert "epochs 0 of 3" in found.texts[""]


def test_a_finished_run_whose_weights_are_gone(run, monkeypatch):
    (run[0] / WEIGHTS).unlink()
    command(monkeypatch, run[0])
    assert Page(run[0] / "report.html").titles == ["Curves", "Result", "Settings"]


def test_settings_of_a_loop_of_ones_own(run, monkeypatch):
    write_json(run[0] / SETTINGS, {"seed": 0})
    write_json(run[0] / RESULT, {"test_loss": 1.0, "anything": {"a": [1]}})
    command(monkeypatch, run[0], "--data", "sample")
    found = Page(run[0] / "report.html")
    assert found.titles == [*SECTIONS, "Settings"]
    assert "anything {'a': [1]}" in found.texts["result"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (LOG, "epoch,lr\n1,2\n", r"log\.csv is damaged \(no column train_loss\): bring back what the run has written"),
        (LOG, ",".join(report.LOG_FORMATS) + "\nx", r"log\.csv is damaged \(could not convert string to float: 'x'\)"),
        (LOG, ",".join(report.LOG_FORMATS) + "\n1,2,3,4,5,6,7,8", r"log\.csv is damaged \("),
        (LOG, ",".join(report.LOG_FORMATS) + "\n1,2,3,4,x\0\n", r"log\.csv is damaged \("),
        (RESULT, "[]", r"result\.json is damaged \(expected an object, got \[\]\)"),
        (RESULT, '{"test_accuracy": 2}', r"\(test_accuracy is 2, expected a number from 0 to 1\)"),
        (RESULT, "{", r"result\.json is damaged \("),
        (RESULT, '{"test_accuracy": "x"}', r"\(test_accuracy is 'x', expected a number from 0 to 1\)"),
        (RESULT, "[" * 100_000, r"result\.json is damaged \("),
        (SETTINGS, "{", r"config\.json is damaged"),
        (WEIGHTS, "x", r"best\.safetensors is no safetensors file, or a damaged one"),
    ],
)
def test_a_damaged_file_is_named(run, monkeypatch, name, content, message):
    (run[0] / name).write_text(content)
    with pytest.raises((UsageError, CheckpointError), match=message) as error:
        command(monkeypatch, run[0])
    assert "\n" not in str(error.value)
    assert not (run[0] / "report.html").exists()


def test_no_run_other_images_and_a_place_that_is_not_there(run, monkeypatch, tmp_path):
    with pytest.raises(UsageError, match=r"there is no run in .*nowhere"):
        command(monkeypatch, tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"page\.html cannot be written: No such file or directory; name anoth"):
        command(monkeypatch, run[0], "--out", tmp_path / "nowhere" / "page.html")
    write_json(run[0] / SETTINGS, SETTINGS_OF_A_RUN | {"data": str(tmp_path / "gone")})
    with pytest.raises(cifar10.DataError, match=r"gone does not exist.*; or name the data of the run by --data"):
        command(monkeypatch, run[0])
    write_json(run[0] / SETTINGS, SETTINGS_OF_A_RUN | {"data_sha256": "0"})
    with pytest.raises(UsageError, match=r"the images are not those that the run in .* began with: name its data by"):
        command(monkeypatch, run[0])


def test_a_page_of_a_long_run_is_small(tmp_path):
    """64 filters, 200 epochs and images of noise, which cannot be compressed."""
    _, labels, logits = make_run(tmp_path / "run", ResNet((1,), (64,)), rows(200), count=60)
    noise = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    written(tmp_path / "run", noise, labels, logits)
    assert (tmp_path / "run" / "report.html").stat().st_size < 300_000


@pytest.mark.parametrize(
    "values", [[1.0], [0.0], [float("nan"), 2.0], [float("inf")], [1e-5, 1e-5], [0.1, 0.1 - 1e-9], [1e30, -1e30]]
)
def test_curves_of_one_epoch_and_of_numbers_that_are_not_finite(values):
    drawn = page.chart("loss", {"training": values, "validation": [float("nan")] * len(values)}, 1)
    assert "nan" not in drawn
    assert bool(drawn) == bool(np.isfinite(values).any())


def test_ticks_are_round_and_enclose_the_values(rng):
    for _ in range(500):
        low = rng.normal() * 10.0 ** rng.integers(-8, 8)
        high = low + rng.random() * 10.0 ** rng.integers(-4, 8) * abs(low)
        ticks = page.ticks_of(low, high)
        slack = 1e-5 * abs(low)
        assert ticks[0] <= low + slack
        assert high - slack <= ticks[-1]
        assert 2 <= len(ticks) <= 6
    assert page.ticks_of(0.13, 0.92) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert page.ticks_of(0.001, 0.001) == [0.0, 0.0005, 0.001]
    assert page.ticks_of(0, 0)[-1] == 1


def test_the_interval_of_14_of_16():
    assert report.wilson(14 / 16, 16) == pytest.approx((0.6398, 0.9650), abs=1e-4)


SMALL_RUN = ["--data", "sample", "--device", "cpu", "--epochs", "1", "--batch-size", "20", "--limit-batches", "2"]
SMALL_RUN += ["--channels", "4", "6", "6", "8"]


@pytest.mark.slow
def test_training_writes_the_page_that_the_command_writes_anew(tmp_path):
    """Where there is no matplotlib, too."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(NO_PICTURES), os.environ.get("PYTHONPATH")]))}
    options = {"env": env, "check": True, "capture_output": True, "timeout": 300}
    subprocess.run([sys.executable, EXAMPLES / "train_cifar.py", *SMALL_RUN, "--out", tmp_path / "run"], **options)
    first = (tmp_path / "run" / "report.html").read_bytes()
    assert Page(tmp_path / "run" / "report.html").titles == [*SECTIONS, "Settings"]
    (tmp_path / "run" / "report.html").unlink()
    subprocess.run([sys.executable, EXAMPLES / "report.py", tmp_path / "run"], **options)
    assert (tmp_path / "run" / "report.html").read_bytes() == first


@pytest.mark.slow
def test_a_page_that_cannot_be_written_is_told_and_costs_no_result(tmp_path, monkeypatch, capsys):
    import train_cifar

    def fail(*args):
        assert json.loads((tmp_path / "run" / "result.json").read_text())["test_images"] == 40
        raise RuntimeError("no paper")

    monkeypatch.setattr(train_cifar, "write_report", fail)
    monkeypatch.setattr(sys, "argv", ["train_cifar.py", *SMALL_RUN, "--out", str(tmp_path / "run")])
    with warnings.catch_warnings():
        assert train_cifar.main() == 0
    out, err = capsys.readouterr()
    assert "on 40 images" in out.splitlines()[-1]
    assert err.endswith(f"no report {tmp_path / 'run' / 'report.html'}: no paper\n")


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FRAMES = """<!DOCTYPE html><title>frames</title><body><script>
const found = [], page = PAGE, widths = [360, 1200];
function look(frame) {
  const inner = frame.contentDocument, images = [...inner.images];
  found.push({width: inner.documentElement.clientWidth, needed: inner.documentElement.scrollWidth,
              images: images.length, seen: images.filter(image => image.complete && image.naturalWidth > 0).length,
              charts: [...inner.querySelectorAll("svg")].filter(svg => svg.clientHeight > 100).length});
  if (found.length == widths.length) document.title = JSON.stringify(found);
}
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 9000px; border: 0`;
  frame.srcdoc = page;
  frame.onload = () => look(frame);
  document.body.append(frame);
}
</script>"""


def in_browser(folder, source):
    """Open a page in a browser, in a narrow and a wide frame; return what is seen in each, and the browser's errors."""
    text = json.dumps(source).replace("<", "\\u003c")
    (folder / "frames.html").write_text(FRAMES.replace("PAGE", text), "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=10000"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [BROWSER, *flags, (folder / "frames.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return sorted(found, key=lambda frame: frame["width"]), errors


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to look at the page with")
def test_a_browser_shows_every_picture_in_a_narrow_window_and_in_a_wide_one(run, tmp_path):
    found = written(*run)
    seen, errors = in_browser(tmp_path, found.source)
    assert errors == []
    assert [(frame["width"], frame["needed"]) for frame in seen] == [(360, 360), (1200, 1200)]
    for frame in seen:
        assert frame["images"] == frame["seen"] == len(found.all("img")) == 38
        assert frame["charts"] == 3
    broken = found.source.replace("base64,iVBOR", "base64,iVBOX", 1) + "<script>oops()</script>"
    seen, errors = in_browser(tmp_path, broken)
    assert {frame["seen"] for frame in seen} == {37}
    assert any("oops is not defined" in error for error in errors)
