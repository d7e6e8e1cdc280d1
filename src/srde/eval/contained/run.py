"""Runs a program and its tests in a contained process, and says whether the tests ran to their end."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from srde.errors import UsageError
from srde.eval.contained.seccomp import build_filter, machine

START_SECONDS = 60.0
"""How long the interpreter may take to start; not part of a program's time."""
LEAST_MEMORY_MB = 128

_KEY_BYTES = 16
_LONGEST_ANSWER = 4096  # bytes of one process on the pipe for verdicts; more is a flood
_MOST_IMPORTS = 300
# Imported for every program: what programs use most, also without an import that can be seen in their text, and what the
# standard library imports when something is first called.
_ALWAYS = [
    *(
        "bisect calendar cmath collections.abc contextlib copy copyreg dataclasses datetime decimal enum fractions "
        "functools hashlib heapq itertools json linecache locale math numbers operator random re statistics string struct "
        "textwrap time traceback types typing unicodedata warnings weakref _strptime"
    ).split(),
    *(
        "encodings." + name
        for name in "ascii base64_codec cp1252 cp437 hex_codec iso8859_15 latin_1 raw_unicode_escape rot_13 "
        "unicode_escape utf_16 utf_16_be utf_16_le utf_32 utf_32_be utf_32_le utf_7 utf_8_sig".split()
    ),
    *(["_pylong"] if "_pylong" in sys.stdlib_module_names else []),  # Python 3.12: large numbers as text
]
# Their import does something: opens a browser, prints, shows a window, runs tests, installs.
_NEVER = {"antigravity", "ensurepip", "idlelib", "test", "this", "tkinter", "turtle", "turtledemo"}
_IMPORT = re.compile(
    r"\bfrom[ \t]+([\w.]+)[ \t]+import[ \t]*(?:\(([^)]{0,2000})|([\w, \t]+))|\bimport[ \t]+([\w., \t]+)"
)


@dataclass(frozen=True)
class Verdict:
    """What came of one program.

    Attributes:
        passed: Whether program and tests ran to their end.
        reason: `passed`, or a word and details: `failed:` an assertion of the tests, `error:` another exception, `syntax:`,
            `exit:` it ended itself, `timeout:`, `memory:`, `crash:` a signal ended it, `flood:` it wrote to the pipe for
            verdicts. One line of printable characters, at most 300; the details are the program's, so do not trust them.
        seconds: From the start of the program, which is after that of the interpreter, to its end.
    """

    passed: bool
    reason: str
    seconds: float


class _TimeUpError(Exception):
    """The deadline has passed."""


def require_containment() -> None:
    """Runs one empty program, so that a machine that cannot contain any says so before the first real one.

    Raises:
        UsageError: This is not Linux on x86_64 or aarch64, or the kernel has no seccomp filters or refuses them.
    """
    verdict = run_program("", "", seconds=START_SECONDS)
    if not verdict.passed:
        raise _cannot_contain(f"an empty program did not pass: {verdict.reason}")


def run_program(program: str, tests: str, *, seconds: float = 10.0, memory_mb: int = 1024) -> Verdict:
    """Runs a program, then its tests in the same namespace, in a process of its own; see the package for what holds it.

    May be called from several threads at once. Whatever the program does, this returns within about `seconds`, and its
    process is gone by then. The caller is to have the user's consent: `score_code` asks for it.

    Args:
        program: Python source; its `__name__` is not `__main__`.
        tests: Python source that raises where the program is wrong. The program's top level runs before it is sent.
        seconds: Limit of wall-clock time for both together.
        memory_mb: Limit of address space, in MiB, of which the interpreter takes about 25.

    Raises:
        UsageError: A limit is out of range, or the process cannot be contained here; then nothing has been run.
    """
    if not 0 < seconds < math.inf:
        raise UsageError.of("seconds", seconds, rule="must be above 0 and finite", fix="Give a time limit")
    if memory_mb < LEAST_MEMORY_MB:
        rule = f"must be at least {LEAST_MEMORY_MB}, for the interpreter needs some of it"
        raise UsageError.of("memory_mb", memory_mb, rule=rule, fix="Raise it")
    architecture = machine()
    if architecture is None:
        raise _cannot_contain("this is not 64-bit code on Linux")
    if not sys.executable:
        raise _cannot_contain("sys.executable is empty, so there is no interpreter to start")
    # A lone surrogate cannot be sent; as the replacement character it is a syntax error or another text.
    source, checks = (text.encode("utf-8", "replace") for text in (program, tests))
    with _Child() as child:
        setup = {
            "parent": os.getpid(),
            "memory_bytes": memory_mb << 20,
            "cpu_seconds": math.ceil(seconds) + 5,  # only for the case that this process is stopped
            "filter": base64.b64encode(build_filter(architecture, child.pid)).decode(),
            "modules": [*_ALWAYS, *_imported(f"{program}\n{tests}")],
        }
        child.start(setup, source)
        begin = time.monotonic()
        try:
            reason = child.judge(checks, begin + seconds)
        except _TimeUpError:
            reason = f"timeout: took longer than {seconds:g} s"
        return Verdict(reason is None, reason or "passed", time.monotonic() - begin)


class _Child:
    """The contained process, from its start to its end; it is killed when the `with` is left, if it still runs."""

    def __enter__(self) -> _Child:
        theirs_in, self._orders = os.pipe()
        self._verdicts, theirs_out = os.pipe()
        os.set_blocking(self._orders, False)
        try:
            self._process = subprocess.Popen(
                # -I: no environment, no user's packages, not this folder on the path; -S: no site-packages
                [sys.executable, "-I", "-S", str(Path(__file__).with_name("child.py")), str(theirs_in), str(theirs_out)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs_in, theirs_out),
                env={},
                cwd="/",
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(self._orders)
            os.close(self._verdicts)
            raise
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        self.pid = self._process.pid
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()
        os.close(self._orders)
        os.close(self._verdicts)

    def start(self, setup: dict[str, object], source: bytes) -> None:
        """Sends limits and program; returns when the limits hold."""
        deadline = time.monotonic() + START_SECONDS
        try:
            self._send(_frame(json.dumps(setup).encode()) + _frame(source), deadline)
            answer = self._read(1, deadline)
            if answer == b"S":
                return
            problem = self._read(_LONGEST_ANSWER, deadline).decode("utf-8", "replace")
        except _TimeUpError:
            raise _cannot_contain(f"the interpreter did not start within {START_SECONDS:g} s") from None
        if not answer:
            assert self._process.stderr is not None
            self._process.wait()
            last = self._process.stderr.read().decode("utf-8", "replace").strip().split("\n")[-1]
            problem = f"the interpreter ended with status {self._process.returncode} ({last})"
        raise _cannot_contain(problem)

    def judge(self, checks: bytes, deadline: float) -> str | None:
        """Lets the program and then the tests run; None if all is well, else the reason."""
        answer = self._read(1, deadline)
        if answer == b"R":
            key, challenge = secrets.token_bytes(_KEY_BYTES), secrets.token_bytes(_KEY_BYTES)
            self._send(_frame(key + checks) + challenge, deadline)
            answer = self._read(_LONGEST_ANSWER, deadline)
            if answer == b"P" + key + challenge:
                return None
        elif answer == b"F":
            answer += self._read(_LONGEST_ANSWER, deadline)
        if answer[:1] == b"F" and len(answer) < _LONGEST_ANSWER:
            text = answer[1:].decode("utf-8", "replace")
            return "".join(one if one.isprintable() else " " for one in text)[:300]
        if answer:
            return "flood: wrote to the pipe for verdicts, which is not its to write to"
        try:  # the pipe is closed: the process has ended, is about to, or has closed it to stay
            status = self._process.wait(max(0.0, min(1.0, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            return "exit: closed the pipe for verdicts"
        if status < 0:
            return f"crash: ended by {signal.Signals(-status).name}"
        return f"exit: ended before its tests did, with status {status}"

    def _send(self, content: bytes, deadline: float) -> None:
        """Writes all of it, unless the process closes its end, which shows when its answer is read."""
        rest = memoryview(content)
        while rest:
            _wait(self._orders, select.POLLOUT, deadline)
            try:
                rest = rest[os.write(self._orders, rest) :]
            except BrokenPipeError:
                return

    def _read(self, most: int, deadline: float) -> bytes:
        """Reads to the end of the pipe, or `most` bytes."""
        found = b""
        while len(found) < most:
            _wait(self._verdicts, select.POLLIN, deadline)
            part = os.read(self._verdicts, most - len(found))
            if not part:
                break
            found += part
        return found


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise _TimeUpError


def _frame(content: bytes) -> bytes:
    return len(content).to_bytes(4, "little") + content


def _imported(text: str) -> list[str]:
    """The modules of the standard library that a text seems to import, at most `_MOST_IMPORTS`; too many do no harm."""

    def names() -> Iterator[str]:
        for package, bracketed, members, plain in _IMPORT.findall(text):
            if package:
                yield package
            for part in (re.sub(r"#[^\n]*", "", bracketed) or members or plain).split(","):
                for name in part.split()[:1]:  # what follows is `as ...`
                    yield f"{package}.{name}" if package else name  # a member may be a module or not

    found: dict[str, None] = {}
    for name in names():
        parts = name.split(".")
        if parts[0] in sys.stdlib_module_names and parts[0] not in _NEVER and "__main__" not in parts:
            found[name] = None
        if len(found) == _MOST_IMPORTS:
            break
    return list(found)


def _cannot_contain(problem: str) -> UsageError:
    error = UsageError.of(
        "containment", problem,
        rule="generated code runs only under a seccomp filter, which takes Linux on x86_64 or aarch64 and a kernel that "
        "allows one",
        fix="Run the evaluation on such a machine, or in a container that does not forbid seccomp; or leave out "
        "--confirm_run_unsafe_code, and the items that need code to be run are counted as not scored",
    )  # fmt: skip
    assert isinstance(error, UsageError)
    return error
