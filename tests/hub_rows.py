"""Small repositories laid out as public data sets are on the hub: the same files, columns and cards, invented rows."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from random import Random

import hub_makers as make
from hub_files import (
    LETTERS,
    HubFile,
    Maker,
    Repository,
    Row,
    as_bytes,
    as_zip,
    card,
    parquet,
    strings,
    withheld,
)


def bigbench(task: str, maker: Maker) -> tuple[HubFile, ...]:
    columns = {"idx": "int32", "inputs": "string", "targets": ["string"]}
    columns |= {"multiple_choice_targets": ["string"], "multiple_choice_scores": ["int32"]}
    config = f"{task}_zero_shot"
    files = parquet(config, "train validation", maker, columns, "inputs")
    whole = f"{config}/default-00000-of-00001.parquet"
    parts = tuple(file.path for file in files)
    return (HubFile(whole, config, "default", maker, columns, "inputs", parts=parts), *files)


def winogrande(size: str) -> tuple[HubFile, ...]:
    columns = strings("sentence option1 option2 answer")
    return tuple(
        replace(file, twin=file.path.replace(size, "winogrande_xl"))
        for split, hidden in (("train", {}), ("test", {"answer": ""}), ("validation", {}))
        for file in parquet(size, split, make.winogrande, columns, "sentence", hidden=hidden)
    )


def scibench(source: str) -> tuple[HubFile, ...]:
    names = "solution problem_text answer_latex comment answer_number problemid unit source"
    return tuple(
        HubFile(
            f"{source}{ending}.json",
            "default",
            "train",
            partial(make.scibench, source=source, solved=bool(ending)),
            strings(names),
            "problem_text",
        )
        for ending in ("", "_sol")
    )


def scrolls(config: str, choices: bool) -> tuple[HubFile, ...]:
    files = [
        HubFile(
            f"{config}.zip!{config}/{split}.jsonl",
            config,
            split,
            partial(make.scrolls, choices=choices),
            strings("id pid input output"),
            "input",
        )
        for split in ("train", "validation", "test")
    ]
    return withheld(tuple(files), output=None)


QA = strings("question answer")
CHOICES = {"text": ["string"], "label": ["string"]}
ARC = strings("id question choices answerKey", choices=CHOICES)
AQUA = strings("question options rationale correct", options=["string"])
MMLU = strings("question subject choices answer", choices=["string"], answer=LETTERS)
FACTS = {"title": ["string"], "sent_id": ["int32"]}
PARAGRAPHS = {"title": ["string"], "sentences": [["string"]]}
HOTPOT = strings(
    "id question answer type level supporting_facts context", supporting_facts=FACTS, context=PARAGRAPHS
)
BOARDGAME = strings("proof example label rules preferences theory goal facts config")
MBPP = strings(
    "task_id text code test_list test_setup_code challenge_test_list",
    task_id="int32",
    test_list=["string"],
    challenge_test_list=["string"],
)
SANITIZED = strings(
    "source_file task_id prompt code test_imports test_list",
    task_id="int32",
    test_imports=["string"],
    test_list=["string"],
)
HELLASWAG = strings(
    "ind activity_label ctx_a ctx_b ctx endings source_id split split_type label",
    ind="int32",
    endings=["string"],
)
LOGIQA = strings("context query options correct_option", options=["string"], correct_option="int32")
RECLOR = strings("context question answers label id_string", answers=["string"], label="int64")
PIQA = strings("goal sol1 sol2 label", label="int64")
QUALITY = strings("article question options answer hard", options=["string"], answer="int64", hard="bool")
SCIQ = strings("question distractor3 distractor1 distractor2 correct_answer support")
MESSAGES = {"id": "int64", "messages": [{"role": "string", "content": "string"}]}
ALL, MBPP_SPLITS = "train test validation", "train test validation prompt"


def subject(name: str) -> tuple[HubFile, ...]:
    return parquet(name, "test validation dev", partial(make.mmlu, subject=name), MMLU, "question")


def file(path: str, split: str, maker: Maker, columns: Row, question: str) -> HubFile:
    return HubFile(path, "default", split, maker, columns, question)


def socratic(split: str) -> HubFile:
    (drawn,) = parquet("socratic", split, partial(make.gsm8k, socratic=True), QA, "question")
    return replace(drawn, twin=drawn.path.replace("socratic", "main"))


REPOSITORIES: dict[str, Repository] = {
    "openai/gsm8k": Repository(
        (
            *parquet("main", "train test", make.gsm8k, QA, "question"),
            *(socratic(split) for split in ("train", "test")),
        ),
        "mit",
    ),
    "meta-math/MetaMathQA": Repository(
        (
            file(
                "MetaMathQA-395K.json",
                "train",
                make.metamath,
                strings("type query original_question response"),
                "query",
            ),
        ),
        "mit",
        configs=False,
    ),
    "microsoft/orca-math-word-problems-200k": Repository(
        parquet("default", "train", make.orca_math, QA, "question"), "mit"
    ),
    "lucasmccabe/logiqa": Repository(
        tuple(
            file(f"default/{split}/0000.parquet", split, make.logiqa, LOGIQA, "context")
            for split in ALL.split()
        ),
        revision="refs/convert/parquet",
        card=False,
    ),
    "tasksource/reclor": Repository(
        (
            file("train.json", "train", make.reclor, RECLOR, "context"),
            file("val.json", "validation", make.reclor, RECLOR, "context"),
        ),
        "other",
        configs=False,
    ),
    "Rowan/hellaswag": Repository(
        withheld(parquet("default", ALL, make.hellaswag, HELLASWAG, "ctx"), label="")
    ),
    "hails/bigbench": Repository(
        (*bigbench("logical_deduction", make.deduction), *bigbench("word_sorting", make.word_sorting))
    ),
    "tau/commonsense_qa": Repository(
        withheld(
            parquet(
                "default",
                ALL,
                make.commonsense,
                strings(
                    "id question question_concept choices answerKey", choices=dict(reversed(CHOICES.items()))
                ),
                "question",
            ),
            answerKey="",
        ),
        "mit",
    ),
    "sahil2801/CodeAlpaca-20k": Repository(
        (
            file(
                "code_alpaca_20k.json",
                "train",
                make.code_alpaca,
                strings("instruction input output"),
                "instruction",
            ),
        ),
        "cc-by-4.0",
        configs=False,
    ),
    "m-a-p/Code-Feedback": Repository(
        (file("Code-Feedback.jsonl", "train", make.code_feedback, MESSAGES, "messages"),),
        "apache-2.0",
        configs=False,
    ),
    "google-research-datasets/mbpp": Repository(
        (
            *parquet("full", MBPP_SPLITS, make.mbpp, MBPP, "text"),
            *parquet("sanitized", MBPP_SPLITS, make.mbpp_sanitized, SANITIZED, "prompt"),
        ),
        "cc-by-4.0",
        default="full",
    ),
    "openai/openai_humaneval": Repository(
        parquet(
            "openai_humaneval",
            "test",
            make.humaneval,
            strings("task_id prompt canonical_solution test entry_point"),
            "prompt",
        ),
        "mit",
        default="openai_humaneval",
    ),
    "allenai/sciq": Repository(
        parquet("default", "train validation test", make.sciq, SCIQ, "question"), "cc-by-nc-3.0"
    ),
    "allenai/ai2_arc": Repository(
        (
            *parquet("ARC-Challenge", ALL, make.arc, ARC, "question"),
            *parquet("ARC-Easy", ALL, make.arc, ARC, "question"),
        ),
        "cc-by-sa-4.0",
    ),
    "xw27/scibench": Repository(
        tuple(
            part
            for source in "atkins calculus chemmc class diff fund matter quan stat thermo".split()
            for part in scibench(source)
        ),
        configs=False,
    ),
    "cais/mmlu": Repository(
        (
            *parquet("all", "test validation dev", partial(make.mmlu, subject="any"), MMLU, "question"),
            *parquet("all", "auxiliary_train", make.mmlu, MMLU, "question"),
            *subject("astronomy"),
            *subject("college_physics"),
        ),
        "mit",
    ),
    "deepmind/aqua_rat": Repository(
        (
            *parquet("raw", ALL, make.aqua, AQUA, "question"),
            *parquet("tokenized", ALL, make.aqua, AQUA, "question"),
        ),
        "apache-2.0",
        default="raw",
    ),
    "tasksource/Boardgame-QA": Repository(
        tuple(
            file(f"data/{split}-00000-of-00001-{ending}.parquet", split, make.boardgame, BOARDGAME, "example")
            for split, ending in (
                ("test", "be86a421cd54a34b"),
                ("train", "d7aa2b268ef1ea08"),
                ("valid", "7675409874256e7d"),
            )
        ),
        "cc-by-4.0",
        configs=False,
    ),
    "hotpotqa/hotpot_qa": Repository(
        (
            *(
                HubFile(
                    f"distractor/train-0000{i}-of-00002.parquet",
                    "distractor",
                    "train",
                    make.hotpot,
                    HOTPOT,
                    "question",
                )
                for i in range(2)
            ),
            *parquet("distractor", "validation", make.hotpot, HOTPOT, "question"),
        ),
        "cc-by-sa-4.0",
    ),
    "tau/scrolls": Repository(
        (*scrolls("qasper", choices=False), *scrolls("quality", choices=True)),
        configs=False,
        script="scrolls.py",
    ),
    "emozilla/quality": Repository(
        tuple(
            file(f"data/{split}-00000-of-00001-{ending}.parquet", split, make.quality, QUALITY, "question")
            for split, ending in (("train", "0bffe0bf790d89eb"), ("validation", "77baeb9538209706"))
        ),
        configs=False,
    ),
    "baber/piqa": Repository(
        withheld(
            tuple(file(f"piqa_{split}.parquet", split, make.piqa, PIQA, "goal") for split in ALL.split()),
            label=-1,
        ),
        card=False,
    ),
    "allenai/winogrande": Repository(
        tuple(
            part
            for size in ("xs", "s", "m", "l", "xl", "debiased")
            for part in winogrande(f"winogrande_{size}")
        )
    ),
}


def drawn_rows(repo_id: str, rows_per_split: int, seed: int) -> dict[str, list[Row]]:
    """The rows of every file. Within a configuration no question occurs twice, whatever the split."""
    drawn: dict[str, list[Row]] = {}
    seen: dict[str, set[str]] = {}
    files = REPOSITORIES[repo_id].files
    for file in sorted(files, key=lambda file: bool(file.parts)):
        shards = [other.path for other in files if (other.config, other.split) == (file.config, file.split)]
        count = max(1, len(range(shards.index(file.path), rows_per_split, len(shards))))
        rng, known = Random(f"{seed} {repo_id} {file.twin or file.path}"), seen.setdefault(file.config, set())
        rows = [row for part in file.parts for row in drawn[part]]
        while not file.parts and len(rows) < count:
            (row,) = file.rows(1, rng)
            question = json.dumps(row[file.question])
            if question not in known:
                known.add(question)
                rows.append(row)
        drawn[file.path] = rows
    return drawn


def build_files(repo_id: str, rows_per_split: int, seed: int) -> dict[str, bytes]:
    """The repository's files by their paths. A split of several files is shared out among them, with a row at least for each."""
    repository = REPOSITORIES[repo_id]
    drawn = drawn_rows(repo_id, rows_per_split, seed)
    content = {file.path: as_bytes(file.path, drawn[file.path], file.columns) for file in repository.files}
    built = {path: data for path, data in content.items() if "!" not in path}
    for archive in dict.fromkeys(path.split("!")[0] for path in content if "!" in path):
        members = {
            path.split("!")[1]: data for path, data in content.items() if path.startswith(f"{archive}!")
        }
        built[archive] = as_zip(members)
    if repository.script:
        built[repository.script] = b"# A loader, which `datasets` no longer runs.\n"
    if repository.card:
        built["README.md"] = card(repo_id.split("/")[1], repository)
    return built
