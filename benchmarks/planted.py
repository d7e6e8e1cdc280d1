"""How many planted duplicates, near duplicates and leaked test questions `srde data build` finds, and how many rows it
condemns wrongly.

    python benchmarks/planted.py                                             # rows of Zipf-distributed words
    python benchmarks/planted.py --rows_file train.jsonl --tests_file test.jsonl    # real rows

Among clean rows are planted, each from a row or question of its own:

- exact duplicates: as they are, or with other blanks;
- near duplicates: words replaced until the Jaccard similarity of word n-grams (n = 3 and n = 5) has just passed 0.95, 0.9 or 0.8;
- leaks: evaluation questions verbatim, in capitals without the words' punctuation, inside another text, and inside a response;
- near misses that must stay: similarity just below 0.5, pairs that differ in a few words and in their known answer, and rows
  that hold a quarter of an evaluation question's longest line.

Recall: planted rows that were left out for the right reason. Precision: rows left out for a reason that were planted for it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_build import make_rows
from srde.data.build.build import build
from srde.data.build.settings import BuildSettings
from srde.quickstart.default_model import default_model

Row = dict[str, Any]
REASONS = {"exact duplicate": "exact", "near duplicate": "near", "contaminated": "leak"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=6000, help="clean rows, where they are made")
    parser.add_argument("--rows_file", help="JSONL of prompt and response, instead of made rows")
    parser.add_argument("--tests_file", help="the same of evaluation questions")
    parser.add_argument("--each", type=int, default=100, help="planted rows of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", default="benchmarks/results/planted.jsonl", help="one line is added per run"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(Path(scratch), args)
    print(table(found))
    with open(args.output, "a", encoding="utf-8") as log:
        log.write(
            json.dumps({"rows_file": bool(args.rows_file), "each": args.each, "seed": args.seed, **found})
            + "\n"
        )


def measure(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Plants, builds and counts."""
    model = str(default_model())
    rows_file, tests_file = scratch / "clean.jsonl", scratch / "tests.jsonl"
    if args.rows_file:
        rows_file, tests_file = Path(args.rows_file), Path(args.tests_file)
    else:
        make_rows(rows_file, args.rows, model, seed=1)
        make_rows(tests_file, 2000, model, seed=2)
    clean, tests = read(rows_file), read(tests_file)

    def left_out(rows: Path, name: str) -> dict[str, str]:
        files = {"sources": [str(rows)], "eval_sources": [str(tests_file)]}
        settings = BuildSettings(
            model, str(scratch / name), **files, max_length=8192, validation_fraction=0.0
        )
        return dropped(build(settings).folder)

    # What clean rows hold of their own (real data do) is none of the planted rows' doing.
    own = set(left_out(rows_file, "before"))
    clean = [row for row in clean if name_of(row) not in own]
    planted, kinds = plant(clean, tests, args.each, random.Random(args.seed))
    mixed = scratch / "rows.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in planted), encoding="utf-8")
    out = left_out(mixed, "out")
    recall: dict[str, list[bool]] = defaultdict(list)
    for name, kind in kinds.items():
        recall[kind].append(REASONS.get(out.get(name, ""), "kept") == kind.split(",")[0])
    wrong = Counter()
    right = Counter()
    for name, reason in out.items():
        if reason in REASONS:
            wanted = kinds.get(name, "kept").split(",")[0]
            (right if wanted == REASONS[reason] else wrong)[REASONS[reason]] += 1
    return {
        "clean_rows": len(clean),
        "clean_rows_left_out_without_planting": len(own),
        "recall": {
            kind: {"cases": len(hits), "share": sum(hits) / len(hits)} for kind, hits in recall.items()
        },
        "precision": {kind: right[kind] / max(right[kind] + wrong[kind], 1) for kind in REASONS.values()},
    }


def plant(
    clean: list[Row], tests: list[Row], each: int, rng: random.Random
) -> tuple[list[Row], dict[str, str]]:
    """The rows with what is planted among them, and the kind of each planted one by its id."""
    # Each is used once; long enough that replacing one word leaves more than 0.9 of the n-grams.
    long = [row for row in clean if len(row["prompt"].split()) >= 100]
    bases = rng.sample(long, len(long))
    # Texts for leaks and near misses to stand in, which are not among the rows themselves.
    carriers = rng.sample(clean, 6 * each)
    clean = [row for row in clean if not any(row is one for one in carriers)]
    bases = [row for row in bases if not any(row is one for one in carriers)]
    questions = [row for row in rng.sample(tests, len(tests)) if len(row["prompt"].split()) >= 16]
    vocabulary = sorted({word for row in clean[:2000] for word in row["prompt"].split() if word.isalpha()})
    kinds: dict[str, str] = {}
    made: list[Row] = []

    def add(kind: str, row: Row, **fields: Any) -> None:
        name = f"planted-{len(kinds)}"
        kinds[f"planted/{name}"] = kind
        made.append({**row, "id": name, "source": "planted", **fields})

    def like_one(n: int, level: float, below: bool = False) -> tuple[Row, Row]:
        """A row and an edited copy of it."""
        while True:
            row = bases.pop()
            if (copy := edited(row, n, level, vocabulary, rng, below)) is not None:
                return row, copy

    for number in range(each):
        add("exact, as it is", bases.pop())
        row = bases.pop()
        add("exact, other blanks", row, prompt=row["prompt"].replace(" ", "  ", 3 + number % 5) + "\n")
        for n in (3, 5):
            for level in (0.9, 0.8):
                add(f"near, {n}-grams {level}", like_one(n, level)[1])
            add(f"kept, {n}-grams below 0.5", like_one(n, 0.5, below=True)[1])
        row, copy = like_one(3, 0.9)
        row["answer"] = f"first {number}"
        add("kept, another answer", copy, answer=f"second {number}")

        add("leak, verbatim", {**carriers.pop(), "prompt": questions.pop()["prompt"]})
        plain = re.sub(r"(?<!\S)[^\w\s]+|[^\w\s]+(?!\S)|'", "", questions.pop()["prompt"]).upper()
        add("leak, capitals", {**carriers.pop(), "prompt": plain})
        row = carriers.pop()
        inside = f"{row['prompt']}\n\nAnd now: {questions.pop()['prompt']} Think first."
        add("leak, inside a text", {**row, "prompt": inside})
        add(
            "leak, in a response", {**carriers.pop(), "response": f"Here is one. {questions.pop()['prompt']}"}
        )
        row, asked = carriers.pop(), max(questions.pop()["prompt"].split("\n"), key=len).split()
        add(
            "kept, a quarter of a question",
            {**row, "prompt": f"{row['prompt']} {' '.join(asked[: len(asked) // 4])}"},
        )
    return rng.sample(clean, len(clean)) + rng.sample(made, len(made)), kinds


def edited(
    row: Row, n: int, level: float, vocabulary: list[str], rng: random.Random, below: bool = False
) -> Row | None:
    """The row with words replaced, one by one, as long as the similarity stays above the level (or until it is below).

    None if one word is one too many.
    """
    text = row["prompt"].split(" ")
    whole = grams(f"{row['prompt']}\n{row['response']}", n)
    best = dict(row)
    for place in rng.sample(range(len(text)), len(text)):
        text[place] = rng.choice(vocabulary)
        changed = grams(f"{' '.join(text)}\n{row['response']}", n)
        similarity = len(whole & changed) / len(whole | changed)
        if similarity < level and not below:
            break
        best = {**row, "prompt": " ".join(text)}
        if similarity < level:
            break
    return None if best["prompt"] == row["prompt"] else best


def name_of(row: Row) -> str:
    """The row's name in a build's account."""
    return row["id"] if row["id"].startswith(f"{row['source']}/") else f"{row['source']}/{row['id']}"


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    found = re.findall(r"\w+", text.lower())
    return {tuple(found[at : at + n]) for at in range(max(len(found) - n + 1, 1))}


def read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    keep = ("prompt", "response", "domain", "source", "id", "answer")
    return [{name: row[name] for name in keep if name in row} for row in rows]


def dropped(folder: Path | None) -> dict[str, str]:
    """Reason by row."""
    lines = ((folder or Path()) / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["id"]: entry["reason"] for entry in map(json.loads, lines)}


def table(found: dict[str, Any]) -> str:
    def lines() -> Iterator[str]:
        yield "| planted | cases | found |\n|---|---:|---:|"
        for kind, counts in sorted(found["recall"].items()):
            yield f"| {kind} | {counts['cases']} | {100 * counts['share']:.1f} % |"
        yield "\n| reason | precision |\n|---|---:|"
        for kind, share in found["precision"].items():
            yield f"| {kind} | {100 * share:.1f} % |"

    return "\n".join(lines())


if __name__ == "__main__":
    main()
