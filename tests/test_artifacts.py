"""Artifacts on disk: found, checked, listed, cleared; one compiled by MAX and run."""

import json
import os
import time
from dataclasses import replace

import numpy as np
import pytest

from whisper_max.runtime import artifacts, cache_listing, compilation
from whisper_max.runtime.artifact_key import ArtifactKey
from whisper_max.runtime.cache_folder import CacheRefused, lock

from compile_tools import KEY, ensure, forget_this_process, names, warnings
from fake_compilers import CONTENT


def test_untrusted_folder_is_refused_by_everything(compiling):
    cache = compiling.cache
    cache.mkdir()
    cache.chmod(0o777)
    for use in (
        lambda: ensure(KEY, cache),
        lambda: compilation.state(KEY, cache),
        lambda: artifacts.find(KEY, cache),
        lambda: artifacts.read(KEY, cache),
        lambda: cache_listing.list_artifacts(cache),
        lambda: cache_listing.clear(cache),
    ):
        with pytest.raises(CacheRefused, match="WHISPER_MAX_CACHE_DIR"):
            use()
    assert names(cache) == set()


def truncate(mef):
    mef.write_bytes(mef.read_bytes()[:-1])


def flip_a_byte(mef):
    content = bytearray(mef.read_bytes())
    content[3] ^= 1
    mef.write_bytes(content)


def lose_the_record(mef):
    mef.with_suffix(".json").unlink()


def spoil_the_record(mef):
    mef.with_suffix(".json").write_text("{")


def take_another_record(mef):
    record = json.loads(mef.with_suffix(".json").read_text())
    mef.with_suffix(".json").write_text(json.dumps({**record, "digest": "0" * 64}))


def become_a_link(mef):
    mef.rename(mef.with_name("elsewhere"))
    mef.symlink_to("elsewhere")


def become_a_link_of_that_size(mef):
    mef.rename(mef.with_name("x" * len(CONTENT)))
    mef.symlink_to("x" * len(CONTENT))


def be_intact(mef):
    """The bytes are those that were written, but MAX has another opinion of them."""


@pytest.mark.parametrize(
    "damage, why",
    [
        (truncate, "its size is not the recorded one"),
        (flip_a_byte, "are not those that were written"),
        (lose_the_record, "record is missing"),
        (spoil_the_record, "record is missing or damaged"),
        (take_another_record, "record is missing or damaged"),
        (become_a_link, "its size is not the recorded one"),
        (become_a_link_of_that_size, "cannot be read"),
        (be_intact, "MAX cannot read it"),
    ],
)
def test_damaged_artifact_is_removed_with_one_warning_and_rebuilt(compiling, caplog, damage, why):
    cache, key, count = compiling.cache, compiling.key, compiling.count
    assert ensure(key, cache).ready
    mef = artifacts.find(key, cache)
    damage(mef)
    assert artifacts.read(key, cache) is None
    assert not os.path.lexists(mef)
    [warning] = warnings(caplog)
    assert str(mef) in warning and why in warning
    assert artifacts.read(key, cache) is None
    assert len(warnings(caplog)) == 1

    forget_this_process()
    assert ensure(key, cache).ready
    assert count() == 2


@pytest.mark.parametrize(
    ("function", "raised"),
    [
        ("whisper_max.runtime.cache_folder.json.loads", TimeoutError),
        ("whisper_max.runtime.artifacts.read_private", TimeoutError),
        ("max.engine.read", TimeoutError),
        ("max.engine.read", RuntimeError),
    ],
)
def test_what_a_signal_handler_raises_removes_no_artifact(
    compiling, caplog, monkeypatch, function, raised
):
    """Python runs handlers behind a call of native code: the error is the program's."""
    assert ensure(compiling.key, compiling.cache).ready

    def time_is_over(*args, **kwargs):
        raise raised("time is over")

    with monkeypatch.context() as patch, pytest.raises(raised, match="^time is over$"):
        patch.setattr(function, time_is_over)
        artifacts.read(compiling.key, compiling.cache)
    assert artifacts.find(compiling.key, compiling.cache) is not None and not warnings(caplog)


def test_artifact_that_is_being_replaced_is_left_alone(compiling, caplog):
    cache = compiling.cache
    assert ensure(KEY, cache).ready
    mef = artifacts.find(KEY, cache)
    truncate(mef)
    with lock(cache / f"{KEY.stem}.lock"):
        assert artifacts.find(KEY, cache) is None
        assert mef.exists() and not warnings(caplog)


def test_list_and_clear(compiling):
    cache = compiling.cache
    listed = {
        name: replace(KEY, label=name, options=(("name", name),))
        for name in ("ready", "stale", "damaged", "failed", "working")
    }
    for name in ("ready", "stale", "damaged"):
        assert ensure(listed[name], cache).ready
    assert ensure(listed["failed"], cache, "exit_quietly").name == "failed"
    record = cache / f"{listed['stale'].stem}.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "fingerprint": {"engine": "max=26.6.0"}}))
    truncate(artifacts.find(listed["damaged"], cache))
    (cache / "notes.txt").write_text("the user's own")

    with lock(cache / f"{listed['working'].stem}.lock"):
        records = {record.label: record for record in cache_listing.list_artifacts(cache)}
        assert {label: record.state for label, record in records.items()} == {
            "ready": "ready",
            "stale": "stale",
            "damaged": "damaged",
            "failed": "failed",
            "working": "compiling",
        }
        ready = records["ready"]
        assert ready.key == listed["ready"].to_dict()
        assert ready.size > len(CONTENT) and ready.compile_seconds < 60
        assert abs(ready.created - time.time()) < 60
        assert abs(records["failed"].created - time.time()) < 60

        (cache / artifacts.ENGINE_CACHE / "object").write_bytes(bytes(1000))
        assert cache_listing.clear(cache) == sum(
            record.size for label, record in records.items() if label != "working"
        )
        # What a running compile uses stays.
        assert names(cache) == {"notes.txt", f"{listed['working'].stem}.lock"}
        assert (cache / artifacts.ENGINE_CACHE / "object").exists()

    assert cache_listing.clear(cache) == 1000
    assert [path.name for path in cache.iterdir()] == ["notes.txt"]
    assert cache_listing.list_artifacts(cache) == []


def test_list_and_clear_of_no_folder(compiling):
    cache = compiling.cache
    assert cache_listing.list_artifacts(cache) == []
    assert cache_listing.clear(cache) == 0


@pytest.mark.slow
def test_two_graphs_compiled_by_max_are_read_back_and_run(compiling):
    cache = compiling.cache
    key = ArtifactKey("two", "artifact_graphs:build", (("width", 8),), "cpu", "baseline")
    state = compilation.ensure(key, cache, "blocking", progress=False)
    assert state.ready, (cache / f"{key.stem}.log").read_text()

    from max.driver import CPU, Buffer
    from max.engine import InferenceSession

    generator = np.random.default_rng(0)
    weights = {
        name: generator.standard_normal(8, dtype=np.float32)
        for name in ("encoder.scale", "decoder.scale")
    }
    models = InferenceSession(devices=[CPU()]).init_all(
        artifacts.read(key, cache), weights_registry=weights
    )
    x = generator.standard_normal((3, 8), dtype=np.float32)
    for name in ("encoder", "decoder"):
        result = models[name].execute(Buffer.from_dlpack(x))[0].to_numpy()
        np.testing.assert_array_equal(result, x * weights[f"{name}.scale"])

    [record] = cache_listing.list_artifacts(cache)
    assert record.state == "ready" and record.compile_seconds > 0
    assert record.peak_memory_bytes > 100 << 20
