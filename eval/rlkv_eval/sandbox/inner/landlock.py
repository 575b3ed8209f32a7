"""Landlock (Linux 5.13 and newer): which files may be opened, whatever the user, root included."""

from __future__ import annotations

import ctypes
import os
import stat
import struct

from .kernel import LIBC, syscall

CREATE, ADD, RESTRICT = 444, 445, 446  # the same numbers on every architecture
# linux/landlock.h
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
MAKE_CHAR, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 10, 1 << 11
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV

READ = EXECUTE | READ_FILE | READ_DIR
SPECIAL = MAKE_CHAR | MAKE_SOCK | MAKE_FIFO | MAKE_BLOCK | IOCTL_DEV


def abi() -> int:
    """Version of Landlock that the kernel offers; 0 for none."""
    return max(0, int(LIBC.syscall(ctypes.c_long(CREATE), None, ctypes.c_long(0), ctypes.c_long(1))))


def handled(version: int) -> int:
    """Every right on files that a kernel of this version can withhold; each lies one bit above the last."""
    return (1 << 13 + (version >= 2) + (version >= 3) + (version >= 5)) - 1


def restrict(readable: list[str], writable: list[str]) -> None:
    """From now on open only what lies under ``readable``, and change only what lies under ``writable``.

    No TCP port either (version 4), no signal or abstract socket to a process outside (version 6). Paths that
    don't exist are passed over. Needs no_new_privs. Raises OSError when the kernel refuses.
    """
    version = abi()
    if version == 0:
        raise OSError("Landlock: not offered by this kernel")
    rights = handled(version)
    attributes = struct.pack("<QQQ", rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = syscall("landlock_create_ruleset", CREATE, ctypes.c_char_p(attributes), size, 0)
    try:
        for path in readable:
            _allow(ruleset, path, READ & rights)
        for path in writable:
            _allow(ruleset, path, rights & ~SPECIAL)
        syscall("landlock_restrict_self", RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            rights &= OF_FILES
        rule = struct.pack("<Qi", rights, place)
        syscall("landlock_add_rule", ADD, ruleset, 1, ctypes.c_char_p(rule), 0)
    finally:
        os.close(place)
