"""What the fault tests share: one process that forks, one tiny model, the runs that nothing happens to."""

from __future__ import annotations

import pytest
from rig import Rig
from runs import Lab

from tiny import save_tiny


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """Starts runs. Its process takes seconds to start, so all fault tests share it."""
    folder = tmp_path_factory.mktemp("lab")
    base = save_tiny(folder / "base")
    rig = Rig(folder, base)
    yield Lab(rig, base, folder)
    rig.close()
