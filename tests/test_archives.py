"""The two archives: read right, and whatever else an archive or a pickle may try, refused in one line."""

import gzip
import io
import pickle
import re
import struct
import tarfile

import numpy as np
import pytest
import small_cifar10 as small

from minires import archives, cifar10_files
from minires.archives import DataError, read_archive, read_pickle

FILES = small.batches()
PICKLE = small.pickle_of(FILES["test_batch.bin"])


def read(path, content):
    path.write_bytes(content)
    return dict(read_archive(path, cifar10_files.SHA256, small.RECORDS))


@pytest.mark.parametrize("name", ["cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"])
def test_both_archives_give_the_same_files(tmp_path, name):
    assert read(tmp_path / name, small.archives(FILES)[name]) == FILES


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_form_of_tar_will_do(tmp_path, form):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", format=form, pax_headers={"comment": "x" * 600}) as tar:
        for name, content in FILES.items():
            info = tarfile.TarInfo(f"./a/{name}")
            info.size, info.mtime, info.uname = len(content), 1234567890.5, "kriz"
            tar.addfile(info, io.BytesIO(content))
    assert read(tmp_path / "a.tar.gz", packed.getvalue()) == FILES


def test_pythons_own_unpickler_reads_the_made_up_pickle_alike():
    batch = pickle.loads(PICKLE, encoding="latin1")
    records = np.frombuffer(FILES["test_batch.bin"], np.uint8).reshape(-1, 3073)
    assert batch["labels"] == records[:, 0].tolist()
    np.testing.assert_array_equal(batch["data"], records[:, 1:])
    said = read_pickle(PICKLE)
    assert said.keys() == batch.keys()
    assert (said["labels"], said["filenames"]) == (batch["labels"], batch["filenames"])


def test_an_array_stored_by_columns_is_read_by_columns(tmp_path):
    content = FILES["test_batch.bin"]
    pixels = np.frombuffer(content, np.uint8).reshape(-1, 3073)[:, 1:]
    by_columns = PICKLE.replace(b"tb\x89T", b"tb\x88T").replace(pixels.tobytes(), pixels.tobytes(order="F"))
    np.testing.assert_array_equal(pickle.loads(by_columns, encoding="latin1")["data"], pixels)
    assert read(tmp_path / "a.tar.gz", small.tar_gz({"test_batch": by_columns})) == {"test_batch.bin": content}


def member(name, kind, target="/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return {name: info}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"../../evil": b"x"}, r"'cifar-10-batches-bin/\.\./\.\./evil' leads out of the folder; nothing was unpacked"),
        ({"a/../../test_batch.bin": FILES["test_batch.bin"]}, "leads out of the folder"),
        ({"..\\evil": b"x"}, "leads out of the folder"),
        (member("x", tarfile.SYMTYPE), "'x' is neither a file nor a folder, but of type b'2'; nothing was unpacked"),
        (member("x", tarfile.LNKTYPE), "of type b'1'"),
        (member("x", tarfile.CHRTYPE), "of type b'3'"),
        (member("x", tarfile.BLKTYPE), "of type b'4'"),
        (member("x", tarfile.FIFOTYPE), "of type b'6'"),
        (member("/etc/x", tarfile.DIRTYPE), "'/etc/x.*' leads out of the folder"),
        (member("C:/x", tarfile.DIRTYPE), "'C:/x.*' leads out of the folder"),
        ({"a/test_batch.bin": FILES["test_batch.bin"], "b/test_batch.bin": b""}, "holds 'test_batch.bin' twice"),
        ({"test_batch.bin": b"", "test_batch": PICKLE}, "holds 'test_batch' twice"),
        ({"test_batch.bin": bytes(40_000_001)}, r"'test_batch.bin' has 40,000,001 bytes, at most 40,000,000 expected"),
        ({"test_batch": b"no pickle"}, "'test_batch' is no batch of CIFAR-10: "),
        ({"line\nbreak/../x": b""}, r"line\\nbreak/\.\./x' leads out of the folder"),
    ],
)
def test_what_has_no_place_in_an_archive_is_refused(tmp_path, files, message):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / "a.tar.gz", small.tar_gz(files))
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == [*before, tmp_path / "a.tar.gz"]


def test_a_bomb_is_stopped(tmp_path):
    """A gigabyte of zeros in a megabyte, claimed as a file that nobody wants."""
    info = tarfile.TarInfo("a/zeros")
    info.size = (1 << 33) - 1
    path = tmp_path / "bomb.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(400):
            file.write(bytes(1_000_000))
    with (
        small.memory_below(10_000_000),
        pytest.raises(DataError, match="unpacks to more than 300,000,000 bytes, too much for CIFAR-10"),
    ):
        dict(read_archive(path, cifar10_files.SHA256, small.RECORDS))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends early: it is not complete"),
        (b"<html>", "is no gzip archive, or a damaged one: Not a gzipped file"),
        (gzip.compress(b"x" * 512), "is no tar archive, or a damaged one: the checksum of a header is wrong"),
        (small.tar_gz(FILES)[:-9000], "ends early"),
        (gzip.compress(gzip.decompress(small.tar_gz(FILES))[:6000]), "ends early"),
        (small.tar_gz(FILES)[:300] + bytes(100) + small.tar_gz(FILES)[400:], "damaged"),
    ],
)
def test_a_damaged_archive_is_named(tmp_path, content, message):
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "a.tar.gz")) + ".*" + message):
        read(tmp_path / "a.tar.gz", content)


def test_a_size_that_is_no_octal_number(tmp_path):
    header = tarfile.TarInfo("a/x")
    header.size = 1 << 40
    with pytest.raises(DataError, match=r"'a/x' has the size .*, expected an octal number"):
        read(tmp_path / "a.tar.gz", gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024)))


class Evil:
    def __reduce__(self):
        return print, ("the pickle has been run",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_something_runs_nothing(protocol, capsys):
    with pytest.raises(ValueError, match=r"asks for|does not use"):
        read_pickle(pickle.dumps(Evil(), protocol))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cos\nsystem\n(U\x02lstR.", "it asks for 'os system'"),
        (b"cnumpy\nfromfile\n.", "it asks for 'numpy fromfile'"),
        (b"cnumpy\nndarray\nK\x01\x85R.", "it calls what cannot be called"),
        (b"K\x01K\x01\x85R.", "it calls what cannot be called"),
        (b"K\x01K\x02b.", "it sets a state of what has none"),
        (b"}K\x01K\x02s.", "a key that is no string"),
        (b"](U\x01aK\x01u.", "a key that is no string"),
        (b"0.", "opcode '0', which CIFAR-10 does not use"),
        (b"]" * 200_001, "more than 200,000 opcodes"),
        (b"N", "a pickle without an end"),
        (b".", "list index out of range"),
        (b"a.", "pop from empty list"),
        (b"e.", "list index out of range"),
        (b"h\x01.", "1"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", r"opcode '\\x8e', which"),
        (b"r\xff\xff\xff\x7f.", "list index out of range"),
        (b"T\xff\xff\xff\x7fabc.", "expected 2147483647 bytes in a string4, but only 4 remain"),
    ],
)
def test_a_pickle_that_says_something_else_is_refused(content, message):
    with pytest.raises(archives._FAULTS, match=message):
        read_pickle(content)


def test_a_claim_of_gigabytes_costs_nothing():
    """Five bytes, for which Python's own Unpickler sets aside a list of 32 gigabytes."""
    with small.memory_below(100_000):
        read_pickle(b"Nr\xff\xff\xff\x7f.")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (b"N.", "it holds no array of data"),
        (b"}.", "it holds no array of data"),
        (small.pickle_of(FILES["test_batch.bin"], data=b"N"), "it holds no array of data"),
        (small.pickle_of(FILES["test_batch.bin"], labels=[b"K\x0a", b"K\x01"]), "labels are not 2 numbers from 0 to 9"),
        (small.pickle_of(FILES["test_batch.bin"], labels=[b"K\x01"]), "labels are not 2 numbers"),
        (small.pickle_of(FILES["test_batch.bin"], labels=[b"\x88", b"\x88"]), "labels are not 2 numbers"),
        (PICKLE.replace(b"U\x02u1", b"U\x02i1"), "its data are not 2 rows of 3,072 bytes"),
        (small.pickle_of(FILES["test_batch.bin"][:3073]), "its data are not 2 rows of 3,072 bytes"),
        (PICKLE.replace(b"M" + struct.pack("<H", 2), b"M" + struct.pack("<H", 3)), "its data are not 2 rows"),
    ],
)
def test_a_batch_of_another_kind_is_refused(tmp_path, batch, message):
    with pytest.raises(DataError, match=f"'data_batch_2' is no batch of CIFAR-10: .*{message}"):
        read(tmp_path / "a.tar.gz", small.tar_gz({"data_batch_2": batch}))


def test_ten_thousand_mutated_pickles_are_refused_or_read():
    """Nothing checks these bytes beforehand: the machine itself is attacked."""
    read_in_full = 0
    with small.memory_below(1_000_000):
        for content in small.mutations(PICKLE, 10_000):
            try:
                records = archives._records(read_pickle(content), small.RECORDS)
            except archives._FAULTS:
                continue
            assert len(records) == len(FILES["test_batch.bin"])  # other pixels, which only a checksum can tell
            read_in_full += 1
    assert 0 < read_in_full < 10_000


@pytest.mark.parametrize("name", ["cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"])
@pytest.mark.parametrize("layer", ["gzip", "tar"])
def test_ten_thousand_mutated_archives_are_refused_or_read(monkeypatch, name, layer):
    """2,500 of each kind. No checksum stands before the parser."""
    packed = small.archives(FILES)[name]
    if layer == "tar":
        packed = gzip.decompress(packed)
        monkeypatch.setattr(archives.gzip, "open", lambda path: io.BytesIO(content))
    else:
        real_open = gzip.open
        monkeypatch.setattr(archives.gzip, "open", lambda path: real_open(io.BytesIO(content)))
    messages = []
    with small.memory_below(5_000_000):
        for content in small.mutations(packed, 2_500):
            try:
                files = dict(read_archive(name, cifar10_files.SHA256, small.RECORDS))
                assert all(type(content) is bytes for content in files.values())
            except DataError as error:
                messages.append(str(error))
    assert 500 < len(messages) < 2_500
    assert all(message.startswith(name) and "\n" not in message for message in messages)
