"""What a notification looks like to each service, within the limits that the services document.

Discord, "Execute Webhook": `content` up to 2000 characters; per embed 25 fields, 256 characters of name, 1024 of value, both not
empty, 256 of title; 6000 characters in all embeds together. `allowed_mentions` with nothing to parse keeps a text from pinging.

Slack, incoming webhooks and Block Kit: 50 blocks; a section's text up to 3000 characters, 10 fields of 2000; `text` is what a
notification shows, best under 4000. `&`, `<` and `>` are escaped, so that a text can neither link nor ping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from srde.monitor.webhook import Kind

COLORS = {
    "started": 0x3498DB,
    "resumed": 0x3498DB,
    "completed": 0x2ECC71,
    "stopped": 0xF1C40F,
    "failed": 0xE74C3C,
}
"""Event -> the colour of Discord's embed."""

DISCORD_CONTENT, DISCORD_TITLE, DISCORD_NAME, DISCORD_VALUE = 2000, 256, 256, 1024
DISCORD_FIELDS, DISCORD_EMBED = 25, 6000
SLACK_TEXT, SLACK_SECTION, SLACK_FIELD = 4000, 3000, 2000
SLACK_FIELDS, SLACK_BLOCKS = 10, 50
EMPTY = "-"  # Discord takes no empty names or values


@dataclass(frozen=True)
class Notification:
    """What happened to a run.

    Attributes:
        event: ``started``, ``resumed``, ``completed``, ``failed`` or ``stopped``.
        run: The run's name.
        text: A sentence.
        facts: Name -> text, number or `None`, shown in this order.
        time: When, in seconds since 1970.
    """

    event: str
    run: str
    text: str
    facts: Mapping[str, str | int | float | bool | None]
    time: float


def payload(kind: Kind, note: Notification) -> dict[str, Any]:
    """The JSON object that a service takes."""
    if kind == "discord":
        return _discord(note)
    if kind == "slack":
        return _slack(note)
    return {
        "event": note.event,
        "run": note.run,
        "text": note.text,
        "facts": dict(note.facts),
        "time": note.time,
    }


def _discord(note: Notification) -> dict[str, Any]:
    title = clip(f"{note.run}: {note.event}", DISCORD_TITLE)
    left = DISCORD_EMBED - _length(title)
    fields: list[dict[str, Any]] = []
    for name, value in _at_most(DISCORD_FIELDS, note.facts):
        field = {"name": clip(name, DISCORD_NAME), "value": clip(value, DISCORD_VALUE), "inline": True}
        left -= _length(field["name"]) + _length(field["value"])
        if left < 0:
            break
        fields.append(field)
    moment = datetime.fromtimestamp(note.time, UTC).isoformat(timespec="milliseconds")
    embed = {"title": title, "color": COLORS.get(note.event, 0), "timestamp": moment, "fields": fields}
    return {
        "content": clip(f"**{note.event}** {note.run}: {note.text}", DISCORD_CONTENT),
        "embeds": [embed],
        "allowed_mentions": {"parse": []},
    }


def _slack(note: Notification) -> dict[str, Any]:
    head = f"*{_escape(note.event)}* {_escape(note.run, 200)}: "
    blocks: list[dict[str, Any]] = [
        {"type": "section", "text": _mrkdwn(head + _escape(note.text, SLACK_SECTION - _length(head)))}
    ]
    facts = _at_most(SLACK_FIELDS * (SLACK_BLOCKS - 1), note.facts)
    for start in range(0, len(facts), SLACK_FIELDS):
        fields = []
        for name, value in facts[start : start + SLACK_FIELDS]:
            label = f"*{_escape(name, 200)}*\n"
            fields.append(_mrkdwn(label + _escape(value, SLACK_FIELD - _length(label))))
        blocks.append({"type": "section", "fields": fields})
    return {"text": _escape(f"{note.event} {note.run}: {note.text}", SLACK_TEXT), "blocks": blocks}


def _mrkdwn(text: str) -> dict[str, Any]:
    # verbatim: no names of channels or people are looked for in it
    return {"type": "mrkdwn", "text": text, "verbatim": True}


def _at_most(count: int, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The first facts as text; the last one says how many more there are."""
    pairs = [
        (str(name) or EMPTY, EMPTY if value in (None, "") else str(value)) for name, value in facts.items()
    ]
    if len(pairs) > count:
        pairs[count - 1 :] = [("...", f"{len(pairs) - count + 1} more")]
    return pairs


def _length(text: str) -> int:
    """Characters as the strictest counter would have them: those beyond U+FFFF count twice."""
    return len(text) + sum(character > "\uffff" for character in text)


def clip(text: str, limit: int) -> str:
    """The text, or as much of its beginning as leaves room for an ellipsis."""
    return _take(text, limit, str)


def _escape(text: str, limit: int = SLACK_TEXT) -> str:
    """The text as Slack's markup wants it, cut so that no escape is cut in two."""
    escapes = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
    return _take(text, limit, lambda character: escapes.get(character, character))


def _take(text: str, limit: int, write: Callable[[str], str]) -> str:
    """Writes as many characters as fit into the limit, the last of them an ellipsis if not all do."""
    written: list[str] = []
    length, fits = 0, 0
    for character in text:
        piece = write(character)
        length += _length(piece)
        if length > limit:
            return "".join(written[:fits]) + "\N{HORIZONTAL ELLIPSIS}"
        written.append(piece)
        if length < limit:
            fits = len(written)
    return "".join(written)
