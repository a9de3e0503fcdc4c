"""The command that compiles the graphs for GPUs: what it asks for, and what it says of the result.

What it compiles is tried by running it: `make gpu-compile`.
"""

from __future__ import annotations

import json

import pytest

from benchmarks import command, gpu_compile
from whisper_max.dimensions_of import dimensions_of
from whisper_max.graphs.gpu import build
from whisper_max.runtime.compilation import ArtifactState


@pytest.fixture
def compiles(monkeypatch, tmp_path):
    """Keys that were asked for; of bfloat16 none can be compiled."""
    asked = []

    def ensure(key, cache, policy, **options):
        assert policy == "blocking"
        asked.append(key)
        if dict(key.options)["dtype"] == "bfloat16":
            return ArtifactState("failed", "it crashed (signal 6: Aborted)")
        return ArtifactState("ready")

    def find(key, cache):
        path = tmp_path / f"{len(asked)}.mef"
        path.with_suffix(".json").write_text(
            json.dumps({"compile_seconds": 61.4, "size": 3 << 20})
        )
        return path

    monkeypatch.setattr(gpu_compile.compilation, "ensure", ensure)
    monkeypatch.setattr(gpu_compile.artifacts, "find", find)
    return asked


def test_every_graph_for_every_architecture_and_dtype(compiles, capsys):
    assert command.main(["gpu-compile", "--dtypes", "float16,float32"]) == 0
    devices = [key.device for key in compiles]
    assert {device: devices.count(device) for device in devices} == {
        "cuda:sm_80": 4,
        "cuda:sm_90a": 4,
    }
    assert len({key.digest for key in compiles}) == 8
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert lines[1].split() == ["tiny", "encoder", "sm_80", "float16", "61", "3.0", "MiB"]


def test_a_failure_is_told_and_the_others_go_on(compiles, capsys):
    arguments = ["gpu-compile", "--architectures", "sm_80", "--dtypes", "bfloat16,float32"]
    assert command.main(arguments) == command.FAILED == 1
    assert len(compiles) == 4
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "crashed (signal 6" in line] == [
        line for line in lines if "bfloat16" in line
    ]
    assert len(lines) == 5


def test_the_model_decides_the_sizes(compiles):
    assert command.main(["gpu-compile", "--models", "large-v2", "--dtypes", "float16"]) == 0
    for key in compiles:
        options = dict(key.options)
        sizes = options.keys() & dimensions_of("large-v2").keys()
        assert len(sizes) in (5, 6)
        assert all(options[name] == dimensions_of("large-v2")[name] for name in sizes)


def test_it_knows_what_can_be_built():
    asked = gpu_compile.keys(("tiny",), ("sm_80",), ("float16",))
    graphs = [dict(key.options)["graphs"] for key, *_ in asked]
    assert graphs == [",".join(build.ENCODER), ",".join(build.DECODER)]
    assert build.DTYPES == command.GPU_DTYPES


@pytest.mark.parametrize("architecture", command.GPU_ARCHITECTURES)
def test_every_key_has_options_that_the_builder_takes(architecture):
    for key, *_ in gpu_compile.keys(("tiny", "turbo"), (architecture,), command.GPU_DTYPES[:1]):
        assert key.device == f"cuda:{architecture}"
        assert build.build(device="cpu", cpu_level=key.cpu_level, **dict(key.options))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "float64"}, "dtype is 'float64'; there are float16, bfloat16, float32"),
        ({"graphs": "step,decoder"}, "no graph 'decoder' beside cross_kv, prefill, greedy_step"),
        ({"graphs": "encoder,step"}, "no graph 'step' beside encoder"),
        ({"n_text_head": 5}, "n_text_state is 384 with 5 heads; heads of 64 are needed"),
    ],
)
def test_what_cannot_be_built_is_refused(changed, message):
    sizes = {
        name: size
        for name, size in dimensions_of("tiny").items()
        if name == "n_audio_ctx" or not name.startswith(("n_audio", "n_mels"))
    }
    options = {"dtype": "float16", "graphs": "step", "ranked": 6, **sizes}
    with pytest.raises(ValueError, match=message):
        build.build(device="cpu", cpu_level="baseline", **{**options, **changed})
