"""System calls that Python has no function for, by number, through libc's ``syscall``."""

from __future__ import annotations

import ctypes
import os

LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38  # linux/prctl.h
CAPSET = {"x86_64": 126, "aarch64": 91}
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def machine() -> str:
    return os.uname().machine


def checked(result: int, what: str) -> int:
    """``result`` of a C call; OSError that names the call when it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(what: str, number: int, *arguments: object) -> int:
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    return checked(LIBC.syscall(ctypes.c_long(number), *words), what)


def prctl(what: str, option: int, *values: int | ctypes.c_void_p) -> None:
    words = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in values]
    words += [ctypes.c_ulong(0)] * (4 - len(words))
    checked(LIBC.prctl(option, *words), what)


def die_with_parent(parent: int) -> None:
    """Be killed when the process ``parent`` ends; exit at once if it has ended already."""
    prctl("prctl(PDEATHSIG)", PR_SET_PDEATHSIG, 9)
    if os.getppid() != parent:
        os._exit(1)


def drop_privileges() -> None:
    """Give up every capability for good, root's too; no program run later can regain one."""
    capability = 0
    while capability < 64:
        try:
            prctl("prctl(CAPBSET_DROP)", PR_CAPBSET_DROP, capability)
        except OSError:
            break  # past the last one that this kernel knows, or not privileged to begin with
        capability += 1
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    none = (ctypes.c_uint32 * 6)()
    syscall("capset", CAPSET[machine()], ctypes.byref(header), ctypes.byref(none))
    prctl("prctl(NO_NEW_PRIVS)", PR_SET_NO_NEW_PRIVS, 1)
