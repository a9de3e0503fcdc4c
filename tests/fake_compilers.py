"""Stand-ins for `compile_to_mef`, run in the compiling process: they finish at once, or break.

Each takes the key and the path to write to, and counts its calls in the file of the key's option
"count" where there is one.
"""

import atexit
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from whisper_max.runtime.compile_worker import ArtifactRefused

CONTENT = b"not a MEF, but bytes to be stored and found"


def count(key):
    file = dict(key.options).get("count")
    if file:
        with open(file, "a") as calls:
            calls.write("x")


def write(key, path):
    count(key)
    path.write_bytes(CONTENT)


def write_slowly(key, path):
    count(key)
    time.sleep(1.5)
    path.write_bytes(CONTENT)


def _autogroup_niceness():
    """Of this session against others; None where Linux has none."""
    try:
        return int(Path("/proc/self/autogroup").read_text().split()[-1])
    except OSError:
        return None


def wait_for_a_share(key, path):
    """Writes this session's niceness, first and when it has changed."""
    count(key)
    first, end = _autogroup_niceness(), time.monotonic() + 10
    while _autogroup_niceness() == first and time.monotonic() < end:
        time.sleep(0.05)
    path.write_text(json.dumps([first, _autogroup_niceness()]))


def describe_process(key, path):
    count(key)
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that listed the folder
            pass
    description = {
        "descriptors": descriptors,
        "niceness": os.nice(0),
        "autogroup": _autogroup_niceness(),
        "scheduler": os.sched_getscheduler(0),
        "oom_score_adj": Path("/proc/self/oom_score_adj").read_text().strip(),
        "session": os.getsid(0),
        "supervisor_session": os.getsid(os.getppid()),
        "cwd": os.getcwd(),
        "main": sys.modules["__main__"].__dict__.get("__file__"),
        "environment": {
            name: os.environ.get(name)
            for name in ("MODULAR_CACHE_DIR", "MODULAR_TELEMETRY_ENABLED", "TMPDIR")
        },
        "package": sys.modules["whisper_max"].__file__,
    }
    path.write_text(json.dumps(description))


def abort_at_the_end(key, path):
    write(key, path)
    atexit.register(os.abort)


def crash(key, path):
    count(key)
    print("about to crash", flush=True)
    path.write_bytes(CONTENT)
    ctypes.string_at(0)


def be_killed(key, path):
    count(key)
    os.kill(os.getpid(), signal.SIGKILL)


def exit_quietly(key, path):
    count(key)
    os._exit(3)


def run_out_of_memory(key, path):
    count(key)
    bytearray(1 << 62)


def fill_the_disk(key, path):
    count(key)
    path.symlink_to("/dev/full")
    path.write_bytes(CONTENT)


def refuse_tiles(key, path):
    count(key)
    path.write_bytes(CONTENT)
    if key.cpu_level == "amx":
        raise ArtifactRefused("its tiles are wrong")


def write_nothing(key, path):
    count(key)


def talk_and_fail(key, path):
    count(key)
    print("many words " * 20_000)
    raise RuntimeError("the last words")


def hang(key, path):
    count(key)
    helper = subprocess.Popen(["sleep", "600"])
    Path(dict(key.options)["pids"]).write_text(f"{os.getpid()} {helper.pid}")
    time.sleep(600)
