"""What whisper_max knows of openai-whisper: the parts each target replaces, mirrors or reads.

Names are written without the leading "whisper.". `versions` compares them with what is installed.
To take in a new release: read what it changes, install it, and add the digests that
`versions.code_digests()` then shows to differ.
"""

from __future__ import annotations

_ATTENTION = {
    "model.MultiHeadAttention.__init__": "(self, n_state, n_head)",
    "model.MultiHeadAttention.forward": "(self, x, xa=None, mask=None, kv_cache=None)",
    "model.MultiHeadAttention.qkv_attention": "(self, q, k, v, mask=None)",
    "model.ResidualAttentionBlock.__init__": "(self, n_state, n_head, cross_attention=False)",
    "model.ResidualAttentionBlock.forward": "(self, x, xa=None, mask=None, kv_cache=None)",
}
_ENCODER = {
    **_ATTENTION,
    "model.AudioEncoder.__init__": "(self, n_mels, n_ctx, n_state, n_head, n_layer)",
    "model.AudioEncoder.forward": "(self, x)",
}
_DECODER = {
    **_ATTENTION,
    "model.TextDecoder.__init__": "(self, n_vocab, n_ctx, n_state, n_head, n_layer)",
    "model.TextDecoder.forward": "(self, x, xa, kv_cache=None)",
}
_INFERENCE = {
    **_DECODER,
    "model.Whisper.install_kv_cache_hooks": "(self, cache=None)",
    "decoding.PyTorchInference.__init__": "(self, model, initial_token_length)",
    "decoding.PyTorchInference.logits": "(self, tokens, audio_features)",
    "decoding.PyTorchInference.rearrange_kv_cache": "(self, source_indices)",
    "decoding.PyTorchInference.cleanup_caching": "(self)",
    "decoding.DecodingTask.__init__": "(self, model, options)",
    "decoding.DecodingTask._main_loop": "(self, audio_features, tokens)",
}

# Per target: the functions replaced or called, with the parameters we count on.
SIGNATURES: dict[str, dict[str, str]] = {
    "encoder": _ENCODER,
    "decoder": _DECODER,
    "inference": _INFERENCE,
    "decoding_loop": {
        **_INFERENCE,
        "decoding.DecodingTask.run": "(self, mel)",
        "decoding.GreedyDecoder.update": "(self, tokens, logits, sum_logprobs)",
        "decoding.BeamSearchDecoder.update": "(self, tokens, logits, sum_logprobs)",
        "decoding.SuppressBlank.apply": "(self, logits, tokens)",
        "decoding.SuppressTokens.apply": "(self, logits, tokens)",
        "decoding.ApplyTimestampRules.apply": "(self, logits, tokens)",
    },
    "alignment": {
        **_DECODER,
        "model.Whisper.forward": "(self, mel, tokens)",
        "timing.find_alignment": (
            "(model, tokenizer, text_tokens, mel, num_frames, *, medfilt_width=7, qk_scale=1.0)"
        ),
        "timing.median_filter": "(x, filter_width)",
        "timing.dtw": "(x)",
    },
}

# What the constructors set and we read.
INSTANCE_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "model.MultiHeadAttention": ("n_head", "query", "key", "value", "out"),
    "model.ResidualAttentionBlock": (
        "attn",
        "attn_ln",
        "cross_attn",
        "cross_attn_ln",
        "mlp",
        "mlp_ln",
    ),
    "model.AudioEncoder": ("conv1", "conv2", "positional_embedding", "blocks", "ln_post"),
    "model.TextDecoder": ("token_embedding", "positional_embedding", "blocks", "ln", "mask"),
    "decoding.PyTorchInference": ("model", "initial_token_length", "kv_cache", "hooks"),
    "decoding.DecodingTask": (
        "model",
        "tokenizer",
        "options",
        "n_group",
        "n_ctx",
        "sample_len",
        "sample_begin",
        "sot_index",
        "inference",
        "decoder",
        "logit_filters",
    ),
    "decoding.GreedyDecoder": ("temperature", "eot"),
    "decoding.BeamSearchDecoder": (
        "beam_size",
        "eot",
        "inference",
        "max_candidates",
        "finished_sequences",
    ),
    "decoding.SuppressBlank": ("tokenizer", "sample_begin"),
    "decoding.SuppressTokens": ("suppress_tokens",),
    "decoding.ApplyTimestampRules": (
        "tokenizer",
        "sample_begin",
        "max_initial_timestamp_index",
    ),
}

MODEL_DIMENSIONS = (
    "n_mels",
    "n_audio_ctx",
    "n_audio_state",
    "n_audio_head",
    "n_audio_layer",
    "n_vocab",
    "n_text_ctx",
    "n_text_state",
    "n_text_head",
    "n_text_layer",
)

_DECODER_CODE = (
    "model.LayerNorm",
    "model.Linear",
    "model.MultiHeadAttention",
    "model.ResidualAttentionBlock",
    "model.TextDecoder",
)
_INFERENCE_CODE = (
    *_DECODER_CODE,
    "model.Whisper.install_kv_cache_hooks",
    "decoding.PyTorchInference",
    "decoding.DecodingTask.__init__",
    "decoding.DecodingTask._main_loop",
)

# Per target: the classes and functions whose every line matters, because we compute the same.
MIRRORED_CODE: dict[str, tuple[str, ...]] = {
    "encoder": (
        "model.LayerNorm",
        "model.Linear",
        "model.Conv1d",
        "model.MultiHeadAttention",
        "model.ResidualAttentionBlock",
        "model.AudioEncoder",
    ),
    "decoder": _DECODER_CODE,
    "inference": _INFERENCE_CODE,
    "decoding_loop": (
        *_INFERENCE_CODE,
        "decoding.GreedyDecoder",
        "decoding.BeamSearchDecoder",
        "decoding.SuppressBlank",
        "decoding.SuppressTokens",
        "decoding.ApplyTimestampRules",
    ),
    "alignment": (
        *_DECODER_CODE,
        "model.Whisper.forward",
        "timing.find_alignment",
        "timing.median_filter",
        "timing.dtw",
    ),
}

# The digests of that code (`versions.code_digest`), one for each different state it was in.
KNOWN_CODE: dict[str, tuple[str, ...]] = {
    "model.LayerNorm": ("7d01c1a992d31b8b",),
    "model.Linear": ("1707b2ad96224629",),
    "model.Conv1d": ("cc39798d52022fbc",),
    "model.MultiHeadAttention": (
        "2b1eba08db3a795e",  # 20231117
        "6bd5054a1cea2938",  # 20240930: scaled_dot_product_attention
    ),
    "model.ResidualAttentionBlock": ("f62cd6ae077f80d7",),
    "model.AudioEncoder": ("8f9e76f7f07b666d",),
    "model.TextDecoder": ("f5382ca890e1cc12",),
    "model.Whisper.forward": ("319171869342b665",),
    "model.Whisper.install_kv_cache_hooks": ("3f8175822209c4d7",),
    "decoding.PyTorchInference": ("8a31d04c1eea62ae",),
    "decoding.DecodingTask.__init__": ("af522b3fb99ccd8c",),
    "decoding.DecodingTask._main_loop": ("71aba3f31d2f0777",),
    "decoding.GreedyDecoder": ("10268f3b19ff6d3b",),
    "decoding.BeamSearchDecoder": ("0e7ab874a9687e9c",),
    "decoding.SuppressBlank": ("e76cacbf4b194ccd",),
    "decoding.SuppressTokens": ("d397cc34e6cffd34",),
    "decoding.ApplyTimestampRules": ("5106d78a3fc9186d",),
    "timing.find_alignment": (
        "7f61de0551a5e642",  # 20231117
        "5d98a9cc0ebc42f9",  # 20240930: under disable_sdpa()
    ),
    "timing.median_filter": ("271112fc6b7a23c9",),
    "timing.dtw": ("84ba0a9185ed52e5",),
}
