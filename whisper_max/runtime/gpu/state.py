"""What MAX keeps for one encoder or decoder on a GPU: its weights, and the last result.

The weights are PyTorch's own memory wherever they have the dtype that the graphs take, and a copy,
made once, where upstream would convert them at each call: matrices in float32 under float16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import NamedTuple

import torch
from max.driver import Buffer
from max.graph import DeviceRef, TensorType
from torch import Tensor, nn

from ...conditions import parameter_reasons, value_reasons
from ...dispatch import refuse
from ...graphs.gpu.build import DECODER, ENCODER
from ...graphs.gpu.specification import AudioSizes, Target, TextSizes
from ...settings import Settings
from .. import hardware, loading
from ..artifact_key import ArtifactKey
from ..model_state import Guard, Memo, tensors_of
from ..tensors import to_buffer, to_torch
from ..watch import Watch
from .engine import RANKED, GpuEngine, Weights, to_dtype
from .devices import MaxDevice

BUILDER = "whisper_max.graphs.gpu.build:build"


class GpuReady(NamedTuple):
    """An engine, and one module's weights for its graphs."""

    engine: GpuEngine
    weights: Weights

    def encode(self, mel: Tensor) -> Tensor:
        """mel, shape = (batch, n_mels, 2 * n_audio_ctx), -> (batch, n_audio_ctx, n_state)."""
        return to_torch(self.engine.execute("encoder", to_buffer(mel), *self.weights["encoder"])[0])


class GpuState:
    """Weights of one module on a GPU, checked against its parameters at every use.

    kind : "encoder" or "decoder"
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.features: Memo[Tensor] = Memo()
        self._guard = Guard()
        self.watch = Watch()
        self._reasons: list[str] = []
        self._ready: dict[tuple, GpuReady] = {}

    def ready(
        self,
        module: nn.Module,
        settings: Settings,
        max_device: MaxDevice,
        sizes: AudioSizes | TextSizes,
        dtype: torch.dtype,
    ) -> GpuReady:
        """Engine and weights for the module as it is now, to compute in this dtype.

        Raises UnsupportedByMax while there is no engine, or where the parameters are not such
        that the graphs could take them.
        """
        with self._guard.taken():
            tensors = tensors_of(module)
            if not self.watch.unchanged(tensors):
                self._look_at(tensors, max_device)
            refuse(self._reasons)
            name, level = to_dtype(dtype).name, settings.cpu_level
            engine = loading.loaded(
                (key_of(self.kind, sizes, name, max_device.architecture, level),),
                settings,
                str(max_device.torch_device),
                lambda compiled: GpuEngine(compiled, max_device),
                lambda key: f"{max_device.torch_device} ({key.device})",
            )
            found = self._ready.get((sizes, dtype))
            if found is None or found.engine is not engine:
                with engine.failing("taking the weights"):
                    found = GpuReady(engine, _weights(self.kind, tensors, sizes, dtype))
                self._ready[sizes, dtype] = found
            return found

    def _look_at(self, tensors: Mapping[str, Tensor], max_device: MaxDevice) -> None:
        self._ready, self._reasons = {}, []
        self.features.drop()
        self.watch.forget()
        refuse(parameter_reasons(tensors.values(), max_device.torch_device))
        self._reasons = value_reasons(tensors)
        self.watch.note(tensors)


def sizes_of(kind: str, dimensions: Mapping[str, int]) -> AudioSizes | TextSizes:
    """Of the "encoder" or "decoder" of a model with these `ModelDimensions`, by name."""
    sizes = AudioSizes if kind == "encoder" else TextSizes
    return sizes(**{field.name: dimensions[field.name] for field in fields(sizes)})


def audio_sizes(encoder: nn.Module) -> AudioSizes:
    """Of an AudioEncoder."""
    n_audio_ctx, n_audio_state = encoder.positional_embedding.shape
    n_mels, blocks = encoder.conv1.weight.shape[1], encoder.blocks
    return AudioSizes(n_mels, n_audio_ctx, n_audio_state, blocks[0].attn.n_head, len(blocks))


def text_sizes(decoder: nn.Module, frames: int) -> TextSizes:
    """Of a TextDecoder, for audio features of so many frames."""
    n_text_ctx, n_text_state = decoder.positional_embedding.shape
    n_vocab, blocks = len(decoder.token_embedding.weight), decoder.blocks
    heads = blocks[0].attn.n_head
    return TextSizes(frames, n_vocab, n_text_ctx, n_text_state, heads, len(blocks))


def key_of(
    kind: str,
    sizes: AudioSizes | TextSizes,
    dtype: str,
    architecture: str,
    cpu_level: str | None = None,
) -> ArtifactKey:
    """The artifact with all graphs of an "encoder" or "decoder" of these sizes.

    dtype : such as "float16"
    architecture : such as "cuda:sm_90a"
    cpu_level : as for `hardware.cpu_level`; a part of every artifact runs on the host
    """
    options = {**asdict(sizes), "dtype": dtype}
    if kind == "encoder":
        width, layers, graphs = sizes.n_audio_state, sizes.n_audio_layer, ENCODER
    else:
        width, layers, graphs = sizes.n_text_state, sizes.n_text_layer, DECODER
        options["ranked"] = RANKED
    return ArtifactKey(
        label=f"gpu-{kind}-{width}x{layers}-{dtype}",
        builder=BUILDER,
        options=tuple({**options, "graphs": ",".join(graphs)}.items()),
        device=architecture,
        cpu_level=hardware.cpu_level(cpu_level),
    )


def keys_of(
    dimensions: Mapping[str, int], dtype: str, architecture: str, cpu_level: str | None = None
) -> dict[str, ArtifactKey]:
    """Both artifacts of a model with these `ModelDimensions`: "encoder" and "decoder".

    dtype, architecture, cpu_level : as for `key_of`
    """
    return {
        kind: key_of(kind, sizes_of(kind, dimensions), dtype, architecture, cpu_level)
        for kind in ("encoder", "decoder")
    }


def _weights(
    kind: str, tensors: Mapping[str, Tensor], sizes: AudioSizes | TextSizes, dtype: torch.dtype
) -> Weights:
    """By the graphs that take them. Each tensor is there once, however many graphs take it."""
    target = Target(sizes, to_dtype(dtype), DeviceRef.CPU())  # for its names and dtypes only
    if kind == "encoder":
        types = {"encoder": target.encoder_weights()}
    else:
        types = {"cross_kv": target.cross_kv_weights(), "decoder": target.decoder_weights()}
    return Weights(
        {graph: list(_shared(kind, tensors, by_name)) for graph, by_name in types.items()}
    )


def _shared(
    kind: str, tensors: Mapping[str, Tensor], types: Mapping[str, TensorType]
) -> Iterable[Buffer]:
    for name, wanted in types.items():
        tensor = tensors[name.removeprefix(f"{kind}.")]
        yield to_buffer(tensor.to(getattr(torch, wanted.dtype.name)))
