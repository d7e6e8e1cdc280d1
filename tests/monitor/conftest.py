"""Run folders as a trainer leaves them, in any state."""

from __future__ import annotations

import math
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from srde.artifacts import atomic_folder
from srde.monitor.log import EVENTS_FILE, HEARTBEAT_FILE, METRICS_FILE, RUN_FILE, MetricsLog, replace_json

DOMAINS = ("math", "logic", "code")
PHASES = (("warm_up", 0.1), ("expert_pretraining", 0.1), ("joint", 0.8))


class FabricatedRun:
    """Writes what `srde train` writes, through the same functions.

    Args:
        folder: The run's folder.
        steps, max_steps: How far it is, and how far it goes.
        layers, experts: Its size.
        settings: Other fields of `run.json`.
    """

    def __init__(self, folder, steps=60, max_steps=100, layers=4, experts=8, start=None, **settings):
        self.folder, self.max_steps, self.layers, self.experts = Path(folder), max_steps, layers, experts
        self.step = 0
        self.start = time.time() - steps / 2 if start is None else start
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = MetricsLog(self.folder / METRICS_FILE)
        self.rng = random.Random(0)
        ends = [round(max_steps * sum(share for _, share in PHASES[: i + 1])) for i in range(len(PHASES))]
        phases = [
            {"name": name, "start": start, "end": end}
            for (name, _), start, end in zip(PHASES, [0, *ends], ends, strict=False)
        ]
        self.facts = {
            "format": 1, "max_steps": max_steps, "phases": phases, "num_experts": experts, "num_shared_experts": 1,
            "layers": [f"model.layers.{i}.mlp" for i in range(layers)], "domains": list(DOMAINS),
            "heartbeat_steps": 10, "logging_steps": 1, "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "identity": {"seed": 0}, "started": self.start, **settings,
        }  # fmt: skip
        replace_json(self.folder / RUN_FILE, self.facts)
        self.event("started", "training started")
        self.train(steps)
        self.beat()

    def phase_of(self, step):
        return next(
            (p["name"] for p in self.facts["phases"] if step < p["end"]), self.facts["phases"][-1]["name"]
        )

    def time_of(self, step):
        return self.start + step / 2

    def loads(self):
        """Nearly even loads of the routed experts, and a shared one that is always on."""
        row = [
            [1 / self.experts * self.rng.uniform(0.5, 1.5) for _ in range(self.experts)]
            for _ in range(self.layers)
        ]
        return [[round(load, 5) for load in layer] + [1.0] for layer in row]

    def train(self, steps, loads=None, **fields):
        """Logs more steps; an evaluation every 20."""
        for _ in range(steps):
            self.step += 1
            phase = self.phase_of(self.step - 1)
            record = {
                "kind": "train", "step": self.step, "phase": phase,
                "loss": 1.2 + 1.5 * math.exp(-3 * self.step / self.max_steps) + self.rng.gauss(0, 0.05),
                "learning_rate": 3e-3 * (1 - self.step / self.max_steps), "grad_norm": 0.8,
                "sparsity": 0.05 - 0.04 * self.step / self.max_steps, "router_temperature": 1.0,
                "open_experts": self.experts, "tokens": 4096 * self.step,
                "router_aux_loss": 0.011, "router_z_loss": 0.002,
                "expert_load": None if phase == "warm_up" else (loads or self.loads()),
                "clock": {
                    "time": self.time_of(self.step), "tokens_per_second": 8192 + self.rng.uniform(-50, 50),
                    "step_seconds": 0.5, "memory_mb": 9100.0,
                },
            } | fields  # fmt: skip
            self.metrics.append(record)
            if self.step % 20 == 0:
                self.evaluate()

    def evaluate(self):
        loss = 1.3 + 0.8 * math.exp(-3 * self.step / self.max_steps)
        domains = {
            name: {"loss": loss + 0.1 * i, "base_loss": 1.9 + 0.1 * i, "tokens": 5120}
            for i, name in enumerate(self.facts["domains"])
        }
        self.metrics.append(
            {
                "kind": "eval",
                "step": self.step,
                "loss": loss,
                "base_loss": 2.0,
                "domains": domains,
                "clock": {},
            }
        )

    def event(self, name, text, **fields):
        record = {"time": self.time_of(self.step), "pid": os.getpid(), "host": socket.gethostname()}
        MetricsLog(self.folder / EVENTS_FILE).append(
            record | {"event": name, "step": self.step, "text": text} | fields
        )

    def beat(self, status="training", **fields):
        record = {
            "time": self.time_of(self.step), "pid": os.getpid(), "host": socket.gethostname(), "status": status,
            "step": self.step, "max_steps": self.max_steps, "phase": self.phase_of(self.step), "reason": None,
        }  # fmt: skip
        replace_json(self.folder / HEARTBEAT_FILE, record | fields)

    def checkpoint(self, name=None, size=2000):
        name = name or f"checkpoint-{self.step}"
        with atomic_folder(self.folder / name, metadata={"step": self.step}) as folder:
            (folder / "adapter_model.safetensors").write_bytes(b"\x01" * size)
            (folder / "trainer_state.json").write_text("{}")
        self.event("checkpoint", f"saved {name}")
        return self.folder / name

    def damage(self, name):
        """Turns one bit of a checkpoint."""
        file = self.folder / name / "adapter_model.safetensors"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


@pytest.fixture
def fabricate(tmp_path):
    """Makes a run in a folder of its own."""
    return lambda name="run", **settings: FabricatedRun(tmp_path / name, **settings)


@pytest.fixture(scope="session")
def dead_pid():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid
