"""Files that outlive a kill: small ones replaced whole, growing ones read up to their last whole line."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def whole_lines(path: Path) -> list[bytes]:
    """Lines of a file that runs append to; empty if there is none.

    A last line cut short by a kill is removed from the file, so that the next one starts afresh.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return content[:whole].splitlines()


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace ``path`` by ``content`` in one move; text is written as UTF-8. OSError passes through."""
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
