"""Mojo kernels of whisper_max: the operations that decide Whisper's speed on a CPU.

Each file is one idea. The first four register the custom ops that `whisper_max.graphs` places into
MAX graphs; the others are their parts:

    blocks       the attention blocks of the encoder and of the decoder, all layers in one op
    stem         what stands before and after them: convolutions, embedding, LayerNorm
    select       logit filters, log-softmax, and the most likely tokens
    packing      weights into panels
    attention    softmax(q k^T) v for the encoder, for cross attention and for one decoding step
    projection   linear layers, with LayerNorm, GELU and residual fused
    products     packed rows times panels: float32, bfloat16 and int8
    gemm         a few rows times panels, in registers
    tiles        the same in AMX tiles
    norm         LayerNorm
    phases       one team of workers that goes through all layers without being put to sleep

Every dimension is read from the operands, so one compiled artifact serves every model size.
"""
