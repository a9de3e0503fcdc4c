"""What MAX leaves running in the user's process does not take its CPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from whisper_max.runtime import timer_slack

SCRIPT = """
import json
from pathlib import Path
import torch
from harness import load_checkpoint
import whisper_max

def threads():
    return {task.name for task in Path("/proc/self/task").iterdir()}

model = load_checkpoint()
encoder = model.encoder
mel = torch.zeros(1, encoder.conv1.weight.shape[1], 2 * len(encoder.positional_embedding))
whisper_max.patch(mode="strict", compile="blocking")
whisper_max.accelerate(model)
from whisper_max import settings
from whisper_max.runtime import loading, storage
with torch.no_grad():
    with whisper_max.disabled():
        encoder(mel)  # PyTorch's threads
    loading.engine(storage.arithmetic_of("high", exact=True), settings.active())
    before = threads()
    encoder(mel)
started = threads() - before
print(json.dumps([int(Path(f"/proc/{thread}/timerslack_ns").read_text()) for thread in started]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.skipif(
    hasattr(os, "geteuid") and os.geteuid() != 0, reason="only root sees other threads' tolerance"
)
def test_threads_of_the_first_execution_need_not_wake_in_time():
    """How often they do wake is no measure: timers that are due anyway go off with any other."""
    script = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert script.returncode == 0, script.stderr
    tolerances = json.loads(script.stdout)
    assert tolerances and set(tolerances) == {timer_slack.TOLERANCE}


@pytest.mark.skipif(sys.platform != "linux", reason="timers have their tolerance on Linux")
def test_this_threads_own_tolerance_comes_back():
    def tolerance():
        return timer_slack._libc.prctl(timer_slack._PR_GET_TIMERSLACK, 0, 0, 0, 0)

    before = tolerance()
    with pytest.raises(RuntimeError), timer_slack.inherited_timer_slack(7_000_000):
        assert tolerance() == 7_000_000
        raise RuntimeError
    assert tolerance() == before
