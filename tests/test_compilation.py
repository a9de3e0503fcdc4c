"""The three policies: who compiles, when, in which process, and who waits for it."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from whisper_max.runtime import artifacts, compilation, compile_worker, limits

from compile_tools import KEY, ensure, forget_this_process, names, wait_for
from fake_compilers import CONTENT

TESTS = Path(__file__).resolve().parent


def test_cached_never_compiles(compiling):
    cache, key, count = compiling.cache, compiling.key, compiling.count
    state = ensure(key, cache, policy="cached")
    assert (state.name, state.ready, count()) == ("missing", False, 0)
    assert "tiny-high" in state.reason
    assert not cache.exists()


def test_blocking_compiles_once_and_leaves_only_the_artifact(compiling, monkeypatch):
    cache, key, count = compiling.cache, compiling.key, compiling.count
    assert ensure(key, cache).ready
    assert names(cache) == {f"{key.stem}.mef", f"{key.stem}.json"}
    assert artifacts.find(key, cache).read_bytes() == CONTENT

    record = json.loads((cache / f"{key.stem}.json").read_text())
    assert record["key"] == key.to_dict() and record["digest"] == key.digest
    assert record["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert record["size"] == len(CONTENT)
    assert 0 <= record["compile_seconds"] < 60 and record["peak_memory_bytes"] > 1 << 20

    assert ensure(key, cache).ready
    forget_this_process()
    assert ensure(key, cache).ready
    assert ensure(key, cache, policy="cached").ready
    assert count() == 1


def test_background_returns_at_once_and_compiles_once_per_process(compiling):
    cache, key, count = compiling.cache, compiling.key, compiling.count
    state = ensure(key, cache, "write_slowly", policy="background")
    assert state.name == "compiling" and not state.ready
    for _ in range(5):
        assert ensure(key, cache, "write_slowly", policy="background").name == "compiling"
    assert compilation.state(key, cache).name == "compiling"
    wait_for(lambda: compilation.state(key, cache).ready)
    assert count() == 1


def test_blocking_waits_for_the_compile_in_the_background(compiling):
    cache, key, count = compiling.cache, compiling.key, compiling.count
    assert ensure(key, cache, "write_slowly", policy="background").name == "compiling"
    assert ensure(key, cache, policy="blocking").ready
    assert count() == 1


@pytest.mark.parametrize("earlier", ["write_slowly", "write"])
def test_a_compile_into_another_folder_is_another(compiling, tmp_path, earlier):
    """Whoever waited for it would find nothing in this one, and no failure either."""
    other, key, count = tmp_path / "other", compiling.key, compiling.count
    policy = "background" if earlier == "write_slowly" else "blocking"
    ensure(key, other, earlier, policy=policy)
    assert compilation.state(key, compiling.cache).name == "missing"
    assert ensure(key, compiling.cache).ready
    wait_for(lambda: compilation.state(key, other).ready)
    assert count() == 2


def test_state_starts_nothing(compiling):
    cache, key, count = compiling.cache, compiling.key, compiling.count
    assert compilation.state(key, cache).name == "missing"
    assert not cache.exists() and count() == 0


def test_unknown_policy(compiling):
    cache = compiling.cache
    with pytest.raises(ValueError, match="'later'"):
        ensure(KEY, cache, policy="later")


def in_another_process(key, cache, compiler, policy):
    """Start a program without a `__main__` guard that asks for the artifact and ends."""
    program = f"""
        import sys
        sys.path[:0] = {[str(TESTS.parent), str(TESTS)]!r}
        print("this program runs")
        from whisper_max.runtime import compilation
        from whisper_max.runtime.artifact_key import ArtifactKey
        key = ArtifactKey.from_dict({key.to_dict()!r})
        state = compilation.ensure(
            key, {str(cache)!r}, {policy!r}, compiler="fake_compilers:{compiler}", progress=False
        )
        print(state.name)
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )


def test_two_processes_at_once_compile_once(compiling):
    cache, key, count = compiling.cache, compiling.key, compiling.count
    programs = [in_another_process(key, cache, "write_slowly", "blocking") for _ in range(2)]
    assert [program.communicate()[0] for program in programs] == ["this program runs\nready\n"] * 2
    assert count() == 1
    assert names(cache) == {f"{key.stem}.mef", f"{key.stem}.json"}


def test_background_compile_outlives_the_program_and_is_seen_by_others(compiling):
    cache, key, count = compiling.cache, compiling.key, compiling.count
    program = in_another_process(key, cache, "write_slowly", "background")
    assert program.communicate()[0] == "this program runs\ncompiling\n"
    wait_for(lambda: compilation.state(key, cache).name == "compiling")
    wait_for(lambda: compilation.state(key, cache).ready)
    assert count() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_compiling_process_is_on_its_own(compiling, monkeypatch, tmp_path):
    cache = compiling.cache
    decoy = tmp_path / "decoy"
    decoy.mkdir()
    (decoy / "json.py").write_text("raise SystemExit('a module of the working folder was taken')")
    monkeypatch.chdir(decoy)
    monkeypatch.setenv("PYTHONPATH", str(decoy))
    ours = os.open(tmp_path / "ours", os.O_CREAT | os.O_RDWR)
    os.set_inheritable(ours, True)
    try:
        assert ensure(KEY, cache, "describe_process", policy="background").name == "compiling"
        wait_for(lambda: compilation.state(KEY, cache).ready)
    finally:
        os.close(ours)

    process = json.loads(artifacts.find(KEY, cache).read_text())
    assert process["descriptors"]["0"] == "/dev/null"
    assert str(tmp_path / "ours") not in process["descriptors"].values()
    assert process["descriptors"]["1"].startswith(f"{cache}/{KEY.stem}.log")
    if limits.cpu_quota() is None:  # with one it pauses instead
        assert process["niceness"] == 19
        assert process["autogroup"] in (compile_worker.AUTOGROUP_NICENESS, None)
        assert process["scheduler"] == os.SCHED_IDLE
    assert process["oom_score_adj"] == "1000"
    # Neither dies with this process's terminal, nor the supervisor with the compiler's group.
    assert len({os.getsid(0), process["session"], process["supervisor_session"]}) == 3
    assert process["cwd"] == str(cache / f"{KEY.stem}.work")
    assert process["main"] is None
    assert process["package"] == sys.modules["whisper_max"].__file__
    environment = process["environment"]
    assert environment["MODULAR_TELEMETRY_ENABLED"] == "0"
    assert environment["MODULAR_CACHE_DIR"] == str(cache / "modular")
    assert environment["TMPDIR"].startswith(str(cache / "modular" / "kernels-"))


@pytest.mark.skipif(
    limits.cpu_quota() is not None or not Path("/proc/self/autogroup").exists(),
    reason="it pauses for a quota, or sessions are not weighed against each other",
)
def test_a_compile_that_waits_too_long_gets_a_share(compiling, monkeypatch):
    """Beside a program that leaves it nothing."""
    cache = compiling.cache
    monkeypatch.setattr(compilation, "PATIENCE_SECONDS", 1.0)
    ensure(KEY, cache, "wait_for_a_share", policy="background")
    wait_for(lambda: compilation.state(KEY, cache).ready)
    first, later = json.loads(artifacts.find(KEY, cache).read_text())
    assert (first, later) == (compile_worker.AUTOGROUP_NICENESS, 0)


def test_blocking_compile_has_normal_priority(compiling):
    cache = compiling.cache
    assert ensure(KEY, cache, "describe_process").ready
    assert json.loads(artifacts.find(KEY, cache).read_text())["niceness"] == os.nice(0)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_goes_by_the_last_compile(compiling, capsys, monkeypatch, terminal):
    cache = compiling.cache
    first = replace(KEY, options=(("n_mels", 128),))
    assert ensure(first, cache).ready
    record = cache / f"{first.stem}.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "compile_seconds": 42.0}))
    assert capsys.readouterr().err == ""

    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert ensure(KEY, cache, "write_slowly", progress=True).ready
    shown = capsys.readouterr().err
    assert "compiling tiny-high, once" in shown
    if terminal:
        assert shown.count("of about 42 s") > 2
    else:
        # Two lines and no bar: a log keeps all that is written to it.
        first, last = shown.splitlines()
        assert first.endswith(": about 42 s")
        assert re.fullmatch(r"compiling tiny-high took \d+ s", last)


def test_no_compile_without_memory_disk_or_interpreter(compiling, monkeypatch):
    cache, key, count = compiling.cache, compiling.key, compiling.count
    with monkeypatch.context() as patch:
        patch.setattr(compilation, "available_memory", lambda: 1 << 30)
        state = ensure(key, cache)
        assert (state.name, "needs 3 GiB of memory, 1024 MiB" in state.reason) == ("missing", True)
    with monkeypatch.context() as patch:
        patch.setattr(compilation, "NEEDED_DISK", 1 << 60)
        assert str(cache) in ensure(key, cache).reason
    with monkeypatch.context() as patch:
        patch.setattr(sys, "frozen", True, raising=False)
        assert "Python interpreter" in ensure(key, cache).reason
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(cache / "no-python"))
        assert "cannot start" in ensure(key, cache).reason
    assert count() == 0
    with monkeypatch.context() as patch:
        patch.setattr(compilation, "available_memory", lambda: None)  # unknown is no obstacle
        assert ensure(key, cache).ready


BEATS = """
import time
for _ in range(20):
    print(time.monotonic(), flush=True)
    time.sleep(0.01)
"""


@pytest.mark.parametrize("quota_is_used_up", [True, False])
def test_a_compile_pauses_while_the_containers_quota_is_used_up(monkeypatch, quota_is_used_up):
    times = itertools.count() if quota_is_used_up else itertools.repeat(7)
    monkeypatch.setattr(compile_worker.limits, "times_throttled", lambda: next(times))
    monkeypatch.setattr(compile_worker, "LOOK_SECONDS", 0.08)
    monkeypatch.setattr(compile_worker, "PAUSE_SECONDS", 0.5)
    child = subprocess.Popen(
        [sys.executable, "-c", BEATS], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert compile_worker._wait_with_pauses(child, 30.0) == 0
    beats = [float(line) for line in child.communicate()[0].splitlines()]
    longest = max(after - before for before, after in zip(beats, beats[1:]))
    assert (longest > 0.4) is quota_is_used_up


def test_pauses_do_not_lift_the_limit(monkeypatch):
    times = itertools.count()
    monkeypatch.setattr(compile_worker.limits, "times_throttled", lambda: next(times))
    monkeypatch.setattr(compile_worker, "PAUSE_SECONDS", 0.1)
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            compile_worker._wait_with_pauses(child, 0.5)
    finally:
        child.kill()
        child.wait()
