"""The documentation speaks of what is there: links lead somewhere, messages stand in the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import whisper_max
from whisper_max.runtime import compilation
from whisper_max.settings import ENVIRONMENT, TARGETS, Settings

PACKAGE = Path(whisper_max.__file__).parent
ROOT = PACKAGE.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def strings_in_the_code() -> list[str]:
    """Every string literal of the package; the parts between the braces of an f-string singly."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [node.value for node in nodes if isinstance(node.value, str)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def explained() -> dict[str, list[str]]:
    """The messages of troubleshooting.md, each with those of its parts that do not vary."""
    rows = re.findall(r"^\| (`.*?`) \|", text("docs/troubleshooting.md"), flags=re.MULTILINE)
    assert len(rows) > 30
    messages = re.findall(r"`([^`]+)`", " ".join(rows))
    parts = {m: [part.strip(" ,:;()…") for part in re.split("…|%s", m)] for m in messages}
    return {message: list(filter(None, found)) for message, found in parts.items()}


def reasons_in_the_code() -> set[str]:
    """What `refuse`, `UnsupportedByMax` and lists of reasons are given, "…" for what varies."""
    nodes = [
        node
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    ]
    given: list[ast.expr] = []
    for node in nodes:
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given += node.args if called in ("refuse", "UnsupportedByMax", "reasons.append") else []
        elif isinstance(node, ast.AugAssign) and ast.unparse(node.target) == "reasons":
            given.append(node.value)
        elif isinstance(node, ast.FunctionDef) and node.name.endswith("_reasons"):
            returns = (inner for inner in ast.walk(node) if isinstance(inner, ast.Return))
            given += [inner.value for inner in returns if inner.value is not None]
    found = set()
    for value in given:
        for item in getattr(value, "elts", None) or [getattr(value, "elt", value)]:
            if isinstance(item, ast.JoinedStr):
                parts = [getattr(part, "value", None) for part in item.values]
                found.add("".join(p if isinstance(p, str) else "…" for p in parts))
            elif isinstance(item, ast.Constant) and isinstance(item.value, str):
                found.add(item.value)
    return found


def test_every_message_explained_is_one_that_the_code_gives():
    strings = strings_in_the_code()
    for message, parts in explained().items():
        for part in parts:
            assert any(part in string for string in strings), f"{part!r} of {message!r}"


def test_every_reason_that_the_code_gives_is_explained():
    reasons = reasons_in_the_code()
    assert len(reasons) > 60
    for reason in reasons:
        assert any(
            parts and all(part in reason for part in parts) for parts in explained().values()
        ), reason


def test_every_function_setting_and_target_is_explained():
    usage = text("docs/usage.md")
    for name in {*whisper_max.__all__, *ENVIRONMENT.values(), *TARGETS} - {"__version__"}:
        assert re.search(rf"`{name}\b", usage), name
    assert Settings.precision == "high" and "`high`, `highest`" in usage


def test_limits_of_the_compile_are_those_of_the_code():
    page = text("docs/first-run.md")
    memory, disk = compilation.NEEDED_MEMORY >> 30, compilation.NEEDED_DISK >> 20
    assert f"{memory} GiB of free memory and {disk} MiB of free disk" in page
    assert f"after {compilation.LIMIT_SECONDS / 60:.0f} minutes" in page


def test_figures_have_their_place_in_the_readme():
    (_, rest) = text("README.md").split("<!-- figures -->")
    assert rest.count("<!-- /figures -->") == 1
