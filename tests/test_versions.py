"""The openai-whisper at hand is known, and every way in which it could be another is noticed."""

from __future__ import annotations

import functools
import linecache
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import placeholders
import pytest

from whisper_max import patching, upstream_structure, versions
from whisper_max.settings import TARGETS

ALL = set(TARGETS)


@dataclass(frozen=True)
class Mutant:
    """openai-whisper with a text replaced in one file, and how the checks must react."""

    name: str
    file: str
    old: str
    new: str
    refused: set[str]
    reason: str


def read_mutants() -> list[Mutant]:
    text = Path(__file__).with_name("whisper_mutants.txt").read_text(encoding="utf-8")
    return [parse(block) for block in text.split("\n\n") if "\n- " in block]


def parse(block: str) -> Mutant:
    head, *lines = block.strip("\n").splitlines()
    name, file, *refused = head.split()
    old, new, reason = (
        "\n".join(line[2:] for line in lines if line.startswith(mark)) for mark in "-+>"
    )
    return Mutant(name, file, old, new, ALL if refused == ["all"] else set(refused), reason)


MUTANTS = read_mutants()


@pytest.fixture(autouse=True)
def known_environment(monkeypatch):
    placeholders.start_unpatched(monkeypatch)
    placeholders.pretend_max_is_installed(monkeypatch)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_speaks_against_the_installed_upstream(target):
    assert versions.reasons_against(target) == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_changed_upstream_is_refused_where_it_matters_and_nowhere_else(
    monkeypatch, tmp_path, mutant
):
    placeholders.import_changed_whisper(monkeypatch, tmp_path, mutant.file, mutant.old, mutant.new)
    placeholders.install_replacements(monkeypatch)
    before = {target: placeholders.upstream(target) for target in TARGETS}
    try:
        report = patching.patch()
        assert set(report.refused) == mutant.refused
        assert set(report.patched) == ALL - mutant.refused
        for target in mutant.refused:
            assert mutant.reason in "; ".join(report.refused[target])
            assert placeholders.upstream(target) is before[target]
    finally:
        patching.unpatch()
    assert {target: placeholders.upstream(target) for target in TARGETS} == before


def test_every_guard_has_a_mutant():
    reasons = "\n".join(mutant.reason for mutant in MUTANTS)
    for name in {name for names in upstream_structure.SIGNATURES.values() for name in names}:
        short = name.removeprefix("model.").removeprefix("decoding.").removeprefix("timing.")
        assert f"{short} takes" in reasons or f"{short} is missing" in reasons
    for name in upstream_structure.INSTANCE_ATTRIBUTES:
        assert f"whisper.{name} sets no attribute" in reasons
    for name in upstream_structure.KNOWN_CODE:
        assert f"the code of whisper.{name} is not that" in reasons


def test_the_switch_of_disable_sdpa_must_be_where_hooks_flip_it(monkeypatch):
    from whisper import model

    if not hasattr(model, "disable_sdpa"):
        pytest.skip("this release has no SDPA")
    monkeypatch.delattr(model.MultiHeadAttention, "use_sdpa")
    for target in TARGETS:
        (reason,) = versions.structure_reasons(target)
        assert "use_sdpa is not the switch of disable_sdpa()" in reason


def test_the_switch_may_be_off_while_patching(monkeypatch):
    from whisper import model

    monkeypatch.setattr(model.MultiHeadAttention, "use_sdpa", False, raising=False)
    assert all(versions.structure_reasons(target) == [] for target in TARGETS)


def test_a_method_put_in_by_another_package_is_seen_and_named(monkeypatch):
    from whisper.model import AudioEncoder

    def forward(self, x):
        return x

    monkeypatch.setattr(AudioEncoder, "forward", forward)
    (reason,) = versions.structure_reasons("encoder")
    assert "code of whisper.model.AudioEncoder" in reason
    assert f"part of it comes from {__name__}" in reason
    assert versions.structure_reasons("decoder") == []


def test_a_wrapper_that_looks_like_what_it_wraps_is_seen(monkeypatch):
    from whisper import timing

    @functools.wraps(timing.find_alignment)
    def wrapper(*args, **kwargs):
        return []

    monkeypatch.setattr(timing, "find_alignment", wrapper)
    reasons = versions.structure_reasons("alignment")
    assert any("find_alignment takes (*args, **kwargs)" in reason for reason in reasons)


def test_something_callable_that_is_no_function_is_refused(monkeypatch):
    from whisper import timing

    monkeypatch.setattr(timing, "dtw", functools.partial(timing.dtw))
    reasons = versions.structure_reasons("alignment")
    assert "whisper.timing.dtw is not a Python function but partial" in reasons


def test_without_source_only_a_tested_release_is_taken(monkeypatch, tmp_path):
    placeholders.import_changed_whisper(monkeypatch, tmp_path, "model.py", "** -0.25", "** -0.5")
    shutil.rmtree(tmp_path / "whisper")
    linecache.clearcache()
    assert versions.structure_reasons("encoder") == []

    monkeypatch.setattr(sys.modules["whisper"], "__version__", "20991231")
    reasons = versions.structure_reasons("encoder")
    assert "the source of whisper.model.AudioEncoder cannot be read" in reasons[-1]
    assert "openai-whisper 20991231 is untested" in reasons[-1]


def test_a_newer_release_with_the_same_code_is_taken(monkeypatch):
    import whisper

    monkeypatch.setattr(whisper, "__version__", "20991231")
    assert versions.installed()["openai-whisper"] == "20991231"
    assert all(versions.structure_reasons(target) == [] for target in TARGETS)


@pytest.mark.parametrize(
    ("package", "version", "reason"),
    [
        ("max", "not installed", "MAX is not installed: pip install 'max==26.7.*'"),
        ("max", "26.8.1", "MAX 26.8.1 is untested: pip install 'max==26.7.*'"),
        ("torch", "2.3.1+cu121", "torch 2.3.1+cu121 is older than 2.4"),
        ("python", "3.9.2", "Python 3.9.2 is not supported (supported: 3.10, 3.11, 3.12, 3.13)"),
        (
            "python",
            "3.14.0rc1",
            "Python 3.14.0rc1 is not supported (supported: 3.10, 3.11, 3.12, 3.13)",
        ),
    ],
)
def test_versions_outside_the_tested_ranges_are_refused(monkeypatch, package, version, reason):
    found = versions.installed()
    monkeypatch.setattr(versions, "installed", lambda: {**found, package: version})
    assert versions.environment_reasons() == [reason]
    assert all(versions.reasons_against(target) == [reason] for target in TARGETS)


@pytest.mark.parametrize(("package", "version"), [("torch", "2.13.0+cpu"), ("max", "26.7.3")])
def test_versions_inside_the_tested_ranges_are_taken(monkeypatch, package, version):
    found = versions.installed()
    monkeypatch.setattr(versions, "installed", lambda: {**found, package: version})
    assert versions.environment_reasons() == []


def test_every_mirrored_part_has_a_digest_and_every_target_a_structure():
    mirrored = {name for names in upstream_structure.MIRRORED_CODE.values() for name in names}
    assert mirrored == set(upstream_structure.KNOWN_CODE)
    assert set(upstream_structure.MIRRORED_CODE) == set(upstream_structure.SIGNATURES) == ALL
    assert None not in versions.code_digests().values()


def test_comments_and_blank_lines_do_not_count(monkeypatch, tmp_path):
    before = versions.code_digests()
    line = "        x = self.ln_post(x)\n"
    commented = f"        # the last one\n\n{line}"
    placeholders.import_changed_whisper(monkeypatch, tmp_path, "model.py", line, commented)
    assert Path(sys.modules["whisper"].__file__).parent.parent == tmp_path
    assert versions.code_digests() == before
