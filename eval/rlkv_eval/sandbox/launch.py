"""Start sandboxed processes, watch them from outside, and say how they ended.

Runs nothing of the job in this process: no ``preexec_fn``, so it may be called from any thread of a program
that holds a model.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from rlkv.errors import RLKVError

_START = "import sys; sys.path.insert(0, sys.argv[1]); from inner.child import main; main()"
_HERE = str(Path(__file__).parent)
# Hash seeds fixed: a verdict must not depend on the order of a set of strings.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"}
_KILL_WAIT = 10.0  # seconds for a killed process to be gone


@dataclass(frozen=True)
class Limits:
    """``seconds`` of wall time (and, plus one, of CPU time); bytes of ``memory`` (address space), of ``disk``
    (all files together) and of ``output`` (kept of stdout and of stderr; the rest is read and dropped);
    number of ``files``.
    """

    seconds: int = 10
    memory: int = 1 << 30
    disk: int = 16 << 20
    output: int = 64 << 10
    files: int = 256

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 1:
            raise RLKVError(f"sandbox: every limit must be 1 or more, got {self}")


@dataclass(frozen=True)
class Outcome:
    """``kind``: "ok" (it ended with exit code 0), "error" (another code), "killed" (by a signal), "timeout"
    (wall or CPU time), "disk" (its directory is full, where the kernel doesn't hold it) or "stopped" (a
    process that it ran together with ended first). ``reason`` is one sentence.
    """

    kind: str
    reason: str
    stdout: str
    stderr: str
    seconds: float


@dataclass(frozen=True)
class Job:
    """``program``: a module of ``inner``, whose ``main`` gets ``payload`` (anything JSON holds). ``fds`` are
    handed over under their own numbers, and closed here; nothing else is open in the process.
    """

    payload: Any
    program: str = "script"
    fds: tuple[int, ...] = ()


def run(source: str, limits: Limits | None = None, guards: tuple[str, ...] | None = None) -> Outcome:
    """Run Python source. ``guards`` None: the best that work here, found once. Raises RLKVError for none."""
    return run_together([Job(source)], limits, guards)[0]


def run_together(
    jobs: list[Job], limits: Limits | None = None, guards: tuple[str, ...] | None = None
) -> list[Outcome]:
    """Run jobs at the same time, each in a sandbox of its own, until the first of the list ends.

    The others are stopped then. Limits are of each; the wall time is counted once. Raises RLKVError, with
    nothing run, where a process cannot be contained.
    """
    limits = limits or Limits()
    running: list[_Running] = []
    try:
        try:
            guards = best_guards() if guards is None else guards
            for job in jobs:
                running.append(_Running(job, limits, guards))
        except OSError as error:
            raise RLKVError(f"sandbox: no process could be started: {error}") from None
        finally:  # a reader must see the end when the process at the other side ends
            for fd in (fd for job in jobs for fd in job.fds):
                os.close(fd)
        _watch(running, limits)
    finally:
        for process in running:
            process.stop()
    return [process.outcome(limits, guards) for process in running]


def best_guards() -> tuple[str, ...]:
    from rlkv_eval.sandbox.guards import check  # which runs its test through this module

    return check()


def readable_paths() -> list[str]:
    """What the code may read: the interpreter's library and the system's shared libraries. Not the home."""
    base = os.path.realpath(sys.base_prefix)
    places = {"platbase": sys.base_exec_prefix}  # of a virtual environment: where its interpreter lives
    libraries = [sysconfig.get_path(name, vars=places) for name in ("stdlib", "platstdlib")]
    libraries += [f"{base}/lib", f"{base}/lib64"] if base != "/" else []
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    devices = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]
    wanted = [path for path in (*system, *libraries, *devices) if os.path.exists(path)]
    return [
        path
        for index, path in enumerate(dict.fromkeys(wanted))
        if not any(path != other and path.startswith(other + "/") for other in wanted)
    ]


@dataclass
class _Stream:
    """One output of a process: the first bytes kept, the rest counted."""

    pipe: IO[bytes]
    room: int
    kept: bytearray = field(default_factory=bytearray)
    dropped: int = 0

    def take(self) -> bool:
        """Read what is there; False at the end of the stream."""
        part = os.read(self.pipe.fileno(), 1 << 16)
        fits = max(0, self.room - len(self.kept))
        self.kept += part[:fits]
        self.dropped += len(part[fits:])
        return bool(part)

    def text(self) -> str:
        note = f"\n[{self.dropped} more bytes]" if self.dropped else ""
        return self.kept.decode(errors="replace") + note


class _Running:
    """One sandboxed process, seen from outside."""

    def __init__(self, job: Job, limits: Limits, guards: tuple[str, ...]) -> None:
        self.stopped_for = ""
        self.folder = tempfile.mkdtemp(prefix=f"rlkv-sandbox-{os.getpid()}-")
        status, self._status_end = os.pipe()
        order = {
            "parent": os.getpid(),
            "status": self._status_end,
            "keep": job.fds,
            "guards": guards,
            "folder": self.folder,
            "readable": readable_paths(),
            "limits": asdict(limits),
            "program": job.program,
            "payload": job.payload,
        }
        self.began = time.monotonic()
        self.ended = self.began
        with tempfile.TemporaryFile() as stdin:  # a pipe might fill up before it is read
            stdin.write(json.dumps(order).encode())
            stdin.seek(0)
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-s", "-P", "-c", _START, _HERE],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self.folder,
                env=_ENVIRONMENT,
                pass_fds=(*job.fds, self._status_end),
                start_new_session=True,
            )
        os.close(self._status_end)
        assert self.process.stdout is not None and self.process.stderr is not None
        self.status = _Stream(os.fdopen(status, "rb", buffering=0), 1 << 16)
        self.stdout = _Stream(self.process.stdout, limits.output)
        self.stderr = _Stream(self.process.stderr, limits.output)
        self.streams = [self.status, self.stdout, self.stderr]

    def stop(self, why: str = "") -> None:
        """Kill whatever is left of it, reap it, remove its folder."""
        self.stopped_for = self.stopped_for or why
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(_KILL_WAIT)
            self.ended = time.monotonic()
        if not self.status.pipe.closed:
            while self.status.take():  # a refusal must be heard, however late
                pass
        for stream in self.streams:
            stream.pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def outcome(self, limits: Limits, guards: tuple[str, ...]) -> Outcome:
        reports = [json.loads(line) for line in bytes(self.status.kept).splitlines()]
        report: dict[str, Any] = {key: value for part in reports for key, value in part.items()}
        if "refused" in report:
            raise RLKVError(f"sandbox: {' and '.join(guards)} could not be set up: {report['refused']}")
        kind, reason = self._ending(report, limits)
        return Outcome(kind, reason, self.stdout.text(), self.stderr.text(), self.ended - self.began)

    def _ending(self, report: dict[str, Any], limits: Limits) -> tuple[str, str]:
        code = report.get("exit")
        if code is None and self.stopped_for:
            return self.stopped_for, {
                "timeout": f"it did not end within {limits.seconds} s",
                "disk": f"it wrote more than {limits.disk} bytes or {limits.files} files",
                "stopped": "stopped with the process that it belonged to",
            }[self.stopped_for]
        if code is None:
            raise RLKVError(f"sandbox: the process did not start: {self.stderr.text().strip()[-300:]}")
        if code == 0:
            return "ok", "it ended"
        if code < 0 and report["cpu"] >= limits.seconds:
            return "timeout", f"it used more than {limits.seconds} s of CPU time"
        if code < 0:
            return "killed", f"it was killed by {signal.Signals(-code).name}"
        lines = self.stderr.kept.decode(errors="replace").strip().splitlines()
        return "error", lines[-1][:300] if lines else f"it ended with exit code {code}"


def _watch(running: list[_Running], limits: Limits) -> None:
    """Read all outputs until the first process has ended, or its time or its space is used up."""
    first, deadline = running[0], running[0].began + limits.seconds
    with selectors.DefaultSelector() as selector:
        for process in running:
            for stream in process.streams:
                selector.register(stream.pipe, selectors.EVENT_READ, stream)
        while any(stream.pipe in selector.get_map() for stream in first.streams):
            left = deadline - time.monotonic()
            full = [process for process in running if _overfull(process.folder, limits)]
            if left <= 0 or full:
                for process in running:
                    process.stop("disk" if process in full else "timeout" if left <= 0 else "stopped")
                return
            for key, _ in selector.select(min(left, 0.05)):
                if not key.data.take():
                    selector.unregister(key.fileobj)
    first.process.wait()
    first.ended = time.monotonic()
    for process in running[1:]:
        process.stop("stopped")


def _overfull(folder: str, limits: Limits) -> bool:
    """Whether the files below hold more than allowed; inside a mount namespace they are not seen from here,
    and the kernel holds the limit.
    """
    size = files = 0
    for place, _, names in os.walk(folder):
        for name in names:
            files += 1
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(place, name)).st_blocks * 512
        if size > limits.disk or files > limits.files:
            return True
    return False
