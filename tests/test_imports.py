"""Imports point down, know only what they may, and importing the package costs nothing."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import whisper_max

PACKAGE = Path(whisper_max.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up. A part may import from its own layer and from those below, never in a circle.
LAYERS = [
    {"kernels", "gpu_kernels"},
    {"graphs"},
    {"runtime"},
    {"first_use", "listeners"},
    {"audio_encoder", "text_decoder"},
    {"live_models"},
    {"inference", "selection", "decoding_loop", "decoding_task", "alignment"},
    {"patch_table", "patching", "precompile"},
    {"__init__"},
    {"__main__", "cli", "demo"},
]
# Everybody may import these; they import nothing of ours except each other.
LEAVES = {
    "activation",
    "after_import",
    "changed_parts",
    "class_swap",
    "conditions",
    "dimensions_of",
    "dispatch",
    "known_parts",
    "on_one_thread",
    "options",
    "pickling",
    "report",
    "rule",
    "settings",
    "shadow",
    "tensor_numbers",
    "upstream_structure",
    "versions",
}
# Who may import a package; what no one is named for, everybody may.
KNOWN_TO = {
    "whisper": {
        "alignment",
        "audio_encoder",
        "cli",
        "decoding_loop",
        "decoding_task",
        "demo",
        "inference",
        "listeners",
        "live_models",
        "patching",
        "selection",
        "text_decoder",
        "versions",
        "__main__",
    },
    "max": {"graphs", "runtime"},
}
MAX_IMPORT_SECONDS = 0.05


def part(file: Path) -> str:
    """The part of the package a file belongs to: its own name, or that of its folder."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(file: Path) -> set[str]:
    """The full names of everything the file imports, wherever in it the import stands."""
    package = ["whisper_max", *file.relative_to(PACKAGE).parts[:-1]]
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def imported_parts(file: Path) -> set[str]:
    """The parts of our package the file imports, apart from its own."""
    parts = set()
    for name in imported_modules(file):
        first, _, rest = name.partition(".")
        if first == "whisper_max" and rest != "__version__":
            below = rest.partition(".")[0]
            parts.add(below if below in LEAVES.union(*LAYERS) else "__init__")
    return parts - {part(file)}


def rank(name: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if name in layer)


def label(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@pytest.mark.parametrize("file", FILES, ids=label)
def test_every_file_has_its_place(file):
    places = [layer for layer in [*LAYERS, LEAVES] if part(file) in layer]
    assert len(places) == 1, f"{part(file)} belongs into exactly one of LAYERS and LEAVES"


@pytest.mark.parametrize("file", FILES, ids=label)
def test_imports_point_down(file):
    for imported in imported_parts(file):
        if part(file) in LEAVES:
            assert imported in LEAVES
        elif imported not in LEAVES:
            assert rank(imported) <= rank(part(file)), f"{part(file)} imports {imported} above it"


def test_no_two_parts_import_each_other():
    edges: dict[str, set[str]] = {}
    for file in FILES:
        edges.setdefault(part(file), set()).update(imported_parts(file))
    while edges:
        free = [name for name, imported in edges.items() if not imported & edges.keys()]
        assert free, f"a circle among {', '.join(sorted(edges))}"
        for name in free:
            del edges[name]


@pytest.mark.parametrize("file", FILES, ids=label)
def test_only_some_know_whisper_and_max_and_graphs_do_not_know_torch(file):
    packages = {name.partition(".")[0] for name in imported_modules(file)}
    for package, parts in KNOWN_TO.items():
        assert package not in packages or part(file) in parts
    assert not (part(file) == "graphs" and "torch" in packages)


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("use", ["pass", "whisper_max.status()", "whisper_max.disabled()"])
def test_importing_the_package_imports_neither_torch_nor_whisper_nor_max(use):
    heavy = {"torch", "whisper", "max", "numpy"}
    code = f"import sys, whisper_max; {use}; print(*{heavy} & sys.modules.keys())"
    assert run(code) == ""


def test_what_is_dropped_before_anything_ran_on_max_does_not_import_it():
    code = (
        "import sys, whisper, whisper_max; from whisper_max import demo; whisper_max.patch(); "
        "model = whisper.load_model(str(demo.CHECKPOINT), device='cpu'); "
        "whisper_max.refresh(model); print(type(model.encoder).__name__, 'max' in sys.modules)"
    )
    assert run(code) == "MaxAudioEncoder False"


def test_importing_the_package_is_quick():
    code = (
        "from time import perf_counter; start = perf_counter(); import whisper_max; "
        "print(perf_counter() - start)"
    )
    # The best of several: the machine may be busy, the package may not be slow.
    assert min(float(run(code)) for _ in range(5)) < MAX_IMPORT_SECONDS


@pytest.mark.parametrize("name", whisper_max.__all__)
def test_everything_public_is_there_and_documented(name):
    thing = getattr(whisper_max, name)
    assert name in dir(whisper_max)
    assert name == "__version__" or thing.__doc__


def test_the_lazy_names_are_those_that_type_checkers_see():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in block.body
        for alias in node.names
    }
    assert seen == whisper_max._HOMES
    assert {*seen, "__version__"} == set(whisper_max.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'whisper_max' has no attribute 'patsch'"):
        importlib.import_module("whisper_max").patsch


def test_the_page_names_every_part():
    page = (PACKAGE.parent / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    _, _, code = page.partition("## The code\n")
    named = set(re.findall(r"\w+", code))
    assert not {*LEAVES, *(part for layer in LAYERS for part in layer)} - named
