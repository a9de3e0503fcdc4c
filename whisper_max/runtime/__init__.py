"""Compiled graphs on disk and in memory: hardware, artifacts, sessions, weights."""
