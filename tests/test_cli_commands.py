"""`whisper-max compile`, `cache`, `demo` and `bench`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import whisper
from max.driver import CPU

import whisper_max
from whisper_max import demo, versions
from whisper_max.cli import bench, findings, main
from whisper_max.cli.sizes import readable
from whisper_max.conditions import UnsupportedByMax
from whisper_max.runtime import artifacts, cache_listing, compilation, hardware, storage
from whisper_max.runtime.gpu import devices
from whisper_max.runtime.gpu.devices import MaxDevice
from whisper_max.settings import active

from compile_tools import KEY, ensure


# compile


@pytest.fixture
def compiled(empty_cache, monkeypatch) -> list[str]:
    """Labels of what compile() has compiled; a file of two bytes each."""
    labels: list[str] = []

    def compile_at_once(key, folder, policy, *, progress, force):
        assert (policy, force) == ("blocking", True)
        labels.append(key.label)
        return compilation.ArtifactState("ready")

    def find(key, folder):
        empty_cache.mkdir(exist_ok=True)
        file = empty_cache / f"{key.label}.mef"
        file.write_bytes(b"ab")
        return file

    monkeypatch.setattr(compilation, "ensure", compile_at_once)
    monkeypatch.setattr(artifacts, "find", find)
    monkeypatch.setattr(hardware, "_detected_level", lambda: "avx512")
    return labels


@pytest.mark.parametrize(
    ("arguments", "labels"),
    [
        ([], ["float16-float32"]),
        (["tiny.en", "turbo", "large-v3", str(demo.CHECKPOINT)], ["float16-float32"]),
        (["base", "--precision", "highest"], ["float16-float32"]),
        (["base", "--precision", "medium"], ["float16-float16"]),
        (["base", "--precision", "int8"], ["int8-float16"]),
    ],
)
def test_one_artifact_serves_models_of_every_size(compiled, empty_cache, capsys, arguments, labels):
    assert main(["compile", *arguments]) == 0
    files = [empty_cache / f"whisper-{label}-avx512.mef" for label in labels]
    assert set(compiled) == {file.stem for file in files}
    assert capsys.readouterr().out == "".join(
        f"ready: {file} (0.0 KiB), for models of every size\n" for file in files
    )


def test_weights_that_float16_does_not_hold_get_an_artifact_of_their_own(compiled, tmp_path):
    model = whisper.load_model(str(demo.CHECKPOINT), device="cpu")
    whisper_max.compile(model)
    assert compiled == ["whisper-float16-float32-avx512"]

    compiled.clear()
    with torch.no_grad():
        model.decoder.token_embedding.weight[0, 0] = 1 / 3
    whisper_max.compile(model)
    both = ["whisper-float16-float32-avx512", "whisper-float32-float32-avx512"]
    assert compiled == both  # the encoder's weights still are

    compiled.clear()
    file = tmp_path / "tuned.pt"
    torch.save({"dims": vars(model.dims), "model_state_dict": model.state_dict()}, file)
    whisper_max.compile(file)
    assert compiled == both

    compiled.clear()
    whisper_max.compile(model, precision="int8")
    assert compiled == ["whisper-int8-float16-avx512"]


def test_a_model_of_a_gpu_needs_two_artifacts_of_its_own(compiled, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    def found(device):
        assert device == torch.device("cuda", 1)
        return MaxDevice(device, CPU(), "cuda:sm_80")

    monkeypatch.setattr(devices, "cuda_device", found)
    assert main(["compile", "--device", "cuda", "tiny", "turbo"]) == 0
    parts = ["encoder-384x4", "decoder-384x4", "encoder-1280x32", "decoder-1280x4"]
    labels = [f"gpu-{part}-float16" for part in parts]
    assert compiled == labels
    told = capsys.readouterr().out.splitlines()
    assert [line.rpartition(", ")[2] for line in told] == [
        *["for tiny on this GPU"] * 2, *["for turbo on this GPU"] * 2
    ]


def test_compile_says_why_it_cannot(compiled, monkeypatch, capsys):
    assert main(["compile", "--device", "cuda"]) == 2
    assert "have the sizes of one model, which has to be named" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["compile", "--device", "cuda", "tiny"]) == 2
    assert capsys.readouterr().err == "whisper-max: PyTorch finds no NVIDIA GPU\n"

    failed = compilation.ArtifactState("failed", "compiling failed: it was killed")
    monkeypatch.setattr(compilation, "ensure", lambda *_, **__: failed)
    assert main(["compile", "tiny"]) == 2
    assert capsys.readouterr().err == "whisper-max: compiling failed: it was killed\n"

    without_max = {**versions.installed(), "max": "not installed"}
    monkeypatch.setattr(versions, "installed", lambda: without_max)
    with pytest.raises(UnsupportedByMax, match="MAX is not installed: pip install"):
        whisper_max.compile("tiny")


def test_a_model_of_another_build_is_refused(compiled):
    model = whisper.load_model(str(demo.CHECKPOINT), device="cpu")
    model.dims.n_text_head *= 2
    with pytest.raises(UnsupportedByMax, match="its head_dim is 32"):
        whisper_max.compile(model)
    with pytest.raises(TypeError, match="not list"):
        whisper_max.compile([])
    assert compiled == []


# cache


def test_cache_is_located_listed_and_cleared(compiling, monkeypatch, capsys):
    monkeypatch.setenv("WHISPER_MAX_CACHE_DIR", str(compiling.cache))
    assert main(["cache", "list"]) == 0
    assert capsys.readouterr().out == f"nothing in {compiling.cache}\n"
    assert main(["cache", "path"]) == 0
    assert capsys.readouterr().out == f"{compiling.cache}\n"

    assert ensure(KEY, compiling.cache).ready
    assert main(["cache", "list"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    columns = ["graphs", "precision", "state", "size", "made", "took", "memory"]
    assert header.split() == columns
    assert row.split()[:2] == ["tiny-high", "ready"]  # made by another builder

    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out.startswith("freed ")
    assert main(["cache", "list"]) == 0
    assert capsys.readouterr().out.startswith("nothing in ")


def test_what_is_stale_is_cleared_and_what_is_ready_stays(compiling, monkeypatch, capsys):
    monkeypatch.setenv("WHISPER_MAX_CACHE_DIR", str(compiling.cache))
    assert ensure(KEY, compiling.cache).ready
    assert main(["cache", "clear", "--stale"]) == 0
    assert main(["cache", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["tiny-high", "ready"]

    monkeypatch.setattr(cache_listing, "_fingerprint", lambda: {"cpu": "another"})
    (finding,) = (f for f in findings.of_the_settings(active()) if f.topic == "cache")
    assert (finding.state, finding.remedy) == ("note", "whisper-max cache clear --stale")
    assert main(["cache", "clear", "--stale"]) == 0
    assert main(["cache", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("nothing in ")
    (finding,) = (f for f in findings.of_the_settings(active()) if f.topic == "cache")
    assert (finding.state, finding.remedy) == ("ok", "")


@pytest.mark.parametrize(
    ("precision", "exact", "level", "served"),
    [
        ("high", True, "avx512", ["high", "highest"]),
        ("highest", False, "baseline", ["high", "highest"]),
        ("high", True, "amx", ["high"]),
        ("medium", True, "avx512", ["medium"]),
        ("int8", True, "amx", ["int8"]),
    ],
)
def test_precisions_that_an_artifact_serves(precision, exact, level, served):
    arithmetic = storage.arithmetic_of(precision, exact)
    options = {"weight": arithmetic.weight, "cross": arithmetic.cross}
    assert storage.precisions_of(options, level) == served


def test_a_cache_folder_that_others_may_write_to_is_refused_in_one_line(empty_cache, capsys):
    empty_cache.mkdir()
    empty_cache.chmod(0o777)
    for action in ("list", "clear"):
        assert main(["cache", action]) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        assert "can be written to by other users" in shown


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 KiB"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3072.0 GiB")],
)
def test_sizes_for_people(size, text):
    assert readable(size) == text


# demo, bench


def test_demo_is_the_demonstration(monkeypatch):
    monkeypatch.setattr(demo, "main", lambda: 17)
    assert main(["demo"]) == 17
    assert main(["demo", "--loud"]) == 2


def test_bench_runs_the_harness_of_the_source_tree(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(subprocess, "call", lambda *args, **options: calls.append((args, options)))
    monkeypatch.setattr(bench, "SOURCE_TREE", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__main__.py").touch()
    main(["bench", "--quick"])
    command = [sys.executable, "-m", "benchmarks", "--quick"]
    assert calls == [((command,), {"cwd": tmp_path})]


def test_bench_without_a_source_tree_says_where_it_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "SOURCE_TREE", tmp_path)
    assert main(["bench"]) == 2
    assert "get the source tree of whisper_max, and run `make bench`" in capsys.readouterr().err
