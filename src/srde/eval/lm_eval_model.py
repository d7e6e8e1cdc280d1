"""The model `srde` of lm-evaluation-harness: an adapter on its base, routed, forced to an expert, or switched off.

    lm_eval --model srde --model_args adapter=runs/mine,route=math --tasks arc_easy

Everything but loading and routing is lm-eval's own class for Transformers models, so that scores of the base are lm-eval's
scores. `src/_srde_lm_eval.py` says how lm-eval finds this module.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from srde.data.tokenizers import first_line
from srde.errors import ConfigError, DataError, UsageError
from srde.hub.open import open_model
from srde.infer.route import routed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The arguments of lm-eval's class that act on a model which is loaded already; it would take the others and not use them.
PASSED_ON = (
    "add_bos_token", "chat_template_args", "enable_thinking", "logits_cache", "max_batch_size", "max_length",
    "mixed_precision_dtype", "prefix_token_id", "softmax_dtype", "think_end_token", "truncation",
)  # fmt: skip
OWN = ("adapter", "base", "route", "expert", "dtype", "device", "batch_size")


@register_model("srde")
class SrdeLM(HFLM):
    """A causal language model with an srde adapter, as lm-eval asks for it.

    Args:
        adapter: A folder or hub id; or the loaded model itself, then with its `tokenizer`.
        base: Another place to load the same base from.
        route: "off" for the base alone; or an expert's name, which several may share: the router then chooses among them.
            None lets the router choose among all.
        expert: The number of the one expert that all tokens take.
        dtype: Type of the base's weights; "auto" keeps the checkpoint's.
        device: Where to put the model: lm-eval's names. CUDA, if there is any, when left out.
        batch_size: Sequences per forward: a number, "auto" or "auto:N".
        tokenizer: Only for a loaded model.
        settings: Those in `PASSED_ON`, with lm-eval's meaning.

    Raises:
        ConfigError: An argument is unknown or missing, or the adapter has no such expert.
        ArtifactError: `adapter` is no adapter, or made for another base.
        UsageError: The process is one of several: lm-eval would give each of them all items.
    """

    def __init__(
        self,
        adapter: str | PreTrainedModel | None = None,
        base: str | None = None,
        route: str | int | None = None,
        expert: int | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **settings: Any,
    ) -> None:
        _refuse(adapter, settings)
        if isinstance(adapter, str | os.PathLike):
            model, tokenizer = open_model(str(adapter), dtype, base)
            model.to(_device(device))
        else:
            model = adapter
        with _less_said():
            super().__init__(
                pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, **settings
            )
        self.route, self.expert = route, expert
        with self.routed():  # an expert that there is not is told now, not after the tasks have been loaded
            pass

    def routed(self) -> AbstractContextManager[Any]:
        """Inside, the model routes as `route` and `expert` say."""
        return routed(self.model, None if self.route is None else str(self.route), self.expert)

    def _model_call(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.routed():
            return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.routed():
            return super()._model_generate(*args, **kwargs)


class SrdeTasks(TaskManager):
    """lm-eval's tasks, with our errors for what cannot be had and for what was not confirmed.

    Args:
        include_path: A folder with more definitions.
        confirm_run_unsafe_code: Whether tasks may run code that the model wrote.
    """

    def __init__(self, include_path: str | None, confirm_run_unsafe_code: bool) -> None:
        super().__init__(include_path=include_path)
        self.confirmed = confirm_run_unsafe_code

    def load(self, task_list: Any) -> Any:
        try:
            loaded = super().load(task_list)
        except OSError as error:  # all that `datasets` raises where a data set or the network is missing
            raise DataError.of(
                "tasks", task_list, rule=f"a data set could not be loaded ({first_line(error)})",
                fix="without a network, only data sets already in the cache of datasets can be had",
            ) from error  # fmt: skip
        unsafe = sorted(name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False))
        if unsafe and not self.confirmed:
            raise ConfigError.of(
                "task", unsafe[0], rule="it runs code that the model wrote, and lm-eval does so without containment",
                fix="leave it out, or pass --confirm_run_unsafe_code on a machine that you can lose",
            )  # fmt: skip
        return loaded


def _refuse(adapter: object, settings: dict[str, Any]) -> None:
    """Raises for what cannot be meant: lm-eval passes any `--model_args` on, and its class ignores what it does not know."""
    if unknown := [name for name in settings if name not in PASSED_ON]:
        close = difflib.get_close_matches(unknown[0], [*OWN, *PASSED_ON], n=1)
        fix = f"the nearest is {close[0]}" if close else f"it takes {', '.join((*OWN, *PASSED_ON))}"
        if unknown[0] in ("pretrained", "peft"):
            fix = "the adapter is named by adapter, and another place of its base by base"
        raise ConfigError.of("model_args", unknown[0], rule="the model srde has no such argument", fix=fix)
    if adapter is None:
        raise ConfigError.of(
            "adapter",
            None,
            rule="the model srde needs a folder or hub id",
            fix="pass --model_args adapter=DIR",
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError.of(
            "WORLD_SIZE", os.environ["WORLD_SIZE"], rule="the model srde runs in one process",
            fix="start lm_eval by itself, without accelerate launch or torchrun",
        )  # fmt: skip


def _device(name: str | None) -> torch.device:
    """Where the model goes. lm-eval's command line always says cuda:0 unless told otherwise, and so, as its own class for
    Transformers models does, CUDA where there is none means the CPU."""
    if name is None or str(name).startswith("cuda"):
        return torch.device((name or "cuda") if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError.of(
            "device", name, rule="torch knows no such device", fix="pass cuda or cpu"
        ) from error


@contextmanager
def _less_said() -> Iterator[None]:
    """Keeps lm-eval from warning, twice, that a loaded model takes fewer arguments: `_refuse` has refused the others."""
    logger = logging.getLogger(HFLM.__module__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
