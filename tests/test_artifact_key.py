"""What decides the name of an artifact, and what does not."""

import json
from dataclasses import replace

import pytest

from whisper_max.runtime import artifact_key
from whisper_max.runtime.artifact_key import ArtifactKey

from compile_tools import KEY


def test_digest_depends_on_every_field_but_the_label():
    others = [
        replace(KEY, builder="whisper_max.graphs.other:build"),
        replace(KEY, options=(("n_mels", 128),)),
        replace(KEY, options=(("n_mels", 80), ("storage", "fp16"))),
        replace(KEY, options=(("n_mels", "80"),)),
        replace(KEY, device="cuda:sm_90a"),
        replace(KEY, cpu_level="amx"),
    ]
    assert len({key.digest for key in [KEY, *others]}) == 1 + len(others)
    assert replace(KEY, label="base").digest == KEY.digest
    assert replace(KEY, label="base").stem == f"base-{KEY.digest[:16]}"


@pytest.mark.parametrize("part", ["whisper_max", "sources", "engine", "cpu"])
def test_digest_depends_on_versions_sources_and_cpu(monkeypatch, part):
    current = artifact_key.fingerprint()
    monkeypatch.setattr(artifact_key, "fingerprint", lambda: {**current, part: "another"})
    assert replace(KEY).digest != KEY.digest


def test_digest_does_not_depend_on_the_order_of_options():
    one = replace(KEY, options=(("a", 1), ("b", 2)))
    other = replace(KEY, options=(("b", 2), ("a", 1)))
    assert one == other and one.digest == other.digest


def test_key_survives_json():
    assert ArtifactKey.from_dict(json.loads(json.dumps(KEY.to_dict()))) == KEY


@pytest.mark.parametrize(
    "field, value",
    [
        ("label", "../../etc/passwd"),
        ("label", ""),
        ("builder", "whisper_max.graphs.build"),
        ("device", "cuda"),
        ("device", "tpu"),
    ],
)
def test_malformed_keys_are_refused(field, value):
    with pytest.raises(ValueError, match=f"artifact {field} is {value!r}"):
        replace(KEY, **{field: value})


def test_options_that_json_would_change_are_refused():
    with pytest.raises(TypeError, match="option dims"):
        replace(KEY, options=(("dims", (80, 1500)),))
