"""openai-whisper's own test suite, unpatched and under the patch.

    python -m compat.upstream

The tests come from the source of the release that is installed (`source`), never from here. What
fails where it must is listed in expected_failures.yaml.
"""
