"""Where the sandbox works, where it refuses, and its tables against the system's own headers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlkv.errors import RLKVError
from rlkv_eval.sandbox import Limits, check, guards, run
from rlkv_eval.sandbox.inner import landlock, seccomp
from rlkv_eval.sandbox.launch import readable_paths

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(seconds=5)


def test_an_ordinary_user() -> None:
    """The same self-test as root's, as nobody."""
    if os.geteuid() != 0:
        pytest.skip("the whole file already runs as an ordinary user")
    if not (setpriv := shutil.which("setpriv")):
        pytest.skip("setpriv is not installed")
    nobody = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups"]
    code = "from rlkv_eval.sandbox import run; print(run('import os; print(os.getuid())').stdout)"
    able = (
        "import subprocess as s, sys; assert sys.version_info > (3, 11); s.check_call([sys.executable, '-V'])"
    )
    for python in (sys.executable, "/usr/bin/python3", "/usr/bin/python3.11", "/usr/bin/python3.12"):
        done = subprocess.run([*nobody, python, "-c", able], capture_output=True, text=True)
        if done.returncode == 0:
            break
    else:
        pytest.skip("nobody may run no Python 3.11 or newer here")
    done = subprocess.run(
        [*nobody, python, "-c", code],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'eval'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "65534" in done.stdout


def test_refuses_where_nothing_guards_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    check.cache_clear()
    monkeypatch.setattr(guards, "CHOICES", (("nothing of the kind",),))
    try:
        with pytest.raises(
            RLKVError, match=r"cannot be contained here, so it is not run.*write a file outside"
        ):
            run("print('must not run')", LIMITS)
    finally:
        check.cache_clear()


def test_refuses_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    check.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    try:
        with pytest.raises(RLKVError, match="needs Linux"):
            check()
    finally:
        check.cache_clear()


def test_a_guard_that_cannot_be_set_up_stops_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RLKVError, match="could not be set up"):
        monkeypatch.setattr("rlkv_eval.sandbox.launch.readable_paths", lambda: ["/dev/null/x"])
        run("print('must not run')", LIMITS, ("landlock",))


def test_limits_are_checked() -> None:
    with pytest.raises(RLKVError, match="1 or more"):
        Limits(seconds=0)


def test_readable_paths_hold_no_home() -> None:
    for place in readable_paths():
        assert (
            not Path.home().is_relative_to(place)
            and not str(place).startswith("/etc/")
            or place == "/etc/ld.so.cache"
        )


def test_landlock_rights_by_version() -> None:
    """The number of rights that linux/landlock.h lists for each version."""
    assert [landlock.handled(version).bit_count() for version in range(1, 8)] == [13, 14, 15, 15, 16, 16, 16]


def test_the_filter_allows_what_the_headers_call_so(tmp_path: Path) -> None:
    """Numbers against this machine's own headers."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler to read the kernel's headers with")
    column = seccomp.ARCHITECTURES[os.uname().machine][0]
    calls = [call.split(":") for call in [*seccomp.CALLS.split(), *seccomp.WITH_ARGUMENT]]
    calls = [call for call in calls if call[column] != "-"]
    source = "#include <sys/syscall.h>\n" + "".join(f"{call[0]}=SYS_{call[0]}\n" for call in calls)
    done = subprocess.run([compiler, "-E", "-P", "-"], input=source, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no kernel headers")
    known = dict(line.split("=") for line in done.stdout.splitlines() if "=" in line)
    compared = {name: number for name, number in known.items() if number.isdigit()}
    assert len(compared) > 80
    assert all(compared.get(call[0], call[column]) == call[column] for call in calls)
