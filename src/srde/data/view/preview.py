"""Shows rows as the model sees them: the rendered conversation with special tokens, what is trained marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from srde.data.rows import Row
from srde.data.tokenize import encode_row
from srde.data.tokenizers import tokenizer_fingerprints
from srde.data.view.page import document
from srde.data.view.pieces import Piece, pieces
from srde.data.view.reading import numbered_rows, printable
from srde.data.view.shards import BuiltSet, Packed, open_set, read_shard
from srde.errors import ArtifactError, ConfigError, DataError

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "⟦", "⟧"
"""Around trained text, where there are no colours."""

_TRAINED, _SPECIAL = "black on green3", "magenta"
_STYLE = """
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--tile); border-radius: .5rem; padding: .8rem 1rem;
  font: 13.5px/1.5 ui-monospace, monospace; tab-size: 4; }
mark { background: #b9ebc4; color: #102a16; } i { font-style: normal; color: #a0529a; } mark i { color: #7a1f6e; }
h3 { font-size: .95rem; font-weight: 600; color: var(--soft); margin: 1rem 0 .3rem; }
@media (prefers-color-scheme: dark) {
  mark { background: #1f5c33; color: #e6f7ea; } i { color: #d58fd0; } mark i { color: #f0b8ec; }
}
"""


@dataclass(frozen=True)
class Part:
    """An example as shown: its head line and its pieces. `head` is empty where the row's own says all."""

    head: str
    pieces: list[Piece]


@dataclass(frozen=True)
class Shown:
    """A row as shown: of a data file, one part; of a built set, one for each example."""

    head: str
    parts: list[Part] = field(default_factory=list)


def preview_rows(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    row: int | None = None,
    count: int = 1,
    domain: str | None = None,
) -> Iterator[Shown]:
    """Rows of data files as they would be tokenised.

    Args:
        path: A data file or a folder of them.
        tokenizer: Of the model.
        row: The line to begin with, counted from 1; in a folder, of the first file with so many.
        count: How many rows.
        domain: Only rows of this domain.

    Yields:
        A row each; of one that breaks a rule, a head that says which.

    Raises:
        DataError: There is no such row, or the file cannot be read.
        ConfigError: No row has the domain.
    """
    given, domains, last = 0, dict[str, None](), 0
    for line, one in numbered_rows(path):
        if not line and isinstance(one, DataError):
            raise one  # the file cannot be read
        last = line
        if isinstance(one, Row):
            domains[one.domain or "(none)"] = None
        elif domain is not None:
            continue
        if row is not None and not given and line < row:
            continue
        if isinstance(one, DataError):
            yield Shown(str(one))
        elif domain is None or one.domain == domain:
            yield _shown_row(one, tokenizer)
        else:
            continue
        given += 1
        if given >= count:
            return
    if not given:
        _refuse(path, row, domain, list(domains), f"its last row is on line {last}")


def _shown_row(row: Row, tokenizer: PreTrainedTokenizerBase) -> Shown:
    place = f"{row.file}:{row.line}"
    try:
        encoded = encode_row(tokenizer, row)
    except DataError as error:
        return Shown(str(error))
    start = max(encoded.prompt_length, 1)  # the first token is never predicted
    trained = [place >= start for place in range(len(encoded.input_ids))]
    names = [
        place, row.domain or "no domain", row.source or "no source", row.id or "no id",
        f"{len(trained):,} tokens, {encoded.trained_tokens:,} trained",
    ]  # fmt: skip
    return Shown(" · ".join(names), [Part("", list(pieces(tokenizer, encoded.input_ids, trained)))])


def preview_set(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    row: int | None = None,
    count: int = 1,
    domain: str | None = None,
) -> Iterator[Shown]:
    """Packed rows of a built set, example by example.

    Args:
        folder: The packed set, with `MANIFEST.json`.
        tokenizer: The one that it was made with.
        row: The packed row to begin with, counted from 1 through all training shards, then the held-out ones.
        count: How many rows.
        domain: Only rows with examples of this domain, and of these only such examples.

    Raises:
        ArtifactError: The set is damaged, or made with another tokenizer.
        DataError: There is no such row.
        ConfigError: The set has no such domain.
    """
    built = open_set(folder)
    if tokenizer_fingerprints(tokenizer)["vocabulary"] != built.metadata["tokenizer"].get("vocabulary"):
        raise ArtifactError.of(
            "model_name", tokenizer.name_or_path, rule=f"the set was made with the vocabulary of {built.metadata['model']}",
            fix="name that model: other tokenizers would show other words",
        )  # fmt: skip
    domains: list[str] = built.metadata["domains"]
    wanted = None if domain is None else domains.index(domain) if domain in domains else -1
    given = number = 0
    for shard in (*built.shards("train"), *built.shards("validation")):
        for rows in read_shard(built.folder / shard):
            for place in range(len(rows.numbers_B)):
                number += 1
                if row is not None and number < row:
                    continue
                own = _examples(rows, place)
                chosen = [one for one in own if wanted is None or rows.examples["domains"][one] == wanted]
                if chosen:
                    yield _shown_packed(built, shard, rows, place, own, chosen, tokenizer)
                    given += 1
                if given >= count:
                    return
    if not given:
        _refuse(folder, row, domain, domains, f"it has {number} packed rows")


def _examples(rows: Packed, place: int) -> range:
    """The numbers of a row's examples among all of a batch."""
    end = int(rows.examples_B[: place + 1].sum())
    return range(end - int(rows.examples_B[place]), end)


def _shown_packed(
    built: BuiltSet,
    shard: str,
    rows: Packed,
    place: int,
    own: range,
    chosen: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
) -> Shown:
    starts_X, trained_X, lengths_X = rows.starts_X, rows.trained_X, rows.examples["lengths"]
    row_start = int(starts_X[own.start])
    parts = []
    for one in chosen:
        start = int(starts_X[one])
        here = slice(start, start + int(lengths_X[one]))
        positions = rows.tokens["position_ids"][here]
        names = [
            f"example {one - own.start + 1} of {len(own)}",
            _name(built.metadata["domains"], int(rows.examples["domains"][one])),
            _name(built.metadata["sources"], int(rows.examples["sources"][one])),
            f"tokens {start - row_start} to {here.stop - row_start - 1}",
            f"positions {positions[0]} to {positions[-1]}",
            f"{int(lengths_X[one]):,} tokens, {int(trained_X[one]):,} trained",
        ]
        trained = (rows.tokens["labels"][here] >= 0).tolist()
        parts.append(
            Part(" · ".join(names), list(pieces(tokenizer, rows.tokens["input_ids"][here].tolist(), trained)))
        )
    head = (
        f"{shard}:{rows.numbers_B[place]} · {len(own)} examples · {int(rows.tokens_B[place]):,} of "
        f"{built.metadata['max_length']:,} tokens, {int(trained_X[own.start : own.stop].sum()):,} trained"
    )
    return Shown(head, parts)


def _name(names: Sequence[str], number: int) -> str:
    return names[number] if 0 <= number < len(names) else f"number {number}"


def _refuse(path: str | Path, row: int | None, domain: str | None, domains: Sequence[str], size: str) -> None:
    if domain is not None and domain not in domains:
        raise ConfigError.of(
            "domain",
            domain,
            rule=f"no row of {path} has it",
            fix=f"the domains there are {', '.join(domains)}",
        )
    if row is not None:
        raise DataError.at(path, row, "row", f"there is none to show from here on; {size}")
    raise DataError.at(path, None, "file", "holds no row that could be shown")


def as_text(shown: Shown, *, color: bool) -> Text:
    """A row for the terminal.

    Args:
        shown: The row.
        color: Marks what is trained by its ground; else by `OPEN` and `CLOSE` around it.
    """
    from rich.text import Text

    text = Text(f"{printable(shown.head)}\n", style="bold" if color else "")
    text = Text.assemble(text)
    for part in shown.parts:
        if part.head:
            text.append(f"── {printable(part.head)} ──\n", style="dim" if color else "")
        inside = False
        for piece in part.pieces:
            if not color and piece.trained != inside:
                text.append(CLOSE if inside else OPEN)
                inside = piece.trained
            style = f"{_SPECIAL if piece.special and not piece.trained else ''} {_TRAINED if piece.trained else ''}"
            text.append(printable(piece.text, keep="\n\t"), style=style.strip() if color else "")
        text.append(f"{CLOSE if inside else ''}\n")
    return text


def as_page(rows: Sequence[Shown], title: str) -> str:
    """The rows as one HTML page; whatever comes from the data is escaped."""
    body = [
        f"<h1>{_html(title)}</h1>\n<p>What is trained is <mark>marked</mark>; <i>special tokens</i> have a colour.</p>\n"
    ]
    for shown in rows:
        body.append(f"<h2>{_html(shown.head)}</h2>\n")
        for part in shown.parts:
            body.append(f"<h3>{_html(part.head)}</h3>\n" if part.head else "")
            body.append(f"<pre>{''.join(_spans(part.pieces))}</pre>\n")
    return document(title, "".join(body), _STYLE)


def _spans(found: Sequence[Piece]) -> Iterator[str]:
    inside = False
    yield "\n"  # a first line break in <pre> is dropped, so that one of the text's own stays
    for piece in found:
        if piece.trained != inside:
            yield "</mark>" if inside else "<mark>"
            inside = piece.trained
        text = escape(printable(piece.text, keep="\n\t"))
        yield f"<i>{text}</i>" if piece.special else text
    yield "</mark>" if inside else ""


def _html(text: str) -> str:
    return escape(printable(text))
