"""Help for a dataclass of settings, read from the comments beside its fields, so that it can't go stale."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from typing import Any, get_type_hints

from rlkv.config import default_of, kind_name, plain


@dataclasses.dataclass(frozen=True)
class Setting:
    """One line of help."""

    key: str
    kind: str
    default: str
    meaning: str


def settings(cls: type, prefix: str = "") -> list[Setting]:
    """Every setting of ``cls``, those of nested dataclasses as ``parent.child``."""
    meanings: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        if dataclasses.is_dataclass(parent):
            meanings |= comments(parent)
    hints = get_type_hints(cls)
    rows = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        kind, default = hints[field.name], default_of(field)
        if dataclasses.is_dataclass(kind) and not hasattr(kind, "parse"):
            rows += settings(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]
            continue
        meaning = field.metadata.get("help") or meanings.get(field.name, "")
        rows.append(Setting(prefix + field.name, kind_name(kind), show(default), meaning))
    return rows


def show(default: Any) -> str:
    """A default as the command line takes it."""
    if default is dataclasses.MISSING:
        return "required"
    value = plain(default)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(str, value)) or "empty"
    if value is None:
        return "none"
    return str(value).replace("\n", "\\n") or "empty"


def comments(cls: type) -> dict[str, str]:
    """Field name -> the comment after it on its line, the ``#:`` lines above it, or the string below it."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    at_line: dict[int, tuple[str, bool]] = {}  # line -> comment, and whether it stands alone
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("#:").strip()
            at_line[token.start[0]] = text, token.line.strip().startswith("#:")
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    found: dict[str, str] = {}
    for index, node in enumerate(body):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        above: list[str] = []
        line = node.lineno - 1
        while at_line.get(line, ("", False))[1]:
            above.insert(0, at_line[line][0])
            line -= 1
        lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        parts = above + [at_line[line][0] for line in lines if line in at_line]
        after = body[index + 1] if index + 1 < len(body) else None
        if not parts and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            parts = [" ".join(str(after.value.value).split())]
        found[node.target.id] = " ".join(parts)
    return found
