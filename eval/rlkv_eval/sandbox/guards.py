"""Which guards hold on this machine: found once, by trying to break out.

Always: the system-call filter, resource limits, no capabilities, a private folder, a supervisor. Beside them
at least one guard of the files: namespaces (a file tree of its own) or Landlock, both where both are there.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from pathlib import Path

from rlkv.errors import RLKVError
from rlkv_eval.sandbox.inner import seccomp
from rlkv_eval.sandbox.launch import Limits, run

CHOICES = (("namespaces", "landlock"), ("landlock",), ("namespaces",))

# Each line tries one thing that must fail; what succeeds is printed. {mark} lies outside the folder.
_ATTEMPTS = """
import ctypes, os, socket
def attempt(name, action):
    try:
        action()
        print(name)
    except (OSError, MemoryError, RuntimeError):
        pass
attempt("write a file outside", lambda: open({mark!r}, "w"))
attempt("read a file outside", lambda: open({mark!r}).read())
attempt("list the folder above", lambda: os.listdir({above!r}))
attempt("change a file's mode", lambda: os.chmod({mark!r}, 0o777))
attempt("remove a file outside", lambda: os.unlink({mark!r}))
attempt("open a socket", socket.socket)
attempt("start a process", os.fork)
attempt("run a program", lambda: os.execv("/proc/self/exe", ["python"]))
attempt("signal another process", lambda: os.kill({parent}, 0))
attempt("allocate beyond the limit", lambda: bytearray(2 << 30))
attempt("stay root over the system", lambda: os.setuid(0) if os.getuid() else os.chroot("."))
open("own", "w").write("x")
assert open("own").read() == "x"
"""


@functools.cache
def check() -> tuple[str, ...]:
    """The strongest guards that hold here, shown by an attempt at everything they forbid.

    Raises RLKVError, with what failed, where none do: untrusted code is never run unguarded.
    """
    if sys.platform != "linux" or not seccomp.supported():
        raise RLKVError(
            "sandbox: running a model's code needs Linux on x86_64 or aarch64; leave the code tasks out"
        )
    failures = []
    for guards in CHOICES:
        try:
            leaks = escapes(guards)
        except RLKVError as error:
            failures.append(str(error).removeprefix("sandbox: "))
            continue
        if not leaks:
            return guards
        failures.append(f"{' and '.join(guards)} let code {leaks}")
    raise RLKVError(
        "sandbox: a model's code cannot be contained here, so it is not run; allow user namespaces or "
        f"Landlock, or leave the code tasks out ({'; '.join(failures)})"
    )


def escapes(guards: tuple[str, ...]) -> str:
    """What code could do under these guards that it must not, comma-separated; "" when they hold."""
    with tempfile.TemporaryDirectory(prefix="rlkv-mark-") as folder:
        mark = Path(folder) / "mark"
        mark.write_text("secret")
        source = _ATTEMPTS.format(mark=str(mark), above=folder, parent=os.getpid())
        outcome = run(source, Limits(), guards)
        changed = not mark.exists() or mark.read_text() != "secret"
    if outcome.kind != "ok":
        raise RLKVError(f"sandbox: the self-test did not run: {outcome.reason}")
    done = outcome.stdout.splitlines()
    return ", ".join(done or ["change a file outside"] * changed)
