"""Ways to run a model on MAX, and upstream's modules in float64 to hold it against."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import whisper
from max.driver import Buffer
from torch import Tensor, nn
from whisper.model import TextDecoder, Whisper

import whisper_max
from whisper_max import demo, settings
from whisper_max.conditions import UnsupportedByMax
from whisper_max.runtime import compilation, storage
from whisper_max.runtime.engine import Engine


def compile_all(*precisions: str) -> Path:
    """Compile the graphs of precisions, several at a time; return the cache folder."""
    active = settings.active()
    wanted = dict.fromkeys(
        storage.arithmetic_of(precision, exact)
        for precision in precisions
        for exact in (True, False)
    )

    def compiled(arithmetic: storage.Arithmetic) -> None:
        keys = storage.keys_of(arithmetic, active.cpu_level)
        compilation.ensure_first(keys, active.cache_dir, "blocking", progress=False)

    with ThreadPoolExecutor() as pool:
        list(pool.map(compiled, wanted))
    return active.cache_dir


def run_tests(*tests: str | Path, **environment: str | None) -> str:
    """Runs tests of compat/ in a process of its own; what it printed. Fails unless they pass.

    environment : variables for it; None for one that it is not to have
    """
    done = run_python("-m", "pytest", "-p", "no:cacheprovider", *map(str, tests), **environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_python(
    *arguments: str, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Runs Python in compat/, with variables as for `run_tests`; standard error is with output.

    It finds `benchmarks` also where whisper_max is all that is installed of this tree.
    """
    here = Path(__file__).parent
    variables = {**os.environ, "PYTHONPATH": str(here.parent), **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=here,
        env={name: value for name, value in variables.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def note(request: pytest.FixtureRequest, name: str, text: str) -> None:
    """Records what a test found, under a name, where the matrix asks for it."""
    if request.config.pluginmanager.has_plugin("compat.matrix.recording"):
        request.getfixturevalue("keep_figure")(name, text)


device = "cpu"
"""Where the bundled checkpoint is loaded: what the option --device says, "cpu" in a rehearsal."""


@contextmanager
def rehearsal() -> Iterator[None]:
    """Models on the CPU run on the graphs and the session for GPUs, compiled for the CPU."""
    from max.driver import CPU

    from whisper_max.runtime import by_device
    from whisper_max.runtime.gpu.devices import MaxDevice

    rehearsing = MaxDevice(torch.device("cpu"), CPU(), "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_device, "_gpu_of", lambda device: rehearsing)
        yield


def assert_close(found: Tensor, expected: Tensor) -> None:
    """The same function of float32 numbers, computed in two ways."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def fail_from(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """MAX fails in the decoder's graph of this number, and in all after it."""
    execute, steps = Engine.execute, itertools.count()

    def failing(engine: Engine, graph: str, *operands: Buffer) -> list[Buffer]:
        if graph.startswith("decoder") and next(steps) >= step:
            raise UnsupportedByMax("out of memory, say")
        return execute(engine, graph, *operands)

    monkeypatch.setattr(Engine, "execute", failing)


def load_checkpoint() -> Whisper:
    """The bundled checkpoint, as a script loads it."""
    return whisper.load_model(str(demo.CHECKPOINT), device=device)


@contextmanager
def on_max(precision: str = "high") -> Iterator[None]:
    """Everything on MAX, or an error."""
    with whisper_max.patched(
        mode="strict", compile="blocking", precision=precision, device=_wanted_device()
    ):
        yield


@contextmanager
def with_fallback() -> Iterator[None]:
    """As users run it: what MAX cannot do, PyTorch does."""
    with whisper_max.patched(mode="auto", compile="blocking", device=_wanted_device()):
        yield


def _wanted_device() -> str | None:
    """For `patch`: a GPU has to be asked for."""
    return "cuda" if device == "cuda" else None


def on_pytorch(model: Whisper) -> Whisper:
    """A copy of a model, in upstream's own classes."""
    return whisper_max.restore(copy.deepcopy(model))


def exact(module: nn.Module) -> nn.Module:
    """A copy of upstream's encoder or decoder that computes in float64 throughout."""
    twin = copy.deepcopy(module).double()
    for part in twin.modules():
        if isinstance(part, nn.LayerNorm):
            part.__class__ = nn.LayerNorm  # upstream's own goes through float32
    return twin


@torch.no_grad()
def exact_logits(decoder: TextDecoder, tokens: Tensor, features: Tensor) -> Tensor:
    """Logits in float64, which upstream's forward would round to float32."""
    twin = exact(decoder)
    seen: list[Tensor] = []
    twin.ln.register_forward_hook(lambda module, inputs, output: seen.append(output))
    twin(tokens, features.double())
    return seen[0] @ twin.token_embedding.weight.T
