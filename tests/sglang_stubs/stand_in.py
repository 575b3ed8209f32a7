"""Stand-ins for packages that SGLang's CPU engine imports and does not use: they have every name.

Lower-case names are functions that return their first argument if it can be called (so that they serve as
decorators), capitalised names are empty classes, and so on for modules below.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any


class _Function:
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return arguments[0] if arguments and callable(arguments[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Function()


class _Names(type):
    """Attributes of an empty class are their own names, as those of an enumeration might be."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def _attribute(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Names(name, (), {}) if name[0].isupper() else _Function()


class _Module(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return _attribute(name)


class _Below(MetaPathFinder, Loader):
    """Finds any module below a stand-in."""

    def __init__(self, package: str) -> None:
        self.prefix = package + "."

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith(self.prefix) else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stand_in(package: str) -> Callable[[str], Any]:
    """``__getattr__`` of a package that is not there."""
    sys.meta_path.insert(0, _Below(package))
    return _attribute
