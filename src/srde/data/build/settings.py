"""The settings of `srde data build`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import date
from typing import Literal

from srde.errors import ConfigError


@dataclass
class BuildSettings:
    """What to build, from what, for which model."""

    model_name: str = field(
        metadata={
            "help": "Hub id or folder of the model whose tokenizer and chat template are used.",
            "aliases": ["--model_name_or_path"],
        }
    )
    work_dir: str = field(
        metadata={"help": "Folder for the data set and for what a killed build goes on from."}
    )
    examples_per_domain: int = field(
        default=100_000, metadata={"help": "Training rows of each domain, shared evenly by its sources."}
    )
    domains: list[str] | None = field(
        default=None, metadata={"help": "Only these domains. All that the sources have, if not given."}
    )
    sources: list[str] | None = field(
        default=None,
        metadata={
            "help": "Registered sources, YAML files with sources, data files, folders of them. All registered, if not given."
        },
    )
    eval_sources: list[str] | None = field(
        default=None,
        metadata={
            "help": "The same for the evaluation sets that training rows are compared with. If not given: those of all "
            "registered sources when one from the hub is trained on, and those that the YAML files name."
        },
    )
    licenses: list[str] | None = field(
        default=None, metadata={"help": "Only rows under these licences, e.g. MIT Apache-2.0."}
    )
    seed: int = field(default=42, metadata={"help": "Which rows are chosen, and their order."})
    max_length: int = field(
        default=2048, metadata={"help": "Tokens per packed row; longer examples are left out and counted."}
    )
    validation_fraction: float = field(
        default=0.01, metadata={"help": "Share of the documents that is held out, besides the training rows."}
    )
    near_duplicate_threshold: float = field(
        default=0.7,
        metadata={
            "help": "Jaccard similarity of 3-word n-grams from which a row is a near duplicate; above 1 for none."
        },
    )
    decontamination_ngram: int = field(
        default=13, metadata={"help": "Words in an n-gram shared with an evaluation question."}
    )
    decontamination_overlap: float = field(
        default=0.5,
        metadata={
            "help": "Share of an evaluation question's n-grams from which a row holds it; above 1 for no check."
        },
    )
    on_bad_row: Literal["error", "skip"] = field(
        default="error",
        metadata={"help": "Ends the build at a row that breaks a rule, or leaves it out and counts it."},
    )
    num_proc: int | None = field(
        default=None, metadata={"help": "Processes. As many as cores, if not given."}
    )
    template_date: str | None = field(
        default=None,
        metadata={
            "help": "Date, as 2026-01-31, for chat templates that put today's in. The day that the build began, if not given."
        },
    )
    shard_index: int = field(default=0, metadata={"help": "Which part this machine makes, from 0."})
    num_shards: int = field(
        default=1, metadata={"help": "Parts that the build is divided into; `srde data merge` joins them."}
    )
    upload_repo: str | None = field(
        default=None, metadata={"help": "Data set on the hub, owner/name, that the result is pushed to."}
    )
    private: bool = field(default=False, metadata={"help": "Makes that data set private if it is new."})

    def __post_init__(self) -> None:
        self.domains = _listed(self.domains)
        self.licenses = _listed(self.licenses)
        for name, low, rule in (
            ("examples_per_domain", 1, "a domain needs at least 1 row"),
            ("max_length", 8, "a row needs at least 8 tokens"),
            ("seed", 0, "it must be at least 0"),
            ("decontamination_ngram", 5, "it must be at least 5 words"),
            ("num_shards", 1, "it must be at least 1"),
            ("shard_index", 0, "it must be at least 0"),
        ):
            if getattr(self, name) < low:
                raise ConfigError.of(name, getattr(self, name), rule=rule, fix=f"use {low} or more")
        if self.shard_index >= self.num_shards:
            raise ConfigError.of(
                "shard_index", self.shard_index, rule=f"it must be below num_shards={self.num_shards}",
                fix=f"use 0 to {self.num_shards - 1}",
            )  # fmt: skip
        if not 0 <= self.validation_fraction < 0.5:
            raise ConfigError.of(
                "validation_fraction",
                self.validation_fraction,
                rule="it must be from 0 to below 0.5",
                fix="use 0.01",
            )
        for name in ("near_duplicate_threshold", "decontamination_overlap"):
            if not getattr(self, name) > 0:
                raise ConfigError.of(
                    name,
                    getattr(self, name),
                    rule="it must be above 0",
                    fix="use a value above 1 to switch it off",
                )
        if self.on_bad_row not in ("error", "skip"):
            raise ConfigError.of(
                "on_bad_row", self.on_bad_row, rule="it must be error or skip", fix="use one of them"
            )
        if self.upload_repo and self.num_shards > 1:
            raise ConfigError.of(
                "upload_repo",
                self.upload_repo,
                rule="a part is not uploaded",
                fix="pass it to `srde data merge`",
            )
        if self.template_date is not None:
            try:
                date.fromisoformat(self.template_date)
            except ValueError as error:
                raise ConfigError.of(
                    "template_date",
                    self.template_date,
                    rule=f"it must be a date ({error})",
                    fix="write it as 2026-01-31",
                ) from error
        if self.num_proc is not None and self.num_proc < 1:
            raise ConfigError.of("num_proc", self.num_proc, rule="it must be at least 1", fix="use 1")

    @property
    def processes(self) -> int:
        """How many to use."""
        return self.num_proc or len(os.sched_getaffinity(0))

    def identity(self) -> dict[str, object]:
        """The settings that the result's bytes depend on."""
        names = (
            "examples_per_domain", "domains", "licenses", "seed", "max_length", "validation_fraction", "near_duplicate_threshold",
            "decontamination_ngram", "decontamination_overlap", "on_bad_row",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def _listed(values: list[str] | None) -> list[str] | None:
    return None if values is None else [part for value in values for part in value.split(",") if part]
