"""The audio encoder: mirrors `AudioEncoder.forward` in openai-whisper's model.py."""

from __future__ import annotations

from max.dtype import DType
from max.graph import Graph, KernelLibrary, Module, TensorValue

from .layers import Layers, attention, gelu, merge_heads, split_heads
from .specification import Target


def encoder(module: Module, library: KernelLibrary, target: Target) -> Graph:
    """mel, shape = (batch, n_mels, 2 * n_audio_ctx) -> features, (batch, n_audio_ctx, n_state).

    Operands: mel; the weights. Both mel and features are of the target's dtype.
    """
    sizes, weights = target.sizes, target.encoder_weights()
    mel_type = target.tensor("batch", sizes.n_mels, 2 * sizes.n_audio_ctx)
    graph = Graph(
        "encoder",
        input_types=[mel_type, *weights.values()],
        kernel_library=library,
        module=module,
    )
    with graph:
        mel, *values = (value.tensor for value in graph.inputs)
        layer = Layers(dict(zip(weights, values)))
        x = mel.permute([0, 2, 1])  # (batch, 2 * n_audio_ctx, n_mels)
        x = gelu(layer.conv1d(x, "encoder.conv1", stride=1))
        x = gelu(layer.conv1d(x, "encoder.conv2", stride=2))  # (batch, n_audio_ctx, n_state)
        positions = layer.weights["encoder.positional_embedding"]
        x = (x.cast(DType.float32) + positions).cast(target.dtype)
        for number in range(sizes.n_audio_layer):
            x = _block(layer, x, f"encoder.blocks.{number}")
        graph.output(layer.layer_norm(x, "encoder.ln_post"))
    return graph


def _block(layer: Layers, x: TensorValue, name: str) -> TensorValue:
    """`ResidualAttentionBlock` without cross attention."""
    y = layer.layer_norm(x, f"{name}.attn_ln")
    q, k, v = (
        split_heads(layer.linear(y, f"{name}.attn.{part}")) for part in ("query", "key", "value")
    )
    x = layer.linear(merge_heads(attention(q, k, v)), f"{name}.attn.out", added=x)
    return layer.mlp(layer.layer_norm(x, f"{name}.mlp_ln"), f"{name}.mlp", x)
