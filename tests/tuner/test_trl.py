"""TRL's SFTTrainer takes an `SrdeConfig` like any PEFT configuration."""

import pytest
import torch
from adapters import LOADERS, config, load_base, tensors, tokens, trainable
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

trl = pytest.importorskip("trl", reason="trl is not installed: training with TRL is NOT tested")
datasets = pytest.importorskip(
    "datasets", reason="datasets is not installed: training with TRL is NOT tested"
)

# TRL 1.16 and Transformers 5.23 have these among themselves; a user sees them with any PEFT method.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "<eos>", "<unk>", *(f"w{n}" for n in range(60))]
    model = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


def rows():
    return datasets.Dataset.from_list(
        [{"prompt": f"w{n} w{n + 1}", "completion": f" w{n + 2} w{n + 3} w{n + 4}"} for n in range(8)]
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"gradient_checkpointing": False},
        {"packing": True, "max_length": 16},
        {"gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_two_steps_train_the_adapter_and_the_output_reloads(base, tokenizer, tmp_path, options):
    arguments = {"bf16": False, "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.05}
    quiet = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    trainer = trl.SFTTrainer(
        model=load_base(base),
        args=trl.SFTConfig(output_dir=str(tmp_path), **arguments | quiet | options),
        train_dataset=rows(),
        processing_class=tokenizer,
        peft_config=config(),
    )
    model = trainer.model
    assert isinstance(model, PeftModel) and {p.dtype for p in trainable(model).values()} == {torch.float32}
    before = tensors(model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]
    after = model.state_dict()
    assert {n for n, tensor in before.items() if not torch.equal(tensor, after[n])} == set(trainable(model))

    trainer.save_model()
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    want = model(tokens()).logits
    with model.disable_adapter():
        assert not torch.equal(model(tokens()).logits, want)
    for loader in ("PeftModel.from_pretrained", "AutoPeftModelForCausalLM", "AutoModelForCausalLM"):
        assert torch.equal(LOADERS[loader](base, str(tmp_path)).eval()(tokens()).logits, want)


def test_a_run_resumes_from_trl_s_checkpoint(base, tokenizer, tmp_path):
    def train(**resume):
        trainer = trl.SFTTrainer(
            model=load_base(base),
            args=trl.SFTConfig(
                output_dir=str(tmp_path), max_steps=4, save_steps=2, learning_rate=0.05, bf16=False, use_cpu=True,
                report_to="none", disable_tqdm=True, per_device_train_batch_size=2,
            ),
            train_dataset=rows(),
            processing_class=tokenizer,
            peft_config=config(),
        )  # fmt: skip
        trainer.train(**resume)
        return {name: p.detach().clone() for name, p in trainable(trainer.model).items()}

    whole = train()
    resumed = train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
