"""Whisper for GPUs in MAX's own operations: weights as upstream has them, one graph per task."""
