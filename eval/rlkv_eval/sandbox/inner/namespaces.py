"""Namespaces: the process sees no other process, no network, and a file tree of its own, read-only."""

from __future__ import annotations

import ctypes
import os

from .kernel import LIBC, PIVOT_ROOT, checked, machine, syscall

# linux/sched.h, linux/mount.h
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 1 << 17, 1 << 26, 1 << 27, 1 << 28, 1 << 29, 1 << 30
ALL = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
DETACH = 2

WORK = "/sandbox"  # the writable directory, as the code sees it


def unshare() -> None:
    """Enter new namespaces; the next child is process 1 of its process namespace. OSError if forbidden."""
    user, group = os.geteuid(), os.getegid()
    if LIBC.unshare(NEWUSER | ALL) == 0:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{user} {user} 1")
        _write("/proc/self/gid_map", f"{group} {group} 1")
    else:  # root may do without a user namespace where those are switched off
        checked(LIBC.unshare(ALL), "unshare")


def enter_root(folder: str, readable: list[str], bytes_: int, files: int) -> None:
    """Make a new file tree at the empty ``folder`` and move into it: ``readable`` read-only at their own
    places, WORK in memory with room for ``bytes_`` and ``files``, nothing else. OSError if forbidden.
    """
    _mount("none", "/", None, REC | PRIVATE)
    _mount("tmpfs", folder, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    for path in readable:
        _show(path, folder + path)
    os.mkdir(folder + WORK)
    _mount("tmpfs", folder + WORK, "tmpfs", NOSUID | NODEV, f"size={bytes_},nr_inodes={files},mode=700")
    _mount("none", folder, None, REMOUNT | BIND | RDONLY | NOSUID | NODEV)
    os.chdir(folder)
    syscall("pivot_root", PIVOT_ROOT[machine()], ctypes.c_char_p(b"."), ctypes.c_char_p(b"."))
    checked(LIBC.umount2(b".", DETACH), "umount")  # the old root, stacked on the new one
    os.chdir(WORK)


def _show(path: str, target: str) -> None:
    """Bind ``path`` at ``target``, read-only with everything mounted below it."""
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    elif os.path.exists(path):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    else:
        return
    _mount(path, target, None, BIND)
    # A user namespace may not clear the flags that a mount came with, so they are repeated. The flags of
    # statvfs are the mount flags for all that are kept here (nosuid, nodev, noexec, noatime, relatime).
    kept = os.statvfs(target).f_flag
    flags = (kept & (2 | 4 | 8 | 1024 | 2048)) | (1 << 21 if kept & 4096 else 0)
    device = os.path.realpath(path).startswith("/dev/")
    _mount("none", target, None, REMOUNT | BIND | flags | NOSUID | (0 if device else RDONLY))


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    result = LIBC.mount(
        os.fsencode(source),
        os.fsencode(target),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        options.encode() if options else None,
    )
    checked(result, f"mount {target}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
