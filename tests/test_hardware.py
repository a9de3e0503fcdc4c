"""CPU levels from cpuinfo texts, limits from cgroup folders, and what artifacts depend on."""

import json
import math
import os
import platform
import sys

import pytest

from whisper_max.runtime import fingerprint, hardware, limits

SKYLAKE_SERVER = {"avx2", "avx512f", "avx512bw", "avx512vl", "avx512dq"}
CASCADE_LAKE = SKYLAKE_SERVER | {"avx512_vnni"}
SAPPHIRE_RAPIDS = CASCADE_LAKE | {"amx_tile", "amx_bf16", "amx_int8"}


@pytest.mark.parametrize(
    "flags, tiles_granted, level",
    [
        (set(), False, "baseline"),
        ({"avx2", "fma"}, False, "baseline"),
        (SKYLAKE_SERVER - {"avx512dq"}, False, "baseline"),
        (SKYLAKE_SERVER, False, "avx512"),
        (SAPPHIRE_RAPIDS, True, "amx"),
        (SAPPHIRE_RAPIDS, False, "avx512"),  # an old Linux, or a sandbox that forbids the request
        (SAPPHIRE_RAPIDS - {"amx_bf16"}, True, "avx512"),
        ({"amx_tile", "amx_bf16"}, True, "baseline"),  # a mask that hides AVX-512
    ],
)
def test_level_of_flags(flags, tiles_granted, level):
    assert hardware.level_of(flags, tiles_granted) == level


@pytest.mark.parametrize(
    "detected, limit, level",
    [
        ("amx", None, "amx"),
        ("amx", "avx512", "avx512"),
        ("amx", "baseline", "baseline"),
        ("avx512", "amx", "avx512"),
        ("baseline", "amx", "baseline"),
    ],
)
def test_limit_lowers_and_never_raises(monkeypatch, detected, limit, level):
    monkeypatch.setattr(hardware, "_detected_level", lambda: detected)
    assert hardware.cpu_level(limit) == level


def test_unknown_limit_names_value_and_choices():
    with pytest.raises(ValueError, match="'avx1024'.*'baseline', 'avx512', 'amx'"):
        hardware.cpu_level("avx1024")


@pytest.mark.parametrize("system, machine", [("darwin", "arm64"), ("linux", "aarch64")])
def test_other_systems_are_baseline(monkeypatch, system, machine):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset(SAPPHIRE_RAPIDS))
    assert hardware._detected_level.__wrapped__() == "baseline"


def test_vnni_needs_the_avx512_level(monkeypatch):
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset(CASCADE_LAKE))
    monkeypatch.setattr(hardware, "_detected_level", lambda: "avx512")
    assert hardware.has_vnni()
    monkeypatch.setattr(hardware, "_detected_level", lambda: "baseline")
    assert not hardware.has_vnni()
    monkeypatch.setattr(hardware, "_detected_level", lambda: "avx512")
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset(SKYLAKE_SERVER))
    assert not hardware.has_vnni()


def test_flags_are_those_of_every_core():
    x86 = "processor : 0\nflags\t\t: fpu avx2 avx512f\n\nprocessor : 1\nflags\t\t: fpu avx2\n"
    assert hardware.parse_flags(x86) == {"fpu", "avx2"}
    assert hardware.parse_flags("Features\t: fp asimd bf16\n") == {"fp", "asimd", "bf16"}
    assert hardware.parse_flags("") == frozenset()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_detection_on_this_machine_agrees_with_cpuinfo():
    words = set(hardware.CPUINFO.read_text().split())
    level = hardware.cpu_level()
    if platform.machine() != "x86_64" or "avx512dq" not in words:
        assert level == "baseline"
    else:
        assert level == ("amx" if "amx_bf16" in words and hardware._request_tiles() else "avx512")
    if "amx_tile" not in words:
        assert not hardware._request_tiles()


def test_description_is_jsonable_and_complete():
    description = json.loads(json.dumps(hardware.describe()))
    assert description["cpu_level"] in hardware.CPU_LEVELS
    assert description["cpu_model"]
    assert 1 <= description["threads"] <= description["cpus"]
    assert description["memory_available_mib"] is None or description["memory_available_mib"] > 0


def write_tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


V2 = {"proc/self/cgroup": "0::/pod/container\n"}
V1 = {"proc/self/cgroup": "5:memory:/pod\n4:cpu,cpuacct:/pod\n1:name=systemd:/\n0::/\n"}


@pytest.mark.parametrize(
    "quotas, expected",
    [
        ({}, None),
        ({"pod/container": "max 100000\n"}, None),
        ({"pod/container": "150000 100000\n"}, 1.5),
        ({"pod/container": "max 100000", "pod": "50000 100000"}, 0.5),  # the tightest of all above
        ({".": "400000 100000\n"}, 4.0),  # in a container the mount may be all there is
    ],
)
def test_cpu_quota(tmp_path, quotas, expected):
    write_tree(tmp_path, V2)
    write_tree(tmp_path / "cgroup", {f"{folder}/cpu.max": text for folder, text in quotas.items()})
    assert limits.cpu_quota(tmp_path / "proc", tmp_path / "cgroup") == expected


@pytest.mark.parametrize("quota, expected", [("-1", None), ("250000", 2.5)])
def test_cpu_quota_in_cgroup_v1(tmp_path, quota, expected):
    pod = "cgroup/cpu/pod"
    files = {f"{pod}/cpu.cfs_quota_us": quota, f"{pod}/cpu.cfs_period_us": "100000\n"}
    write_tree(tmp_path, {**V1, **files})
    assert limits.cpu_quota(tmp_path / "proc", tmp_path / "cgroup") == expected


@pytest.mark.parametrize("tree, folder", [(V2, "cgroup"), (V1, "cgroup/cpu")])
def test_times_throttled_are_those_of_all_groups_above(tmp_path, tree, folder):
    path = tree["proc/self/cgroup"].splitlines()[-1 if tree is V2 else 1].split(":")[2]
    write_tree(tmp_path, tree)
    write_tree(tmp_path / folder, {f"{path.strip('/')}/cpu.stat": "nr_periods 9\nnr_throttled 4\n"})
    write_tree(tmp_path / folder, {"cpu.stat": "nr_throttled 3\nthrottled_usec 80\n"})
    assert limits.times_throttled(tmp_path / "proc", tmp_path / "cgroup") == 7


def test_nothing_is_throttled_without_cgroups(tmp_path):
    assert limits.times_throttled(tmp_path / "proc", tmp_path / "cgroup") == 0


def test_cpu_quota_without_cgroups(tmp_path):
    assert limits.cpu_quota(tmp_path / "proc", tmp_path / "cgroup") is None


def test_threads_take_the_smallest_limit(monkeypatch):
    monkeypatch.setattr(limits, "affinity", lambda: 8)
    for quota, cap, expected in [(None, 32, 8), (2.1, 32, 3), (0.5, 32, 1), (None, 4, 4)]:
        monkeypatch.setattr(limits, "cpu_quota", lambda quota=quota: quota)
        assert limits.threads(cap) == expected
    monkeypatch.setattr(limits, "affinity", lambda: 256)
    assert limits.threads() == limits.MAX_THREADS


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_threads_follow_the_affinity():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert limits.threads() == 1
    finally:
        os.sched_setaffinity(0, before)
    quota = limits.cpu_quota() or math.inf
    assert limits.threads() == max(1, min(len(before), math.ceil(min(quota, limits.MAX_THREADS))))


def test_available_memory_is_the_tighter_of_machine_and_container(tmp_path):
    meminfo = "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n"
    write_tree(tmp_path, {**V2, "proc/meminfo": meminfo})
    folders = (tmp_path / "proc", tmp_path / "cgroup")
    assert limits.available_memory(*folders) == 8000 * 1024

    container = tmp_path / "cgroup" / "pod" / "container"
    write_tree(container, {"memory.max": "max\n", "memory.current": "1000\n"})
    assert limits.available_memory(*folders) == 8000 * 1024

    cached = "anon 4000\ninactive_file 2000\n"  # given up on demand
    write_tree(container, {"memory.max": "10000", "memory.current": "7000", "memory.stat": cached})
    assert limits.available_memory(*folders) == 10000 - 7000 + 2000


def test_available_memory_in_cgroup_v1(tmp_path):
    pod = "cgroup/memory/pod"
    write_tree(
        tmp_path,
        {
            **V1,
            "proc/meminfo": "MemAvailable: 8000 kB\n",
            f"{pod}/memory.limit_in_bytes": "3000",
            f"{pod}/memory.usage_in_bytes": "3500",
        },
    )
    assert limits.available_memory(tmp_path / "proc", tmp_path / "cgroup") == 0


def test_available_memory_unknown_without_proc(tmp_path):
    assert limits.available_memory(tmp_path / "proc", tmp_path / "cgroup") is None


def test_fingerprint_names_engine_and_cpu():
    current = json.loads(json.dumps(fingerprint.fingerprint()))
    assert set(current) == {"whisper_max", "sources", "engine", "cpu"}
    assert "max=26.7" in current["engine"]
    assert current["cpu"].startswith(platform.machine())


def test_sources_digest_follows_names_and_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "PACKAGE", tmp_path)
    write_tree(tmp_path, {"graphs/encoder.py": "a", "kernels/linear.mojo": "b"})
    graphs, kernels = fingerprint.graphs_digest(), fingerprint.kernels_digest()

    write_tree(tmp_path, {"graphs/notes.txt": "no source", "kernels/__pycache__/x.pyc": ""})
    assert (fingerprint.graphs_digest(), fingerprint.kernels_digest()) == (graphs, kernels)

    write_tree(tmp_path, {"kernels/linear.mojo": "c"})
    assert fingerprint.graphs_digest() == graphs
    assert fingerprint.kernels_digest() != kernels

    (tmp_path / "graphs" / "encoder.py").rename(tmp_path / "graphs" / "decoder.py")
    assert fingerprint.graphs_digest() != graphs


def test_cpu_target_follows_instruction_sets_only(monkeypatch):
    def target(*flags):
        monkeypatch.setattr(fingerprint, "cpu_flags", lambda: frozenset(flags))
        return fingerprint.cpu_target()

    assert target("avx2", "fma") == target("avx2", "fma", "md_clear", "ibrs")
    assert target("avx2", "fma") != target("avx2", "fma", "avx512f")
