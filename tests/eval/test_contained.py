"""Generated code: what passes, what fails and why, and that it can do nothing but compute."""

from __future__ import annotations

import os
import platform
import random
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from srde.data.rows import Row, read_rows
from srde.errors import DataError, UsageError
from srde.eval.contained import require_containment, run, run_program, score_code, seccomp
from srde.eval.contained.answers import program_of

pytestmark = pytest.mark.skipif(seccomp.machine() is None, reason="code is contained on Linux only")

DOUBLE = "def double(x):\n    return 2 * x\n"
TESTS = "assert double(1) == 2\nassert double(-3) == -6\n"
NEVER = "assert False, 'the tests ran'"  # tests that no program passes
LONGEST_TO_STOP = 15.0  # seconds beyond the limit; the machine may be busy


@pytest.fixture(autouse=True)
def nothing_remains():
    """No process and no descriptor is left by any program."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert contained_processes() == []
    assert set(os.listdir("/proc/self/fd")) <= before


def contained_processes() -> list[int]:
    """The children of this process that run programs, whichever thread has started them."""
    found = []
    for one in (one for task in os.listdir("/proc/self/task") for one in children_of(os.getpid(), task)):
        try:
            if b"/contained/child.py\0" in Path(f"/proc/{one}/cmdline").read_bytes():
                found.append(int(one))
        except OSError:  # it has ended meanwhile
            continue
    return found


def children_of(pid: int, thread: int | str | None = None) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{thread or pid}/children").read_text().split()
    except OSError:
        return []


def row(tests: str | None = TESTS, prompt: str = "Write double(x).", **metadata) -> Row:
    """A row of kind code."""
    told = metadata if tests is None else {"tests": tests, **metadata}
    user = [{"role": "user", "content": prompt}]
    return Row(prompt=user, response=DOUBLE, file="rows.jsonl", line=7, kind="code", metadata=told)


def score(text: str, row: Row) -> tuple[bool, str]:
    return score_code(text, row, confirm_run_unsafe_code=True)


def attempt(program: str, tests: str = NEVER, seconds: float = 5.0):
    """Runs a program that must not pass, and must be over in time."""
    begin = time.monotonic()
    verdict = run_program(program, tests, seconds=seconds)
    assert time.monotonic() - begin < seconds + LONGEST_TO_STOP
    assert not verdict.passed
    return verdict


# What passes, and what fails for which reason


def test_a_right_program_passes():
    verdict = run_program(DOUBLE, TESTS)
    assert (verdict.passed, verdict.reason) == (True, "passed")
    assert 0 < verdict.seconds < 5


@pytest.mark.parametrize(
    ("program", "tests", "reason"),
    [
        ("def double(x):\n    return x + 1\n", TESTS, r"failed: line 2 of the tests: assert double\(-3\) == -6"),
        ("", TESTS, r"error: line 1 of the tests: NameError: name 'double' is not defined"),
        ("\n1 / 0", TESTS, r"error: line 2 of the program: ZeroDivisionError: division by zero"),
        ("assert False", "", r"error: line 1 of the program: AssertionError"),
        ("def double(x:\n", TESTS, r"syntax: line 1 of the program: '\(' was never closed"),
        ("x = 1\0", TESTS, r"(syntax|error): .*null bytes"),
        ("x = '\ud800'", "", r"passed"),
        ("", "assert (", r"syntax: line 1 of the tests: .*"),
        ("print(input())", TESTS, r"error: line 1 of the program: EOFError: .*"),
        ("import numpy", "", r"error: line 1 of the program: ModuleNotFoundError: No module named 'numpy'"),
        ("import srde", "", r"error: line 1 of the program: ModuleNotFoundError: No module named 'srde'"),
        ("def f(): return f()\nf()", "", r"error: line 1 of the program: RecursionError: .*"),
        ("raise ValueError('a\\n\\x1b[31mb')", "", r"error: line 1 of the program: ValueError: a  \[31mb"),
        ("raise ValueError('x' * 5000)", "", r"error: line 1 of the program: ValueError: x{200,}"),
        ("class E(Exception):\n  def __str__(self): 1 / 0\nraise E", "", r"error: .* cannot be shown"),
        ("import sys; sys.exit(0)", TESTS, r"exit: called exit\(0\)"),
        ("import os; os._exit(0)", TESTS, r"exit: ended before its tests did, with status 0"),
        ("import os; os.abort()", TESTS, r"crash: ended by SIGABRT"),
        ("x = [0] * 10**10", TESTS, r"memory: needed more than 1024 MiB"),
        ("while True: pass", TESTS, r"timeout: took longer than 0.5 s"),
    ],
    ids=[
        "assert", "name", "raise", "assert-above", "syntax", "null", "surrogate", "tests-syntax", "input", "numpy", "srde",
        "recursion", "escapes", "long", "unprintable", "exit", "_exit", "abort", "memory", "timeout",
    ],
)  # fmt: skip
def test_the_reason(program, tests, reason):
    verdict = run_program(program, tests, seconds=0.5 if reason.startswith("timeout") else 10)
    assert re.fullmatch(reason, verdict.reason), verdict.reason
    assert verdict.passed == (reason == "passed")
    assert len(verdict.reason) <= 300 and verdict.reason.isprintable()


ORDINARY = (
    "math re typing collections itertools functools heapq string datetime random copy operator bisect hashlib json "
    "statistics fractions decimal sys os cmath array struct time textwrap unittest enum dataclasses abc io pprint zlib"
).split()


def test_ordinary_imports_and_what_they_import_later_work():
    uses = """
        from collections import (
            abc, Counter)
        from xml.etree import ElementTree
        import concurrent.futures as futures, os.path
        assert datetime.datetime.strptime("2024-02-29", "%Y-%m-%d").strftime("%j") == "060"
        assert hashlib.sha256(b"").hexdigest()[:4] == "e3b0" and hashlib.md5(b"").hexdigest()[:4] == "d41d"
        assert hashlib.new("sha1", b"").hexdigest()[:4] == "da39"
        assert "\\N{GREEK SMALL LETTER ALPHA}".encode("latin-1", "replace") == b"?" and "é".encode("utf-16-le")
        assert random.Random(1).randint(0, 9) == 2 and 0 <= random.random() < 1
        assert decimal.Decimal(1) / 3 and statistics.median([1, 2, 4]) == 2 and len(str(7**4000)) and int("9" * 4000)
        @dataclasses.dataclass
        class Point:
            x: "int" = 1
        assert Point() == Point(1) and copy.deepcopy(Point()) == Point() and json.dumps(dataclasses.asdict(Point()))
        assert typing.get_type_hints(Point) == {"x": int}
        time.sleep(0.001)
        assert ElementTree.fromstring("<a/>").tag == "a" and issubclass(list, abc.Sequence)
        import warnings
        warnings.warn("shown to nobody")
        print("shown to nobody", file=sys.stderr)
    """
    # Each on a line of its own, and without a mention that could be seen, for those that are always there.
    plain = "\n".join(f"import {name}" for name in ORDINARY) + textwrap.dedent(uses)
    assert run_program(plain, "").reason == "passed"
    hidden = "for name in ('ma' + 'th', 'heap' + 'q', 'date' + 'time', 'js' + 'on'): __import__(name)"
    assert run_program(hidden, "").reason == "passed"


def test_imports_are_found_and_those_that_do_something_are_not():
    text = """
        from math import sqrt
        import heapq, os.path as p
        from concurrent import (futures, # two
            nothing)
        import this, antigravity; import unittest.__main__, numpy
    """
    assert run._imported(text) == [
        "math", "math.sqrt", "heapq", "os.path", "concurrent", "concurrent.futures", "concurrent.nothing",
    ]  # fmt: skip
    assert len(run._imported("\n".join(f"from os import a{i}" for i in range(1000)))) == run._MOST_IMPORTS


def test_the_main_block_does_not_run():
    assert run_program(DOUBLE + "if __name__ == '__main__':\n    print(double(int(input())))\n", TESTS).passed


def test_large_texts_get_through():
    filler = "# " + "x" * 200_000 + "\n"
    assert run_program(filler + DOUBLE, filler + TESTS).passed


def test_several_threads_at_once():
    with ThreadPoolExecutor(4) as pool:
        tests = [f"assert double(1) == {i % 3}" for i in range(12)]
        verdicts = list(pool.map(lambda test: run_program(DOUBLE, test), tests))
    assert [verdict.passed for verdict in verdicts] == [i % 3 == 2 for i in range(12)]


def test_a_program_costs_little():
    costs = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run_program(DOUBLE, TESTS).passed
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(costs) < 0.2  # about 0.04 on a processor of 2023


# Refusals: nothing runs


def test_without_consent_nothing_runs(monkeypatch):
    monkeypatch.setattr("srde.eval.contained.answers.run_program", lambda *_, **__: pytest.fail("it ran"))
    for consent in (False, None, 1, "yes"):
        with pytest.raises(UsageError, match=r"confirm_run_unsafe_code=.*Give --confirm_run_unsafe_code if"):
            score_code(DOUBLE, row(), confirm_run_unsafe_code=consent)
    with pytest.raises(TypeError):
        score_code(DOUBLE, row())


@pytest.mark.parametrize("tests", [None, "", 3], ids=repr)
def test_a_row_without_tests_is_named(tests):
    with pytest.raises(DataError, match=r"rows.jsonl:7: tests: is missing"):
        score(DOUBLE, row(tests))


@pytest.mark.parametrize(
    "limits",
    [{"seconds": 0}, {"seconds": float("inf")}, {"seconds": float("nan")}, {"memory_mb": 10}],
    ids=repr,
)
def test_limits_out_of_range(limits):
    with pytest.raises(UsageError, match=f"^{next(iter(limits))}="):
        run_program("", "", **limits)


def test_a_machine_that_contains(monkeypatch):
    require_containment()
    monkeypatch.setattr(run, "machine", lambda: None)
    with pytest.raises(
        UsageError, match=r"takes Linux on x86_64 or aarch64 .* leave out --confirm_run_unsafe_code"
    ):
        require_containment()


def test_another_system_or_processor_is_none_that_contains(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert seccomp.machine() is None
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert seccomp.machine() == "aarch64"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert seccomp.machine() is None


ALLOW_ALL = b"\x06\0\0\0\0\0\xff\x7f"


@pytest.mark.parametrize(
    ("filter_", "problem"),
    [
        (b"", r"prctl.*Invalid argument"),
        (ALLOW_ALL, r"the seccomp filter was installed and open works still"),
    ],
    ids=["refused", "idle"],
)
def test_without_a_filter_nothing_runs(monkeypatch, filter_, problem):
    monkeypatch.setattr(run, "build_filter", lambda *_: filter_)
    with pytest.raises(UsageError, match=problem):
        run_program("", "")


def test_an_interpreter_that_does_not_start_is_told(monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho libpython is missing >&2\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(UsageError, match=r"status 127 \(libpython is missing\)"):
        run_program("", "")
    broken.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(run, "START_SECONDS", 0.2)
    with pytest.raises(UsageError, match=r"did not start within 0.2 s"):
        run_program("", "")
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(UsageError, match=r"sys.executable is empty"):
        run_program("", "")


# Attacks: each fails in time, and leaves no trace where the test looks


@pytest.mark.security
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "while True:\n try:\n  while True: pass\n except BaseException: pass",
        "import time; time.sleep(1000)",
        "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
        "import signal\nfor s in range(1, 32):\n try: signal.signal(s, signal.SIG_IGN)\n except OSError: pass\nwhile True: pass",
        "x = 9 ** 9 ** 9",
        "while True: print('x' * 1000000)",
        "import sys\nwhile True: sys.stderr.write('x' * 1000000)",
        "import re; re.match('(a*)*b', 'a' * 40)",
        "raise_later = type('E', (Exception,), {'__str__': lambda self: [0 for _ in iter(int, 1)]})\nraise raise_later",
    ],
    ids=["loop", "catching", "sleep", "stop", "signals", "power", "stdout", "stderr", "regex", "message"],
)  # fmt: skip
def test_an_endless_program_is_stopped(program):
    assert attempt(program, seconds=0.3).reason == "timeout: took longer than 0.3 s"


@pytest.mark.security
@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(10**11)",
        "x = []\nwhile True: x.append(bytearray(10**7))",
        "x = 'a'\nwhile True: x += x",
        "x = []\nwhile True: x = [x, x, [0] * 1000000]",
        "import mmap\nx = [mmap.mmap(-1, 10**8) for _ in range(1000)]",
    ],
    ids=["at-once", "list", "text", "nested", "mmap"],
)
def test_a_memory_bomb_does_not_go_beyond_its_limit(program):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    verdict = run_program(program, NEVER, seconds=10, memory_mb=256)
    assert re.match("memory: needed more than 256 MiB|error: .*Cannot allocate memory", verdict.reason)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(before, 256 * 1024)  # KiB


MAKERS = {
    "fork": "os.fork()",
    "forkpty": "os.forkpty()",
    "exec": "os.execv('/bin/true', ['true'])",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "system": "assert os.system('true') != 0; raise OSError",
    "popen": "import subprocess; subprocess.run(['true'])",
    "multiprocessing": "import multiprocessing.popen_fork; multiprocessing.get_context('fork').Process(target=print).start()",
    "thread": "import threading; threading.Thread(target=print).start()",
}


@pytest.mark.security
@pytest.mark.parametrize("name", MAKERS)
def test_no_process_can_be_made(name):
    source = f"""
        import os
        for _ in range(50):
            try:
                {MAKERS[name]}
            except (OSError, RuntimeError):
                continue
            raise SystemExit("made one")
    """
    assert run_program(textwrap.dedent(source), "").reason == "passed"


@pytest.mark.security
def test_a_fork_bomb_makes_no_process():
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(attempt, bomb, seconds=1)
        most = 0
        while not running.done():
            most = max(most, len(contained_processes()))
            assert [one for pid in contained_processes() for one in children_of(pid)] == []
        assert running.result().reason.startswith("timeout") and most == 1


WRITERS = {
    "open": "open(new, 'w').write('x')",
    "append": "open(old, 'a').write('x')",
    "update": "open(old, 'r+').write('x')",
    "os.open": "os.write(os.open(new, os.O_CREAT | os.O_WRONLY), b'x')",
    "truncate-by-reading": "os.open(old, os.O_RDONLY | os.O_TRUNC)",
    "tmpfile": "os.open(folder, os.O_TMPFILE | os.O_RDWR)",
    "pathlib": "import pathlib; pathlib.Path(new).write_text('x')",
    "tempfile": "import tempfile; tempfile.mkstemp(dir=folder)",
    "cwd": "open('here', 'w')",
    "mkdir": "os.mkdir(new)",
    "mkfifo": "os.mkfifo(new)",
    "mknod": "os.mknod(new)",
    "symlink": "os.symlink('/etc/passwd', new)",
    "link": "os.link(old, new)",
    "rename": "os.rename(old, new)",
    "remove": "os.remove(old)",
    "rmtree": "import shutil; shutil.rmtree(folder)",
    "truncate": "os.truncate(old, 0)",
    "chmod": "os.chmod(old, 0)",
    "chown": "os.chown(old, 1, 1)",
    "utime": "os.utime(old, (0, 0))",
    "xattr": "os.setxattr(old, 'user.x', b'x')",
    "chdir": "os.chdir(folder)",
    "chroot": "os.chroot(folder)",
    "sqlite": "import sqlite3; sqlite3.connect(new).execute('create table x (y)')",
    "memfd": "os.write(os.memfd_create('x'), b'x')",
}


@pytest.mark.security
@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_written_anywhere(name, tmp_path):
    old = tmp_path / "old"
    old.write_text("as it was")
    before = (old.stat(), sorted(os.listdir(tmp_path)), sorted(os.listdir("/")))
    start = f"import os\nfolder, old, new = {str(tmp_path)!r}, {str(old)!r}, {str(tmp_path / 'new')!r}\n"
    verdict = attempt(start + WRITERS[name])
    assert re.match(
        r"error: .*(PermissionError|unable to open|No usable temporary|FileNotFound)", verdict.reason
    )
    assert (old.stat(), sorted(os.listdir(tmp_path)), sorted(os.listdir("/"))) == before
    assert old.read_text() == "as it was"


READERS = {
    "environment": "found = str(dict(os.environ)) + str(os.environb)",
    "getenv": "found = str(os.getenv('SRDE_CANARY'))",
    "own-environ": "found = open('/proc/self/environ').read()",
    "parent-environ": "found = open(f'/proc/{os.getppid()}/environ').read()",
    "parent-memory": "found = open(f'/proc/{os.getppid()}/mem', 'rb')",
    "parent-arguments": "found = open(f'/proc/{os.getppid()}/cmdline').read()",
    "file": "found = open(secret_file).read()",
    "list": "found = str(os.listdir(os.path.dirname(secret_file)))",
    "stdin": "import sys; found = sys.stdin.read()",
    "ptrace": "found = str(libc.ptrace(16, os.getppid(), 0, 0))",
    "process_vm_readv": "found = str(libc.syscall(310, os.getppid(), 0, 0, 0, 0, 0))",
    "stack": "import ctypes; found = str([libc.getenv(b'SRDE_CANARY')])",
}


@pytest.mark.security
@pytest.mark.parametrize("name", READERS)
def test_no_secret_is_read(name, tmp_path, monkeypatch):
    secret = "k3y-" + "".join(random.choices("abcdefgh", k=20))
    monkeypatch.setenv("SRDE_CANARY", secret)
    monkeypatch.setenv("HF_TOKEN", secret)
    (tmp_path / "token").write_text(secret)
    start = f"import os, ctypes\nsecret_file = {str(tmp_path / 'token')!r}\nlibc = ctypes.CDLL(None)\n"
    verdict = attempt(start + READERS[name] + "\nraise ValueError(found)")
    assert secret not in verdict.reason and "SRDE_CANARY" not in verdict.reason
    assert re.match(r"error: .*(PermissionError|ValueError)", verdict.reason)


@pytest.mark.security
@pytest.mark.parametrize("family", ["inet", "unix", "datagram", "pair", "raw"])
def test_no_socket_is_made_and_nobody_is_called(family, tmp_path):
    with socket.socket() as listener, socket.socket(socket.AF_UNIX) as local:
        listener.bind(("127.0.0.1", 0))
        local.bind(str(tmp_path / "s"))
        for one in (listener, local):
            one.listen()
            one.setblocking(False)
        port = listener.getsockname()[1]
        program = {
            "inet": f"socket.socket().connect(('127.0.0.1', {port}))",
            "unix": f"socket.socket(socket.AF_UNIX).connect({str(tmp_path / 's')!r})",
            "datagram": f"socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
            "pair": "socket.socketpair()",
            "raw": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
        }[family]
        assert "PermissionError" in attempt("import socket\n" + program).reason
        for one in (listener, local):
            with pytest.raises(BlockingIOError):
                one.accept()


@pytest.mark.security
@pytest.mark.parametrize(
    "call",
    [
        "os.kill(parent, URG)", "os.kill(-1, 0)", "os.kill(0, URG)", "os.killpg(parent, URG)", "os.kill(parent, 0)",
        "signal.pidfd_send_signal(os.pidfd_open(parent), URG)", "os.setpriority(os.PRIO_PROCESS, parent, 19)",
        "resource.prlimit(parent, resource.RLIMIT_NOFILE, (0, 0))", "os.sched_setaffinity(parent, [0])",
        "fcntl.fcntl(1, fcntl.F_SETOWN, parent)", "check(libc.tgkill(parent, parent, URG))",
    ],
)  # fmt: skip
def test_the_parent_gets_no_signal_and_keeps_its_limits(call):
    got = []
    before = signal.signal(
        signal.SIGURG, lambda *_: got.append(1)
    )  # a signal that hurts nobody, should it arrive
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        start = """
            import ctypes, fcntl, os, resource, signal
            parent, URG, libc = os.getppid(), signal.SIGURG, ctypes.CDLL(None, use_errno=True)
            def check(result):
                if result:
                    raise OSError(ctypes.get_errno(), "refused")
            """
        verdict = attempt(textwrap.dedent(start) + call)
        assert re.match(r"error: .*PermissionError", verdict.reason), verdict.reason
    finally:
        signal.signal(signal.SIGURG, before)
    assert got == [] and resource.getrlimit(resource.RLIMIT_NOFILE) == limits


FAKES = {
    "print": "print('passed'); print('P'); print('ok')",
    "exit": "import sys; sys.exit(0)",
    "quit": "raise SystemExit",
    "exit-in-tests": "import sys\ndef double(x): sys.exit(0)",
    "_exit": "import os; os._exit(0)",
    "_exit-in-tests": "import os\ndef double(x): os._exit(0)",
    "interrupt": "raise KeyboardInterrupt",
    "generator-exit": "def double(x): raise GeneratorExit",
    "stop-iteration": "def double(x): raise StopIteration",
    "kill": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "atexit": "import atexit, os; atexit.register(os.write, 1, b'P')",
    "all-descriptors": """
        import os
        for fd in range(200):
            try: os.write(fd, b'P' + b'passed' * 9)
            except OSError: pass
        def double(x): return 3
    """,
    "echo-descriptors": """
        import os, select
        def double(x):
            for fd in range(1, 200):
                if select.select([fd], [], [], 0)[0]:
                    for to in range(200):
                        try: os.write(to, b'P' + os.read(fd, 999))
                        except OSError: pass
            return 3
    """,
    "flood": """
        import os
        while True:
            for fd in range(3, 50):
                try: os.write(fd, b'x' * 100)
                except OSError: pass
    """,
    "claim-then-exit": """
        import os
        for fd in range(3, 50):
            try: os.write(fd, b'R' + b'P' * 33)
            except OSError: pass
        os._exit(0)
    """,
    "close-descriptors": "import os; os.closerange(0, 200)",
    "close-and-stay": "import os, time; os.closerange(0, 200); time.sleep(100)",
    "builtins": """
        import builtins, os, sys
        def nothing(*args, **kwargs): return b''
        for name in ('exec', 'compile', 'print', 'len', 'isinstance', 'type', 'getattr', 'BaseException', 'bytes', 'int'):
            setattr(builtins, name, nothing)
        __builtins__ = {'exec': nothing}
        builtins.AssertionError = builtins.MemoryError
        def double(x): return 3
    """,
    "modules": """
        import os, sys, json
        os.read = os.write = os._exit = json.loads = lambda *a: b''
        for module in list(sys.modules.values()):
            for name in list(vars(module)):
                if name in ('main', 'read_frame', 'read_exactly', '_failure', 'try_containment', 'contain'):
                    setattr(module, name, lambda *a: None)
        def double(x): return 3
    """,
    "tests-left-out": """
        import os
        real = os.read
        def read(descriptor, size):
            found = real(descriptor, size)
            return found if len(found) <= 16 else found[:16] + b'#' * (len(found) - 16)
        os.read = read
    """,
    "main-module": "import __main__\n__main__.read_frame = __main__.exec = lambda *a: None\ndef double(x): return 3",
    "trace-skips-lines": """
        import sys
        def trace(frame, event, argument):
            if frame.f_code.co_filename == '<tests>' and event == 'line': frame.f_lineno = 2
            return trace
        sys.settrace(trace)
        def double(x): return -6
    """,
    "excepthook": "import sys\nsys.excepthook = lambda *a: None\ndef double(x): raise ValueError",
    "catch": "try:\n    raise SystemExit\nfinally:\n    pass",
    "asserts-off": "__debug__1 = False\nimport sys\ntry: sys.flags.optimize = 2\nexcept Exception: pass\ndef double(x): return 3",
    "hidden-loop": "class Bad:\n  def __del__(self): raise SystemExit\nx = Bad()\ndel x\ndef double(x): return 3",
}  # fmt: skip


@pytest.mark.security
@pytest.mark.parametrize("name", FAKES)
def test_a_faked_pass_fails(name):
    assert attempt(textwrap.dedent(FAKES[name]), TESTS).reason != "passed"


@pytest.mark.security
def test_the_tests_have_the_builtins_that_they_expect():
    program = "import builtins\nbuiltins.all = builtins.abs = lambda *_: 0 == 0\n__builtins__ = {}\ndef double(x): return 3\n"
    assert attempt(program, "assert all(double(x) == 2 * x for x in [1])").reason.startswith("failed")
    assert attempt(program, "assert abs(double(1) - 2) == 0").reason.startswith("failed")


@pytest.mark.security
def test_no_module_leads_to_the_runner():
    program = """
        import sys, __main__
        assert [m for m in sys.modules.values() if hasattr(m, "try_containment") or hasattr(m, "KEY_BYTES")] == []
        assert __main__ is sys.modules[__name__] and not hasattr(__main__, "main")
    """
    assert run_program(textwrap.dedent(program), "").reason == "passed"


@pytest.mark.security
def test_no_system_call_but_those_on_the_list_works():
    """Every number but the list's is refused with EPERM, those of later kernels and of the x32 table too."""
    column = 0 if seccomp.machine() == "x86_64" else 1
    # 335 and 336 on x86_64 are the kernel's own trampolines of uprobes: they go past filters, and end whoever calls them.
    allowed = [335, 336, *(numbers[column] for numbers in seccomp._NUMBERS.values())]
    program = f"""
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        x32 = range(0x40000000, 0x40000000 + 600)
        for number in [*(n for n in range(600) if n not in {allowed}), *x32, 2**31 - 1]:
            assert libc.syscall(number, 0, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1, number
        for number in {[seccomp._NUMBERS[name][column] for name in ("kill", "tgkill", "fcntl", "ioctl")]}:
            assert libc.syscall(number, 1, 1, 0) == -1 or number == {seccomp._NUMBERS["fcntl"][column]}, number
        limits = (ctypes.c_ulong * 2)(1, 1)
        assert libc.prlimit(0, 7, limits, None) == -1 and libc.prlimit(0, 7, None, limits) == 0
    """
    assert run_program(textwrap.dedent(program), "").reason == "passed"


@pytest.mark.security
def test_the_kernel_says_that_a_running_program_is_contained():
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(attempt, "while True: pass", seconds=1)
        status = {}
        while not running.done() and status.get("Seccomp") != "2":
            for pid in contained_processes():
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
                limits = re.sub(" {2,}", " ", Path(f"/proc/{pid}/limits").read_text())
        running.result()
    for limit in (
        "cpu time 6 6",
        "address space 1073741824 1073741824",
        "file size 0 0",
        "core file size 0 0",
    ):
        assert f"Max {limit} " in limits
    assert int(status["VmSize"].split()[0]) < 128 * 1024  # KiB; what the interpreter takes of the limit
    assert status["Seccomp"] == "2" and status["NoNewPrivs"] == "1"
    assert {status[name].strip("0") for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")} == {""}


@pytest.mark.security
def test_the_program_dies_with_its_parent():
    code = "from srde.eval.contained import run_program; run_program('while True: pass', '', seconds=600)"
    middle = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        child = None
        while child is None:
            assert time.monotonic() < deadline and middle.poll() is None
            for one in children_of(middle.pid):
                if "\nSeccomp:\t2" in Path(f"/proc/{one}/status").read_text():
                    child = os.pidfd_open(int(one))
            time.sleep(0.01)
    finally:
        middle.kill()
        middle.wait()
    ended, _, _ = select.select([child], [], [], 20)
    if not ended:
        signal.pidfd_send_signal(child, signal.SIGKILL)
    os.close(child)
    assert ended


@pytest.mark.parametrize(
    ("column", "header"),
    [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")],
    ids=["x86_64", "aarch64"],
)
def test_the_numbers_are_the_kernels(column, header):
    if not Path(header).is_file():
        pytest.skip(f"there is no {header}")
    known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\s", Path(header).read_text()))
    ours = {name: numbers[column] for name, numbers in seccomp._NUMBERS.items()}
    assert ours == {name: int(known[name]) for name in ours}


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_the_filter_as_a_machine_reads_it(architecture):
    """The filter on a plain interpreter of its instructions, also for the machine that this is not."""
    column, audit = seccomp._ARCHITECTURES[architecture]
    code = seccomp.build_filter(architecture, 77)

    def decide(number: int, *arguments: int, audit: int = audit) -> int:
        data = number.to_bytes(4, "little") + audit.to_bytes(4, "little") + bytes(8)
        data += b"".join(
            argument.to_bytes(8, "little") for argument in (*arguments, *[0] * (6 - len(arguments)))
        )
        at = accumulator = 0
        while True:
            operation, if_true, if_false, value = seccomp.struct.unpack_from("=HBBI", code, 8 * at)
            at += 1
            if operation == 0x20:
                accumulator = int.from_bytes(data[value : value + 4], "little")
            elif operation == 0x15:
                at += if_true if accumulator == value else if_false
            else:
                assert operation == 0x06
                return value

    allow, refuse = 0x7FFF0000, 0x00050001
    numbers = {name: columns[column] for name, columns in seccomp._NUMBERS.items()}
    checked = {"kill", "tgkill", "ioctl", "fcntl", "prlimit64"}
    for number in range(600):
        free = number in {numbers[name] for name in set(numbers) - checked}
        assert decide(number, 5, 5, 5) == (allow if free else refuse), number
    assert decide(numbers["read"], audit=0x40000003) == 0x80000000  # 32-bit x86
    assert decide(numbers["kill"], 77, 9) == allow == decide(numbers["tgkill"], 77, 78, 6)
    assert (
        decide(numbers["fcntl"], 1, 1)
        == decide(numbers["fcntl"], 1, 3)
        == decide(numbers["ioctl"], 1, 0x5401)
        == allow
    )
    assert decide(numbers["ioctl"], 1, 0x5412) == decide(numbers["fcntl"], 1, 8, 1) == refuse
    assert decide(numbers["prlimit64"], 0, 7, 0, 9) == allow
    for changes in ((1, 7, 0), (0, 7, 9), (0, 7, 9 << 32)):
        assert decide(numbers["prlimit64"], *changes) == refuse


# Which part of an answer is the program

STUB = 'from typing import List\n\n\ndef helper(x):\n    return x\n\n\ndef double(x: int) -> int:\n    """Twice x."""\n'
PROMPT = f"Complete this Python function:\n```python\n{STUB}```"


@pytest.mark.parametrize(
    "text",
    [
        DOUBLE,
        f"```python\n{DOUBLE}```",
        f"```\n{DOUBLE}```\nIt doubles.",
        f"Sure:\n\n```py\n{DOUBLE}",
        f"Use it:\n```python\nprint(1)\n```\n```python\n{DOUBLE}```\n```python\nprint(double(input()))\n```",
        f"1. This:\n{textwrap.indent(f'```python{chr(10)}{DOUBLE}```', '   ')}\n",
        "```python\ndef double(x): return 2 * x\n```",
    ],
    ids=["bare", "fence", "plain-fence", "open-fence", "several", "indented", "one-line"],
)
def test_code_is_found_in_an_answer(text):
    assert score(text, row()) == (True, "passed")
    assert score(text, row(entry_point="double", prompt=PROMPT)) == (True, "passed")


@pytest.mark.parametrize(
    "text",
    [
        "    return 2 * x\n",
        "return 2 * x",
        "  return 2 * x",
        "\treturn 2 * x",
        "y = x\n    return 2 * y",
        "y = x\nreturn 2 * y",
        "if x:\n        return 2 * x\n    return 0",
        "if x:\n      return 2 * x\n    return 0",
        "if x:\n    return 2 * x\nreturn 0",
        "    y = helper(x)\n\n    return 2 * y\n\n\nprint(double(2))\n",
        "```python\n    return 2 * x\n```",
        "```python\nreturn 2 * x\n```",
        STUB + "    return 2 * x\n",
        "def double(x: List) -> List:\n    return 2 * helper(x)\n",
        "from __future__ import annotations\ndef double(x: Unknown):\n    return 2 * x\n",
    ],
    ids=[
        "body", "no-margin", "two", "tab", "stripped", "no-margins", "stripped-block", "stripped-narrow",
        "no-margin-block", "tail", "fence-body", "fence-no-margin", "whole", "redefined", "future",
    ],
)  # fmt: skip
def test_a_body_completes_the_function_of_the_prompt(text):
    assert score(text, row(entry_point="double", prompt=PROMPT)) == (True, "passed")


def test_prose_is_no_program():
    passed, reason = score("I would multiply x by two.", row())
    assert not passed and reason.startswith("syntax")
    assert score("", row(entry_point="double", prompt=PROMPT))[1].startswith("failed")
    assert program_of("a", "no code here", "double", TESTS) == "a"


def shared_rows(split: str) -> list[Row]:
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("SRDE_SHARED_DATA", beside))
    if not any(folder.glob("*.jsonl")):
        pytest.skip(f"the shared data is not at {folder}; set SRDE_SHARED_DATA")
    return [one for one in read_rows(folder / f"code.{split}.jsonl") if one.kind == "code"]


def check_reference(one: Row) -> None:
    assert score(one.response, one) == (True, "passed"), one.id
    if one.source == "humaneval":
        stub = re.search(r"```python\n(.*?)```", one.prompt[-1]["content"], re.DOTALL)[1]
        body = one.answer.removeprefix(stub)
        assert body != one.answer and score(body, one) == (True, "passed"), one.id
        assert score(body.strip(), one) == (True, "passed"), one.id


def test_some_reference_answers_pass():
    rows = shared_rows("test")
    by_source = {
        source: [one for one in rows if one.source == source] for source in ("humaneval", "mbpp", "p3")
    }
    for some in by_source.values():
        for one in random.Random(0).sample(some, 3):
            check_reference(one)
            assert not score("def never_asked_for(): pass", one)[0], one.id


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_reference_answers_pass():
    rows = shared_rows("test") + shared_rows("train")
    with ThreadPoolExecutor(2) as pool:
        assert sum(1 for _ in pool.map(check_reference, rows)) > 1000
