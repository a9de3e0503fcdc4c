"""The operations that the graphs are written in: whisper_max's Mojo kernels as functions.

A `Layers` holds the weights by name, as `state_dict` does; its methods are the layers of
openai-whisper's model.py, with the weights looked up by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from max.dtype import DType
from max.graph import BufferValue, DeviceRef, TensorType, TensorValue, ops
from max.graph.dim import DimLike
from max.graph.shape import ShapeLike

from .specification import DECODER_BLOCKS, ENCODER_BLOCKS, Parameter, Storage

KERNELS = Path(__file__).resolve().parent.parent / "kernels"


class Layers:
    """The layers of one graph.

    weights : graph inputs by name, as `specification.inputs` lists them
    threads : shape = (1,), int32; how many threads may work at a time
    """

    def __init__(
        self,
        weights: Mapping[str, TensorValue],
        threads: TensorValue,
        storage: Storage,
        device: DeviceRef,
    ) -> None:
        self.weights = weights
        self.threads = threads
        self.storage = storage
        self.device = device

    def linear(
        self,
        x: TensorValue,
        name: str,
        *,
        gelu: bool = False,
        residual: TensorValue | None = None,
    ) -> TensorValue:
        """act(x @ weight.T + bias) + residual; x, shape = (batch, length, in) -> (..., out).

        `residual`, shape = (length, out), is the same for the whole batch.
        """
        none_vector, none_matrix = self._absent(1), self._absent(2)
        bias = self.weights[f"{name}.bias"]
        return self._custom(
            "whisper_linear",
            [
                x,
                none_vector,  # the norm before it, which layers inside of the blocks have
                none_vector,
                self.weights[f"{name}.weight"],
                self.weights[f"{name}.scale"],
                bias,
                none_matrix if residual is None else residual,
                self.threads,
                ops.constant(int(gelu), DType.int32, self.device),
            ],
            (x.shape[0], x.shape[1], bias.shape[0]),
            product=self.storage.product,
            tiles=self.storage.tiles,
        )

    def conv_patches(
        self, x: TensorValue, frames: DimLike, *, channels_first: bool = False, stride: int = 1
    ) -> TensorValue:
        """What a convolution of width 3 and padding 1 multiplies, channels of one tap together.

        x, shape = (batch, length, channels), or (batch, channels, length) where `channels_first`,
        -> (batch, frames, 3 * channels), with `frames` = ceil(length / stride)
        """
        channels = x.shape[1 if channels_first else 2]
        return self._custom(
            "whisper_conv_patches",
            [x, self.threads],
            (x.shape[0], frames, 3 * channels),
            channels_first=channels_first,
            stride=stride,
        )

    def layer_norm(self, x: TensorValue, name: str) -> TensorValue:
        """LayerNorm over the last axis of x, shape = (batch, length, n_state)."""
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return self._custom("whisper_layer_norm", [x, weight, bias, self.threads], x.shape)

    def encoder_blocks(self, x: TensorValue) -> TensorValue:
        """All residual attention blocks of the encoder; x, shape = (batch, frames, n_state)."""
        return self._custom(
            "whisper_encoder_blocks",
            [x, self.threads, *self._operands(ENCODER_BLOCKS)],
            x.shape,
            product=self.storage.product,
            tiles=self.storage.tiles,
            attention=self.storage.attention,
        )

    def cross_kv(self, features: TensorValue, filled: Sequence[BufferValue]) -> None:
        """Fills the packed cross-attention caches of all layers from the encoder's output.

        features, shape = (windows, frames, n_state); what is filled: see `graphs.cross_kv`
        """
        kv = "decoder.blocks.cross_attn.kv"
        operands = [self.weights[f"{kv}.{part}"] for part in ("weight", "scale", "bias")]
        ops.inplace_custom(
            "whisper_cross_kv",
            self.device,
            [*filled, features, self.threads, *operands],
            parameters={
                "width": self.storage.width,
                "product": self.storage.product,
                "tiles": self.storage.tiles,
            },
        )

    def embed(self, tokens: TensorValue, position: TensorValue) -> TensorValue:
        """Token plus positional embedding of tokens, shape = (rows, tokens)."""
        positional = self.weights["decoder.positional_embedding"]
        return ops.custom(
            "whisper_embed",
            self.device,
            [
                tokens,
                position,
                self.weights["decoder.token_embedding.weight"],
                self.weights["decoder.token_embedding.scale"],
                positional,
            ],
            [self._type((*tokens.shape, positional.shape[1]))],
        )[0].tensor

    def decoder(
        self,
        x: TensorValue,
        wanted: TensorValue,
        self_cache: BufferValue,
        cross_keys: TensorValue,
        cross_values: TensorValue,
        source: TensorValue,
        position: TensorValue,
        score_slots: TensorValue,
        score_shape: ShapeLike,
        residuals_shape: ShapeLike,
    ) -> tuple[TensorValue, TensorValue, TensorValue]:
        """All residual attention blocks of the decoder, for new tokens at position[0], and logits.

        x, shape = (rows, tokens, n_state)
        wanted : of its rows * tokens, the flat numbers of those whose logits are computed

        Returns logits, shape = (wanted, 1, n_vocab); the raw cross-attention scores of the heads
        that `score_slots`, shape = (layers, heads), gives a place; and, unless that shape has no
        elements, x before and after each cross attention and at the end, shape =
        (2 * layers + 1, rows * tokens, n_state).
        """
        bias = self.weights["decoder.token_embedding.bias"]
        logits, raw_scores, residuals = ops.inplace_custom(
            "whisper_decoder_blocks",
            self.device,
            [
                x,
                wanted,
                self_cache,
                cross_keys,
                cross_values,
                source,
                position,
                score_slots,
                self.threads,
                *self._operands(DECODER_BLOCKS),
                self.weights["decoder.ln.weight"],
                self.weights["decoder.ln.bias"],
                self.weights["decoder.token_embedding.weight"],
                self.weights["decoder.token_embedding.scale"],
                bias,
            ],
            [
                self._type((wanted.shape[0], 1, bias.shape[0])),
                self._type(score_shape),
                self._type(residuals_shape),
            ],
            parameters={
                "width": self.storage.width,
                "product": self.storage.product,
                "tiles": self.storage.tiles,
            },
        )
        return logits.tensor, raw_scores.tensor, residuals.tensor

    def select(
        self,
        logits: TensorValue,
        mask: TensorValue,
        rules: TensorValue,
        logprobs: BufferValue,
        best: BufferValue,
    ) -> None:
        """Writes the most likely tokens of each row under the decoding rules, and how likely.

        logits, shape = (rows, 1, n_vocab); mask, (n_vocab,); rules, (rows, 5): kernels/select.mojo

        logprobs, float32, and best, int32, both (rows, k)
        """
        ops.inplace_custom(
            "whisper_select",
            self.device,
            [logprobs, best, logits, mask, rules, self.threads],
            parameters={"width": self.storage.width},
        )

    def _operands(self, parameters: tuple[Parameter, ...]) -> list[TensorValue]:
        parts = {"linear": ("weight", "scale", "bias"), "norm": ("weight", "bias")}
        return [self.weights[f"{p.name}.{part}"] for p in parameters for part in parts[p.kind]]

    def _absent(self, rank: int) -> TensorValue:
        """An operand whose size matches no layer: the kernel takes it for "none"."""
        return ops.constant(np.zeros((1,) * rank, np.float32), device=self.device)

    def _type(self, shape: ShapeLike) -> TensorType:
        return TensorType(DType.float32, shape, self.device)

    def _custom(
        self,
        op: str,
        values: list[TensorValue],
        shape: ShapeLike,
        **parameters: bool | int | DType,
    ) -> TensorValue:
        parameters["width"] = self.storage.width
        types = [self._type(shape)]
        return ops.custom(op, self.device, values, types, parameters=parameters)[0].tensor
