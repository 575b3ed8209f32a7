"""Entry of the sandboxed process: read the job, lock the door, run the program, report how it ended.

Two processes: a supervisor, and its child, in which everything happens. The supervisor runs nothing of the
job; it waits, and reports on the pipe that only it still holds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import sys
import traceback
from typing import Any, NoReturn

from . import kernel, landlock, namespaces, seccomp


def main() -> None:
    """``job`` (JSON on stdin): parent (pid), status (fd), keep (fds), guards, folder, readable, limits,
    program (a module of this package) and payload (for its ``main``).
    """
    job = json.load(sys.stdin)
    status = int(job["status"])
    try:
        kernel.die_with_parent(job["parent"])
        if "namespaces" in job["guards"]:
            namespaces.unshare()
        supervisor = os.getpid()
        child = os.fork()
        if child == 0:
            _contained(job, status, supervisor)
    except Exception as error:
        _report(status, {"refused": f"{type(error).__name__}: {error}"})
        os._exit(1)
    for fd in (0, 1, 2, *job["keep"]):
        os.close(fd)  # so that readers see the end when the child ends
    _, ended, usage = os.wait4(child, 0)
    _report(status, {"exit": os.waitstatus_to_exitcode(ended), "cpu": usage.ru_utime + usage.ru_stime})
    os._exit(0)


def _contained(job: dict[str, Any], status: int, supervisor: int) -> NoReturn:
    try:
        inside = "namespaces" in job["guards"]
        kernel.die_with_parent(0 if inside else supervisor)  # of another process namespace: 0
        program = importlib.import_module(f".{job['program']}", __package__)
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        os.umask(0o077)
        _lock(job, inside)
    except BaseException as error:
        _report(status, {"refused": f"{type(error).__name__}: {error}"})
        os._exit(1)
    os.close(status)  # from here on nothing that runs can speak for the sandbox
    code = 0
    try:
        program.main(job["payload"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        code = 1
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code & 255)  # no finalisers of the job's objects, no exit handlers


def _lock(job: dict[str, Any], inside: bool) -> None:
    limits, folder, work = job["limits"], job["folder"], job["folder"]
    if inside:
        namespaces.enter_root(folder, job["readable"], limits["disk"], limits["files"])
        work = namespaces.WORK
    os.chdir(work)
    _limit(limits)
    kernel.drop_privileges()
    if "landlock" in job["guards"]:
        landlock.restrict(job["readable"], [work])
    seccomp.restrict()


def _limit(limits: dict[str, int]) -> None:
    for name, value in (
        ("RLIMIT_CPU", limits["seconds"] + 1),
        ("RLIMIT_AS", limits["memory"]),
        ("RLIMIT_FSIZE", limits["disk"]),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_NPROC", 1),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_MEMLOCK", 0),
        ("RLIMIT_MSGQUEUE", 0),
    ):
        which = getattr(resource, name)
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def _report(status: int, message: dict[str, Any]) -> None:
    os.write(status, json.dumps(message).encode() + b"\n")
