"""The loop of `srde chat`: reads lines, streams answers, obeys commands; in a terminal and in a pipe."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator
from contextlib import closing

from rich.console import Console
from rich.text import Text

from srde.errors import ConfigError, DataError, SrdeError
from srde.infer.chat import Chat
from srde.infer.route import AUTO, OFF, expert_labels
from srde.infer.stream import Piece
from srde.infer.view import Painter, expert_table, layer_table
from srde.tuner import Routing

INTERRUPTED = 130
PROMPT = "> "

COMMANDS = {
    "/help": "this list",
    "/route NAME|off|auto": "an expert, several (math,code), a mixture (math=0.7,code=0.3), the base, or as routed",
    "/expert N": "one expert by its number",
    "/routing on|off": "colour each token by its expert",
    "/analysis": "which experts, which layers, how sure: of the last answer",
    "/regenerate": "answer the last question again",
    "/system TEXT": "what the system says first; without a text, nothing",
    "/reset": "forget the conversation",
    "/save FILE": "write it as a row of JSONL",
    "/exit": "leave",
}


class Terminal:
    """A conversation at a keyboard, or with lines from a pipe: then only answers and tables go to the standard output, and the
    first error ends it.

    Args:
        chat: The conversation.
        console: Where answers go.
        read: Gives the next line, without its end; raises EOFError after the last.
        interactive: Whether somebody types.
        routing: Whether tokens are coloured by their experts.
    """

    def __init__(
        self,
        chat: Chat,
        console: Console,
        read: Callable[[], str],
        *,
        interactive: bool,
        routing: bool = False,
    ) -> None:
        self.chat, self.console, self.read, self.interactive = chat, console, read, interactive
        self.routing = routing
        self.labels = (
            expert_labels(chat.model) if isinstance(getattr(chat.model, "srde", None), Routing) else []
        )
        self._notices = console if interactive else Console(stderr=True, highlight=False, markup=False)
        self._warned = False

    def run(self) -> int:
        """Runs until /exit, the end of the input, or Ctrl-C twice; returns the exit status."""
        while True:
            answering = False
            try:
                line = self.read()
                self._warned, answering = False, True
                if not self.obey(line.strip()):
                    return 0
            except EOFError:
                if self.interactive:
                    self.console.print()
                return 0
            except KeyboardInterrupt as stop:
                # the second Ctrl-C, also while the first is still waiting for the token at hand
                self.console.file.write("\n")
                if self._warned or isinstance(stop.__context__, KeyboardInterrupt):
                    return INTERRUPTED
                self._warned = True
                self.notice(
                    "stopped; Ctrl-C again leaves" if answering else "Ctrl-C again leaves, and so does /exit"
                )
            except SrdeError as error:
                if not self.interactive:
                    raise
                self.notice(str(error), "red")

    def notice(self, text: str, style: str = "dim") -> None:
        """Tells the user something that is no answer."""
        self._notices.print(Text(text, style), soft_wrap=not self.interactive)

    def obey(self, line: str) -> bool:
        """Asks what a line says, or does what its command means; returns whether to go on.

        Raises:
            SrdeError: There is no such command, or it cannot be done.
        """
        if not line:
            return True
        if not line.startswith("/") or line.startswith("//"):
            self.show(self.chat.say(line[1:] if line.startswith("//") else line))
            return True
        name, _, argument = line.partition(" ")
        if name == "/exit":
            return False
        names = [command.split(" ")[0] for command in COMMANDS]
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            raise ConfigError.of(
                "command", name, rule="there is no such command",
                fix=f"the nearest is {close[0]}" if close else "/help lists them; // begins a text with a slash",
            )  # fmt: skip
        getattr(self, f"_{name[1:]}")(argument.strip())
        return True

    def show(self, pieces: Iterator[Piece]) -> None:
        """Streams an answer, and then says which colours were whose."""
        forgotten = self.chat.forgotten
        painter = Painter(self.console, routing=self.routing)
        seen: list[int | None] = []
        # closed at once when Ctrl-C comes: that ends the thread that generates
        with closing(pieces):  # type: ignore[type-var]
            for piece in pieces:
                if self.chat.forgotten != forgotten:
                    self._tell_forgotten(forgotten)
                    forgotten = self.chat.forgotten
                painter.write(piece)
                seen += [piece.expert] if piece.gate_E is not None else []
        painter.end()
        if self.routing and seen:
            painter.legend(self.labels, seen)

    def _tell_forgotten(self, before: int) -> None:
        turns = (self.chat.forgotten - before) // 2
        noun = "question" if turns == 1 else "questions"
        self.notice(
            f"The context is full: the model no longer sees the oldest {turns} {noun} and their answers."
        )

    def _help(self, _: str) -> None:
        width = max(map(len, COMMANDS))
        for command, meaning in COMMANDS.items():
            self.notice(f"  {command:<{width}}  {meaning}", "")

    def _route(self, name: str) -> None:
        self.chat.set_route(name or AUTO)
        self.notice("the base speaks" if name == OFF else f"route: {name or AUTO}")

    def _expert(self, number: str) -> None:
        if not number.isdecimal():
            raise ConfigError.of(
                "expert", number, rule="it must be a number", fix="use /expert 3, or /route NAME"
            )
        self.chat.set_route(expert=int(number))
        self.notice(f"expert {self.labels[int(number)]} speaks")

    def _routing(self, value: str) -> None:
        if value not in ("on", "off"):
            raise ConfigError.of("routing", value, rule="it must be on or off", fix="use /routing on")
        self.routing = value == "on"
        self.notice(f"routing is {'shown' if self.routing else 'not shown'}")

    def _analysis(self, _: str) -> None:
        analysis = self.chat.analyse()
        self.console.print(layer_table(analysis))
        self.console.print(expert_table(analysis))

    def _regenerate(self, _: str) -> None:
        self.show(self.chat.again())

    def _system(self, text: str) -> None:
        self.chat.system = text or None
        self.notice(
            "the system says that first from now on" if text else "the system says nothing of its own"
        )

    def _reset(self, _: str) -> None:
        self.chat.reset()
        self.notice("forgotten")

    def _save(self, path: str) -> None:
        if not path:
            raise ConfigError.of("file", path, rule="a conversation needs a file", fix="use /save FILE")
        self.chat.save(path)
        self.notice(f"saved: {path}")


def keyboard() -> str:
    """Reads a line from the terminal, with history and editing where the platform has readline."""
    return input(PROMPT)


def pipe_reader() -> Callable[[], str]:
    """Reads lines of UTF-8 from the standard input.

    Returns:
        A function that gives the next line; it raises EOFError after the last, and DataError for a line that is not UTF-8.
    """
    count = 0

    def read() -> str:
        nonlocal count
        raw = sys.stdin.buffer.readline()
        count += 1
        if not raw:
            raise EOFError
        try:
            return raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError.at("standard input", count, "text", "is not UTF-8") from error

    return read
