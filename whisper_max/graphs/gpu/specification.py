"""What the GPU graphs take: sizes of a model, and weights under upstream's names and shapes.

Sizes are static, unlike on the CPU: products of known widths get better kernels on a GPU. How
many windows, beams and tokens there are stays symbolic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from max.dtype import DType
from max.graph import DeviceRef, TensorType

from ..specification import HEAD_DIM


@dataclass(frozen=True)
class AudioSizes:
    """What the encoder's graph needs of `ModelDimensions` of openai-whisper, under its names."""

    n_mels: int
    n_audio_ctx: int
    n_audio_state: int
    n_audio_head: int
    n_audio_layer: int

    def __post_init__(self) -> None:
        _check_heads("audio", self.n_audio_state, self.n_audio_head)


@dataclass(frozen=True)
class TextSizes:
    """What the decoder's graphs need. Audio features are as wide as the text's states."""

    n_audio_ctx: int
    n_vocab: int
    n_text_ctx: int
    n_text_state: int
    n_text_head: int
    n_text_layer: int

    def __post_init__(self) -> None:
        _check_heads("text", self.n_text_state, self.n_text_head)


def _check_heads(part: str, state: int, heads: int) -> None:
    if state != heads * HEAD_DIM:
        raise ValueError(
            f"n_{part}_state is {state} with {heads} heads; heads of {HEAD_DIM} are needed"
        )


@dataclass(frozen=True)
class Target:
    """Where and in what the graphs compute.

    dtype : of products, activations and matrices; norms, softmax and log-softmax are float32
    """

    sizes: AudioSizes | TextSizes
    dtype: DType
    device: DeviceRef

    def tensor(self, *shape: int | str, dtype: DType | None = None) -> TensorType:
        """A type on the device, of the target's dtype if no other is given."""
        return TensorType(dtype or self.dtype, shape, self.device)

    def encoder_weights(self) -> dict[str, TensorType]:
        """Of `model.encoder`, by the names in the model's state_dict."""
        sizes, state = self.sizes, self.sizes.n_audio_state
        weights = {
            "encoder.conv1.weight": self.tensor(state, sizes.n_mels, 3),
            "encoder.conv1.bias": self.tensor(state),
            "encoder.conv2.weight": self.tensor(state, state, 3),
            "encoder.conv2.bias": self.tensor(state),
            "encoder.positional_embedding": self.tensor(
                sizes.n_audio_ctx, state, dtype=DType.float32
            ),
        }
        for layer in range(sizes.n_audio_layer):
            weights.update(self._block(f"encoder.blocks.{layer}", state))
        weights.update(self._norm("encoder.ln_post", state))
        return weights

    def cross_kv_weights(self) -> dict[str, TensorType]:
        """Of the keys and values of cross attention, which belong to `model.decoder`."""
        state = self.sizes.n_text_state
        weights: dict[str, TensorType] = {}
        for layer in range(self.sizes.n_text_layer):
            name = f"decoder.blocks.{layer}.cross_attn"
            weights.update(self._linear(f"{name}.key", state, state, bias=False))
            weights.update(self._linear(f"{name}.value", state, state))
        return weights

    def decoder_weights(self) -> dict[str, TensorType]:
        """Of the rest of `model.decoder`."""
        sizes, state = self.sizes, self.sizes.n_text_state
        weights = {
            "decoder.token_embedding.weight": self.tensor(sizes.n_vocab, state),
            "decoder.positional_embedding": self.tensor(
                sizes.n_text_ctx, state, dtype=DType.float32
            ),
        }
        for layer in range(sizes.n_text_layer):
            name = f"decoder.blocks.{layer}"
            weights.update(self._block(name, state))
            weights.update(self._norm(f"{name}.cross_attn_ln", state))
            weights.update(self._linear(f"{name}.cross_attn.query", state, state))
            weights.update(self._linear(f"{name}.cross_attn.out", state, state))
        weights.update(self._norm("decoder.ln", state))
        return weights

    def _block(self, name: str, state: int) -> Iterator[tuple[str, TensorType]]:
        yield from self._norm(f"{name}.attn_ln", state)
        yield from self._linear(f"{name}.attn.query", state, state)
        yield from self._linear(f"{name}.attn.key", state, state, bias=False)
        yield from self._linear(f"{name}.attn.value", state, state)
        yield from self._linear(f"{name}.attn.out", state, state)
        yield from self._norm(f"{name}.mlp_ln", state)
        yield from self._linear(f"{name}.mlp.0", state, 4 * state)
        yield from self._linear(f"{name}.mlp.2", 4 * state, state)

    def _linear(
        self, name: str, inner: int, outer: int, bias: bool = True
    ) -> Iterator[tuple[str, TensorType]]:
        yield f"{name}.weight", self.tensor(outer, inner)
        if bias:
            yield f"{name}.bias", self.tensor(outer)

    def _norm(self, name: str, state: int) -> Iterator[tuple[str, TensorType]]:
        yield f"{name}.weight", self.tensor(state, dtype=DType.float32)
        yield f"{name}.bias", self.tensor(state, dtype=DType.float32)
