"""A child process that compares answers: sympy may take for ever, or all memory, and cannot be stopped.

Its limits are the kernel's: CPU seconds for each comparison (so that a verdict does not depend on how busy
the machine is), address space, and a wall-clock backstop on our side. A child that dies is replaced. Requests
and replies are lines of JSON over pipes; any thread may ask.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any

CPU_SECONDS = 10.0
MEMORY_BYTES = 4 << 30
WALL_SECONDS = 20 * CPU_SECONDS  # a machine so busy that CPU seconds do not pass
START_SECONDS = 300.0

CHILD = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from rlkv_eval.graders.worker import serve; serve(float(sys.argv[2]), int(sys.argv[3]))"
)


class WorkerError(RuntimeError):
    """A comparison that ended without a result: out of time or memory, or an exception in the child."""


class Worker:
    """``ask(function, *arguments)`` runs ``rlkv_eval.graders.equal.<function>`` in the child."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS, memory_bytes: int = MEMORY_BYTES) -> None:
        self.cpu_seconds, self.memory_bytes = cpu_seconds, memory_bytes
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0

    def ask(self, function: str, *arguments: str) -> Any:
        """What the function returns, as JSON carries it. Raises WorkerError."""
        with self.lock:
            process = self._alive()
            request = json.dumps([function, *arguments]).encode() + b"\n"
            try:
                process.stdin.write(request)  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
            except OSError:
                raise self._died() from None
            kind, value = self._reply(WALL_SECONDS)
        if kind != "ok":
            raise WorkerError(value)
        return value

    def close(self) -> None:
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
        self.process = None

    def _alive(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.owner != os.getpid():
            self.process = None  # we are a fork: the child belongs to our parent
        if self.process is None or self.process.poll() is not None:
            limits = [str(self.cpu_seconds), str(self.memory_bytes)]
            command = [sys.executable, "-c", CHILD, json.dumps(sys.path), *limits]
            # One thread, and no colours or GPUs: the child only does algebra.
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
            )
            self.owner = os.getpid()
            kind, value = self._reply(START_SECONDS)
            if kind != "ready":
                raise WorkerError(f"the grader's process did not start: {value}")
        return self.process

    def _reply(self, seconds: float) -> tuple[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        handle, deadline, reply = self.process.stdout.fileno(), time.monotonic() + seconds, b""
        while not reply.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([handle], [], [], left)[0]:
                raise self._died(f"no result within {seconds:g} s")
            chunk = os.read(handle, 65536)
            if not chunk:
                raise self._died()
            reply += chunk
        kind, value = json.loads(reply)
        return kind, value

    def _died(self, why: str = "") -> WorkerError:
        assert self.process is not None
        self.process.kill()
        said = self.process.communicate()[1].decode(errors="replace").strip().splitlines()
        code, self.process = self.process.returncode, None
        if not why and code == -signal.SIGPROF:
            why = f"more than {self.cpu_seconds:g} s of CPU"
        return WorkerError(
            why or f"the grader's process ended with {code}: {said[-1] if said else 'no message'}"
        )


def serve(cpu_seconds: float, memory_bytes: int) -> None:
    """The child's loop. Only its own replies go to the pipe: what libraries print is thrown away."""
    pipe = os.fdopen(os.dup(1), "wb", buffering=0)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import logging
    import warnings

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    sys.set_int_max_str_digits(0)  # comparing long integers needs no printing, but sympy's cache does
    import math_verify  # noqa: F401  importing it costs time that is no comparison's

    from rlkv_eval.graders import equal

    pipe.write(b'["ready", null]\n')
    for line in sys.stdin.buffer:
        function, *arguments = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # its signal ends the process, in C code as well
        try:
            reply = ["ok", getattr(equal, function)(*arguments)]
        except RecursionError:
            reply = ["error", "nested too deeply"]
        except MemoryError:
            reply = ["error", f"more than {memory_bytes >> 20} MiB of memory"]
        except Exception as error:
            reply = ["error", f"{type(error).__name__}: {str(error)[:200]}"]
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.write(json.dumps(reply).encode() + b"\n")


_worker = Worker()
atexit.register(_worker.close)


def ask(function: str, *arguments: str) -> Any:
    """``Worker.ask`` of the one child that this process keeps."""
    return _worker.ask(function, *arguments)
