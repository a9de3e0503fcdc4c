"""The bundled trained checkpoint, grown to the dimensions of the real models.

Random weights have the real sizes, but say nothing; the bundled checkpoint transcribes, but is
small. A grown one does both: each channel of the small model becomes several, and each layer too,
so that in exact arithmetic nearly the same numbers come out, at the cost of the real model. (The
idea of growing without changing the function: Chen, Goodfellow and Shlens, "Net2Net", 2016.)

- Channels of the residual stream are copies, in random order. LayerNorm of copies is copies.
- The columns of a matrix for the copies of one channel share its weight, and get random numbers
  that sum to zero over the copies: all weights differ and take part, and cancel.
- The channels of each head are rotated: queries and keys alike, values as the output undoes it.
- Each layer of the small model is at work once. The others are copies whose outputs count for
  little and have alternating signs.
- Input of 128 mel bands is interpolated to 80 in the first convolution.
- Tokens that the small model does not know, all zeros there, get random rows that cancel as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]

WEAK = 0.005
"""How much of its output a further copy of a layer adds to the residual stream. At 0.02 tiny has
the one of four encoder layers that nothing cancels, and misses sentences of a long recording."""

UNKNOWN_TOKEN = 0.02
"""Standard deviation of an unknown token's row."""

_SEED = 2016
_CANTONESE = 50358  # the token that large-v3 and turbo have in addition


def grow(dims: Mapping[str, int], state: Mapping[str, Tensor], wanted: Mapping[str, int]) -> State:
    """Weights of the wanted dimensions that compute nearly what `state` computes.

    dims, wanted : the fields of `whisper.model.ModelDimensions`. A wanted width is a multiple of
        the present one, and heads are as wide; the vocabulary is the same, or has one language
        more; bands of mel are 80 or 128.
    state : of a `whisper.model.Whisper` of `dims`

    Returns a state_dict in float16, the same at every call.

    Raises ValueError for dimensions that cannot be reached.
    """
    growing = _Growing(dims, state, wanted)
    grown = {**growing.encoder(), **growing.decoder()}
    return {name: tensor.half().contiguous() for name, tensor in grown.items()}


class _Growing:
    """One growth, with its random choices."""

    def __init__(
        self, dims: Mapping[str, int], state: Mapping[str, Tensor], wanted: Mapping[str, int]
    ) -> None:
        self.dims, self.wanted = dims, wanted
        self.state = {name: tensor.float() for name, tensor in state.items()}
        self.generator = torch.Generator().manual_seed(_SEED)
        width, self.heads = dims["n_audio_state"], dims["n_audio_head"]
        self.times, rest = divmod(wanted["n_audio_state"], width)
        self.depth = width // self.heads
        same = ("n_audio_ctx", "n_text_ctx")
        if (
            rest
            or not self.times
            or any(dims[field] != wanted[field] for field in same)
            or wanted["n_audio_head"] != self.times * self.heads
            or any(wanted[f"n_text_{of}"] != wanted[f"n_audio_{of}"] for of in ("state", "head"))
            or wanted["n_vocab"] - dims["n_vocab"] not in (0, 1)
            or wanted["n_audio_layer"] < dims["n_audio_layer"]
            or wanted["n_text_layer"] < dims["n_text_layer"]
        ):
            raise ValueError(f"dimensions {dict(dims)} do not grow to {dict(wanted)}")
        self.audio, self.text = self.copies(width), self.copies(width)

    def copies(self, count: int) -> Tensor:
        """Which of `count` small channels each channel is a copy of, in random order."""
        order = torch.randperm(self.times * count, generator=self.generator)
        return order % count

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def encoder(self) -> State:
        """Its weights, by their names in a state_dict."""
        state, stem = self.state, self.copies(self.dims["n_audio_state"])
        bands = interpolation(self.dims["n_mels"], self.wanted["n_mels"])
        first = torch.einsum("oik,im->omk", state["encoder.conv1.weight"], bands)
        second = state["encoder.conv2.weight"].unbind(2)
        grown = {
            "encoder.conv1.weight": first[stem],
            "encoder.conv1.bias": state["encoder.conv1.bias"][stem],
            "encoder.conv2.weight": torch.stack(
                [self.matrix(tap, self.audio, stem) for tap in second], 2
            ),
            "encoder.conv2.bias": state["encoder.conv2.bias"][self.audio],
            "encoder.positional_embedding": state["encoder.positional_embedding"][:, self.audio],
            **self.norm("encoder.ln_post", "encoder.ln_post", self.audio),
        }
        for layer, (small, strength) in enumerate(self.layers("n_audio_layer")):
            names = f"encoder.blocks.{small}.", f"encoder.blocks.{layer}."
            grown |= self.block(*names, self.audio, strength)
        return grown

    def decoder(self) -> State:
        """Its weights, by their names in a state_dict."""
        state, times = self.state, self.times
        tokens = state["decoder.token_embedding.weight"][:, self.text]
        unknown = ~tokens.any(1)
        tokens[unknown] = UNKNOWN_TOKEN * self.cancelling(int(unknown.sum()), self.text)
        if self.wanted["n_vocab"] > self.dims["n_vocab"]:
            more = UNKNOWN_TOKEN * self.cancelling(1, self.text)
            tokens = torch.cat([tokens[:_CANTONESE], more, tokens[_CANTONESE:]])
        # The copies of a channel add up in the logits.
        last = self.norm("decoder.ln", "decoder.ln", self.text)
        grown = {
            "decoder.token_embedding.weight": tokens,
            "decoder.positional_embedding": state["decoder.positional_embedding"][:, self.text],
            **{name: tensor / times for name, tensor in last.items()},
        }
        for layer, (small, strength) in enumerate(self.layers("n_text_layer")):
            names = f"decoder.blocks.{small}.", f"decoder.blocks.{layer}."
            grown |= self.block(*names, self.text, strength)
            names = tuple(f"{name}cross_attn" for name in names)
            grown |= self.attention(*names, self.text, self.audio, strength)
            grown |= self.norm(*(f"{name}_ln" for name in names), self.text)
        return grown

    def layers(self, field: str) -> list[tuple[int, float]]:
        """For each layer: of which small one it is a copy, and how much its output counts."""
        few, many = self.dims[field], self.wanted[field]
        ends = [(small + 1) * many // few - 1 for small in range(few)]
        found = []
        for layer in range(many):
            small = next(i for i, end in enumerate(ends) if layer <= end)
            weak = WEAK if layer % 2 else -WEAK
            found.append((small, 1.0 if layer == ends[small] else weak))
        return found

    def block(self, small: str, large: str, channels: Tensor, strength: float) -> State:
        """Self-attention, MLP and their norms."""
        hidden = self.copies(len(self.state[f"{small}mlp.0.bias"]))
        first, second = (self.state[f"{small}mlp.{i}.weight"] for i in (0, 2))
        return {
            **self.attention(f"{small}attn", f"{large}attn", channels, channels, strength),
            **self.norm(f"{small}attn_ln", f"{large}attn_ln", channels),
            f"{large}mlp.0.weight": self.matrix(first, hidden, channels),
            f"{large}mlp.0.bias": self.state[f"{small}mlp.0.bias"][hidden],
            f"{large}mlp.2.weight": strength * self.matrix(second, channels, hidden),
            f"{large}mlp.2.bias": strength * self.state[f"{small}mlp.2.bias"][channels],
            **self.norm(f"{small}mlp_ln", f"{large}mlp_ln", channels),
        }

    def attention(
        self, small: str, large: str, channels: Tensor, source: Tensor, strength: float
    ) -> State:
        """The four projections; `source` has the channels that keys and values are made of."""
        state = self.state
        inner = self.copies(self.heads)[:, None] * self.depth + torch.arange(self.depth)
        inner = inner.flatten()
        turned, values = self.rotations(), self.rotations()

        def heads(part: str, of: Tensor, rotation: Tensor) -> State:
            weight = self.matrix(state[f"{small}.{part}.weight"], inner, of)
            found = {f"{large}.{part}.weight": _turn(rotation, weight)}
            if (bias := state.get(f"{small}.{part}.bias")) is not None:
                found[f"{large}.{part}.bias"] = _turn(rotation, bias[inner])
            return found

        out = self.matrix(state[f"{small}.out.weight"], channels, inner)
        return {
            **heads("query", channels, turned),
            **heads("key", source, turned),
            **heads("value", source, values),
            f"{large}.out.weight": strength * _turn(values, out.T).T,
            f"{large}.out.bias": strength * state[f"{small}.out.bias"][channels],
        }

    def rotations(self) -> Tensor:
        """A random rotation for each head."""
        heads = self.times * self.heads
        return torch.linalg.qr(self.normal(heads, self.depth, self.depth)).Q

    def norm(self, small: str, large: str, channels: Tensor) -> State:
        return {
            f"{large}.{part}": self.state[f"{small}.{part}"][channels]
            for part in ("weight", "bias")
        }

    def matrix(self, weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """As many copies of rows and columns as asked for; the same product for copied input."""
        shared = weight[rows][:, columns] / self.times
        deviation = weight.std() / self.times**0.5
        return shared + deviation * self.cancelling(len(rows), columns)

    def cancelling(self, count: int, columns: Tensor) -> Tensor:
        """Random rows that are zero when multiplied with copies: shape = (count, columns)."""
        order = torch.argsort(columns, stable=True)  # copies of one channel side by side
        noise = self.normal(count, len(columns) // self.times, self.times)
        noise -= noise.mean(2, keepdim=True)
        found = torch.empty(count, len(columns))
        found[:, order] = noise.flatten(1)
        return found


def _turn(rotations: Tensor, rows: Tensor) -> Tensor:
    """Rotates the rows of each head."""
    heads = rows.unflatten(0, rotations.shape[:2])
    return torch.einsum("hij,hj...->hi...", rotations, heads).flatten(0, 1)


def interpolation(bands: int, wanted: int) -> Tensor:
    """From log-mel spectrograms of `wanted` bands to such of `bands`: shape = (bands, wanted).

    Both divide the same range of the mel scale evenly.
    """
    if bands == wanted:
        return torch.eye(bands)
    here, there = (np.arange(1, count + 1) / (count + 1) for count in (bands, wanted))
    columns = [np.interp(here, there, unit) for unit in np.eye(wanted)]
    return torch.from_numpy(np.stack(columns, 1)).float()
