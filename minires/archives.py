"""The two archives in which CIFAR-10 is published, binary and Python, read without trusting them.

Both are tar archives in gzip, which can name places outside their folder, hold links and devices, and unpack to a
thousand times their size; and the Python archive holds pickles, which are programs. Nothing is unpacked by the names in
an archive here, and no pickle is run: the few forms that CIFAR-10 uses are read, within limits; all else is refused.

Source      POSIX.1-1988, ustar: a header of 512 bytes, then the file, filled up to a multiple of 512
            https://peps.python.org/pep-0307, pickle protocol 2; the opcodes are explained in Python's pickletools.py
"""

import gzip
import io
import pickletools
import re
import struct
import zlib

import numpy as np

TOTAL_BYTES = 300_000_000  # of an unpacked archive; the official ones have 184 and 186 million
MEMBER_BYTES = 40_000_000  # of one file in it; the official ones have 31 million
OPCODES = 200_000  # of one pickle; a label takes one, a file name two, and there are 10,000 of each
PIXELS = 3 * 32 * 32


class DataError(ValueError):
    """The data cannot be used; the message names the file, what was found and what was expected."""


def read_archive(path, names, records):
    """Yield (name, content) for each of the six batch files in an archive, in the form of the binary files.

    Args        names: of the binary files; the Python archive has the same ones without ".bin"
                records: how many images each file must have
    Raises      DataError for whatever does not belong into the archive; it names the file and the fault
    """
    pickles = {name.removesuffix(".bin"): name for name in names}
    seen = set()
    for member, content in _members(path, {*names, *pickles}):
        name = pickles.get(member, member)
        if name in seen:
            raise DataError(f"{path} holds {member!r} twice")
        seen.add(name)
        try:
            yield name, _records(read_pickle(content), records) if member in pickles else content
        except _FAULTS as error:
            raise DataError(f"{path}: {member!r} is no batch of CIFAR-10: {_one_line(error)}") from None


# What damaged bytes can raise on the way through the code below, and nothing else: a MemoryError would be a fault here.
_FAULTS = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, struct.error)


def _members(path, wanted):
    """Yield (name, content) of the wanted files of a tar archive in gzip, in their order; walk past the others."""
    left = TOTAL_BYTES

    def read(count):
        nonlocal left
        left -= count
        if left < 0:
            raise DataError(f"{path} unpacks to more than {TOTAL_BYTES:,} bytes, too much for CIFAR-10")
        data = file.read(count)
        if len(data) != count:
            raise EOFError
        return data

    try:
        with gzip.open(path) as file:
            while (header := read(512)).strip(b"\0"):  # a header of zeros marks the end
                name, size = _header(path, header)
                padding = -size % 512
                if name not in wanted:
                    for start in range(0, size, 1 << 20):
                        read(min(1 << 20, size - start))
                elif size > MEMBER_BYTES:
                    raise DataError(f"{path}: {name!r} has {size:,} bytes, at most {MEMBER_BYTES:,} expected")
                else:
                    yield name, read(size)
                read(padding)
    except EOFError:
        raise DataError(f"{path} ends early: it is not complete") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is no gzip archive, or a damaged one: {_one_line(error)}") from None


def _header(path, header):
    """Return (the last part of the name, size) from a tar header; the name is None for what is not a plain file."""
    fields = [header[start:end].partition(b"\0")[0] for start, end in ((0, 100), (124, 136), (148, 156), (345, 500))]
    name, size, checksum, prefix = fields[0].decode("latin-1"), fields[1].strip(), fields[2].strip(), fields[3]
    with_blanks = header[:148] + b" " * 8 + header[156:]  # the checksum's own field counts as blanks
    if not re.fullmatch(rb"[0-7]+", checksum) or int(checksum, 8) != sum(with_blanks):
        raise DataError(f"{path} is no tar archive, or a damaged one: the checksum of a header is wrong")
    if not re.fullmatch(rb"[0-7]+", size):
        raise DataError(f"{path}: {name!r} has the size {size!r}, expected an octal number")
    kind = header[156:157]
    if kind in b"xgL":  # remarks on the next file, which CIFAR-10 has no need of
        return None, int(size, 8)
    if kind not in (b"0", b"\0", b"5"):
        raise DataError(f"{path}: {name!r} is neither a file nor a folder, but of type {kind!r}; nothing was unpacked")
    full = (prefix.decode("latin-1") + "/" if prefix and header[257:262] == b"ustar" else "") + name
    parts = re.split(r"[/\\]", full)
    if not parts[0] or ".." in parts or ":" in parts[0]:
        raise DataError(f"{path}: {full!r} leads out of the folder; nothing was unpacked")
    return (None if kind == b"5" else parts[-1]), int(size, 8)


class Made:
    """What a pickle would have made by a call: the function's name, the arguments, and the state set on it later."""

    def __init__(self, function, arguments):
        self.function, self.arguments, self.state = function, arguments, None


# The functions that the pickles call, and what else they name: an array is _reconstruct(ndarray, ...) with a state.
CALLS = {"numpy.core.multiarray _reconstruct", "numpy dtype"}
NAMES = {*CALLS, "numpy ndarray"}
OPCODES_OF_CIFAR10 = {
    *("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINSTRING"),
    *("SHORT_BINSTRING", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("GLOBAL", "REDUCE", "BUILD"),
}
KNOWN = {opcode.code: opcode for opcode in pickletools.opcodes if opcode.name in OPCODES_OF_CIFAR10}
_MARK = object()


def read_pickle(content):
    """Return what a pickle of strings, numbers, lists, tuples, dicts and NumPy arrays says, without doing it.

    A pickle is a program for a machine with a stack, and its opcode REDUCE calls any function by name. Python's advice
    is an Unpickler with a find_class of one's own, which governs what is called; that still lets an opcode of five
    bytes claim gigabytes for the list of memorised values. This machine knows only the opcodes in CIFAR-10's files. It
    calls nothing: where the program says "call", it notes down what and with what.

    Limits      OPCODES; the keys of a dict are strings; a string of Python 2 comes back as a str of its bytes (Latin-1)
    Raises      ValueError and its relatives for all other content
    """
    stack, memo = [], {}

    def since_mark():
        place = len(stack) - 1
        while stack[place] is not _MARK:  # where there is none this ends with an IndexError
            place -= 1
        items = stack[place + 1 :]
        del stack[place:]
        return items

    def set_items(target, items):
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(target) is not dict or type(key) is not str:
                raise ValueError("a key that is no string")
            target[key] = value

    file = io.BytesIO(content)
    for _ in range(OPCODES):
        code = file.read(1).decode("latin-1")
        if code not in KNOWN:
            raise ValueError(f"opcode {code!r}, which CIFAR-10 does not use" if code else "a pickle without an end")
        opcode = KNOWN[code]
        if opcode.name == "GLOBAL":  # a module and a name, a line each; pickletools would undo escapes in them
            argument = " ".join(file.readline(100).decode("latin-1").rstrip("\n") for _ in range(2))
        else:
            argument = opcode.arg.reader(file) if opcode.arg else None
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                return stack[-1]
            case "MARK":
                stack.append(_MARK)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                items = stack[-2:]
                del stack[-2:]
                set_items(stack[-1], items)
            case "SETITEMS":
                items = since_mark()
                set_items(stack[-1], items)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(opcode.name[-1])
                stack[-length:] = [tuple(stack[-length:])]
            case "GLOBAL":
                if argument not in NAMES:
                    raise ValueError(f"it asks for {argument!r}")
                stack.append(Made(argument, None))
            case "REDUCE":
                arguments = stack.pop()
                if type(stack[-1]) is not Made or stack[-1].function not in CALLS:
                    raise ValueError("it calls what cannot be called")
                stack[-1] = Made(stack[-1].function, arguments)
            case "BUILD":
                state = stack.pop()
                if type(stack[-1]) is not Made:
                    raise ValueError("it sets a state of what has none")
                stack[-1].state = state
    raise ValueError(f"a pickle of more than {OPCODES:,} opcodes")


def _records(batch, count):
    """Turn the dict of a batch into the bytes of a binary file: for each image its label and its pixels.

    Shapes      data (count, 3072) uint8, in either order of memory; labels, count numbers from 0 to 9
    """
    if type(batch) is not dict or type(batch.get("data")) is not Made:
        raise ValueError("it holds no array of data")
    labels = batch.get("labels")
    _, shape, dtype, by_columns, pixels = batch["data"].state
    if shape != (count, PIXELS) or dtype.arguments[0] != "u1" or len(pixels) != count * PIXELS:
        raise ValueError(f"its data are not {count:,} rows of {PIXELS:,} bytes")
    if type(labels) is not list or [type(label) is int and 0 <= label <= 9 for label in labels] != [True] * count:
        raise ValueError(f"its labels are not {count:,} numbers from 0 to 9")
    pixels = np.frombuffer(pixels.encode("latin-1"), np.uint8)
    pixels = pixels.reshape(count, PIXELS, order="F" if by_columns else "C")
    return np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1).tobytes()  # (count, 3073)


def _one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__
