"""Checkpoints of openai-whisper in the forms that other packages read."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers.convert_slow_tokenizer import TikTokenConverter
from whisper.tokenizer import Tokenizer, get_tokenizer

from .models import Model

ASSETS = "assets/multilingual.tiktoken"

# openai-whisper's names and those of transformers, to be replaced in this order.
_NAMES = (
    ("blocks", "layers"),
    ("mlp.0", "fc1"),
    ("mlp.2", "fc2"),
    ("mlp_ln", "final_layer_norm"),
    ("cross_attn_ln", "encoder_attn_layer_norm"),
    ("attn_ln", "self_attn_layer_norm"),
    ("cross_attn.", "encoder_attn."),
    (".attn.", ".self_attn."),
    ("query", "q_proj"),
    ("key", "k_proj"),
    ("value", "v_proj"),
    (".out.", ".out_proj."),
    ("decoder.ln.", "decoder.layer_norm."),
    ("ln_post", "layer_norm"),
    ("token_embedding", "embed_tokens"),
    ("positional_embedding", "embed_positions.weight"),
)


def to_transformers(model: Model, folder: Path) -> None:
    """Writes model, tokenizer and feature extractor into the folder."""
    checkpoint = torch.load(model.checkpoint, map_location="cpu", weights_only=True)
    tokenizer = get_tokenizer(multilingual=True, num_languages=model.languages)
    converted = transformers.WhisperForConditionalGeneration(
        _configuration(checkpoint["dims"], tokenizer)
    )
    state = {
        f"model.{renamed(name)}": tensor.float()
        for name, tensor in checkpoint["model_state_dict"].items()
    }
    # The output projection is the token embedding, in both packages.
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    converted.load_state_dict(state)
    converted.tie_weights()
    converted.generation_config = _generation(checkpoint["dims"], tokenizer)
    converted.save_pretrained(folder)
    _tokenizer(tokenizer).save_pretrained(folder)
    n_mels = checkpoint["dims"]["n_mels"]
    transformers.WhisperFeatureExtractor(feature_size=n_mels).save_pretrained(folder)


def to_ctranslate2(model: Model, folder: Path) -> None:
    """Writes the model, float32, into the folder, from the files of `to_transformers`."""
    from ctranslate2.converters import TransformersConverter

    files = ["tokenizer.json", "preprocessor_config.json"]
    TransformersConverter(str(model.transformers), copy_files=files).convert(str(folder))


def renamed(name: str) -> str:
    """A parameter's name in transformers."""
    for ours, theirs in _NAMES:
        name = name.replace(ours, theirs)
    return name


def _configuration(dims: dict[str, int], tokenizer: Tokenizer) -> transformers.WhisperConfig:
    return transformers.WhisperConfig(
        vocab_size=dims["n_vocab"],
        num_mel_bins=dims["n_mels"],
        d_model=dims["n_audio_state"],
        encoder_layers=dims["n_audio_layer"],
        encoder_attention_heads=dims["n_audio_head"],
        encoder_ffn_dim=4 * dims["n_audio_state"],
        decoder_layers=dims["n_text_layer"],
        decoder_attention_heads=dims["n_text_head"],
        decoder_ffn_dim=4 * dims["n_text_state"],
        max_source_positions=dims["n_audio_ctx"],
        max_target_positions=dims["n_text_ctx"],
        **_ends(tokenizer),
    )


def _generation(dims: dict[str, int], tokenizer: Tokenizer) -> transformers.GenerationConfig:
    """What openai-whisper's decoding does unasked, as transformers has it in a file."""
    special = (
        tokenizer.transcribe,
        tokenizer.translate,
        tokenizer.sot,
        tokenizer.sot_prev,
        tokenizer.sot_lm,
        tokenizer.no_speech,
    )
    layers, heads = dims["n_text_layer"], dims["n_text_head"]
    return transformers.GenerationConfig(
        **_ends(tokenizer),
        suppress_tokens=sorted({*tokenizer.non_speech_tokens, *special}),
        begin_suppress_tokens=[*tokenizer.encode(" "), tokenizer.eot],
        no_timestamps_token_id=tokenizer.no_timestamps,
        prev_sot_token_id=tokenizer.sot_prev,
        is_multilingual=True,
        lang_to_id={
            f"<|{code}|>": tokenizer.to_language_token(code)
            for code in tokenizer.all_language_codes
        },
        task_to_id={"transcribe": tokenizer.transcribe, "translate": tokenizer.translate},
        alignment_heads=[[i, j] for i in range(layers // 2, layers) for j in range(heads)],
        max_initial_timestamp_index=50,
        max_length=dims["n_text_ctx"],
        return_timestamps=False,
    )


def _ends(tokenizer: Tokenizer) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.eot,
        "eos_token_id": tokenizer.eot,
        "pad_token_id": tokenizer.eot,
        "decoder_start_token_id": tokenizer.sot,
    }


def _tokenizer(tokenizer: Tokenizer) -> transformers.WhisperTokenizerFast:
    import whisper

    encoding = tokenizer.encoding
    numbers = encoding._special_tokens
    converted = TikTokenConverter(
        vocab_file=str(Path(whisper.__file__).parent / ASSETS),
        pattern=encoding._pat_str,
        extra_special_tokens=sorted(numbers, key=numbers.get),
    ).converted()
    end = "<|endoftext|>"
    return transformers.WhisperTokenizerFast(
        tokenizer_object=converted, bos_token=end, eos_token=end, unk_token=end, pad_token=end
    )
