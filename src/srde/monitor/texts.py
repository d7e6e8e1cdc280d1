"""Numbers and names for people: durations, sizes, names from files without characters that steer a terminal."""

from __future__ import annotations


def printable(value: object) -> str:
    r"""A text from a file with `\x1b` and the like in the place of whatever steers a terminal or turns the writing around."""
    text = " ".join(str(value).split("\n"))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def duration(seconds: float | None) -> str:
    """Two units at most: `8 s`, `12 min 5 s`, `3 h 20 min`, `2 d 4 h`; `-` if not known."""
    if seconds is None:
        return "-"
    left = round(seconds)
    for size, large, small, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if left >= size:
            rest = left % size // small
            return f"{left // size} {large} {rest} {name}" if rest else f"{left // size} {large}"
    return f"{left} s"


def size(count: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def count(value: float | None) -> str:
    """A large number, short: `950`, `12.3 k`, `4.5 M`, `7.8 B`; `-` if not known."""
    if value is None:
        return "-"
    for unit in ("", " k", " M"):
        if abs(value) < 1000:
            return f"{value:.0f}{unit}" if not unit or value >= 100 else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f} B"


def percent(share: float | None) -> str:
    """A share; `-` if not known."""
    if share is None:
        return "-"
    return f"{100 * share:.1f} %" if share == 0 or share >= 0.001 else f"{100 * share:.3f} %"


def loss(value: float | None) -> str:
    """A loss in nats; `-` if not known."""
    return "-" if value is None else f"{value:.3f}"


def plural(number: int, name: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"
