"""What a program notices besides its text: its signals, its threads' ends, a fork in the middle.

    python side_effects.py signal | thread | fork
"""

import os
import signal
import sys
import threading
import time

import numpy as np
import torch
import whisper

import whisper_max
from whisper_max import demo

torch.set_num_threads(1)  # GNU OpenMP's threads do not survive a fork
whisper_max.patch()
model = whisper.load_model(str(demo.CHECKPOINT), "cpu")
mel = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 80, 3000), np.float32))


def encode() -> None:
    with torch.no_grad():
        model.encoder(mel)


def max_calls() -> int:
    return whisper_max.status().targets["encoder"].max_calls


if sys.argv[1] == "signal":
    heard = []
    signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    encode()
    os.kill(os.getpid(), signal.SIGUSR2)
    time.sleep(0.1)
    assert heard == [signal.SIGUSR2] and max_calls() == 1
elif sys.argv[1] == "thread":
    thread = threading.Thread(target=encode)
    thread.start()
    thread.join()
    assert max_calls() == 1
else:
    thread = threading.Thread(target=encode)
    thread.start()
    while "whisper_max.runtime.load_max" not in sys.modules:
        time.sleep(0.001)
    if os.fork() == 0:
        encode()
        os._exit(0 if max_calls() == 0 else 1)
    _, status = os.wait()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0 and max_calls() == 1
print("as without whisper_max")
