"""A seccomp-BPF filter of allowed system calls, as the bytes that `prctl(PR_SET_SECCOMP)` takes.

The filter is a list of what a Python program needs that computes: memory, time, signals of its own, reading and writing
descriptors that are open already. Whatever is not on the list fails with EPERM: `open` of anything, `socket`, `fork`,
`execve`, `ptrace`, `io_uring_setup`, and every call that a later kernel brings. A call of another architecture's table
(32-bit code on a 64-bit kernel) kills the process, because its numbers would mean something else.

Numbers: Linux `arch/x86/entry/syscalls/syscall_64.tbl` and `include/uapi/asm-generic/unistd.h` (aarch64).
"""

from __future__ import annotations

import platform
import struct
import sys

# name: (number on x86_64, number on aarch64)
_NUMBERS = {
    "brk": (12, 214), "clock_getres": (229, 114), "clock_gettime": (228, 113), "clock_nanosleep": (230, 115),
    "close": (3, 57), "exit": (60, 93), "exit_group": (231, 94), "fcntl": (72, 25), "futex": (202, 98),
    "getcwd": (79, 17), "getegid": (108, 177), "geteuid": (107, 175), "getgid": (104, 176), "getpid": (39, 172),
    "getppid": (110, 173), "getrandom": (318, 278), "getrusage": (98, 165), "gettid": (186, 178),
    "gettimeofday": (96, 169), "getuid": (102, 174), "ioctl": (16, 29), "kill": (62, 129), "lseek": (8, 62),
    "madvise": (28, 233), "mmap": (9, 222), "mprotect": (10, 226), "mremap": (25, 216), "munmap": (11, 215),
    "nanosleep": (35, 101), "ppoll": (271, 73), "prlimit64": (302, 261), "pselect6": (270, 72), "read": (0, 63),
    "restart_syscall": (219, 128), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sched_getaffinity": (204, 123), "sched_yield": (24, 124), "sigaltstack": (131, 132), "sysinfo": (99, 179),
    "tgkill": (234, 131), "times": (100, 153), "uname": (63, 160), "write": (1, 64),
}  # fmt: skip
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*

_F_GETFD, _F_GETFL, _TCGETS = 1, 3, 0x5401

# struct seccomp_data: number, architecture, instruction pointer, six arguments of 64 bits (both machines: low word first)
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_ARGUMENTS = 0, 4, 16
_LOAD, _JUMP_IF_EQUAL, _RETURN = (
    0x20,
    0x15,
    0x06,
)  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
_ALLOW, _KILL_PROCESS, _FAIL_WITH_EPERM = 0x7FFF0000, 0x80000000, 0x00050001


def machine() -> str | None:
    """`x86_64` or `aarch64`, where this interpreter runs as 64-bit code of it on Linux; None elsewhere."""
    found = platform.machine()
    known = sys.platform == "linux" and found in _ARCHITECTURES and sys.maxsize > 2**32
    return found if known else None


def build_filter(architecture: str, pid: int) -> bytes:
    """The filter for one process.

    Args:
        architecture: `x86_64` or `aarch64`.
        pid: The process; `kill` and `tgkill` are allowed on it (that is what `abort` does) and on no other.

    Returns:
        `struct sock_filter` after `struct sock_filter`, 8 bytes each.
    """
    column, audit = _ARCHITECTURES[architecture]
    low, high = 0, 1  # words of an argument
    # (call, ((argument, word, the only value allowed), ...)); a call that stands twice is allowed by either line
    conditional: list[tuple[str, tuple[tuple[int, int, int], ...]]] = [
        ("kill", ((0, low, pid),)),
        ("tgkill", ((0, low, pid),)),
        ("ioctl", ((1, low, _TCGETS),)),  # isatty
        ("fcntl", ((1, low, _F_GETFD),)),
        ("fcntl", ((1, low, _F_GETFL),)),
        ("prlimit64", ((0, low, 0), (2, low, 0), (2, high, 0))),  # reading one's own limits
    ]
    program = [
        _one(_LOAD, _OFFSET_ARCHITECTURE),
        _one(_JUMP_IF_EQUAL, audit, if_true=1),
        _one(_RETURN, _KILL_PROCESS),
        _one(_LOAD, _OFFSET_NUMBER),
    ]
    for name, numbers in _NUMBERS.items():
        if name not in {call for call, _ in conditional}:
            program += [_one(_JUMP_IF_EQUAL, numbers[column], if_false=1), _one(_RETURN, _ALLOW)]
    for name, conditions in conditional:
        rest = 2 * len(conditions) + 1  # instructions after the test of the number
        program += [_one(_LOAD, _OFFSET_NUMBER), _one(_JUMP_IF_EQUAL, _NUMBERS[name][column], if_false=rest)]
        for argument, word, value in conditions:
            rest -= 2
            program += [
                _one(_LOAD, _OFFSET_ARGUMENTS + 8 * argument + 4 * word),
                _one(_JUMP_IF_EQUAL, value, if_false=rest),
            ]
        program.append(_one(_RETURN, _ALLOW))
    program.append(_one(_RETURN, _FAIL_WITH_EPERM))
    return b"".join(program)


def _one(code: int, value: int, *, if_true: int = 0, if_false: int = 0) -> bytes:
    """One `struct sock_filter`."""
    return struct.pack("=HBBI", code, if_true, if_false, value)
