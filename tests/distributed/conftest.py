"""Runs of the real command line in one process and in several; each is made once."""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srde.data.quickstart import build_quickstart
from tiny import save_tiny

LAUNCH = Path(__file__).with_name("launch.py")
SECONDS = 150  # starting takes about ten on a machine with nothing else to do
STEPS = 4
ARGUMENTS = [
    *("--max_steps", str(STEPS), "--max_length", "256", "--logging_steps", "1", "--disable_tqdm", "true"),
    *("--num_experts", "3", "--initial_sparsity", "0.25", "--target_sparsity", "0.25"),
]
ON_CPU = ["--use_cpu", "true"]


@dataclass
class Run:
    """What the processes of a run wrote down, by rank, and the adapter that the run saved."""

    ranks: list[dict]
    saved: dict
    folder: Path


class Runs:
    """Starts runs on one tiny base and a few rows."""

    def __init__(self, folder):
        self.folder, self.done = folder, {}
        self.base = save_tiny(folder / "base")
        self.data = build_quickstart(folder / "data", train_per_domain=6, test_per_domain=2, seed=0)

    def one(self, *arguments):
        """A run in one process that accumulates two micro-batches a step."""
        return self._make([sys.executable], 1, *ON_CPU, "--gradient_accumulation_steps", "2", *arguments)

    def batch_of_two(self, *arguments):
        """A run in one process with two rows in each micro-batch."""
        return self._make([sys.executable], 1, *ON_CPU, "--per_device_train_batch_size", "2", *arguments)

    def torchrun(self, *arguments):
        """A run in two processes."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        return self._make(command, 2, *ON_CPU, *arguments)

    def accelerate(self, config, *arguments):
        """A run in two processes, as a configuration file of Accelerate describes them."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        return self._make([*command, "--main_process_port", port], 2, *arguments)

    def _make(self, command, processes, *arguments):
        key = (*[word for word in command if not word.isdigit()], *arguments)
        if key not in self.done:
            self.done[key] = self._start(command, processes, arguments, self.folder / f"run{len(self.done)}")
        return self.done[key]

    def _start(self, command, processes, arguments, folder):
        given = ["--model_name_or_path", str(self.base), "--train_file", str(self.data.train)]
        out, facts = folder / "out", folder / "facts"
        words = [
            *command,
            str(LAUNCH),
            str(facts),
            "train",
            *given,
            "--output_dir",
            str(out),
            *ARGUMENTS,
            *arguments,
        ]
        env = {
            **{
                name: value
                for name, value in os.environ.items()
                if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
            },
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
        }
        process = subprocess.Popen(
            words,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"the run hung\n{output[-6000:]}")
        assert process.returncode == 0, output[max(output.find("Traceback") - 500, 0) :][:8000]
        ranks = [torch.load(facts / f"{rank}.pt") for rank in range(processes)]
        return Run(ranks, load_file(out / "adapter_model.safetensors"), out)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("distributed"))


def farthest(one, other):
    """The largest difference between two adapters."""
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


@pytest.fixture(scope="session", name="farthest")
def _farthest():
    return farthest


@pytest.fixture(scope="session")
def check():
    """Asserts that a run in two processes is what one process with two micro-batches a step does."""

    def compare(run, one, wrapper, tolerance):
        for rank in run.ranks:
            assert (rank["world_size"], rank["backend"], rank["wrapper"]) == (2, "gloo", wrapper)
        first, second = (rank["batches"] for rank in run.ranks)
        assert (
            len(first) == STEPS
            and [b for pair in zip(first, second, strict=True) for b in pair] == one.ranks[0]["batches"]
        )
        adapters = [rank["adapter"] for rank in run.ranks]
        assert farthest(*adapters) == 0
        assert farthest(adapters[0], one.ranks[0]["adapter"]) <= tolerance
        moved = max(t.abs().max().item() for n, t in adapters[0].items() if n.endswith(".values"))
        assert moved > 1000 * tolerance + 1e-3  # there was something to be equal
        for ours, theirs in zip(run.ranks[0]["log"], one.ranks[0]["log"], strict=True):
            for name in {
                "loss",
                "grad_norm",
                "router_aux_loss",
                "router_z_loss",
                "sparsity_loss",
            } & ours.keys():
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
        assert run.ranks[0]["log"][0]["loss"] == run.ranks[1]["log"][0]["loss"]
        plain = {name.replace(".default", ""): tensor for name, tensor in adapters[0].items()}
        assert farthest(run.saved, plain) == 0

    return compare
