"""A prompt and its answer, token by token: which experts, in which layers, and how sure the routers were.

A prompt's token is judged where it is read; an answer's token where it was produced, which is the position before its own. So
the last token of a prompt counts on both sides.

Letters: T tokens, L layers with experts, E routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from srde.errors import UsageError
from srde.infer.prompts import Prompt, encode_prompt
from srde.infer.route import expert_labels
from srde.infer.routes import Routes, read_routes
from srde.infer.stream import top_expert
from srde.infer.texts import token_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Part:
    """The prompt's or the answer's tokens.

    Attributes:
        texts: What each of the T tokens adds to the text.
        gate_LTE: Weight of each routed expert in each layer; what is missing to 1 went to no expert.
        sure_LT: Probability that the router gives to the slot it likes best.
        entropy_LT: Entropy of the router's probabilities: 0 is sure, 1 is a guess among all that are open.
    """

    texts: list[str]
    gate_LTE: Tensor
    sure_LT: Tensor
    entropy_LT: Tensor

    @property
    def load_LE(self) -> Tensor:
        """Mean weight of each expert in each layer."""
        return self.gate_LTE.mean(1)

    @property
    def load_E(self) -> Tensor:
        """Mean weight of each expert over the layers."""
        return self.gate_LTE.mean((0, 1))

    @property
    def experts_T(self) -> list[int | None]:
        """The expert with the largest mean weight over the layers, per token; None where no expert was chosen."""
        return [top_expert(gate_E) for gate_E in self.gate_LTE.mean(0)]

    @property
    def experts_LT(self) -> list[list[int | None]]:
        """The expert with the largest weight, per layer and token."""
        return [[top_expert(gate_E) for gate_E in gate_TE] for gate_TE in self.gate_LTE]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values, four digits each."""
        return {
            "tokens": self.texts,
            "expert_per_token": self.experts_T,
            "expert_per_layer_and_token": self.experts_LT,
            "load": _rounded(self.load_E),
            "load_per_layer": _rounded(self.load_LE),
            "sureness": round(float(self.sure_LT.mean()), 4),
            "sureness_per_layer": _rounded(self.sure_LT.mean(1)),
            "entropy": round(float(self.entropy_LT.mean()), 4),
            "entropy_per_layer": _rounded(self.entropy_LT.mean(1)),
        }


@dataclass(frozen=True)
class Analysis:
    """What the routers did with one prompt and its answer.

    Attributes:
        prompt: The prompt's tokens, the template's included.
        answer: The answer's tokens; None if there are none.
        layers: Names of the MLPs with experts, in the model's order.
        labels: What to call each routed expert.
        null: Whether tokens may choose to use no expert.
        forced: Whether the experts were given from outside; how sure the routers were is their own opinion all the same.
    """

    prompt: Part
    answer: Part | None
    layers: list[str]
    labels: list[str]
    null: bool
    forced: bool

    @property
    def spoken(self) -> Part:
        """The answer's tokens; without an answer, the prompt's."""
        return self.answer or self.prompt

    @property
    def numbers(self) -> list[str]:
        """The layers' numbers, or their names where these have none."""
        found = [next((part for part in name.split(".") if part.isdecimal()), name) for name in self.layers]
        return found if len(set(found)) == len(found) else self.layers

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            "experts": self.labels,
            "layers": self.layers,
            "null_expert": self.null,
            "forced": self.forced,
            "prompt": self.prompt.to_dict(),
            "answer": self.answer.to_dict() if self.answer else None,
        }


def analyse(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | Sequence[int],
    answer: Sequence[int] = (),
    *,
    system: str | None = None,
    raw: bool = False,
) -> Analysis:
    """Reads a prompt and an answer once more and says which experts took part. A forced route must still be in force.

    Args:
        model: With an srde adapter, active.
        tokenizer: Its tokenizer.
        prompt: A text, a conversation, or token ids.
        answer: Its new tokens, `Answer.ids`; may be left out.
        system: As in `srde.infer.generate.generate`.
        raw: As there.

    Raises:
        ConfigError: The prompt cannot be put to the model.
        UsageError: No adapter is active.
    """
    ids = list(prompt) if _is_ids(prompt) else encode_prompt(tokenizer, prompt, system=system, raw=raw)  # type: ignore[arg-type]
    routes = read_routes(model, [*ids, *answer])
    if routes is None:
        raise UsageError.of(
            "routing", "off", rule="no adapter is active, so there is no router to look at",
            fix="leave out --route off, or load an adapter",
        )  # fmt: skip
    texts = token_texts(tokenizer, [*ids, *answer])
    count = len(ids)
    return Analysis(
        _part(routes, texts[:count], 0),
        _part(routes, texts[count:], count - 1) if len(answer) else None,
        routes.layers,
        expert_labels(model),
        routes.null,
        routes.forced,
    )


def _is_ids(prompt: Any) -> bool:
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], int)


def _part(routes: Routes, texts: list[str], first: int) -> Part:
    at = slice(first, first + len(texts))
    return Part(
        texts,
        routes.gate_LTE[:, at, : routes.num_routed],
        routes.sure_LT[:, at],
        routes.entropy_LT[:, at],
    )


def _rounded(values: Tensor) -> Any:
    return [
        round(value, 4) if isinstance(value, float) else [round(v, 4) for v in value]
        for value in values.tolist()
    ]
