"""The process that generated code runs in. A script of its own: it imports the standard library only, never srde.

Run as `python -I -S child.py ORDERS VERDICTS`, two descriptors. What goes over them, in order:

    parent -> child   frame: JSON with the limits, the filter and the modules to import; frame: the program
    child -> parent   S      limits and filter are on and were tried; or E error: they are not, and nothing was run
    child -> parent   R      the program's top level has run
    parent -> child   frame: a key (16 bytes), then the tests; and 16 bytes of challenge, which stay in the pipe
    child -> parent   P key challenge    the tests have run to their end; or, at any time after S:
    child -> parent   F reason

A frame is its length in 4 bytes (little endian), then its content. Whatever else arrives at the parent is a failure.

After S nothing is looked up by a name that the program could have bound anew: what the rest needs is in local variables,
and between the program and the tests the built-ins are put back. Code that walks the frames of the interpreter can still
find all this; see the package's docstring.
"""

from __future__ import annotations

import base64
import builtins
import contextlib
import ctypes
import importlib
import json
import os
import resource
import sys
import types
from collections.abc import Callable
from typing import Any

KEY_BYTES = 16
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_SIGKILL = 9
_LONGEST_REASON = 300


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("program", ctypes.c_char_p))


def contain(setup: dict[str, Any]) -> None:
    """Takes from this process all that a computation does not need; raises where the kernel does not do it.

    Args:
        setup: `parent` (its process id), `memory_bytes`, `cpu_seconds`, `filter` (base64).
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def ask(call: str, *arguments: object) -> None:
        if getattr(libc, call)(*arguments) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{call}{arguments}: {os.strerror(number)}")

    none = ctypes.c_ulong(0)
    ask("prctl", _PR_SET_PDEATHSIG, ctypes.c_ulong(_SIGKILL), none, none, none)
    if os.getppid() != setup["parent"]:
        raise OSError("the parent has ended")
    try:  # if the machine's memory runs out, this process is the one to go; not every /proc can be written
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:
            score.write("1000")
    except OSError:
        pass
    # No core file, not to a core_pattern's program either, which RLIMIT_CORE does not stop.
    ask("prctl", _PR_SET_DUMPABLE, none, none, none, none)
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    ask("capset", header, (ctypes.c_uint32 * 6)())
    for limit, value in (
        (resource.RLIMIT_AS, setup["memory_bytes"]),
        (resource.RLIMIT_CPU, setup["cpu_seconds"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    ask("prctl", _PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), none, none, none)
    program = base64.b64decode(setup["filter"])
    block = _Filter(len(program) // 8, program)
    ask("prctl", _PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(block), none, none)


def try_containment() -> None:
    """Raises unless opening a file and making a process fail, as the filter says."""
    for name, attempt in (("open", lambda: os.open(os.devnull, os.O_RDONLY)), ("fork", os.fork)):
        try:
            made = attempt()
        except PermissionError:
            continue
        if name == "fork" and made == 0:
            os._exit(0)
        raise OSError(f"the seccomp filter was installed and {name} works still")


def import_quietly(modules: list[str]) -> None:
    """Imports what there is of the modules: after the filter is on, no file can be opened, so none can be imported."""
    for module in modules:
        with contextlib.suppress(ImportError):  # the program's own import will say so
            importlib.import_module(module)


def read_exactly(descriptor: int, size: int, read: Callable[[int, int], bytes] = os.read) -> bytes:
    """Reads that many bytes; raises EOFError where the pipe ends before. What it calls is bound before the program runs."""
    found = b""
    while len(found) < size:
        part = read(descriptor, size - len(found))
        if not part:
            raise EOFError("the parent closed the pipe early")
        found += part
    return found


def read_frame(descriptor: int, exactly: Callable[[int, int], bytes] = read_exactly) -> bytes:
    """Reads one frame."""
    return exactly(descriptor, int.from_bytes(exactly(descriptor, 4), "little"))


def main(orders: int, verdicts: int) -> None:
    """Contains this process, runs the program and its tests, and ends the process."""
    setup = json.loads(read_frame(orders))
    program = read_frame(orders)
    import_quietly(setup["modules"])
    os.dup2(1, 2)  # until here stderr went to the parent, for an interpreter that does not come this far
    try:
        contain(setup)
        try_containment()
    except OSError as error:
        os.write(verdicts, f"E{error}".encode())
        os._exit(1)

    namespace_module = types.ModuleType("program")
    namespace = namespace_module.__dict__
    # A class finds its module by name (dataclasses, pickle); and `__main__` is not to lead to this file.
    sys.modules["program"] = sys.modules["__main__"] = namespace_module
    exactly, write, leave = read_exactly, os.write, os._exit
    trace, profile = sys.settrace, sys.setprofile
    compile_, exec_, decode, frame = compile, exec, bytes.decode, read_frame
    failed, pristine, builtins_, key_bytes = _failure, dict(vars(builtins)), vars(builtins), KEY_BYTES
    # Made now, for later there may be no memory for it.
    out_of_memory = f"Fmemory: needed more than {setup['memory_bytes'] >> 20} MiB".encode()

    write(verdicts, b"S")
    stage, text = "program", ""
    try:
        text = decode(program)
        exec_(compile_(text, "<program>", "exec", 0, True), namespace)
        trace(None)
        profile(None)
        builtins_.update(pristine)
        namespace["__builtins__"] = builtins_
        write(verdicts, b"R")
        content = frame(orders)
        stage, text = "tests", decode(content[key_bytes:])
        exec_(compile_(text, "<tests>", "exec", 0, True), namespace)
        write(verdicts, b"P" + content[:key_bytes] + exactly(orders, key_bytes))
    except MemoryError:
        write(verdicts, out_of_memory)
    except BaseException as error:  # noqa: BLE001  whatever the program raises, SystemExit too, is a failure with a reason
        write(verdicts, b"F" + failed(error, stage, text))
    finally:
        leave(0)  # no exit handlers


def _failure(error: BaseException, stage: str, text: str) -> bytes:
    """The reason, `word: details`; the details are the program's to choose."""
    try:
        details = f"{type(error).__name__}: {error}" if f"{error}" else type(error).__name__
        if isinstance(error, SystemExit):
            reason = f"exit: called exit({error})"
        elif isinstance(error, SyntaxError) and error.filename in ("<program>", "<tests>"):
            reason = f"syntax: line {error.lineno} of the {stage}: {error.msg}"
        else:
            line, trace = None, error.__traceback__
            while trace is not None:
                if trace.tb_frame.f_code.co_filename == f"<{stage}>":
                    line = trace.tb_lineno
                trace = trace.tb_next
            if stage == "tests" and type(error) is AssertionError and line is not None:
                source = text.splitlines()[line - 1].strip()
                reason = f"failed: line {line} of the tests: {source}"
            else:
                reason = f"error: line {line} of the {stage}: {details}"
        return reason[:_LONGEST_REASON].encode("utf-8", "replace")
    except BaseException:  # noqa: BLE001  the exception is the program's own, and so is its __str__
        return b"error: an exception that cannot be shown"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
