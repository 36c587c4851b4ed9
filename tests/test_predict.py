"""Pictures as people have them: each is classified, or named in one line while the others are classified."""

import io
import os
import pathlib
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from small_cifar10 import mutations

from minires import ResNet
from minires.cifar10 import CLASSES, load_sample
from minires.training import save_weights

Image = pytest.importorskip("PIL.Image")
from predict import PictureError, read_image  # noqa: E402

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "predict.py"
MUTATIONS = int(os.environ.get("MINIRES_TEST_MUTATIONS", "2000"))
ORIENTATION = 0x0112
SAMPLE = load_sample().test_images[5]  # (32, 32, 3)
GREY = np.asarray(Image.fromarray(SAMPLE).convert("L"))


def predict(*args, **kwargs):
    """Return (exit code, standard output, standard error)."""
    done = subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, **kwargs)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_weights(path, ResNet((1,), (8,)))
    return path


def assert_shows(path, expected, tolerance=0):
    """What is read is what is shown; a grey picture has the same values in each channel."""
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2)
    difference = np.abs(read_image(path).astype(int) - expected)
    assert difference.mean() <= tolerance, path.name


def broken_exif():
    """EXIF whose orientation is 1 and whose resolution is a number out of range."""
    entries = struct.pack("<HHII", ORIENTATION, 3, 1, 1) + struct.pack("<HHII", 0x0100, 4, 1, 2**32 - 1)
    rational = struct.pack("<HHII", 0x011A, 5, 1, 2**31)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 3) + entries + rational + struct.pack("<I", 0)


def test_three_classes_how_probable_each_is_and_that_there_are_ten(checkpoint, tmp_path):
    image = Image.fromarray(SAMPLE)
    image.save(tmp_path / "small.png")
    image.resize((90, 60)).convert("L").save(tmp_path / "grey.jpg")
    code, out, err = predict(checkpoint, tmp_path / "small.png", tmp_path / "grey.jpg")
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{tmp_path / 'small.png'}: ")
    percentages = [float(part.split()[-1].rstrip("%")) for part in lines[0].split(": ")[1].split(", ")]
    assert len(percentages) == 3
    assert percentages == sorted(percentages, reverse=True)
    assert lines[2].startswith(f"No other classes are known than {', '.join(CLASSES)}")


def test_the_cat_of_the_readme(capsys, monkeypatch):
    """The picture that the front page shows, with what it says there."""
    import predict

    root = pathlib.Path(predict.__file__).parent.parent
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["predict.py", "examples/cat.jpg"])
    assert predict.main() == 0
    told = capsys.readouterr().out.splitlines()[1]
    (shown,) = re.findall(r"# (examples/cat\.jpg: .*)", (root / "README.md").read_text("utf-8"))
    assert told.startswith("examples/cat.jpg: cat ")
    cat, cat_shown = (float(re.search(r"cat ([\d.]+)%", text)[1]) for text in (told, shown))
    assert abs(cat - cat_shown) < 2  # the digits depend on Pillow and the processor


def test_pictures_of_every_kind_become_the_pixels_they_show(tmp_path):
    colour, grey, folder = Image.fromarray(SAMPLE), Image.fromarray(GREY), tmp_path
    for ending in ("png", "bmp", "ico", "ppm", "tga", "tiff", "sgi", "pcx"):
        colour.save(folder / f"colour.{ending}")
        assert_shows(folder / f"colour.{ending}", SAMPLE)
    for ending in ("jpg", "gif", "webp"):
        colour.save(folder / f"colour.{ending}")
        assert_shows(folder / f"colour.{ending}", SAMPLE, 8)
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    assert_shows(folder / "cmyk.jpg", SAMPLE, 8)
    colour.convert("CMYK").save(folder / "cmyk.tiff")
    assert_shows(folder / "cmyk.tiff", SAMPLE)
    grey.convert("P").save(folder / "palette.png")
    assert_shows(folder / "palette.png", GREY)
    grey.convert("LA").save(folder / "grey and alpha.png")
    assert_shows(folder / "grey and alpha.png", GREY)
    bits = grey.convert("1")
    bits.save(folder / "1 bit.png")
    assert_shows(folder / "1 bit.png", np.asarray(bits) * 255)
    for ending in ("gif", "png"):  # the first frame
        colour.save(folder / f"moving.{ending}", save_all=True, append_images=[colour.rotate(90)])
        assert_shows(folder / f"moving.{ending}", SAMPLE, 8)


@pytest.mark.skipif(not Image.registered_extensions().get(".jp2"), reason="this Pillow has no JPEG 2000")
def test_jpeg_2000(tmp_path):
    Image.fromarray(SAMPLE).save(tmp_path / "colour.jp2")
    assert_shows(tmp_path / "colour.jp2", SAMPLE)
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "16 bits.jp2")
    assert_shows(tmp_path / "16 bits.jp2", GREY)


def test_what_is_transparent_becomes_white(tmp_path):
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "transparent.png")
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([255, 0, 0] * 2)
    palette.save(tmp_path / "palette.png", transparency=1)
    Image.new("RGB", (32, 32), (255, 0, 0)).save(tmp_path / "one colour.png", transparency=(255, 0, 0))
    for name in ("transparent.png", "palette.png", "one colour.png"):
        assert (read_image(tmp_path / name) == 255).all(), name


def test_more_than_eight_bits_are_scaled_by_what_the_file_says(tmp_path):
    wide, floats = GREY.astype(np.uint16), GREY.astype(np.float32)
    for name in ("16 bits.png", "16 bits.tiff"):
        Image.fromarray(wide * 257).save(tmp_path / name)
        assert_shows(tmp_path / name, GREY)
    Image.fromarray(wide * 16).save(tmp_path / "12 bits.tiff", tiffinfo={281: 4080})
    assert_shows(tmp_path / "12 bits.tiff", GREY)
    Image.fromarray(floats / 255).save(tmp_path / "floats.tiff")
    assert_shows(tmp_path / "floats.tiff", GREY)
    Image.fromarray(floats).save(tmp_path / "floats to 255.tiff", tiffinfo={341: 255.0})
    assert_shows(tmp_path / "floats to 255.tiff", GREY)
    (tmp_path / "12 bits.pgm").write_bytes(b"P5 32 32 4095\n" + (wide * 16).astype(">u2").tobytes())
    assert_shows(tmp_path / "12 bits.pgm", GREY, 0.5)
    colours = SAMPLE.astype(">u2")
    (tmp_path / "12 bits.ppm").write_bytes(b"P6 32 32 4095\n" + (colours * 16).astype(">u2").tobytes())
    assert_shows(tmp_path / "12 bits.ppm", SAMPLE, 0.5)
    (tmp_path / "16 bits colour.png").write_bytes(png_of_16_bits(colours * 257))
    assert_shows(tmp_path / "16 bits colour.png", SAMPLE)


def png_of_16_bits(values):
    """Write a PNG of 16 bits a channel, which Pillow only reads."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_values_of_which_nothing_tells_the_range_are_refused(tmp_path):
    wide, floats = GREY.astype(np.uint16), GREY.astype(np.float32)
    range_of = f"holds values from {int(GREY.min()) * 16} to {int(GREY.max()) * 16:,}, expected from 0 to 65,535, the"
    Image.fromarray(wide * 16).save(tmp_path / "12 bits.png")
    Image.fromarray(wide * 16).save(tmp_path / "12 bits.tiff")
    Image.fromarray(floats).save(tmp_path / "floats.tiff")
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    Image.fromarray(wide.astype(np.int32) * 257).save(tmp_path / "integers.tiff")
    (tmp_path / "colours.png").write_bytes(png_of_16_bits(SAMPLE.astype(np.uint16) * 16))
    for name, message in {
        "12 bits.png": range_of,
        "12 bits.tiff": range_of,
        "floats.tiff": f"holds values from {GREY.min()} to {GREY.max()}, expected from 0 to 1, the largest",
        "nan.tiff": "holds values from nan to nan, expected from 0 to 1",
        "integers.tiff": "holds 32-bit integers, of which any may be white: save it with 8 bits",
        "colours.png": "expected from 0 to 255, the largest at least a quarter of that",
    }.items():
        with pytest.raises(PictureError) as error:
            read_image(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name} holds ")
        assert message in str(error.value)


@pytest.mark.parametrize("ending", ["jpg", "png", "tiff"])
def test_a_camera_held_upright(tmp_path, ending):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    upright = np.zeros((40, 30, 3), np.uint8)
    upright[:20] = 255  # the sky
    Image.fromarray(np.rot90(upright)).save(tmp_path / f"x.{ending}", exif=exif)
    image = read_image(tmp_path / f"x.{ending}")
    assert image[:14].min() > 240
    assert image[18:].max() < 15


def test_what_is_wrong_beside_the_pixels_does_not_matter(tmp_path):
    image = Image.fromarray(SAMPLE)
    image.save(tmp_path / "plain.jpg")
    content = (tmp_path / "plain.jpg").read_bytes()
    exif = broken_exif()
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    (tmp_path / "exif.jpg").write_bytes(content[:2] + segment + content[2:])
    np.testing.assert_array_equal(read_image(tmp_path / "exif.jpg"), read_image(tmp_path / "plain.jpg"))
    image.save(tmp_path / "profile.png", icc_profile=bytes(2_000_000))
    assert_shows(tmp_path / "profile.png", SAMPLE)


def test_the_square_in_the_middle_or_the_whole_picture(tmp_path):
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png") == 255).all()
    squeezed = read_image(tmp_path / "wide.png", crop="none")
    assert (squeezed[:, 10:22] == 255).all()
    assert (squeezed[:, :6] == 0).all()
    stripes = np.zeros((320, 320, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert np.abs(read_image(tmp_path / "stripes.png").astype(int) - 127).max() < 8  # antialiased
    for size in ((1, 1), (1, 5000), (7, 3)):
        Image.new("RGB", size, "red").save(tmp_path / "thin.png")
        assert (read_image(tmp_path / "thin.png") == (255, 0, 0)).all()


def test_a_bad_picture_is_named_and_the_others_are_classified(checkpoint, tmp_path, capsys):
    good, folder = tmp_path / "good.png", tmp_path / "folder.png"
    Image.fromarray(SAMPLE).save(good)
    folder.mkdir()
    (tmp_path / "note.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "half.png").write_bytes(good.read_bytes()[:1000])
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    bad = [tmp_path / f"{name}.png" for name in ("none", "note", "empty", "folder", "half", "huge")]
    code, out, err = predict(checkpoint, *bad, good)
    assert code == 2
    lines = err.splitlines()
    assert len(lines) == len(bad)
    for line, path in zip(lines, bad, strict=True):
        assert line.startswith(f"error: {path} is "), line
    assert lines[0].endswith("is missing; expected a PNG or JPEG file")
    assert lines[1].endswith(
        "is no picture that Pillow can read: it has no format that it knows, or a rare form of one"
    )
    assert lines[3].endswith("is a folder: name the pictures in it")
    assert "could be decompression bomb" in lines[5]
    assert [line.partition(":")[0] for line in out.splitlines()[:-1]] == [str(good)]
    code, out, err = predict(checkpoint, folder)
    assert (code, out) == (2, "")


def test_names_that_the_console_lacks(checkpoint, tmp_path):
    good, bad = tmp_path / "猫.png", tmp_path / "犬.png"
    Image.fromarray(SAMPLE).save(good)
    code, out, err = predict(checkpoint, bad, good, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert code == 2
    assert err == f"error: {tmp_path}{os.sep}\\u72ac.png is missing; expected a PNG or JPEG file\n"
    assert f"{tmp_path}{os.sep}\\u732b.png: " in out


def pictures():
    """Yield good pictures in the formats that Pillow can write here, as (format, bytes)."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010F], exif[0x011A] = 6, "a camera", 72.0
    kinds = [("RGB", name, {}) for name in ("BMP", "DDS", "ICO", "JPEG2000", "PCX", "PPM", "SGI", "TGA", "QOI")]
    kinds += [("RGB", "JPEG", {"exif": exif}), ("RGB", "JPEG", {"progressive": True}), ("CMYK", "JPEG", {})]
    kinds += [("RGB", "PNG", {"exif": exif}), ("P", "PNG", {"transparency": 0}), ("1", "PNG", {}), ("LA", "PNG", {})]
    kinds += [("RGB", "TIFF", {"exif": exif}), ("L", "TIFF", {"compression": "tiff_lzw"}), ("F", "TIFF", {})]
    kinds += [("RGB", "WEBP", {"exif": exif}), ("RGB", "WEBP", {"lossless": True}), ("RGB", "AVIF", {})]
    kinds += [("P", "GIF", {}), ("RGB", "GIF", {"save_all": True, "append_images": [noise.rotate(90)]})]
    kinds += [("1", "MSP", {}), ("1", "XBM", {}), ("P", "BLP", {}), ("F", "SPIDER", {})]
    kinds += [("RGB", "MPO", {"save_all": True, "append_images": [noise]}), ("RGBA", "TGA", {"compression": "tga_rle"})]
    for mode, name, options in kinds:
        content = io.BytesIO()
        image = noise.convert(mode)
        try:
            (image.point(lambda value: value / 255 + 0) if mode == "F" else image).save(content, name, **options)
        except (KeyError, OSError):  # a Pillow without this format
            continue
        yield name, content.getvalue()
    deep = rng.integers(0, 2**16, (24, 20), dtype=np.uint16)
    for name in ("PNG", "TIFF"):
        content = io.BytesIO()
        Image.fromarray(deep).save(content, name)
        yield name, content.getvalue()


@pytest.mark.slow
def test_thousands_of_damaged_pictures_are_read_or_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)  # a damaged size asks for seconds of work

    def result(content):
        path.write_bytes(content)
        try:
            return read_image(path)
        except PictureError as error:
            return str(error)

    originals = list(pictures())
    assert len({name for name, _ in originals}) >= 14
    read, path = 0, tmp_path / "picture"
    for number, (name, content) in enumerate(originals):
        for i, changed in enumerate(mutations(content, -(-MUTATIONS // len(originals)), seed=number)):
            found = result(changed)
            if isinstance(found, str):
                assert found.startswith(str(path)), (name, i)
                assert "\n" not in found, (name, i)
            else:
                assert (found.shape, found.dtype) == ((32, 32, 3), np.uint8), (name, i)
                read += 1
    assert read > MUTATIONS / 10
    assert capfd.readouterr() == ("", "")
