"""Mojo kernels of whisper_max: the operations that decide Whisper's speed on a CPU.

Each file is one idea. `packing`, `blocks`, `stem` and `select` register the custom ops that
`whisper_max.graphs` places into MAX graphs; the others are their parts:

    gemm         products of a few rows with packed panels, in registers
    projection   linear layers, with LayerNorm, GELU and residual fused
    attention    softmax(q k^T) v for the encoder, for cross attention and for one decoding step
    phases       one team of workers that goes through all layers without being put to sleep

Every dimension is read from the operands, so one compiled artifact serves every model size.
"""
