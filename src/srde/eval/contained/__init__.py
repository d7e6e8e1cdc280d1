"""Running code that a model wrote, in a process that can compute and nothing else.

This is containment, not a sandbox to put an enemy's code into: it is made for programs that are wrong, wasteful or lucky,
and for the tricks that models come upon. Nothing of it runs unless the user asks for it with `--confirm_run_unsafe_code`.

Each program gets a fresh interpreter (`-I -S`: no environment, no site-packages, so no NumPy) as the leader of a session
of its own, with an empty environment, `/dev/null` as its three standard streams, and one pipe in and one out. It imports
what the program mentions of the standard library, then takes its own rights away, tries whether they are gone, and runs
the program. All layers are mandatory; where one cannot be had, `UsageError` says so and nothing runs:

- a seccomp filter of *allowed* calls (`seccomp`): memory, time, reading and writing open descriptors;
- limits on address space, processor time, file size and core files; no new privileges; no capabilities;
- SIGKILL when the time is over, and when the parent dies.

Covered, each by a test:

- endless loops, sleeping and stopping itself: killed when the time is over, and waited for;
- memory: `MemoryError` at the limit (address space, so it holds before memory is used);
- processes and threads: none can be made, so there is nothing to clean up either; `threading` and `asyncio` do not work;
- files: none can be opened, for reading or writing, nor made, removed, renamed, or changed; no socket can be made. So a
  program sees neither the secrets of the disk nor `/proc/<parent>/environ`. A module of the standard library that the
  text does not mention, such as `__import__("sq" + "lite3")`, cannot be imported for the same reason;
- signals to others, `ptrace`, mounts, namespaces, other programs, and all else that is not on the list;
- floods of output: `/dev/null` takes them, and the pipe for verdicts is read up to a bound;
- saying "passed": the parent believes only a key that it sends after the program's top level has run, followed by a
  challenge that stays in the pipe until the tests have run to their end. Printing, `exit`, `os._exit`, an exception of any
  kind, writing to all descriptors, replacing functions of modules or built-ins, and trace functions that skip lines fail.

Not covered:

- a program made for this runner: tests and program share an interpreter, so code that walks the frames while the tests
  call it, finds the key, reads the challenge and writes both, passes. So does what fools the tests themselves: an object
  that says it equals everything, or a function of the program's with a name that the tests use;
- faults of the kernel in the calls that are allowed, and what can be told from time and from the processor's caches;
- use of one processor core, and of memory up to the limit, for as long as the limit says;
- the text of a reason, which the program chooses: it is one printable line, and must be escaped where it is shown.
"""

from srde.eval.contained.answers import score_code
from srde.eval.contained.run import Verdict, require_containment, run_program

__all__ = ["Verdict", "require_containment", "run_program", "score_code"]
