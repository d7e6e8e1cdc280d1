"""The configuration files for several processes: their readers accept them, and every field exists."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import TrainingArguments

import srde

FOLDER = Path(srde.__file__).parent / "recipes/accelerate"
NAMES = ["ddp", "fsdp2", "zero2", "zero3"]


def test_these_are_all():
    assert {file.name for file in FOLDER.iterdir()} == {
        *(f"{n}.yaml" for n in NAMES),
        "zero2.json",
        "zero3.json",
    }


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_it_and_knows_every_field(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == (DistributedType.FSDP if name == "fsdp2" else DistributedType.MULTI_GPU)
    assert config.num_processes == 2 and config.mixed_precision == "no" and not config.use_cpu
    assert set(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())) <= {
        f.name for f in fields(ClusterConfig)
    }


def test_the_fields_of_fsdp_are_those_of_its_plugin():
    ours = load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config
    known = {f"fsdp_{f.name}" for f in fields(FullyShardedDataParallelPlugin)} | {
        "fsdp_version", "fsdp_offload_params"
    }  # fmt: skip
    assert set(ours) <= known
    assert ours["fsdp_version"] == 2 and ours["fsdp_cpu_ram_efficient_loading"] is False


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_reads_it_when_the_trainer_has_filled_it(stage, tmp_path):
    deepspeed = pytest.importorskip(
        "deepspeed", reason="deepspeed is not installed: its configurations are NOT read"
    )
    from transformers.integrations.deepspeed import (
        HfDeepSpeedConfig,
        HfTrainerDeepSpeedConfig,
        unset_hf_deepspeed_config,
    )

    file = FOLDER / f"zero{stage}.json"
    try:
        assert HfDeepSpeedConfig(str(file)).get_value("zero_optimization.stage") == stage
        args = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
            use_cpu=True,
        )
        filled = HfTrainerDeepSpeedConfig(str(file))
        filled.trainer_config_process(args)
        filled.trainer_config_finalize(
            args, type("Model", (), {"config": type("C", (), {"hidden_size": 32})}), 10
        )
    finally:
        unset_hf_deepspeed_config()
    assert "auto" not in json.dumps(filled.config) and filled.config["gradient_clipping"] == 0.5
    read = deepspeed.DeepSpeedConfig(filled.config)  # refuses fields that it does not know
    assert read.zero_optimization_stage == stage and read.gradient_accumulation_steps == 2
