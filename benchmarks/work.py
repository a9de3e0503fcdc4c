"""How much there is to compute and to read: the floor under every time.

Only what no implementation can leave out is counted, so that figures of different peers compare:
multiply-adds as two operations, each weight and each cached number read once.
"""

from __future__ import annotations

from collections.abc import Mapping

TOKENS_IN = 100
KERNEL = 3  # width of both convolutions
MLP = 4  # its width, in n_state


def encoder_operations(dims: Mapping[str, int]) -> float:
    """Floating-point operations of one window."""
    frames, state = dims["n_audio_ctx"], dims["n_audio_state"]
    convolutions = 2 * KERNEL * frames * state * (2 * dims["n_mels"] + state)
    linear = 2 * frames * (4 + 2 * MLP) * state**2  # query, key, value, out; both of the MLP
    attention = 2 * 2 * frames**2 * state
    return convolutions + dims["n_audio_layer"] * (linear + attention)


def prefill_operations(dims: Mapping[str, int], tokens: int) -> float:
    """Operations of cross-attention keys and values, and of a prompt of this many tokens."""
    frames, state, layers = dims["n_audio_ctx"], dims["n_text_state"], dims["n_text_layer"]
    cross = 2 * frames * 2 * state**2
    per_token = 2 * _step_weights(state) + 2 * 2 * frames * state
    logits = 2 * dims["n_vocab"] * state  # of the last token only
    return layers * (cross + tokens * per_token) + logits


def step_bytes(
    dims: Mapping[str, int], rows: int, weight_bytes: int, cross_bytes: int
) -> float:
    """Bytes that one decoder step reads: weights, cross-attention cache (one for all rows), and
    each row's own cache of `TOKENS_IN` tokens in float32.
    """
    frames, state, layers = dims["n_audio_ctx"], dims["n_text_state"], dims["n_text_layer"]
    weights = layers * _step_weights(state) + dims["n_vocab"] * state
    cross = layers * 2 * frames * state
    own = rows * layers * 2 * TOKENS_IN * state
    return weights * weight_bytes + cross * cross_bytes + own * 4


def _step_weights(state: int) -> int:
    """Weights of one layer that a step multiplies with: cross keys and values are cached."""
    self_attention, cross_attention = 4, 2
    return (self_attention + cross_attention + 2 * MLP) * state**2
