"""The six files: only the right bytes pass, and every way for them to arrive leaves them right or not there."""

import contextlib
import errno
import hashlib
import io
import itertools
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import types

import numpy as np
import pytest
import small_cifar10 as small
from small_cifar10 import Server, good, part_of_it, status

from minires import cifar10
from minires.cifar10 import DataError, DownloadError, files
from minires.cifar10 import download as fetching
from minires.cifar10.__main__ import main
from minires.cifar10.files import download, verify

FILES = small.batches()
PACKED = small.archives(FILES)
PYTHON, BINARY = PACKED
PACKED_SHA256 = {name: hashlib.sha256(content).hexdigest() for name, content in PACKED.items()}
MUTATIONS = int(os.environ.get("MINIRES_TEST_MUTATIONS", "2000"))
QUICK = {"timeout": 0.2, "pauses": (0, 0), "slowest": 0}


@pytest.fixture(autouse=True)
def small_cifar10(monkeypatch):
    """Let CIFAR-10 be twelve made-up images, and nobody be asked for it but this machine."""
    for name, value in small.constants(FILES, PACKED).items():
        monkeypatch.setattr(files, name, value)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("MINIRES_CIFAR10_URL", raising=False)
    monkeypatch.setattr(files, "URLS", ())


def served(monkeypatch, *manners, names=(PYTHON,)):
    server = Server(PACKED, manners)
    monkeypatch.setattr(files, "URLS", [f"{server.url}/{name}" for name in names])
    return server


def put(folder, contents=FILES):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".minires.lock"}


# The command and the download, end to end


@pytest.mark.parametrize("names", [(PYTHON,), (BINARY,), (PYTHON, PYTHON)])
def test_a_download_brings_the_six_files_and_nothing_else(tmp_path, monkeypatch, names, capsys):
    with served(monkeypatch, good, names=names):
        place = download(tmp_path / "new" / "cache", **QUICK)
    assert place == tmp_path / "new" / "cache" / "cifar-10-batches-bin"
    assert content_of(place) == FILES
    assert {path.name for path in place.parent.iterdir()} == {"cifar-10-batches-bin", ".minires.lock"}
    announced, _ = capsys.readouterr().err.splitlines()
    assert announced == f"CIFAR-10 is not in {place.parent}: downloading it"


def test_the_first_use_downloads(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIRES_DATA", str(tmp_path))
    with served(monkeypatch, good) as server:
        first = cifar10.load(or_download=True)
        second = cifar10.load(or_download=True)
    assert len(server.requests) == 1
    assert (first.train_images == second.train_images).all()


def test_nothing_is_downloaded_unasked(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIRES_DATA", str(tmp_path))
    with served(monkeypatch, good) as server:
        with pytest.raises(DataError, match=r"^no CIFAR-10 in .*: python -m minires\.cifar10 download brings it there"):
            cifar10.load()
        with pytest.raises(DataError, match=r"data_batch_1\.bin is missing; .*; python -m minires\.cifar10 download /"):
            cifar10.load(tmp_path, or_download=True)
    assert server.requests == []


def test_the_command_downloads_and_verifies(tmp_path, monkeypatch, capsys):
    with served(monkeypatch, good):
        assert main(["download", str(tmp_path)]) == 0
    place = tmp_path / "cifar-10-batches-bin"
    assert capsys.readouterr().out == f"{place}: the six files are right, byte for byte\n"
    for folder in (tmp_path, place):
        assert main(["verify", str(folder)]) == 0
        assert capsys.readouterr() == (f"{place}: the six files are right, byte for byte\n", "")


def test_the_command_uses_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIRES_DATA", str(tmp_path))
    with served(monkeypatch, good):
        assert main(["download"]) == 0
    assert main(["verify"]) == 0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_option_may_stand_anywhere(tmp_path, place):
    arguments = ["verify", str(tmp_path)]
    arguments.insert(place, "--debug")
    with pytest.raises(DataError, match=r"data_batch_1\.bin is missing"):
        main(arguments)
    put(tmp_path)
    assert main(arguments) == 0


def test_the_command_line_of_the_module_is_quiet_but_for_its_line(tmp_path):
    command = [sys.executable, "-m", "minires.cifar10", "verify", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(
        rf"error: {tmp_path}: data_batch_1\.bin is missing; .*; test_batch\.bin is missing; .*\n", run.stderr
    )


def test_exit_codes_tell_the_users_mistakes_from_the_others(tmp_path, monkeypatch, capsys):
    with served(monkeypatch, status(404)):
        assert main(["download", str(tmp_path)]) == 1
    (error,) = capsys.readouterr().err.splitlines()[1:]
    assert error == (
        "error: CIFAR-10 could not be downloaded (127.0.0.1: HTTP 404 Not Found). By hand: get cifar-10-python.tar.gz "
        "or cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html on any machine, put it into "
        f"{tmp_path} as it is, and run python -m minires.cifar10 download {tmp_path}"
    )
    assert main(["verify", str(tmp_path)]) == 2
    with pytest.raises(DataError):
        main(["verify", str(tmp_path), "--debug"])
    with pytest.raises(SystemExit, match="2"):
        main(["unpack"])


def test_ctrl_c_keeps_what_has_come(tmp_path, monkeypatch, capsys):
    part = tmp_path / f"{PYTHON}.part"

    def ctrl_c(handler):
        while not (part.exists() and part.stat().st_size):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        handler.server.over.wait(10)

    with served(monkeypatch, part_of_it(0.5, ctrl_c)):
        assert main(["download", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("\ninterrupted; the same command continues with what has arrived\n")
    begun = part.stat().st_size
    with served(monkeypatch, good) as server:
        download(tmp_path, **QUICK)
    assert server.requests == [(f"/{PYTHON}", f"bytes={begun}-")]


@pytest.mark.parametrize(
    "manners",
    [
        [status(503), part_of_it(0.4, small.reset), small.no_ranges],
        [part_of_it(0.4), status(500), good],
        [part_of_it(0.3, small.stall), good],
        [part_of_it(0.1)],
    ],
)
def test_a_bad_line_brings_the_right_files(tmp_path, monkeypatch, manners):
    with served(monkeypatch, *manners):
        assert content_of(download(tmp_path, **QUICK)) == FILES


@pytest.mark.parametrize(
    "manner",
    [
        status(403),
        status(404),
        status(500),
        status(503),
        small.wrong_bytes,
        small.wrong_length,
        small.silent,
        small.not_http,
    ],
)
def test_a_failed_download_changes_nothing(tmp_path, monkeypatch, manner):
    damaged = put(tmp_path, FILES | {"data_batch_3.bin": b"damaged"})
    with served(monkeypatch, manner), pytest.raises(DownloadError, match=r"^CIFAR-10 could not be downloaded \(127"):
        download(tmp_path, timeout=0.05, pauses=(), slowest=0)
    assert content_of(damaged) == FILES | {"data_batch_3.bin": b"damaged"}


def test_an_address_of_ones_own(tmp_path, monkeypatch):
    with Server(PACKED, [good]) as server:
        monkeypatch.setenv("MINIRES_CIFAR10_URL", f"{server.url}/pub/{BINARY}?version=1")
        download(tmp_path, **QUICK)
    assert [path for path, _ in server.requests] == [f"/pub/{BINARY}?version=1"]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/cifar-10-python.tar.gz", "http://x/y.zip", "nonsense"])
def test_an_address_that_is_none(tmp_path, monkeypatch, url):
    monkeypatch.setenv("MINIRES_CIFAR10_URL", url)
    expected = "expected the address, by http or https, of cifar-10-python.tar.gz or cifar-10-binary.tar.gz"
    with pytest.raises(DataError, match=re.escape(f"MINIRES_CIFAR10_URL is {url}, {expected}")):
        download(tmp_path)


def test_the_built_in_addresses_are_of_one_archive_the_official_one_last(monkeypatch):
    monkeypatch.undo()
    assert len(files.URLS) == 4
    assert all(re.fullmatch(rf"https://.*/{PYTHON}(\?download=1)?", url) for url in files.URLS)
    assert files.URLS[-1].startswith("https://www.cs.toronto.edu/~kriz/")
    assert [size for size, _ in files.ARCHIVES.values()] == [170_498_071, 170_052_171]
    assert all(len(sha256) == 64 for _, sha256 in [*files.ARCHIVES.values(), *files.OFFICIAL.values()])


# Archives brought by hand


@pytest.mark.parametrize("name", [PYTHON, BINARY])
def test_an_archive_brought_by_hand_is_used_and_kept(tmp_path, name, capsys):
    put(tmp_path, {name: PACKED[name]})
    assert content_of(download(tmp_path)) == FILES
    assert (tmp_path / name).read_bytes() == PACKED[name]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PACKED[PYTHON][:-1], r"python\.tar\.gz has [\d,]+ bytes, expected [\d,]+: get it again, or delete it"),
        (PACKED[PYTHON] + b"x", r"has [\d,]+ bytes, expected"),
        (b"", "has 0 bytes, expected"),
        (bytes(len(PACKED[PYTHON])), r"python\.tar\.gz is damaged, its SHA-256 is wrong: get it again, or delete it"),
    ],
)
def test_an_archive_brought_by_hand_that_is_wrong_is_left_alone(tmp_path, content, message):
    put(tmp_path, {PYTHON: content})
    with pytest.raises(DataError, match=message):
        download(tmp_path)
    assert content_of(tmp_path) == {PYTHON: content}


def with_archive(monkeypatch, content, name=PYTHON):
    """Let other bytes be the archive that is expected, so that what is in it is looked at."""
    archives = small.constants(FILES, PACKED | {name: content})["ARCHIVES"]
    monkeypatch.setattr(files, "ARCHIVES", archives)
    return content


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"../data_batch_1.bin": b""}, "its data_batch_1.bin is not the one of CIFAR-10, the SHA-256 is wrong"),
        (FILES | {"data_batch_2.bin": FILES["data_batch_1.bin"]}, "its data_batch_2.bin is not the one of CIFAR-10"),
        ({name: FILES[name] for name in list(FILES)[:4]}, "its data_batch_5.bin is not the one of CIFAR-10"),
        (FILES | {"data_batch_1.bin": b""}, "its data_batch_1.bin is not the one of CIFAR-10, the SHA-256 is wrong"),
    ],
)
def test_an_archive_with_anything_wrong_in_it_puts_nothing_in_place(tmp_path, monkeypatch, files, message):
    put(tmp_path, {PYTHON: with_archive(monkeypatch, small.tar_gz(files))})
    put(tmp_path / "cifar-10-batches-bin", {"data_batch_1.bin": b"old"})
    with pytest.raises(DataError, match=message):
        download(tmp_path)
    assert content_of(tmp_path / "cifar-10-batches-bin") == {"data_batch_1.bin": b"old"}
    assert not list(tmp_path.parent.glob("data_batch*"))


LEFT_OVER = (f"{PYTHON}.part", f"{BINARY}.part")


@pytest.mark.parametrize("by_hand", [{BINARY: PACKED[BINARY]}, FILES, {}])
def test_what_earlier_attempts_left_goes_once_the_six_files_are_right(tmp_path, monkeypatch, by_hand):
    put(tmp_path, dict.fromkeys([*LEFT_OVER, "mine.part"], b"begun"))
    put(tmp_path, by_hand)
    place = tmp_path if by_hand is FILES else tmp_path / "cifar-10-batches-bin"
    put(place, {"data_batch_1.bin.part": b"begun"})
    with served(monkeypatch, good):
        assert download(tmp_path, **QUICK) == place
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names - {".minires.lock"} == {*FILES, *by_hand, "mine.part"}


def test_what_earlier_attempts_left_stays_while_a_file_is_wrong(tmp_path, monkeypatch):
    put(tmp_path, {LEFT_OVER[0]: PACKED[PYTHON][:1000]})
    with served(monkeypatch, status(404)), pytest.raises(DownloadError):
        download(tmp_path, **QUICK)
    assert content_of(tmp_path) == {LEFT_OVER[0]: PACKED[PYTHON][:1000]}


class Evil:
    def __reduce__(self):
        return print, ("the pickle has been run",)


def test_no_archive_is_opened_before_its_checksum_is_right(tmp_path, monkeypatch, capsys):
    """A pickle that would run, and a member that would lead out of the folder, in archives of the right size."""
    pickles = small.tar_gz({"data_batch_1": pickle.dumps(Evil()), "../../escaped": b"x"})
    archives = small.constants(FILES, {PYTHON: pickles, BINARY: pickles})["ARCHIVES"]
    wrong = {name: (size, PACKED_SHA256[name]) for name, (size, _) in archives.items()}
    monkeypatch.setattr(files, "ARCHIVES", wrong)
    for opening in ("tarfile.open", "pickle.load"):
        monkeypatch.setattr(f"minires.cifar10.files.{opening}", lambda *_, **__: pytest.fail("it was opened"))
    for name in (PYTHON, BINARY):
        folder = put(tmp_path / name, {name: pickles})
        with pytest.raises(DataError, match="is damaged, its SHA-256 is wrong"):
            download(folder)
        with Server({name: pickles}, [good]) as server:
            monkeypatch.setattr(files, "URLS", [f"{server.url}/{name}"])
            with pytest.raises(DownloadError, match="with a wrong SHA-256"):
                download(tmp_path / f"{name} fetched", **QUICK)
    assert "the pickle" not in capsys.readouterr().out


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_form_of_tar_will_do(tmp_path, monkeypatch, form):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", format=form, pax_headers={"comment": "x" * 600}) as tar:
        for name, content in FILES.items():
            info = tarfile.TarInfo(f"./a/{name}")
            info.size, info.mtime, info.uname = len(content), 1234567890.5, "kriz"
            tar.addfile(info, io.BytesIO(content))
    put(tmp_path, {PYTHON: with_archive(monkeypatch, packed.getvalue())})
    assert files.read_archive(tmp_path / PYTHON) == FILES


def test_names_in_an_archive_lead_nowhere(tmp_path, monkeypatch):
    """Members are found by the last part of their names and written to their own places, whatever their paths say."""
    packed = small.tar_gz(FILES | {"../../escaped": b"x", "/tmp/escaped": b"x"}, "../..")
    put(tmp_path / "data", {BINARY: with_archive(monkeypatch, packed, BINARY)})
    assert content_of(download(tmp_path / "data")) == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("name", [PYTHON, BINARY])
def test_both_archives_give_the_same_files(tmp_path, name):
    (tmp_path / name).write_bytes(PACKED[name])
    assert files.read_archive(tmp_path / name) == FILES


def test_an_array_stored_by_columns_is_read_by_columns(tmp_path, monkeypatch):
    content = FILES["test_batch.bin"]
    pixels = np.frombuffer(content, np.uint8).reshape(-1, 3073)[:, 1:]
    by_columns = small.pickle_of(content).replace(b"tb\x89T", b"tb\x88T")
    by_columns = by_columns.replace(pixels.tobytes(), pixels.tobytes(order="F"))
    put(tmp_path, {PYTHON: with_archive(monkeypatch, small.tar_gz({"test_batch": by_columns}))})
    assert files.read_archive(tmp_path / PYTHON) == {"test_batch.bin": content}


# What lies in the folder already


def test_only_what_is_wrong_is_replaced(tmp_path, monkeypatch):
    put(tmp_path, FILES | {"data_batch_2.bin": b"wrong", "notes.txt": b"mine"})
    (tmp_path / "test_batch.bin").unlink()
    untouched = (tmp_path / "data_batch_1.bin").stat()
    with served(monkeypatch, good):
        assert download(tmp_path, **QUICK) == tmp_path
    assert content_of(tmp_path) == FILES | {"notes.txt": b"mine"}
    assert (tmp_path / "data_batch_1.bin").stat() == untouched


def test_what_is_right_is_not_downloaded(tmp_path):
    put(tmp_path)
    assert download(tmp_path) == tmp_path


def test_a_stray_file_does_not_hide_the_complete_set_inside(tmp_path):
    put(tmp_path, {"test_batch.bin": b"stray"})
    place = put(tmp_path / "cifar-10-batches-bin")
    assert files.find(tmp_path) == verify(tmp_path) == download(tmp_path) == place
    assert len(cifar10.load(tmp_path).train_images) == 10
    put(tmp_path)
    assert files.find(tmp_path) == tmp_path
    (place / "data_batch_1.bin").unlink()
    (tmp_path / "data_batch_2.bin").unlink()
    assert files.find(tmp_path) == tmp_path


def test_verify_names_each_wrong_file(tmp_path):
    damaged = FILES["data_batch_2.bin"][:-1] + bytes([FILES["data_batch_2.bin"][-1] ^ 1])
    files = FILES | {"data_batch_2.bin": damaged, "data_batch_4.bin": b"x"}
    del files["data_batch_5.bin"]
    with pytest.raises(DataError) as error:
        verify(put(tmp_path, files))
    assert str(error.value) == (
        f"{tmp_path}: data_batch_2.bin is damaged: its SHA-256 is not that of CIFAR-10's data_batch_2.bin; "
        "data_batch_4.bin has 1 bytes, expected 6,146 (2 records of 3,073); data_batch_5.bin is missing; "
        f"python -m minires.cifar10 download {tmp_path} puts it right"
    )


def test_every_byte_of_a_file_counts(tmp_path):
    path = put(tmp_path) / "data_batch_1.bin"
    content = bytearray(path.read_bytes())
    with open(path, "r+b", buffering=0) as file:
        for place in range(len(content)):
            os.pwrite(file.fileno(), bytes([content[place] ^ 1]), place)
            with pytest.raises(DataError, match=r"data_batch_1\.bin is damaged"):
                files.read(tmp_path, {path.name: files.OFFICIAL[path.name]})
            os.pwrite(file.fileno(), content[place : place + 1], place)
    verify(tmp_path)


def test_thousands_of_mutated_files_are_refused(tmp_path):
    path = put(tmp_path) / "test_batch.bin"
    with open(path, "r+b", buffering=0) as file:
        for content in small.mutations(FILES[path.name], MUTATIONS):
            os.pwrite(file.fileno(), content, 0)
            os.ftruncate(file.fileno(), len(content))
            with pytest.raises(DataError) as error:
                files.read(tmp_path, {path.name: files.OFFICIAL[path.name]})
            assert str(error.value).startswith(f"{tmp_path}: {path.name} ")
            assert "\n" not in str(error.value)


def test_thousands_of_mutated_archives_are_refused(tmp_path):
    path = put(tmp_path, {BINARY: PACKED[BINARY]}) / BINARY
    with open(path, "r+b", buffering=0) as file:
        for content in small.mutations(PACKED[BINARY], MUTATIONS):
            os.pwrite(file.fileno(), content, 0)
            os.ftruncate(file.fileno(), len(content))
            with pytest.raises(DataError, match=r"has .* bytes, expected|is damaged, its SHA-256 is wrong"):
                files.read_archive(path)


def test_a_huge_file_is_not_read(tmp_path):
    put(tmp_path)
    os.truncate(tmp_path / "test_batch.bin", 1 << 40)  # a hole: it takes no room
    with small.memory_below(1_000_000), pytest.raises(DataError, match=r"test_batch\.bin has 1,099,511,627,776 bytes"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda path: path.mkdir(), "is no plain file, expected one of 6,146 bytes"),
        (os.mkfifo, "is no plain file"),
        (lambda path: path.symlink_to("/dev/zero"), "is no plain file"),
        (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
        (lambda path: path.symlink_to("nowhere"), "is missing"),
    ],
)
def test_what_is_no_file_is_named(tmp_path, make, fault):
    put(tmp_path)
    (tmp_path / "data_batch_2.bin").unlink()
    make(tmp_path / "data_batch_2.bin")
    with pytest.raises(DataError, match=rf"data_batch_2\.bin {fault}"):
        verify(tmp_path)
    with pytest.raises(DataError, match=rf"data_batch_2\.bin {fault}"):
        cifar10.load(tmp_path)


# Permissions and full disks


@contextlib.contextmanager
def folder_of_root():
    """A folder that nobody may write into, seen with the rights of nobody if the tests run as root."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)
        yield folder, (lambda: os.seteuid(65534)) if root else (lambda: None)
        if root:
            os.seteuid(0)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)


def test_a_file_that_may_not_be_read():
    with folder_of_root() as (folder, drop_rights):
        put(folder)
        (folder / "data_batch_3.bin").chmod(0)
        drop_rights()
        with pytest.raises(DataError, match=r"data_batch_3\.bin cannot be read: Permission denied"):
            cifar10.load(folder)


def test_a_folder_that_may_not_be_entered(monkeypatch):
    with folder_of_root() as (folder, drop_rights):
        monkeypatch.setenv("MINIRES_DATA", str(put(folder / "closed")))
        (folder / "closed").chmod(0)
        drop_rights()
        for command in (cifar10.load, lambda: verify(folder / "closed")):
            with pytest.raises(DataError) as error:
                command()
            assert str(error.value) == (
                f"{folder / 'closed'} cannot be entered: Permission denied, expected the folder with the six files of "
                "CIFAR-10: name another one, or bring them by python -m minires.cifar10 download DIR"
            )


def test_a_folder_that_may_not_be_written(monkeypatch):
    with folder_of_root() as (folder, drop_rights):
        folder.chmod(0o555)
        drop_rights()
        for place in (folder, folder / "new"):
            with pytest.raises(
                DataError, match=r"^/.*: Permission denied; CIFAR-10 needs a folder that can be read and"
            ):
                download(place)


def test_a_folder_that_does_not_exist_is_named(tmp_path, capsys):
    message = (
        f"{tmp_path / 'd3'} does not exist, expected the folder with the six files of CIFAR-10: name another one, or "
        f"bring them by python -m minires.cifar10 download {tmp_path / 'd3'}"
    )
    with pytest.raises(DataError) as error:
        cifar10.load(tmp_path / "d3")
    assert str(error.value) == message
    assert main(["verify", str(tmp_path / "d3")]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder(tmp_path):
    put(tmp_path)
    path = tmp_path / "data_batch_1.bin"
    for command in (verify, cifar10.load):
        with pytest.raises(DataError) as error:
            command(path)
        assert str(error.value) == (
            f"{path} is no folder, expected the folder with the six files of CIFAR-10: name another one, or bring them "
            "by python -m minires.cifar10 download DIR"
        )


def test_a_complete_folder_need_not_be_written():
    with folder_of_root() as (folder, drop_rights):
        put(folder, FILES | {f"{PYTHON}.part": b"left over"}).chmod(0o555)
        drop_rights()
        assert download(folder) == folder


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match=f"^{tmp_path / 'file'}: File exists; CIFAR-10 needs a folder"):
        download(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_too_little_space_is_known_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SPACE", 1 << 60)
    with pytest.raises(DownloadError, match=rf"^{tmp_path}: only [\d]+ MB are free; CIFAR-10 needs .* MB free"):
        download(tmp_path)


def test_a_disk_that_does_not_tell_its_size_is_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: types.SimpleNamespace(total=0, free=0))
    with served(monkeypatch, good):
        assert content_of(download(tmp_path, **QUICK)) == FILES


@pytest.mark.parametrize("written", [*range(0, 37_000, 4_000)])
def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path, monkeypatch, written):
    """The disk is full after so many bytes of the six files; the archive had its place already."""
    room = written

    class FullDisk(io.FileIO):
        def write(self, data):
            nonlocal room
            room -= len(data)
            if room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
            return super().write(data)

    def open_full(path, mode="r"):
        return FullDisk(path, mode) if mode == "wb" else open(path, mode)

    before = FILES | {"data_batch_1.bin": b"old", PYTHON: PACKED[PYTHON]}
    del before["test_batch.bin"]
    put(tmp_path, before)
    monkeypatch.setattr(files, "open", open_full, raising=False)
    if written >= 2 * len(FILES["test_batch.bin"]):
        assert download(tmp_path) == tmp_path
        return
    with pytest.raises(
        DownloadError, match=r"\.bin\.part: No space left on device; CIFAR-10 needs a folder .* MB free"
    ):
        download(tmp_path)
    assert content_of(tmp_path) == before


def test_a_disk_that_is_full_for_the_archive(tmp_path, monkeypatch):
    def full(path, mode="r"):
        if mode == "ab" and not path.name.startswith("."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return open(path, mode)

    monkeypatch.setattr(fetching, "open", full, raising=False)
    with (
        served(monkeypatch, good),
        pytest.raises(DownloadError, match=r"\.gz\.part: No space left on device; CIFAR-10"),
    ):
        download(tmp_path, **QUICK)


# Several processes, and killed ones


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)  # NumPy has threads; the child has none
def test_a_process_killed_at_any_step_leaves_nothing_wrong(tmp_path, monkeypatch):
    """Killed for good, by os._exit in a child process, at each file opened for writing, flushed or moved."""
    steps = 0

    def killed_at(step, function):
        def counting(*args):
            nonlocal steps
            steps += function is not open or "w" in args[1]
            if steps == step:
                os._exit(9)
            return function(*args)

        return counting

    for step in itertools.count(1):
        folder = put(tmp_path / str(step), {BINARY: PACKED[BINARY]})
        if not (child := os.fork()):
            monkeypatch.setattr(files, "open", killed_at(step, open), raising=False)
            for name in ("fsync", "replace"):
                monkeypatch.setattr(os, name, killed_at(step, getattr(os, name)))
            try:
                download(folder)
            finally:
                os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        place = folder / "cifar-10-batches-bin"
        if files.find(folder):
            verify(folder)
        for name in FILES:
            assert not (place / name).exists() or (place / name).read_bytes() == FILES[name]
        assert content_of(download(folder)) == FILES
        if code == 0:
            break
    assert step == 19  # six files opened, six flushed, six moved, and a run that nothing stopped


DOWNLOAD = """
import sys
sys.path.insert(0, {tests!r})
import small_cifar10 as small
from minires.cifar10 import files
from minires.cifar10.__main__ import main
contents = small.batches()
for name, value in small.constants(contents, small.archives(contents)).items():
    setattr(files, name, value)
sys.exit(main(["download", {folder!r}]))
"""


def start(folder, url):
    code = DOWNLOAD.format(tests=str(pathlib.Path(__file__).parent), folder=str(folder))
    environment = os.environ | {"MINIRES_CIFAR10_URL": f"{url}/{PYTHON}", "no_proxy": "*"}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_three_processes_at_once_leave_one_good_copy(tmp_path):
    with Server(PACKED, [good]) as server:
        processes = [start(tmp_path, server.url) for _ in range(3)]
        ends = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], ends
    assert len(server.requests) == 1
    assert content_of(verify(tmp_path)) == FILES


def test_a_killed_process_leaves_no_lock_and_its_bytes_are_used(tmp_path):
    with Server(PACKED, [part_of_it(0.5, small.stall), good]) as server:
        killed = start(tmp_path, server.url)
        part = tmp_path / f"{PYTHON}.part"
        while killed.poll() is None and not (part.exists() and part.stat().st_size):
            time.sleep(0.01)
        waiting = start(tmp_path, server.url)
        assert waiting.stderr.readline() == f"another process is at work in {tmp_path}; waiting for it\n"
        killed.kill()
        killed.communicate()
        assert waiting.wait(timeout=60) == 0, waiting.communicate()
        waiting.communicate()
    assert server.requests[1][1].startswith("bytes=")
    assert content_of(verify(tmp_path)) == FILES


# Odd surroundings


def test_without_a_home_the_way_out_is_named(tmp_path, monkeypatch):
    """As under docker run -u 1234: neither HOME nor an entry for the user."""
    monkeypatch.delenv("MINIRES_DATA", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(DataError, match=r"there is no home folder here, .*: let MINIRES_DATA name one"):
        cifar10.load()
    assert main(["verify"]) == 2


def test_a_tilde_in_the_name_of_the_default_folder_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("MINIRES_DATA", "~/d")
    put(tmp_path / "d")
    assert len(cifar10.load().train_images) == 10


def test_commands_in_messages_can_be_pasted(tmp_path):
    folder = put(tmp_path / "my data", {"test_batch.bin": b""})
    command = re.escape(f"python -m minires.cifar10 download '{folder}'")
    with pytest.raises(DataError, match=command):
        verify(folder)
    with pytest.raises(DataError, match=command):
        cifar10.load(folder)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_names_that_the_console_lacks_are_printed_with_backslashes(tmp_path, encoding):
    command = [sys.executable, "-m", "minires.cifar10", "verify", tmp_path / "数据"]
    run = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, text=True)
    assert run.returncode == 2
    assert r"\u6570\u636e does not exist" in run.stderr


@pytest.mark.parametrize("closed", [False, True])
def test_a_download_without_standard_error(tmp_path, monkeypatch, closed):
    stream = io.StringIO() if closed else None
    if closed:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    with served(monkeypatch, good):
        assert content_of(download(tmp_path, **QUICK)) == FILES


def test_a_folder_that_can_be_entered_but_not_listed_will_do():
    with folder_of_root() as (folder, drop_rights):
        put(folder).chmod(0o711)
        drop_rights()
        assert verify(folder) == folder


def test_a_tilde_on_the_command_line_is_the_home(tmp_path, monkeypatch, capsys):
    """A shell leaves it alone within quotes, and on Windows."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    put(tmp_path / "d")
    assert main(["verify", "~/d"]) == 0
    assert str(tmp_path / "d") in capsys.readouterr().out


def test_a_home_that_is_unknown_is_named_with_the_variable_that_asks_for_it(monkeypatch):
    monkeypatch.setenv("MINIRES_DATA", "~nosuchuser/d")
    with pytest.raises(DataError, match="no home folder for MINIRES_DATA, which is ~nosuchuser/d: let MINIRES_DATA"):
        cifar10.load()
