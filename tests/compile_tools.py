"""What the tests of compiling and of artifacts share."""

import logging
import time
from dataclasses import replace

from whisper_max.runtime import artifacts, compilation
from whisper_max.runtime.artifact_key import ArtifactKey

KEY = ArtifactKey("tiny-high", "whisper_max.graphs.build:build", (("n_mels", 80),), "cpu", "avx512")


class Compiling:
    """A cache folder, and a key whose fake compiles are counted."""

    def __init__(self, folder):
        self.cache = folder / "cache"
        self.counter = folder / "count"
        self.key = replace(KEY, options=(("count", str(self.counter)),))

    def count(self):
        """How many compiles of `key` there have been, in all processes."""
        return len(self.counter.read_text()) if self.counter.exists() else 0


def forget_this_process():
    """Go on as the next process would: with the cache folder alone to go by."""
    compilation._children.clear()
    compilation._warned.clear()


def ensure(key, cache, compiler="write", policy="blocking", **options):
    options.setdefault("progress", False)
    return compilation.ensure(key, cache, policy, compiler=f"fake_compilers:{compiler}", **options)


def names(folder):
    """What is in the cache folder, apart from MAX's own cache."""
    return {path.name for path in folder.iterdir()} - {artifacts.ENGINE_CACHE}


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
