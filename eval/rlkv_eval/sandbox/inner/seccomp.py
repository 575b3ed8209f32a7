"""The system calls that sandboxed code may make: reading, writing, memory, time. All others fail with EPERM.

Absent, and so impossible: new processes and threads, running programs, sockets, signals to others, mounts,
namespaces, tracing, keys, modules, io_uring, and changing the mode, owner or times of a file.
"""

from __future__ import annotations

import ctypes
import struct

from .kernel import PR_SET_SECCOMP, machine, prctl

# name:x86_64:aarch64, from the kernel's unistd.h; "-" where an architecture has no such call.
CALLS = """
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69 pwritev:296:70
close:3:57 close_range:436:436 lseek:8:62 open:2:- openat:257:56 creat:85:- stat:4:- fstat:5:80
lstat:6:- newfstatat:262:79 statx:332:291 access:21:- faccessat:269:48 faccessat2:439:439 readlink:89:-
readlinkat:267:78 getcwd:79:17 chdir:80:49 getdents64:217:61 mkdir:83:- mkdirat:258:34 rmdir:84:-
unlink:87:- unlinkat:263:35 rename:82:- renameat:264:38 renameat2:316:276 ftruncate:77:46 sendfile:40:71
umask:95:166 dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59 poll:7:- ppoll:271:73 select:23:-
pselect6:270:72 mmap:9:222 munmap:11:215 mremap:25:216 mprotect:10:226 madvise:28:233 brk:12:214
futex:202:98 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 sigaltstack:131:132
alarm:37:- setitimer:38:103 getitimer:36:102 pause:34:- nanosleep:35:101 clock_nanosleep:230:115
clock_gettime:228:113 clock_getres:229:114 gettimeofday:96:169 time:201:- times:100:153 getrusage:98:165
getrlimit:97:163 uname:63:160 sysinfo:99:179 getrandom:318:278 getpid:39:172 gettid:186:178
getppid:110:173 getpgrp:111:- getpgid:121:155 getsid:124:156 getuid:102:174 geteuid:107:175
getgid:104:176 getegid:108:177 getgroups:115:158 sched_yield:24:124 sched_getaffinity:204:123
getcpu:309:168 set_tid_address:218:96 set_robust_list:273:99 rseq:334:293 arch_prctl:158:-
membarrier:324:283 restart_syscall:219:128 exit:60:93 exit_group:231:94
"""
# name:x86_64:aarch64:argument -> its allowed values. Terminal and descriptor requests of ioctl; descriptor
# flags and duplicates of fcntl (not F_SETOWN, which sends signals); limits of this process alone.
WITH_ARGUMENT = {
    "ioctl:16:29:1": (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),
    "fcntl:72:25:1": (0, 1, 2, 3, 4, 1030),
    "prlimit64:302:261:0": (0,),
}
ARCHITECTURES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}  # column above, AUDIT_ARCH_*

# linux/filter.h and linux/seccomp.h
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_ARGUMENTS = 16  # offset of the six 64-bit arguments in seccomp_data


def supported() -> bool:
    return machine() in ARCHITECTURES


def program() -> bytes:
    """The filter in classic BPF. A number not listed, of another ABI too, meets the refusal at the end."""
    column, audit = ARCHITECTURES[machine()]
    code = [_step(_LOAD, 4), _step(_EQUAL, audit, 1, 0), _step(_RETURN, _KILL), _step(_LOAD, 0)]
    for call in CALLS.split():
        number = call.split(":")[column]
        if number != "-":
            code += [_step(_EQUAL, int(number), 0, 1), _step(_RETURN, _ALLOW)]
    for call, values in WITH_ARGUMENT.items():
        parts = call.split(":")
        code += [_step(_EQUAL, int(parts[column]), 0, 2 + 2 * len(values))]
        code += [_step(_LOAD, _ARGUMENTS + 8 * int(parts[3]))]  # the low half: both are little-endian
        for value in values:
            code += [_step(_EQUAL, value, 0, 1), _step(_RETURN, _ALLOW)]
        code += [_step(_RETURN, _REFUSE)]
    return b"".join([*code, _step(_RETURN, _REFUSE)])


def restrict() -> None:
    """Install the filter on this thread, for good. Needs no_new_privs; OSError when the kernel refuses."""
    code = ctypes.create_string_buffer(program())
    header = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(code)))
    prctl("prctl(SECCOMP)", PR_SET_SECCOMP, 2, ctypes.c_void_p(ctypes.addressof(header)))


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
