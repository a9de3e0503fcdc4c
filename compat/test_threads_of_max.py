"""What MAX leaves running in the user's process does not take its CPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from whisper_max.runtime import timer_slack

WATCHED_SECONDS = 0.5
WAKE_UPS_A_SECOND = 200
"""Of all threads together; one alone would wake six thousand times."""

SCRIPT = """
import sys, time
from pathlib import Path
import torch
from harness import load_checkpoint
import whisper_max

def wake_ups():
    texts = [(task / "status").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum(int(text.split("voluntary_ctxt_switches:")[1].split()[0]) for text in texts)

whisper_max.patch(mode="strict", compile="blocking")
model = load_checkpoint()
with torch.no_grad():
    model.encoder(torch.zeros(1, model.dims.n_mels, 2 * model.dims.n_audio_ctx))
time.sleep(0.2)  # threads that wait for work give up
before = wake_ups()
time.sleep(float(sys.argv[1]))
print(wake_ups() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_an_idle_process_stays_idle():
    script = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(WATCHED_SECONDS)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert script.returncode == 0, script.stderr
    assert int(script.stdout) < WAKE_UPS_A_SECOND * WATCHED_SECONDS


@pytest.mark.skipif(sys.platform != "linux", reason="timers have their tolerance on Linux")
def test_this_threads_own_tolerance_comes_back():
    def tolerance():
        return timer_slack._libc.prctl(timer_slack._PR_GET_TIMERSLACK, 0, 0, 0, 0)

    before = tolerance()
    with pytest.raises(RuntimeError), timer_slack.inherited_timer_slack(7_000_000):
        assert tolerance() == 7_000_000
        raise RuntimeError
    assert tolerance() == before
