"""Downloads: whatever a server does, the file comes right or one line says why not. No test leaves this machine."""

import errno
import hashlib
import io
import re
import sys
import threading
import types

import numpy as np
import pytest
import small_cifar10 as small
from small_cifar10 import Server, good, part_of_it, status

from minires.cifar10 import download
from minires.cifar10.download import DownloadError, fetch, lock

BODY = np.random.default_rng(1).bytes(20_000)
QUICK = {"timeout": 0.2, "pauses": (0, 0), "slowest": 0}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def bring(servers, folder, **options):
    """Fetch the file from one of several servers."""
    urls, part = [f"{server.url}/file" for server in servers], folder / "file.part"
    return fetch(urls, part, len(BODY), hashlib.sha256(BODY).hexdigest(), **QUICK | options)


def fetched(folder, *manners, begun=None, **options):
    """Fetch from a server with these manners; return the bytes and the ranges that were asked for."""
    if begun is not None:
        (folder / "file.part").write_bytes(begun)
    with Server({"file": BODY}, manners) as server:
        path = bring([server], folder, **options)
    assert path == folder / "file.part"
    assert [entry.name for entry in folder.iterdir()] == ["file.part"]
    return path.read_bytes(), [asked for _, asked in server.requests]


def test_a_file_comes_whole(tmp_path, capsys):
    assert fetched(tmp_path, good) == (BODY, [None])
    assert capsys.readouterr().err == "downloading file, 0.0 MB, from 127.0.0.1\n"


@pytest.mark.parametrize("manner", [small.no_ranges, small.no_length, small.chunked])
@pytest.mark.parametrize("begun", [None, BODY[:777]])
def test_servers_without_ranges_or_lengths_will_do(tmp_path, manner, begun):
    assert fetched(tmp_path, manner, begun=begun)[0] == BODY


def test_a_download_goes_on_where_another_process_left_off(tmp_path, capsys):
    assert fetched(tmp_path, good, begun=BODY[:12_345]) == (BODY, ["bytes=12345-"])
    assert "the rest after 0.0 MB" in capsys.readouterr().err


def test_a_download_that_is_complete_asks_nobody(tmp_path):
    assert fetched(tmp_path, good, begun=BODY) == (BODY, [])


@pytest.mark.parametrize("begun", [b"wrong" * 100, b"wrong" * 4000, b"wrong" * 5000])
def test_a_wrong_beginning_is_thrown_away(tmp_path, begun):
    content, asked = fetched(tmp_path, good, begun=begun)
    assert content == BODY
    assert asked[-1] is None


@pytest.mark.parametrize("then", [None, small.reset, small.stall], ids=["closes", "resets", "stalls"])
def test_half_a_file_is_continued_at_once(tmp_path, then):
    content, asked = fetched(tmp_path, part_of_it(0.5, then), good, pauses=())
    assert content == BODY
    assert asked[0] is None
    assert re.fullmatch(r"bytes=\d+-", asked[1])


def test_many_short_pieces_make_a_whole(tmp_path):
    content, asked = fetched(tmp_path, part_of_it(0.09), pauses=())
    assert content == BODY
    assert len(asked) == 12


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_server_in_trouble_is_asked_again_after_a_pause(tmp_path, code, monkeypatch):
    pauses = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    content, asked = fetched(tmp_path, status(code), status(code), good, pauses=(1, 2, 4))
    assert content == BODY
    assert len(asked) == 3
    assert pauses == [0, 1, 2]


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 416, 204])
def test_a_server_without_the_file_is_not_asked_again(tmp_path, code):
    with Server({"file": BODY}, [status(code)]) as server, pytest.raises(DownloadError, match=r"^127\.0\.0\.1: "):
        bring([server], tmp_path)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("manner", "reason", "requests"),
    [
        (status(403), "HTTP 403 Forbidden", 1),
        (status(404), "HTTP 404 Not Found", 1),
        (status(500), "HTTP 500 Internal Server Error", 3),
        (status(503), "HTTP 503 Service Unavailable", 3),
        (small.redirect_to_itself, "HTTP 302 Found", 5),
        (part_of_it(0), "ended the connection after 0 of 20,000 bytes", 3),
        (part_of_it(0.002), "ended the connection after 120 of 20,000 bytes", 3),
        (part_of_it(0.002, small.stall), r"no answer within 0\.2 s", 3),
        (part_of_it(0, small.reset), "Connection reset by peer", 3),
        (small.silent, r"no answer within 0\.2 s", 3),
        (small.not_http, r".+", 3),
        (small.broken_chunks, r"IncompleteRead\(.*\)", 4),
        (small.wrong_bytes, "sent 20,000 bytes with a wrong SHA-256", 1),
        (small.wrong_length, "offers 20 bytes, expected 20,000", 1),
        (small.too_much_of_another_file, "sent 20,000 bytes with a wrong SHA-256", 1),
    ],
)
def test_a_download_that_fails_says_why_in_one_line(tmp_path, manner, reason, requests):
    with Server({"file": BODY}, [manner]) as server, pytest.raises(DownloadError) as error:
        bring([server], tmp_path)
    assert re.fullmatch(rf"127\.0\.0\.1: {reason}", str(error.value))
    assert len(server.requests) == requests


def test_another_range_than_asked_for_is_refused(tmp_path):
    with pytest.raises(DownloadError, match="offers 110 bytes, expected 20,000"):
        fetched(tmp_path, small.another_range, begun=BODY[:100])


@pytest.mark.parametrize("begun", [None, BODY[:777]])
def test_what_comes_after_the_last_byte_is_not_read(tmp_path, begun):
    assert fetched(tmp_path, small.too_much if begun is None else small.too_much_of_the_rest, begun=begun)[0] == BODY


def test_a_trickle_counts_as_a_stall(tmp_path):
    with pytest.raises(DownloadError, match=r"sends only [\d,]+ bytes a second"):
        fetched(tmp_path, part_of_it(0, small.trickle), timeout=0.1, slowest=10_000, pauses=())


def test_a_server_that_nobody_runs(tmp_path):
    with Server({}, [good]) as server:
        pass
    with pytest.raises(DownloadError, match=r"^127\.0\.0\.1: Connection refused$"):
        bring([server], tmp_path)


def test_a_name_that_is_not_known(tmp_path, monkeypatch):
    def no_such_name(*_, **__):
        raise download.socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(download.socket, "getaddrinfo", no_such_name)
    with pytest.raises(DownloadError, match=r"^mirror\.invalid: the name cannot be looked up$"):
        fetch(["https://mirror.invalid/file"], tmp_path / "file.part", 1, "", **QUICK)


def test_the_next_address_goes_on_with_what_the_first_has_sent(tmp_path):
    broken = Server({"file": BODY}, [part_of_it(0.5, small.reset), status(503)])
    with broken, Server({"file": BODY}, [good]) as whole:
        path = bring([broken, whole], tmp_path)
    assert path.read_bytes() == BODY
    assert len(broken.requests) == 2
    assert whole.requests != [("/file", None)]


def test_what_a_wrong_mirror_has_sent_does_not_spoil_the_next(tmp_path):
    def wrong_half(handler, body):
        part_of_it(0.5)(handler, bytes(len(body)))

    wrong = Server({"file": BODY}, [wrong_half, status(404)])
    with wrong, Server({"file": BODY}, [good]) as whole:
        path = bring([wrong, whole], tmp_path)
    assert path.read_bytes() == BODY
    assert whole.requests == [("/file", "bytes=10000-"), ("/file", None)]


@pytest.mark.parametrize(
    ("manner", "reason"),
    [
        (small.start_of_it(0.5), "ended the connection after 10,000 of 20,000 bytes"),
        (small.start_of_it(0.75), "ended the connection after 15,000 of 20,000 bytes"),
        (small.login_page, "ended the connection after 20 of 20,000 bytes"),
    ],
)
def test_an_address_that_cannot_go_on_leaves_what_has_come(tmp_path, manner, reason):
    (tmp_path / "file.part").write_bytes(BODY[:15_000])
    with (
        Server({"file": BODY}, [manner]) as bad,
        pytest.raises(DownloadError, match=rf"^127\.0\.0\.1: {reason}$"),
    ):
        bring([bad], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file.part": BODY[:15_000]}
    with Server({"file": BODY}, [manner]) as bad, Server({"file": BODY}, [good]) as whole:
        path = bring([bad, whole], tmp_path)
    assert path.read_bytes() == BODY
    assert whole.requests == [("/file", "bytes=15000-")]


def test_every_address_has_its_reason(tmp_path):
    first, second = Server({"file": BODY}, [status(404)]), Server({"file": BODY}, [small.wrong_bytes])
    with (
        first,
        second,
        pytest.raises(DownloadError, match=r"^\S+: HTTP 404 Not Found; \S+: sent 20,000 bytes with a w"),
    ):
        bring([first, second], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [0, 9_000])
def test_a_full_disk_is_the_disks_fault(tmp_path, monkeypatch, after):
    class FullDisk(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > after:
                raise OSError(28, "No space left on device")
            return super().write(data)

    real_open = open
    monkeypatch.setattr(
        download, "open", lambda path, mode: (FullDisk if mode == "ab" else real_open)(path, mode), False
    )
    with pytest.raises(OSError, match="No space left on device"):
        fetched(tmp_path, good)


def test_a_lock_waits_for_the_one_inside(tmp_path, capsys):
    order = []

    def second():
        with lock(tmp_path / "lock"):
            order.append("second")

    with lock(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        while "waiting" not in capsys.readouterr().err:
            pass
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_file_system_without_locks_stops_nothing(tmp_path, monkeypatch):
    def refuse(file):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(download, "_take", refuse)
    with lock(tmp_path / "lock"):
        (tmp_path / "inside").touch()
    assert (tmp_path / "inside").exists()


def test_a_lock_on_windows(tmp_path, monkeypatch, capsys):
    answers = [PermissionError(13, "Permission denied"), PermissionError(13, "Permission denied"), None]

    def locking(fd, mode, count):
        assert (mode, count) == (2, 1)
        if answer := answers.pop(0):
            raise answer

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    with lock(tmp_path / "lock"):
        assert answers == []
    assert capsys.readouterr().err == f"another process is at work in {tmp_path}; waiting for it\n"
