"""Runs the asserts of a task, with the tested code in another process that only ever sees the arguments.

An assert such as ``assert f(1) == 2`` runs here: ``f`` is a stand-in that asks the other process, and
``== 2`` compares plain data. The code cannot reach this process, its memory, the expected values, or the pipe
on which the verdict leaves.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import sys
from typing import Any

from . import wire


class Stranger:
    """An object that lives in the other process: it can be called, asked for an attribute, handed back."""

    def __init__(self, other: Other, number: int) -> None:
        self._other, self._number = other, number

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._other.ask("call", self._number, wire.pack((arguments, named), _number_of))

    def __getattr__(self, name: str) -> Any:
        return self._other.ask("attribute", self._number, name)


def _number_of(value: Any) -> int:
    if not isinstance(value, Stranger):
        raise Unfit(f"a test hands over a {type(value).__name__}, which cannot leave its process")
    return value._number


class Unfit(Exception):
    """The test cannot be run here; not the code's fault."""


class Other:
    """The process that runs the code."""

    def __init__(self, requests: int, replies: int) -> None:
        self.requests, self.replies = requests, replies
        self.strangers: dict[int, Stranger] = {}

    def ask(self, *request: Any) -> Any:
        wire.send(self.requests, request)
        return self.hear()

    def hear(self) -> Any:
        """The value answered; Raised for an exception answered."""
        match wire.receive(self.replies):
            case ["value", value]:
                return wire.unpack(value, self._stranger)
            case ["error", str(name), str(text)]:
                raise Raised(f"{name}: {text}".removesuffix(": "))
        raise wire.Closed

    def _stranger(self, number: int) -> Stranger:
        return self.strangers.setdefault(number, Stranger(self, number))


class Raised(Exception):
    """The code raised."""


def main(payload: dict[str, Any]) -> None:
    """``payload``: tests, names (what the code is to define), requests, replies and verdict (fds).

    Writes {"passed": how many, "kind": "correct" | "wrong" | "unfit", "reason"} to ``verdict``.
    """
    other = Other(int(payload["requests"]), int(payload["replies"]))
    passed, kind, reason = 0, "correct", ""
    where = "running the code"
    try:
        other.hear()
        for index, test in enumerate(payload["tests"]):
            where = f"assert {index + 1} of {len(payload['tests'])}"
            exec(compile(test, "<test>", "exec"), _names(test, set(payload["names"]), other))
            passed += 1
    except AssertionError:
        kind, reason = "wrong", f"{where} does not hold: {' '.join(test.split())[:200]}"
    except Raised as error:
        kind, reason = "wrong", f"{where} raised {error}"
    except wire.Closed:
        kind, reason = "wrong", f"{where}: the code ended its process or broke the protocol"
    except (MemoryError, RecursionError) as error:
        kind, reason = "wrong", f"{where}: what the code returned is too large ({type(error).__name__})"
    except Unfit as error:
        kind, reason = "unfit", f"{where}: {error}"
    except Exception as error:
        kind, reason = "wrong", f"{where} raised {type(error).__name__}: {error}"
    os.write(int(payload["verdict"]), json.dumps([kind, passed, reason[:500]]).encode())


def _names(test: str, defined: set[str], other: Other) -> dict[str, Any]:
    """What the names of ``test`` stand for: the code's definitions, else builtins and the standard library.

    A name that the code is not meant to define never comes from it: it may not bring its own ``set``.
    """
    names: dict[str, Any] = {}
    nodes = list(ast.walk(ast.parse(test)))
    bound = {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    for node in nodes:
        if not isinstance(node, ast.Name) or node.id in bound:
            continue
        if node.id in defined or not (hasattr(builtins, node.id) or node.id in sys.stdlib_module_names):
            names[node.id] = other.ask("name", node.id)
        elif not hasattr(builtins, node.id):
            names[node.id] = importlib.import_module(node.id)
    return names
