"""Runs a model's code, and calls its functions when the judge asks. It never sees what the judge expects."""

from __future__ import annotations

import sys
import types
from typing import Any

from . import wire


def main(payload: dict[str, Any]) -> None:
    """``payload``: code, setup (run after it, in its names), requests and replies (fds)."""
    kept: list[Any] = []
    numbers: dict[int, int] = {}  # id of a kept object -> its place

    def keep(value: Any) -> int:
        if id(value) not in numbers:
            numbers[id(value)] = len(kept)
            kept.append(value)
        return numbers[id(value)]

    def answer(request: list[Any]) -> Any:
        what, *rest = request
        if what == "name":
            return _look_up(module, rest[0])
        if what == "attribute":
            return getattr(kept[rest[0]], rest[1])
        arguments, named = wire.unpack(rest[1], kept.__getitem__)
        return kept[rest[0]](*arguments, **named)

    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # dataclasses and enums look their module up
    requests, replies = int(payload["requests"]), int(payload["replies"])
    request = None
    while True:
        try:
            if request is None:
                exec(compile(payload["code"], "<solution>", "exec"), module.__dict__)
                exec(compile(payload["setup"], "<setup>", "exec"), module.__dict__)
                reply = ["value", None]
            else:
                reply = ["value", wire.pack(answer(request), keep)]
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: the judge must hear of them
            reply = ["error", type(error).__name__, _text(error)]
        try:
            wire.send(replies, reply)
            request = wire.receive(requests)
        except wire.Closed:
            return


def _look_up(module: types.ModuleType, name: str) -> Any:
    if name not in module.__dict__:
        raise NameError(f"the code does not define {name}")
    return module.__dict__[name]


def _text(error: BaseException) -> str:
    try:
        return str(error)[:300]
    except BaseException:
        return "(an exception whose text raises another)"
