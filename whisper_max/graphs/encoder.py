"""The audio encoder: mirrors `AudioEncoder.forward` in openai-whisper's model.py."""

from __future__ import annotations

from max.dtype import DType
from max.graph import DeviceRef, Graph, KernelLibrary, Module, TensorType

from .layers import Layers
from .specification import ENCODER, Storage, inputs, threads_type


def encoder(
    module: Module, library: KernelLibrary, storage: Storage, device: DeviceRef
) -> Graph:
    """mel, shape = (batch, n_mels, 2 * n_audio_ctx) -> features, (batch, n_audio_ctx, n_state).

    Operands: mel, float32; threads; the weights.
    """
    weights = dict(inputs(ENCODER, storage, device))
    mel_type = TensorType(DType.float32, ("batch", "n_mels", "frames"), device)
    graph = Graph(
        "encoder",
        input_types=[mel_type, threads_type(device), *weights.values()],
        kernel_library=library,
        module=module,
    )
    with graph:
        mel, threads, *values = (value.tensor for value in graph.inputs)
        layer = Layers(dict(zip(weights, values)), threads, storage, device)
        positions = layer.weights["encoder.positional_embedding"]

        x = layer.conv_patches(mel, mel.shape[2], channels_first=True)
        x = layer.linear(x, "encoder.conv1", gelu=True)  # (batch, 2 * n_audio_ctx, n_state)
        x = layer.conv_patches(x, positions.shape[0], stride=2)
        x = layer.linear(x, "encoder.conv2", gelu=True, residual=positions)
        x = layer.encoder_blocks(x)
        graph.output(layer.layer_norm(x, "encoder.ln_post"))
    return graph
