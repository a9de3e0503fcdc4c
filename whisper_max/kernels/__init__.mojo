"""Mojo kernels of whisper_max: the operations that decide Whisper's speed on a CPU.

Each file is one idea. The first six register the custom ops that `whisper_max.graphs` places into
MAX graphs; the others are their parts:

    encoder_blocks    the encoder's attention blocks, all layers in one op
    decoder_blocks    the decoder's, and the logits
    cross_kv          cross-attention keys and values of all layers
    stem              what stands before and after: convolutions, embedding, LayerNorm
    select            logit filters, log-softmax, and the most likely tokens
    packing           weights into panels
    layers            a graph's operands as the layers of a block
    attention         softmax(q k^T) v of the encoder, and of cross attention
    self_attention    that of a decoding step
    keys_and_values   how attention reads them
    softmax           scores into weights
    projection        linear layers, with LayerNorm, GELU and residual fused
    products          packed rows times panels: float32, bfloat16 and int8
    gemm              a few rows times panels, in registers
    tiles             the same in AMX tiles
    norm              LayerNorm
    phases            one team of workers that goes through all layers without being put to sleep

Every dimension is read from the operands, so one compiled artifact serves every model size.
"""
