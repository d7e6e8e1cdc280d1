"""deploy/vastai_startup.sh with the real `srde train`: killed in the middle and started again, it ends with one whole run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from srde.artifacts import MANIFEST_NAME, verify
from srde.errors import ArtifactError
from startup_rig import ROOT, DataServer, environment, kill_all, start
from tiny import save_tiny
from webhook_server import WebhookServer

HF_TOKEN = "hf_QwErTyUiOpAsDfGhJkLz"
MAX_STEPS = 80
ROWS = b"".join(b'{"prompt": "What is %d + 1?", "response": "%d"}\n' % (n, n + 1) for n in range(400))


def whole_checkpoints(output: Path) -> list[str]:
    names = []
    for manifest in output.glob(f"checkpoint-*/{MANIFEST_NAME}"):
        try:
            verify(manifest.parent)
        except (ArtifactError, OSError):  # it is being written or removed
            continue
        names.append(manifest.parent.name)
    return sorted(names)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.security
@pytest.mark.timeout(300)
@pytest.mark.skipif(
    any(shutil.which(name) is None for name in ("bash", "curl", "flock", "sha256sum")),
    reason="bash, curl, flock or sha256sum is missing: the startup script is NOT tested",
)
def test_killed_in_the_middle_and_started_again(tmp_path):
    """F2, F17, S4: SIGKILL to the whole group after the first checkpoint; one complete run and its three notifications."""
    work, output = tmp_path / "work", tmp_path / "work/run"
    venv = environment(
        tmp_path / "venv", f'#!/bin/sh\nPYTHONPATH="{ROOT}/src" exec "{sys.executable}" -m srde "$@"\n'
    )
    with DataServer(ROWS) as data, WebhookServer() as hook:
        env = {
            "WORK_DIR": str(work),
            "SRDE_VENV": str(venv),
            "SRDE_SOURCE": str(ROOT),
            "MODEL_NAME": str(save_tiny(tmp_path / "model")),
            "DATA_URL": data.url,
            "MAX_STEPS": str(MAX_STEPS),
            "MAX_RETRIES": "1",
            "RETRY_SECONDS": "0",
            "TRAIN_ARGS": "--use_cpu --dtype float32 --max_length 64 --save_steps 8 --logging_steps 4 --heartbeat_steps 4",
            "WEBHOOK_URL": hook.url,
            "WEBHOOK_ALLOW_PRIVATE": "1",
            "HF_TOKEN": HF_TOKEN,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        process = start(env)
        deadline = time.monotonic() + 60
        while not whole_checkpoints(output) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)  # another process's folder: there is nothing to wait for
        assert process.poll() is None, process.communicate()[0]
        kill_all(process, work)
        assert whole_checkpoints(output) and not (output / "adapter_model.safetensors").exists()

        process = start(env)
        try:
            out, _ = process.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            kill_all(process, work)
            raise
        assert process.returncode == 0, out
        bodies = hook.wait(3)

    verify(output)
    assert (output / "adapter_config.json").is_file() and f"done: {output}" in out
    steps = [
        row["step"]
        for line in (output / "metrics.jsonl").read_text().splitlines()
        if (row := json.loads(line))["kind"] == "train"
    ]
    assert steps == sorted(set(steps)) and steps[-1] == MAX_STEPS
    assert json.loads((output / "heartbeat.json").read_text())["status"] == "completed"
    assert [body["event"] for body in bodies] == ["started", "resumed", "completed"]
    assert len(data.requests) == 1

    secrets = [HF_TOKEN, *hook.url.split("/hook/")[1].split("?token="), "5ca1ab1e0ddba11"]
    written = [file for file in work.rglob("*") if file.is_file()]
    assert work / "startup.log" in written
    for file in written:
        assert not [secret for secret in secrets if secret.encode() in file.read_bytes()], file
    assert not [secret for secret in secrets if secret in out + json.dumps(bodies)]
