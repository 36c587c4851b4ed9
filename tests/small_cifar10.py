"""A small CIFAR-10 for tests: made-up files, both archives of them, and a server on this machine that misbehaves."""

import contextlib
import gzip
import hashlib
import http.server
import io
import socket
import struct
import tarfile
import threading
import tracemalloc

import numpy as np

from minires.cifar10 import files as cifar10_files

RECORDS = 2


def batches(seed=0):
    """Return six binary files, by name."""
    rng = np.random.default_rng(seed)
    files = {}
    for name in cifar10_files.OFFICIAL:
        records = rng.integers(0, 256, (RECORDS, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        files[name] = records.tobytes()
    return files


def pickle_of(content):
    """Write a batch as the Python 2 of 2009 did, opcode by opcode."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    count = len(records)
    labels = [b"K" + bytes([label]) for label in records[:, 0]]
    pixels = records[:, 1:].tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87R(K\x01"
        + (b"M" + struct.pack("<H", count) + b"M\x00\x0c\x86")  # (count, 3072)
        + (b"cnumpy\ndtype\nq\x0eU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89")
        + (b"T" + struct.pack("<i", len(pixels)) + pixels + b"tb")
    )
    return (
        b"\x80\x02}q\x01("
        + (text(b"batch_label") + b"q\x02" + text(b"training batch 1 of 5") + b"q\x03")
        + (text(b"labels") + b"q\x04]q\x05(" + b"".join(labels) + b"e")
        + (text(b"data") + b"q\x06" + array)
        + (text(b"filenames") + b"]r\x00\x01\x00\x00(" + text(b"camion_s_000148.png") + b"q\x0ah\x0ae")
        + b"u."
    )


def tar_gz(files, folder="cifar-10-batches-bin"):
    """Pack files by name. The same files, the same bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        directory = tarfile.TarInfo(folder)
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(packed.getvalue(), 1, mtime=0)


def archives(files):
    """Return both archives of six binary files, by name."""
    pickles = {name.removesuffix(".bin"): pickle_of(content) for name, content in files.items()}
    more = {"readme.html": b"<html></html>"}
    return {
        "cifar-10-python.tar.gz": tar_gz(pickles | more, "cifar-10-batches-py"),
        "cifar-10-binary.tar.gz": tar_gz(files | more),
    }


def constants(files, packed):
    """Return what minires.cifar10.files would hold if CIFAR-10 were these files."""
    return {
        "SPACE": 100_000,
        "OFFICIAL": {name: (RECORDS, hashlib.sha256(content).hexdigest()) for name, content in files.items()},
        "ARCHIVES": {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in packed.items()},
    }


@contextlib.contextmanager
def memory_below(limit):
    """Assert that what happens inside never holds more than so many bytes at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def mutations(content, count, seed=0):
    """Yield `count` versions of some bytes, each with one to three random faults and none the original."""
    rng = np.random.default_rng(seed)
    telling = [b"\0", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x0a", b"7" * 11, b"(", b"r", b"T"]
    while count:
        changed = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            start = int(rng.integers(len(changed) + 1))
            length = int(rng.integers(1, 1 << rng.integers(1, 13)))
            match rng.integers(8):
                case 0 | 1:
                    changed[start : start + 1] = rng.bytes(1)
                case 2:
                    changed[start : start + length] = rng.bytes(length)
                case 3:
                    del changed[start : start + length]
                case 4:
                    changed[start:start] = rng.bytes(length)
                case 5:
                    changed[start:start] = changed[start : start + length]
                case 6:
                    value = telling[rng.integers(len(telling))]
                    changed[start : start + len(value)] = value
                case 7:
                    del changed[start:]
        if changed != content:
            count -= 1
            yield bytes(changed)


class Server:
    """Serve files on this machine; each request takes the next manner, and the last manner stays."""

    def __init__(self, files, manners):
        self.files, self.manners, self.requests, self.over = files, list(manners), [], threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append((self.path, self.headers.get("Range")))
                manner = server.manners[0] if len(server.manners) == 1 else server.manners.pop(0)
                with contextlib.suppress(OSError):  # the client hangs up
                    manner(self, server.files[self.path.rpartition("/")[2].partition("?")[0]])

            def log_message(self, *_):
                pass

            def head(self, code, **headers):
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()

        class Quiet(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.http.over = self.over
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def good(handler, body):
    asked = handler.headers.get("Range")
    start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
    if asked:
        end = len(body) - 1
        handler.head(206, Content_Length=len(body) - start, Content_Range=f"bytes {start}-{end}/{len(body)}")
    else:
        handler.head(200, Content_Length=len(body))
    handler.wfile.write(body[start:])


def no_ranges(handler, body):
    handler.head(200, Content_Length=len(body))
    handler.wfile.write(body)


def start_of_it(share):
    """Send a share of the file, from the first byte whatever was asked for, after an honest header."""

    def manner(handler, body):
        handler.head(200, Content_Length=len(body))
        handler.wfile.write(body[: int(share * len(body))])

    return manner


def login_page(handler, body):
    handler.head(200)
    handler.wfile.write(b"<html>log in!</html>")


def no_length(handler, body):
    handler.head(200)
    handler.wfile.write(body)


def chunked(handler, body):
    handler.protocol_version = "HTTP/1.1"
    handler.head(200, Transfer_Encoding="chunked", Connection="close")
    for start in range(0, len(body), 5000):
        piece = body[start : start + 5000]
        handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    handler.wfile.write(b"0\r\n\r\n")


def broken_chunks(handler, body):
    handler.protocol_version = "HTTP/1.1"
    handler.head(200, Transfer_Encoding="chunked", Connection="close")
    handler.wfile.write(b"1388\r\n" + body[:5000] + b"\r\nno number\r\n")


def another_range(handler, body):
    handler.head(206, Content_Length=10, Content_Range=f"bytes 0-9/{len(body)}")
    handler.wfile.write(body[:10])


def status(code):
    return lambda handler, body: handler.head(code, Content_Length=0)


def redirect_to_itself(handler, body):
    handler.head(302, Location=handler.path, Content_Length=0)


def part_of_it(share, then=None):
    """Send a share of what was asked for, after an honest header; then do something else."""

    def manner(handler, body):
        asked = handler.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        code = 206 if asked else 200
        end = len(body) - 1
        handler.head(code, Content_Length=len(body) - start, Content_Range=f"bytes {start}-{end}/{len(body)}")
        handler.wfile.write(body[start : start + int(share * len(body))])
        handler.wfile.flush()
        if then:
            then(handler)

    return manner


def reset(handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def stall(handler):
    handler.server.over.wait(10)


def trickle(handler):
    while not handler.server.over.wait(0.005):
        handler.wfile.write(b"x")
        handler.wfile.flush()


def silent(handler, body):
    handler.server.over.wait(10)


def not_http(handler, body):
    handler.wfile.write(b"\x00\x01\x02\r\n\r\n")


def wrong_bytes(handler, body):
    good(handler, bytes(byte ^ 1 for byte in body))


def wrong_length(handler, body):
    handler.head(200, Content_Length=20)
    handler.wfile.write(b"<html>log in!</html>")


def too_much_of_the_rest(handler, body):
    start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    handler.head(206, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
    handler.wfile.write(body[start:] + b"and more")


def too_much(handler, body):
    handler.head(200)
    handler.wfile.write(body + b"and more")


def too_much_of_another_file(handler, body):
    too_much(handler, bytes(len(body)))
