"""Models on a GPU: weights shared with PyTorch, a session on the device, steps that are replayed.

It has never run on a GPU: docs/gpu.md says what was tried, and how. That is why nothing here is
used unless `patch(device="cuda")` asks for it.
"""
