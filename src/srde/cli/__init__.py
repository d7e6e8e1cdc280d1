"""The command line: one small file per verb, imported only when its verb is called.

Exit status: 0 done; 1 an error that srde explains; 2 a wrong command line; 75 stopped with its state saved (`srde train` after
SIGTERM or Ctrl-C: the same command goes on); 130 interrupted.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Mapping

from srde.errors import SrdeError, StoppedError

STOPPED = 75  # EX_TEMPFAIL

VERBS = {
    "quickstart": "train six experts on a small model, compare them with the base, ask them one question each",
    "data": "build data sets of six domains, check them, look at them",
    "train": "train experts on a frozen model",
    "config": "check and show the settings of a file for srde train",
    "recipes": "list and copy the files of settings that come with srde",
    "monitor": "watch a run: progress, losses, experts, checkpoints, alerts",
    "eval": "accuracy, loss and routing of base and experts on held-out rows, or on tasks of lm-eval",
    "generate": "answer prompts",
    "chat": "talk with experts, turn by turn",
    "experts": "list, add, freeze, disable, replace and compare experts",
    "export": "write a model for others: SaRDinE, or a plain model with one expert merged",
    "import": "make an adapter of an old srde_weights.pt",
    "plan": "parameters, memory, FLOPs and disk before anything is loaded",
}
"""Verb -> what it does. The module `srde.cli.<verb>` has `main(argv) -> int`; `eval` and friends import their back ends."""


def usage(prog: str, verbs: Mapping[str, str], options: str = "") -> str:
    """The help text of a group of verbs."""
    width = max(map(len, verbs))
    lines = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in verbs.items())
    return (
        f"usage: {prog} {options}<verb> [options]\n\n{lines}\n\n{prog} <verb> --help shows a verb's options."
    )


def no_such(prog: str, verb: str, verbs: Mapping[str, str], help_text: str) -> int:
    """Says that a group has no such verb, and which is the nearest; returns the exit status."""
    close = difflib.get_close_matches(verb, verbs, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    print(f"{prog}: there is no verb {verb!r}.{hint}\n\n{help_text}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; `argv` without the program's name."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage("srde", VERBS, "[--version] "))
        return 0 if argv else 2
    if argv[0] == "--version":
        from srde import __version__

        print(f"srde {__version__}")
        return 0
    verb = argv[0]
    if verb not in VERBS:
        return no_such("srde", verb, VERBS, usage("srde", VERBS, "[--version] "))
    # PEFT 0.21 asks by a name that Transformers 5.23 has renamed: nothing that a user could mend
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    try:
        return importlib.import_module(f"srde.cli.{verb}").main(argv[1:])
    except StoppedError as error:
        print(f"srde {verb}: {error}", file=sys.stderr)
        return STOPPED
    except SrdeError as error:
        print(f"srde {verb}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has enough: `srde data check ... | head`
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or the interpreter complains when it flushes
        return 1
    except KeyboardInterrupt:
        print(f"srde {verb}: interrupted", file=sys.stderr)
        return 130
