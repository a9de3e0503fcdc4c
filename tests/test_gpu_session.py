"""What goes on around the graphs for GPUs, with stand-ins for MAX's models and PyTorch's streams.

The graphs themselves, and whole transcriptions with them on a CPU, are compat/'s.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections import Counter, deque
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from max import driver
from max import engine as max_engine
from max.driver import CPU, Buffer
from max.dtype import DType

from whisper_max import conditions
from whisper_max.conditions import (
    UnsupportedByMax, context_reasons, device_reasons, tensor_reasons
)
from whisper_max.graphs.gpu.specification import TextSizes
from whisper_max.graphs.specification import MASKED
from whisper_max.runtime import tensors
from whisper_max.runtime.artifact_key import ArtifactKey
from whisper_max.runtime.compile_worker import compile_to_mef
from whisper_max.runtime.gpu import engine as gpu_engine
from whisper_max.runtime.gpu import devices
from whisper_max.runtime.gpu.engine import (
    MOST_BEAMS,
    RANKED,
    GpuEngine,
    Workspace,
    WorkspacePool,
    Weights,
)
from whisper_max.runtime.gpu.devices import CudaDevice, MaxDevice
from whisper_max.runtime.gpu.session import GpuSelection, GpuSession
from whisper_max.runtime.gpu.state import GpuReady
from whisper_max.runtime.tensors import to_buffer

from isolation import raise_in

SIZES = TextSizes(
    n_audio_ctx=6, n_vocab=9, n_text_ctx=4, n_text_state=64, n_text_head=1, n_text_layer=2
)
RULES = [[0, 9, 9, 9, 0]] * 2


def zeros(rows: int, ranked: int) -> list[Buffer]:
    """Results of a step: log probabilities and tokens."""
    return [Buffer.zeros((rows, ranked), kind, CPU()) for kind in (DType.float32, DType.int32)]


class Step:
    """Stands in for the loaded step: notes what is done with it, and what it would read."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.fails: dict[str, str] = {}
        self.results = zeros(2, RANKED)

    def _note(self, name: str, key: int | None, operands: tuple) -> None:
        # Of cross_kv's, which are other ones, only that there was a call is looked at.
        tokens, position, parents = (operand.to_numpy().copy() for operand in operands[:3])
        addresses = [operand._data_ptr() for operand in operands]
        self.calls.append((name, key, tokens, position, parents, addresses))
        if name in self.fails:
            raise_in("max.engine.api", RuntimeError(self.fails[name]))

    def execute(self, *operands: Buffer) -> list[Buffer]:
        self._note("execute", None, operands)
        return self.results

    def capture(self, key: int, *operands: Buffer) -> list[Buffer]:
        self._note("capture", key, operands)
        return self.results

    def replay(self, key: int, *operands: Buffer) -> None:
        self._note("replay", key, operands)
        self.results[1].inplace_copy_from(Buffer.from_numpy(np.full((2, RANKED), 7, np.int32)))

    def _await_device_graphs(self) -> None:
        if "await" in self.fails:
            raise_in("max.engine.api", RuntimeError(self.fails["await"]))

    def release_captured_graph(self, key: int) -> None:
        self.calls.append(("release", key))

    @property
    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


class Capturing(MaxDevice):
    """A device that captures, on the CPU."""

    captures = True


@pytest.fixture
def engine() -> GpuEngine:
    made = GpuEngine.__new__(GpuEngine)
    made.max_device = Capturing(torch.device("cpu"), CPU(), "cpu")
    made.graphs = {name: Step() for name in ("decoder_step", "decoder_greedy_step", "cross_kv")}
    made.workspaces = WorkspacePool()
    made.failed_captures, made.abandoned = Counter(), deque()
    return made


@pytest.fixture
def workspace(engine) -> Workspace:
    return Workspace(engine, SIZES, DType.float32, 1, 2)


WEIGHTS = Weights(decoder=[], cross_kv=[])


def step(
    workspace: Workspace, position: int, parents: list[int], weights: Weights = WEIGHTS
) -> tuple[np.ndarray, np.ndarray]:
    return workspace.step([3, 4], position, parents, RULES, weights)


def test_a_step_is_captured_once_and_replayed_from_the_same_memory(engine, workspace):
    calls = engine.graphs["decoder_step"].calls
    _, best = step(workspace, 2, [1, 1])
    step(workspace, 3, [1, 0])
    assert engine.graphs["decoder_step"].names == ["execute", "capture", "replay", "replay"]
    # What only prepares the capture must not reorder beams, which the replay does once more.
    parents = [call[4].tolist() for call in calls]
    assert parents == [[[0, 1]], [[0, 1]], [[1, 1]], [[1, 0]]]
    assert [call[3].tolist() for call in calls] == [[2], [2], [2], [3]]
    assert all(call[2].tolist() == [[[3], [4]]] for call in calls)
    assert all(call[5] == calls[0][5] for call in calls)
    assert len({call[1] for call in calls[1:]}) == 1
    assert best.tolist() == [[7] * RANKED] * 2


def test_a_captured_step_is_not_replayed_for_other_weights(engine, workspace):
    """Two models of one size share the engine, and its workspaces."""
    others = Weights(decoder=[], cross_kv=[])
    for weights in (WEIGHTS, WEIGHTS, others, others):
        step(workspace, 0, [0, 1], weights)
    captured = ["execute", "capture", "replay", "replay"]
    assert engine.graphs["decoder_step"].names == [*captured, "release", *captured]
    # Nor for weights that are new in the place of those that are gone.
    del others, weights
    gc.collect()
    step(workspace, 0, [0, 1], Weights(decoder=[], cross_kv=[]))
    assert engine.graphs["decoder_step"].names[-4:] == ["release", *captured[:3]]


def test_a_captured_step_is_not_replayed_for_another_graph(engine, workspace):
    greedy, beams = engine.graphs["decoder_greedy_step"], engine.graphs["decoder_step"]
    workspace.step([3, 4], 0, [0, 1], RULES, WEIGHTS, "decoder_greedy_step")
    step(workspace, 1, [0, 1])
    assert greedy.names == ["execute", "capture", "replay", "release"]
    assert beams.names == ["execute", "capture", "replay"]


def test_two_rooms_have_captures_of_their_own(engine, workspace):
    other = Workspace(engine, SIZES, DType.float32, 1, 2)
    step(workspace, 0, [0, 1])
    step(other, 0, [0, 1])
    keys = [call[1] for call in engine.graphs["decoder_step"].calls if call[0] == "replay"]
    assert len(set(keys)) == 2


@pytest.mark.parametrize("failing", ["capture", "await"])
def test_without_capture_a_step_is_executed(engine, workspace, caplog, failing):
    model = engine.graphs["decoder_step"]
    model.fails[failing] = "operation not permitted when stream is capturing"
    with caplog.at_level(logging.WARNING, "whisper_max"):
        step(workspace, 0, [0, 1])
        step(workspace, 1, [1, 0])
    released = ["release"] if failing == "await" else []
    assert model.names == ["execute", "capture", *released, "execute", "execute"]
    assert [record.getMessage() for record in caplog.records] == [
        "a decoding step could not be captured, and runs as it is: "
        "operation not permitted when stream is capturing"
    ]


def test_what_cannot_be_captured_is_not_tried_for_ever(engine):
    """But again for another decode: another thread may have been in the way."""
    model = engine.graphs["decoder_step"]
    model.fails["capture"] = "operation not permitted when stream is capturing"
    for _ in range(5):
        step(Workspace(engine, SIZES, DType.float32, 1, 2), 0, [0, 1])
    assert model.names == ["execute", "capture", "execute"] * 3 + ["execute"] * 2


def test_only_one_thread_at_a_time_gives_work_to_a_queue_that_records(engine):
    """Another decode's would be recorded, too."""
    model, recording, others = engine.graphs["decoder_step"], threading.Event(), []
    workspaces = [Workspace(engine, SIZES, DType.float32, 1, 2) for _ in range(2)]
    capture = model.capture

    def slow_capture(key, *operands):
        recording.set()
        others.append(second.join(timeout=0.2))
        assert second.is_alive() and model.names == ["execute"]
        return capture(key, *operands)

    def decode():
        recording.wait(30)
        engine.execute("cross_kv", *[workspaces[1]._tokens.buffer] * 3)
        workspaces[1].suppress(np.zeros(SIZES.n_vocab, np.float32))
        step(workspaces[1], 0, [0, 1])

    second = threading.Thread(target=decode, daemon=True)
    second.start()
    model.capture = slow_capture
    step(workspaces[0], 0, [0, 1])
    model.capture = capture
    second.join(timeout=30)
    assert not second.is_alive() and others == [None]
    assert engine.graphs["cross_kv"].names == ["execute"]
    assert model.names == ["execute", "capture", "replay"] * 2


def test_where_nothing_can_be_captured_nothing_is_tried(engine):
    engine.max_device = MaxDevice(torch.device("cpu"), CPU(), "cpu")
    step(Workspace(engine, SIZES, DType.float32, 1, 2), 0, [0, 1])
    assert engine.graphs["decoder_step"].names == ["execute"]


@pytest.mark.parametrize("failing", ["execute", "replay"])
def test_a_failing_step_leaves_the_call_to_pytorch_and_frees_the_idle(engine, workspace, failing):
    engine.workspaces.give(Workspace(engine, SIZES, DType.float32, 1, 1))
    engine.graphs["decoder_step"].fails[failing] = "CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(UnsupportedByMax, match="CUDA_ERROR_OUT_OF_MEMORY"):
        step(workspace, 0, [0, 1])
    engine.workspaces.give(workspace)  # as its decode does in the end
    for shape in ((1, 1), (1, 2)):
        assert engine.workspaces.take(shape, WEIGHTS, torch.zeros(1)) is None


def test_a_workspace_that_does_not_fit_into_memory_is_none(engine, monkeypatch):
    def full(*arguments):
        raise_in("max.engine.api", ValueError("out of memory"))

    monkeypatch.setattr("whisper_max.runtime.gpu.engine.Buffer", full)
    with pytest.raises(UnsupportedByMax, match="in making a decode's workspace: out of memory"):
        Workspace(engine, SIZES, DType.float32, 1, 1)


def test_a_captured_step_goes_with_its_workspace(engine, workspace):
    """At the next step: another thread may be capturing, which a finalizer must not wait for."""
    gone = Workspace(engine, SIZES, DType.float32, 1, 2)
    step(gone, 0, [0, 1])
    model = engine.graphs["decoder_step"]
    key = model.calls[-1][1]
    del gone
    gc.collect()
    captured = ["execute", "capture", "replay"]
    assert model.names == captured
    step(workspace, 0, [0, 1])
    assert model.names == [*captured, "release", *captured]
    assert model.calls[3] == ("release", key)


def test_a_decode_gets_the_workspace_that_holds_its_features(engine):
    filled = engine.graphs["cross_kv"].calls
    features = [torch.full((1, 6, 64), float(i)) for i in range(2)]
    workspaces = [Workspace(engine, SIZES, DType.float32, 1, 2) for _ in features]
    for workspace, held in zip(workspaces, features):
        workspace.fill(WEIGHTS, held)
        engine.workspaces.give(workspace)
    assert engine.workspaces.take((1, 3), WEIGHTS, features[0]) is None
    assert engine.workspaces.take((1, 2), WEIGHTS, features[1].clone()) is workspaces[1]
    workspaces[1].fill(WEIGHTS, features[1].clone())
    assert len(filled) == 2
    # For other weights, though the same features: a workspace to be filled anew.
    others = Weights(decoder=[], cross_kv=[])
    assert engine.workspaces.take((1, 2), others, features[0]) is workspaces[0]
    workspaces[0].fill(others, features[0])
    assert len(filled) == 3
    assert engine.workspaces.take((1, 2), WEIGHTS, features[0]) is None


def test_a_workspace_does_not_keep_weights(engine, workspace):
    weights = Weights(decoder=[], cross_kv=[])
    workspace.fill(weights, torch.zeros(1, 6, 64))
    step(workspace, 0, [0, 1], weights)
    gone = weakref.ref(weights)
    del weights
    assert gone() is None
    assert not workspace.is_for(Weights(decoder=[], cross_kv=[]), torch.zeros(1, 6, 64))


def test_operands_of_another_size_are_a_fault(workspace):
    with pytest.raises(ValueError, match="reshape"):
        workspace.step([3], 0, [0, 1], RULES, WEIGHTS)


def test_two_rooms_wait_for_the_next_decode(engine):
    workspaces = [Workspace(engine, SIZES, DType.float32, 1, beams) for beams in (1, 2, 3)]
    for workspace in workspaces:
        engine.workspaces.give(workspace)
    taken = [engine.workspaces.take((1, beams), WEIGHTS, torch.zeros(1)) for beams in (1, 2, 3)]
    assert taken == [None, *workspaces[1:]]


def test_a_workspace_comes_back_while_another_is_taken(engine, monkeypatch):
    """The garbage collector gives them back, at any time and in any thread."""
    first, second = (Workspace(engine, SIZES, DType.float32, 1, 2) for _ in range(2))

    def found_after_a_collection(workspace, weights, features):
        engine.workspaces.give(second)
        return True

    monkeypatch.setattr(Workspace, "is_for", found_after_a_collection)
    engine.workspaces.give(first)
    taken = []
    taker = threading.Thread(
        target=lambda: taken.append(engine.workspaces.take((1, 2), WEIGHTS, torch.zeros(1))),
        daemon=True,
    )
    taker.start()
    taker.join(timeout=30)
    assert taken == [first]
    assert list(engine.workspaces._idle) == [second]


def test_a_gpu_without_memory_for_the_features_has_what_idle_rooms_held(engine, workspace):
    class Features:
        def clone(self):
            raise_in("max.engine.api", torch.cuda.OutOfMemoryError("CUDA out of memory"))

    engine.workspaces.give(workspace)
    another = Workspace(engine, SIZES, DType.float32, 1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_engine, "to_buffer", lambda features: another._tokens.buffer)
        with pytest.raises(UnsupportedByMax, match="keeping audio features: CUDA out of memory"):
            another.fill(WEIGHTS, Features())
    assert not engine.workspaces._idle
    assert not another.is_for(WEIGHTS, Features())


def test_a_selection_masks_what_is_suppressed(engine, workspace):
    GpuSelection(workspace, (2, 5), SIZES.n_vocab, 1)
    expected = [MASKED if token in (2, 5) else 0 for token in range(9)]
    assert workspace._mask.buffer.to_numpy() == pytest.approx(expected)


def session(workspace: Workspace) -> GpuSession:
    """A decode in a workspace, of which the prompt is there."""
    made = GpuSession.__new__(GpuSession)
    made._workspace, made._ready = workspace, GpuReady(workspace._engine, WEIGHTS)
    made.length, made._n_text_ctx = 1, SIZES.n_text_ctx
    made._identity = made._parents = list(range(workspace.rows))
    return made


def test_greedy_decoding_ranks_one_token(engine):
    engine.graphs["decoder_greedy_step"].results = zeros(2, 1)
    engine.max_device = MaxDevice(torch.device("cpu"), CPU(), "cpu")
    decode = session(Workspace(engine, SIZES, DType.float32, 1, 2))
    for count, graph in ((1, "decoder_greedy_step"), (2, "decoder_step")):
        selection = decode.selection((), SIZES.n_vocab, count)
        logprobs, best = decode.select([3, 4], selection, RULES)
        assert len(logprobs) == len(best) == 2 * count
        assert engine.graphs[graph].names == ["execute"]


def test_beams_that_change_places_are_few_and_of_one_window(engine):
    """The kernel has room for so many, and looks into one window."""
    engine.max_device = MaxDevice(torch.device("cpu"), CPU(), "cpu")
    crowd = list(range(MOST_BEAMS + 1))
    for (windows, beams), parents, reason in [
        ((2, 2), [1, 0, 3, 2], None),
        ((2, 2), [2, 1, 2, 3], "a row goes on as one of another window"),
        ((1, len(crowd)), crowd, None),
        ((1, len(crowd)), crowd[::-1], f"{len(crowd)} beams, where {MOST_BEAMS} change places"),
    ]:
        rows = windows * beams
        engine.graphs["decoder_step"].results = zeros(rows, RANKED)
        decode = session(Workspace(engine, SIZES, DType.float32, windows, beams))
        decode.reorder(parents)
        selection = decode.selection((), SIZES.n_vocab, 2)
        with pytest.raises(UnsupportedByMax, match=reason) if reason else nullcontext():
            decode.select([3] * rows, selection, RULES[:1] * rows)


def test_memory_of_a_gpu_is_handed_over_while_that_one_is_current(monkeypatch):
    """PyTorch refuses otherwise, where it has several."""
    current = []

    class Of:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, *exception: object) -> None:
            current.pop()

    class OnSecond(SimpleNamespace):
        detach = resolve_neg = contiguous = lambda self: self

    seen = []
    monkeypatch.setattr(torch.cuda, "device", Of)
    monkeypatch.setattr(
        tensors, "Buffer", SimpleNamespace(from_dlpack=lambda tensor: seen.append(list(current)))
    )
    second = torch.device("cuda", 1)
    to_buffer(OnSecond(is_cuda=True, device=second))
    to_buffer(torch.zeros(1))
    assert seen == [[second], []]


def test_graphs_for_a_gpu_are_compiled_without_one(monkeypatch, tmp_path):
    """One that is there may be of another kind, and its memory is not the compiler's."""
    virtual, compiled_for = {}, []
    for what in ("api", "target_arch", "count"):
        name = f"set_virtual_device_{what}"
        monkeypatch.setattr(driver, name, partial(virtual.__setitem__, what))
    monkeypatch.setattr(driver, "Accelerator", lambda: dict(virtual))
    compiled = SimpleNamespace(compile=lambda graph: compiled, export_mef=Path.touch)
    monkeypatch.setattr(
        max_engine, "InferenceSession", lambda devices: compiled_for.extend(devices) or compiled
    )
    key = ArtifactKey("gpu", "builtins:dict", (), "cuda:sm_90a", "avx512")
    compile_to_mef(key, tmp_path / "artifact")
    assert compiled_for == [{"api": "cuda", "target_arch": "sm_90a", "count": 1}]
    assert (tmp_path / "artifact").exists()


def test_a_call_that_is_being_captured_is_left_to_pytorch(monkeypatch):
    """Checks wait for their results, which a capture does not allow."""
    module = torch.nn.Linear(1, 1, device="meta").requires_grad_(False)
    monkeypatch.setattr(conditions, "device_of", lambda module: torch.device("cuda", 0))
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        expected = ["the call is being captured"] if capturing else []
        assert context_reasons(module) == expected


class Stream:
    """Notes who waits for whom."""

    log: list[tuple] = []

    def __init__(self, name: object, device: torch.device | None = None) -> None:
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        Stream.log.append((self.name, "waits for", other.name))

    def synchronize(self) -> None:
        Stream.log.append(("host", "waits for", self.name))


@pytest.fixture
def cuda(monkeypatch):
    """PyTorch's and MAX's side of a GPU: two streams; returns MAX's device."""
    Stream.log = []
    device = SimpleNamespace(
        architecture_name="sm_90a",
        default_queue=SimpleNamespace(native_stream_handle=77),
        synchronize=lambda: Stream.log.append(("host", "waits for", "MAX")),
    )
    monkeypatch.setattr(devices, "Accelerator", lambda id: device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("PyTorch"))
    monkeypatch.setattr(torch.cuda, "ExternalStream", Stream)
    return device


def test_a_gpu_has_one_device_for_all_threads(cuda, monkeypatch):
    """And so one lock."""
    monkeypatch.setattr(devices, "_devices", {})
    found, ready = [], threading.Barrier(2)

    def find() -> None:
        ready.wait(30)
        found.append(devices.cuda_device(torch.device("cuda", 0)))

    def slowly(id: int) -> SimpleNamespace:
        time.sleep(0.1)
        return cuda

    monkeypatch.setattr(devices, "Accelerator", slowly)
    threads = [threading.Thread(target=find, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 2 and found[0] is found[1]


def test_max_waits_for_pytorch_and_pytorch_for_max(cuda):
    max_device = CudaDevice(torch.device("cuda", 1))
    assert max_device.architecture == "cuda:sm_90a"
    with pytest.raises(RuntimeError, match="inside"):
        with max_device.in_order():
            assert Stream.log == [(77, "waits for", "PyTorch")]
            raise RuntimeError("inside")
    assert Stream.log[1:] == [("PyTorch", "waits for", 77)]


def test_what_another_stream_is_still_waiting_for_is_not_read_before(cuda):
    """Features that MAX has been told to compute by another thread."""
    with CudaDevice(torch.device("cuda", 1)).reading():
        assert Stream.log == [("PyTorch", "waits for", 77)]
    assert Stream.log[1:] == [(77, "waits for", "PyTorch")]


def test_without_a_stream_of_its_own_to_wait_on_the_host_waits(cuda):
    cuda.default_queue.native_stream_handle = 0
    max_device = CudaDevice(torch.device("cuda", 0))
    waits = [("host", "waits for", "PyTorch"), ("host", "waits for", "MAX")]
    with max_device.in_order():
        assert Stream.log == waits[:1]
    with max_device.reading():
        assert Stream.log == [*waits, waits[1]]
    assert Stream.log == [*waits, *waits[::-1]]


@pytest.mark.parametrize("architecture", ["sm_75", "sm_61", "gfx942"])
def test_a_gpu_that_the_kernels_are_not_for_is_pytorchs(cuda, architecture):
    cuda.architecture_name = architecture
    with pytest.raises(UnsupportedByMax, match=f"sm_80 and later; this GPU is {architecture}"):
        CudaDevice(torch.device("cuda", 0))
    cuda.architecture_name = "sm_120a"
    CudaDevice(torch.device("cuda", 0))


def test_a_gpu_that_max_does_not_see_is_pytorchs(monkeypatch):
    def none(id):
        raise ValueError("failed to create device: no CUDA driver")

    monkeypatch.setattr(devices, "Accelerator", none)
    with pytest.raises(UnsupportedByMax, match="MAX cannot use cuda:3: .*no CUDA driver"):
        CudaDevice(torch.device("cuda", 3))


@pytest.mark.parametrize(
    ("device", "wanted", "reason"),
    [
        ("cpu", None, None),
        ("cpu", "cpu", None),
        ("cuda:1", "cuda", None),
        ("cpu", "cuda", "the model is on cpu, and device is 'cuda'"),
        ("cuda:0", "cpu", "the model is on cuda:0, and device is 'cpu'"),
        ("cuda:0", None, "never run on one, and patch(device='cuda') has to ask"),
        ("mps", "cpu", "the model is on mps"),
    ],
)
def test_models_on_a_gpu_are_left_alone_unless_asked_for(device, wanted, reason):
    reasons = device_reasons(torch.device(device), wanted)
    assert len(reasons) == (reason is not None)
    assert not reasons or reason in reasons[0]


def test_on_a_gpu_half_precision_is_taken_and_on_the_cpu_it_is_not():
    half = torch.zeros(1, dtype=torch.float16)
    assert tensor_reasons("mel", half, torch.device("cpu")) == ["mel is float16, not float32"]
    assert tensor_reasons("mel", half, torch.device("cuda", 0)) == ["mel is on cpu"]
    double = torch.zeros(1, dtype=torch.float64)
    assert tensor_reasons("mel", double, torch.device("cuda", 0))[1:] == [
        "mel is float64, not float16 or float32"
    ]
