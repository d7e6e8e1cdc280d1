"""How often each expert of an adapter was chosen, where a run or an evaluation beside it tells."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def known_load(folder: Path, num_experts: int) -> tuple[list[float], str] | None:
    """The routed experts' shares of the tokens, as a mean over layers, and where they are from: the folder's
    `eval_results.json`, or else its run's last steps.

    Returns:
        None where neither tells of this number of experts.
    """
    import numpy as np

    if (file := folder / "eval_results.json").is_file():
        try:
            domains = json.loads(file.read_text(encoding="utf-8"))["srde"]["domains"]
            loads = [one["expert_load"] for one in domains.values() if one.get("expert_load")]
            load = np.array([np.mean(one, axis=0)[:num_experts] for one in loads], dtype=float)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(
                f"{file}: it is no eval_results.json of srde eval ({type(error).__name__}); no load is shown",
                file=sys.stderr,
            )
            return None
        if loads and load.shape[1] == num_experts and load.sum() > 0:
            load = load.mean(0)
            return (load / load.sum()).tolist(), "eval_results.json, domains weighing the same"
    if (folder / "run.json").is_file():
        from srde.monitor.routing import recent_routing
        from srde.monitor.run import read_run

        run = read_run(folder, verify_seconds=0)
        found = recent_routing(run.loads, run.facts.num_experts)
        if found is not None and found.share_LE.shape[1] == num_experts:
            return np.nanmean(found.share_LE, axis=0).tolist(), "the run's last logged steps"
    return None
