"""Code that tries to do harm: contained, classified, and the next run is as if nothing had been."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlkv.errors import RLKVError
from rlkv_eval.sandbox import Job, Limits, guards, run, run_together
from rlkv_eval.sandbox.launch import readable_paths

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(seconds=5)
SHORT = Limits(seconds=1)


def usable(choice: tuple[str, ...]) -> bool:
    try:
        return guards.escapes(choice) == ""
    except RLKVError:
        return False


@pytest.fixture(params=guards.CHOICES, ids="+".join)
def choice(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Each set of guards that this machine offers."""
    chosen: tuple[str, ...] = request.param
    if not usable(chosen):
        pytest.skip(f"{' and '.join(chosen)} cannot be set up on this machine")
    return chosen


def children() -> set[str]:
    """Process ids of this process's children, dead ones that nobody waited for included."""
    return {
        pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
    }


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No folder and no child process survives a run; other tests' processes may stand beside it."""
    before = children()
    yield
    assert not list(Path(tempfile.gettempdir()).glob(f"rlkv-sandbox-{os.getpid()}-*"))
    assert not children() - before


def test_ordinary_code_runs(choice: tuple[str, ...]) -> None:
    source = "import math, re, json, hashlib, decimal, sys\n"
    source += "print(math.gcd(12, 18), hashlib.sha256(b'').hexdigest()[:4])"
    outcome = run(
        source + "\nopen('a', 'w').write('b' * 1000); print(len(open('a').read()), file=sys.stderr)",
        LIMITS,
        choice,
    )
    assert (outcome.kind, outcome.stdout, outcome.stderr) == ("ok", "6 e3b0\n", "1000\n")


def test_the_self_test_finds_a_missing_guard() -> None:
    """With no guard of the files the attempts must show it, else the test proves nothing."""
    assert "write a file outside" in guards.escapes(()) and "list the folder above" in guards.escapes(())


def test_infinite_loop(choice: tuple[str, ...]) -> None:
    outcome = run("while True: pass", SHORT, choice)
    assert outcome.kind == "timeout" and "1 s" in outcome.reason


def test_sleeping(choice: tuple[str, ...]) -> None:
    outcome = run("import time\nwhile True: time.sleep(100)", SHORT, choice)
    assert outcome.kind == "timeout"


def test_ignoring_signals_does_not_help(choice: tuple[str, ...]) -> None:
    source = "import signal, time\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n"
    source += "  except (OSError, ValueError): pass\nwhile True: time.sleep(1)"
    assert run(source, SHORT, choice).kind == "timeout"


FORKS = {
    "fork": "import os\nwhile True: os.fork()",
    "daemon": "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(1000)",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
    "subprocess": "import subprocess; subprocess.run(['/bin/sh', '-c', 'true'])",
    "posix_spawn": "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "vfork by ctypes": "import ctypes, os\nif ctypes.CDLL(None).vfork() == -1: raise OSError('refused')",
}


@pytest.mark.parametrize("name", FORKS)
def test_no_second_process(choice: tuple[str, ...], name: str) -> None:
    outcome = run(FORKS[name], LIMITS, choice)
    assert outcome.kind == "error", outcome
    assert any(word in outcome.reason for word in ("not permitted", "can't start", "refused", "Permission"))


def test_ten_gigabytes(choice: tuple[str, ...]) -> None:
    outcome = run("x = bytearray(10 << 30)", LIMITS, choice)
    assert outcome.kind == "error" and outcome.reason == "MemoryError"
    outcome = run("x = []\nwhile True: x.append(bytearray(1 << 20))", LIMITS, choice)
    assert outcome.kind == "error" and outcome.reason == "MemoryError"


def test_writing_outside(choice: tuple[str, ...], tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("kept")
    mode = target.stat().st_mode
    attempts = [
        f"open({str(target)!r}, 'w')",
        f"open({str(target)!r}, 'r+').truncate(0)",
        f"os.truncate({str(target)!r}, 0)",
        f"os.remove({str(target)!r})",
        f"os.rename({str(target)!r}, 'mine')",
        f"os.link({str(target)!r}, 'mine')",
        f"os.chmod({str(target)!r}, 0)",
        f"os.utime({str(target)!r}, (0, 0))",
        f"os.mkdir({str(tmp_path / 'new')!r})",
        f"open('../../../../../../{tmp_path}/precious', 'a')",
        f"(os.symlink({str(target)!r}, 'way'), open('way', 'w'))",
        "open('/etc/passwd', 'a')",
        f"open({sys.executable!r}, 'r+b')",
        "open(os.__file__, 'a')",
        "open('/dev/sda', 'wb')",
    ]
    for attempt in attempts:
        outcome = run(f"import os\n{attempt}", LIMITS, choice)
        assert outcome.kind == "error" and "Error" in outcome.reason, (attempt, outcome)
    assert target.read_text() == "kept" and target.stat().st_mode == mode and target.stat().st_mtime > 1
    assert os.listdir(tmp_path) == ["precious"]


def test_reading_the_home_directory(choice: tuple[str, ...], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hidden")
    files = [secret, Path.home() / ".bashrc", ROOT / "setup.py", Path("/etc/passwd"), Path("/proc/1/environ")]
    for place in files:
        outcome = run(f"print(open({str(place)!r}).read())", LIMITS, choice)
        assert outcome.kind == "error" and outcome.stdout == "", (place, outcome)
    # A file tree of its own shows the way to the interpreter's library, if that is below, and nothing else.
    seen = {part for shown in readable_paths() for part in Path(shown).parts}
    for folder in (tmp_path, Path.home(), ROOT):
        outcome = run(f"import os\nprint(*os.listdir({str(folder)!r}), sep='\\n')", LIMITS, choice)
        assert set(outcome.stdout.split()) <= seen, (folder, outcome)


def test_no_environment(choice: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert "secret" not in run("import os; print(dict(os.environ))", LIMITS, choice).stdout


def test_no_open_files_of_the_runner(choice: tuple[str, ...], tmp_path: Path) -> None:
    """An inheritable file of the runner is not handed on: only 0, 1 and 2 are open."""
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        source = (
            "import os\nfor fd in range(64):\n  try: os.fstat(fd); print(fd, end=' ')\n  except OSError: pass"
        )
        assert run(source, LIMITS, choice).stdout == "0 1 2 "


def test_network(choice: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        attempts = [
            f"socket.create_connection(('127.0.0.1', {port}), 2)",
            "socket.create_connection(('1.1.1.1', 80), 2)",
            "socket.socket(socket.AF_UNIX)",
            "socket.create_server(('127.0.0.1', 0))",
        ]
        for attempt in attempts:
            outcome = run(f"import socket\n{attempt}", LIMITS, choice)
            assert outcome.kind == "error" and "Error" in outcome.reason, (attempt, outcome)


def test_killing_the_parent(choice: tuple[str, ...]) -> None:
    me = os.getpid()
    attempts = [
        "os.kill(os.getppid(), 9)",
        f"os.kill({me}, 9)",
        "os.kill(-1, 9)",
        "os.killpg(0, 9)",
        f"__import__('resource').prlimit({me}, 0, (1, 1))",
        "fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
        f"os.setpriority(os.PRIO_PROCESS, {me}, 19)",
        f"if ctypes.CDLL(None).ptrace(16, {me}, 0, 0) == -1: raise PermissionError",
        f"if ctypes.CDLL(None).syscall(310, {me}, 0, 0, 0, 0, 0) == -1: raise PermissionError",
    ]
    for attempt in attempts:
        outcome = run(f"import os, fcntl, ctypes\n{attempt}", LIMITS, choice)
        assert outcome.kind == "error" and "Permission" in outcome.reason, (attempt, outcome)


def test_filling_the_disk(choice: tuple[str, ...]) -> None:
    limits = Limits(seconds=10, disk=4 << 20, files=64)
    one = "f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20)); f.flush()"
    many = "n = 0\nwhile True:\n  open(f'f{n}', 'wb').write(bytes(1 << 20)); n += 1"
    tiny = "n = 0\nwhile True:\n  open(f'f{n}', 'wb').close(); n += 1"
    for source in (one, many, tiny):
        outcome = run(source, limits, choice)
        held_by_kernel = outcome.kind == "error" and (
            "No space" in outcome.reason or "too large" in outcome.reason
        )
        assert held_by_kernel or outcome.kind == "disk", outcome


def test_huge_output(choice: tuple[str, ...]) -> None:
    limits = Limits(seconds=5, output=1000)
    outcome = run(
        "import sys\nfor _ in range(200): print('x' * 100_000)\nprint('y' * 9999, file=sys.stderr)",
        limits,
        choice,
    )
    assert outcome.kind == "ok" and outcome.stdout == "x" * 1000 + f"\n[{200 * 100_001 - 1000} more bytes]"
    assert len(outcome.stderr) < 1100
    assert run("while True: print('x' * 1000)", Limits(seconds=1, output=1000), choice).kind == "timeout"


def test_how_it_ended_is_told(choice: tuple[str, ...]) -> None:
    for source, kind, reason in (
        ("import sys; sys.exit(0)", "ok", "it ended"),
        ("import os; os._exit(3)", "error", "it ended with exit code 3"),
        ("1 / 0", "error", "ZeroDivisionError: division by zero"),
        ("import ctypes; ctypes.string_at(0)", "killed", "it was killed by SIGSEGV"),
        ("def f(): f()\nf()", "error", "RecursionError: maximum recursion depth exceeded"),
    ):
        outcome = run(source, LIMITS, choice)
        assert (outcome.kind, outcome.reason) == (kind, reason)


def test_forged_reports_are_not_believed(choice: tuple[str, ...]) -> None:
    """The code has no way to the pipe on which its end is reported."""
    source = "import os\nfor fd in range(3, 256):\n  try: os.write(fd, b'{\"exit\": 0}\\n')\n"
    source += "  except OSError: pass\nos._exit(7)"
    assert run(source, LIMITS, choice).reason == "it ended with exit code 7"


def test_killed_runner_leaves_no_process(choice: tuple[str, ...], tmp_path: Path) -> None:
    """A runner killed with SIGKILL takes its sandboxes with it."""
    mark = f"rlkv{time.time_ns()}"
    source = f"import time\nprint('{mark}', flush=True)\ntime.sleep(60)"
    starter = f"from rlkv_eval.sandbox import run, Limits\nrun({source!r}, Limits(seconds=60), {choice!r})"
    runner = subprocess.Popen(
        [sys.executable, "-c", starter], env={**os.environ, "PYTHONPATH": path(), "TMPDIR": str(tmp_path)}
    )
    deadline = time.monotonic() + 20
    while not (ours := sandboxes(runner.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ours
    runner.kill()
    runner.wait()
    while alive(ours) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(ours)


def test_a_group_ends_with_its_first() -> None:
    jobs = [Job("import time; time.sleep(0.2)"), Job("import time; time.sleep(60)")]
    first, second = run_together(jobs, Limits(seconds=20))
    assert (first.kind, second.kind) == ("ok", "stopped") and second.seconds < 15


def path() -> str:
    return f"{ROOT}:{ROOT / 'eval'}"


def sandboxes(parent: int) -> list[int]:
    """Processes below ``parent`` that have reached the sandboxed code's process."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    inner = [
        pid for child in children for pid in Path(f"/proc/{child}/task/{child}/children").read_text().split()
    ]
    return [int(pid) for pid in [*children, *inner]] if inner else []


def alive(processes: list[int]) -> list[int]:
    return [pid for pid in processes if Path(f"/proc/{pid}").exists()]
