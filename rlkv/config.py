"""Settings of a run: a dataclass's defaults, changed by a YAML file, changed by ``key=value`` words.

    config = load(TrainConfig, "configs/pocket.yaml", ["seed=2", "window=16+64", "sparsities=0.25,0.5"])

Values are converted to the annotated type: int, float (finite), bool, str, Path, Literal, lists, tuples,
unions, nested dataclasses (``a.b=value``), and any class with a ``parse`` classmethod, such as ``Window``. An
unknown key or a value of the wrong type raises ``RLKVError``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from rlkv.errors import RLKVError
from rlkv.files import write_atomically

T = TypeVar("T")

TRUE, FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def load(cls: type[T], path: str | Path | None = None, overrides: Iterable[str] = ()) -> T:
    """Build ``cls`` from its defaults, then the YAML file at ``path``, then the ``key=value`` overrides."""
    tree = read_yaml(path) if path is not None else {}
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals:
            raise RLKVError(f"expected key=value, got {word!r}")
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise RLKVError(f"setting {key!r}: {parent!r} has no settings of its own")
            node = child
        node[last] = value
    return build(cls, tree)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file gives an empty mapping."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise RLKVError(f"cannot read the config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RLKVError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise RLKVError(f"{path} must hold 'key: value' lines, but holds a {type(tree).__name__}")
    return {str(key): value for key, value in tree.items()}


def save(config: Any, path: str | Path) -> None:
    """Write the settings, atomically, as YAML that ``load`` reads back to an equal object."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))


def check_same(
    old: dict[str, Any], new: dict[str, Any], what: str, advice: str = "choose another output"
) -> None:
    """Raise RLKVError if a setting of ``new`` was another in ``old``; one that ``old`` lacks may be anything.

    ``what`` begins the sentence: whose settings the old ones are, and where.
    """
    for name, value in new.items():
        if old.get(name, value) != value:
            raise RLKVError(f"{what} with {name}={old[name]}, now it is {value}: {advice}")


def plain(value: Any) -> Any:
    """``value`` in YAML's own types: dataclasses as mappings, classes with ``parse`` and paths as text."""
    if hasattr(type(value), "parse") or isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def build(cls: type[T], tree: dict[str, Any], prefix: str = "", base: T | None = None) -> T:
    """``cls`` with the values of ``tree``; what it leaves out comes from ``base`` or the class's defaults."""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    values = {} if base is None else {name: getattr(base, name) for name in fields}
    for name, value in tree.items():
        if name not in fields:
            raise RLKVError(unknown_key(prefix + name, [prefix + known for known in fields]))
        values[name] = convert(value, hints[name], prefix + name, default_of(fields[name]))
    for name, field in fields.items():
        if name not in values and default_of(field) is dataclasses.MISSING:
            raise RLKVError(f"setting {prefix + name!r} is missing: give {prefix + name}=…")
    return cls(**values)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default value, or ``dataclasses.MISSING``."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def unknown_key(key: str, known: list[str]) -> str:
    """The sentence for a key that does not exist, with the nearest name."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"the settings are {', '.join(known)}"
    return f"unknown setting {key!r}: {hint}"


def convert(value: Any, kind: Any, key: str, default: Any = dataclasses.MISSING) -> Any:
    """``value`` (text, or a YAML value) as the annotated type ``kind``; ``key`` names it in errors."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Union or origin is types.UnionType:
        return convert_union(value, arguments, key, default)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        base = default if isinstance(default, kind) else None  # type: ignore[arg-type]
        return build(kind, value, f"{key}.", base)  # type: ignore[arg-type]
    if origin in (list, tuple, set):
        return convert_sequence(value, origin, arguments, key)
    if kind in (Any, object) or origin is dict or kind is dict:
        parsed = yaml.safe_load(value) if isinstance(value, str) else value
        if kind not in (Any, object) and not isinstance(parsed, dict):
            raise wrong(key, value, kind)
        return parsed
    if origin is Literal:
        for choice in arguments:
            if value == choice or str(value) == str(choice):
                return choice
        raise wrong(key, value, kind)
    return convert_scalar(value, kind, key)


def convert_scalar(value: Any, kind: Any, key: str) -> Any:
    """One number, flag, text, path, or object with ``parse``."""
    is_flag = isinstance(value, bool)
    try:
        if hasattr(kind, "parse") and isinstance(value, str):
            return kind.parse(value)
        if kind is bool and (is_flag or str(value).lower() in TRUE | FALSE):
            return value if is_flag else str(value).lower() in TRUE
        if kind is float and isinstance(value, str | int | float) and not is_flag:
            return to_float(value)
        if kind is int and isinstance(value, str | int | float) and not is_flag:
            return to_int(value)
        if kind in (str, Path) and isinstance(value, str | int | float | Path) and not is_flag:
            return kind(value)
    except RLKVError as error:
        raise RLKVError(f"setting {key!r}: {error}") from None
    except (ValueError, OverflowError):
        pass
    raise wrong(key, value, kind)


def to_float(value: str | int | float) -> float:
    """A finite number; text that is none raises ValueError, NaN and infinity RLKVError."""
    number = float(value)
    if not math.isfinite(number):
        raise RLKVError(f"expected a finite number, got {value!r}")
    return number


def to_int(value: str | int | float) -> int:
    """A whole number; text such as ``1e3`` counts, ``1.5`` raises ValueError."""
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = float(value)
    if value != value or value in (float("inf"), float("-inf")) or value != int(value):
        raise ValueError
    return int(value)


def convert_union(value: Any, kinds: tuple[Any, ...], key: str, default: Any) -> Any:
    """The first member type that takes the value; None only where the union allows it."""
    optional = type(None) in kinds
    if optional and (value is None or (isinstance(value, str) and value.lower() in ("none", "null", ""))):
        return None
    members = [kind for kind in kinds if kind is not type(None)]
    if len(members) == 1:
        return convert(value, members[0], key, default)
    # Text fits everything, so it comes last.
    for kind in sorted(members, key=lambda member: member is str):
        try:
            return convert(value, kind, key, default)
        except RLKVError:
            continue
    raise wrong(key, value, Union[kinds])  # noqa: UP007 (built from a tuple)


def convert_sequence(value: Any, origin: Any, arguments: tuple[Any, ...], key: str) -> Any:
    """A list or tuple, from a YAML list or from text such as ``0.25,0.5``."""
    if isinstance(value, str):
        text = value.strip().removeprefix("[").removesuffix("]")
        value = [part.strip() for part in text.split(",")] if text.strip() else []
    elif not isinstance(value, list | tuple):
        value = [value]  # one value where a list is expected is a list of one
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise RLKVError(f"setting {key!r}: expected {len(arguments)} values, got {len(value)}")
        return tuple(convert(item, kind, key) for item, kind in zip(value, arguments, strict=True))
    kind = arguments[0] if arguments else str
    return origin(convert(item, kind, key) for item in value)


def wrong(key: str, value: Any, kind: Any) -> RLKVError:
    """The error for a value of the wrong type."""
    return RLKVError(f"setting {key!r}: expected {kind_name(kind)}, got {value!r}")


def kind_name(kind: Any) -> str:
    """A type in words, for errors and help."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Union or origin is types.UnionType:
        return " or ".join(kind_name(item) for item in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (list, tuple, set):
        return f"a list of {kind_name(arguments[0])}" if arguments else "a list"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    names |= {type(None): "none", Any: "any value", dict: "a mapping"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))
