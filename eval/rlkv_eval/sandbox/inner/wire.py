"""Values between two processes that don't trust each other: plain data by value, all else by number.

A frame is four bytes of length and JSON. What arrives is built from a fixed list of plain types, so that an
object whose ``__eq__`` always agrees arrives as the data that it holds, or as a number.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from typing import Any

MAX_FRAME = 16 << 20  # bytes
MAX_ITEMS = 1_000_000  # of an iterator


class Closed(Exception):
    """The other side ended, or broke the format."""


def send(fd: int, message: Any) -> None:
    """Write one frame; Closed when nobody reads. One that is too long goes as an error."""
    body = json.dumps(message).encode()
    if len(body) > MAX_FRAME:
        body = json.dumps(["error", "ValueError", f"a value takes more than {MAX_FRAME >> 20} MiB"]).encode()
    rest = memoryview(len(body).to_bytes(4, "big") + body)
    try:
        while rest:
            rest = rest[os.write(fd, rest) :]
    except OSError:
        raise Closed from None


def receive(fd: int) -> Any:
    """The next frame; Closed at the end, for a frame too long, and for what isn't JSON."""
    length = int.from_bytes(_exactly(fd, 4), "big")
    if length > MAX_FRAME:
        raise Closed
    try:
        return json.loads(_exactly(fd, length))
    except (ValueError, RecursionError):
        raise Closed from None


def _exactly(fd: int, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        try:
            part = os.read(fd, count - len(parts))
        except OSError:
            part = b""
        if not part:
            raise Closed
        parts += part
    return bytes(parts)


def pack(value: Any, keep: Callable[[Any], int]) -> Any:
    """``value`` for JSON. A subclass goes as its plain base; what isn't data, as the number of ``keep``."""

    def each(items: Any) -> list[Any]:
        return [pack(item, keep) for item in items]

    match value:
        case None | bool():
            return value
        case int():
            return ["int", format(int(value), "x")]
        case float():
            return float(value)
        case str():
            return str.__str__(value)
        case complex():
            return ["complex", [value.real, value.imag]]
        case bytes() | bytearray():
            return ["bytes" if isinstance(value, bytes) else "bytearray", bytes(value).hex()]
        case list() | tuple() | set() | frozenset() | deque():
            plain = next(kind for kind in (list, tuple, set, frozenset, deque) if isinstance(value, kind))
            return [plain.__name__, each(plain.__iter__(value))]  # type: ignore[arg-type]
        case dict():
            return ["dict", [each(pair) for pair in dict.items(value)]]
        case range():
            return ["range", [value.start, value.stop, value.step]]
        case Decimal():
            return ["Decimal", str(value)]
        case Fraction():
            return ["Fraction", str(value)]
        case array():
            return ["array", [value.typecode, each(value)]]
        case Iterator():
            return ["iter", each(islice(value, MAX_ITEMS))]
    for name in ("keys", "values", "items"):
        if type(value) is type(getattr({}, name)()):
            return [name, each(value)]
    return ["object", keep(value)]


def unpack(data: Any, number: Callable[[int], Any]) -> Any:
    """The value packed as ``data``; ``number`` gives the object of a number. Closed for anything else."""

    def each(items: Any) -> list[Any]:
        return [unpack(item, number) for item in items]

    if not isinstance(data, list):
        return data
    build: dict[str, Callable[[Any], Any]] = {
        "int": lambda digits: int(digits, 16),
        "complex": lambda parts: complex(*parts),
        "bytes": bytes.fromhex,
        "bytearray": bytearray.fromhex,
        "list": each,
        "tuple": lambda items: tuple(each(items)),
        "set": lambda items: set(each(items)),
        "frozenset": lambda items: frozenset(each(items)),
        "deque": lambda items: deque(each(items)),
        "dict": lambda pairs: dict(each(pair) for pair in pairs),
        "range": lambda parts: range(*parts),
        "Decimal": Decimal,
        "Fraction": Fraction,
        "array": lambda parts: array(parts[0], each(parts[1])),
        "iter": lambda items: iter(each(items)),
        "keys": lambda items: dict.fromkeys(each(items)).keys(),
        "values": lambda items: dict(enumerate(each(items))).values(),
        "items": lambda pairs: dict(each(pairs)).items(),
        "object": number,
    }
    try:
        kind, content = data
        return build[kind](content)
    except (ArithmeticError, KeyError, TypeError, ValueError):
        raise Closed from None
