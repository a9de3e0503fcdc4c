"""Whisper as MAX graphs: pure MAX, no PyTorch, no openai-whisper."""
