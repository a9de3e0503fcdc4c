"""Which versions are tested, and whether the openai-whisper at hand is one we know.

A version number says little: there are forks, checkouts, and packages that replace a method at
import. So each target is held against the structure in `upstream_structure`: the signatures we
call, the attributes we read, and the code we compute the same as. What differs is refused, for
the targets that lean on it and with the reason; it is never patched blindly.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import linecache
import platform
import re
import sys
import textwrap
from collections.abc import Iterator
from types import FunctionType

from . import activation
from .upstream_structure import (
    INSTANCE_ATTRIBUTES,
    KNOWN_CODE,
    MIRRORED_CODE,
    MODEL_DIMENSIONS,
    SIGNATURES,
)

SUPPORTED_PYTHON = ("3.10", "3.11", "3.12", "3.13")
TESTED_WHISPER = ("20231117", "20240930", "20250625")
OLDEST_TORCH = "2.4"
TESTED_MAX = "26.7"

NOT_INSTALLED = "not installed"


def installed() -> dict[str, str]:
    """Installed versions by package name, "not installed" where there is none. Imports nothing."""
    found = {
        "python": platform.python_version(),
        "whisper_max": sys.modules[__package__].__version__,
    }
    for package in ("openai-whisper", "torch", "max", "numpy"):
        found[package] = _metadata_version(package) or NOT_INSTALLED
    if "whisper" in sys.modules:  # a checkout on sys.path hides the release installed
        found["openai-whisper"] = getattr(
            sys.modules["whisper"], "__version__", found["openai-whisper"]
        )
    return found


@functools.cache
def _metadata_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def reasons_against(target: str) -> list[str]:
    """Every reason not to patch `target` here; an empty list when it is safe.

    Imports the parts of whisper that the target concerns. An attribute that whisper_max has
    already replaced is judged by the original.
    """
    return [*environment_reasons(), *structure_reasons(target)]


def environment_reasons() -> list[str]:
    """Why no target can run on MAX with the Python, torch and MAX installed."""
    found = installed()
    reasons = []
    if _release(found["python"]) not in SUPPORTED_PYTHON:
        supported = ", ".join(SUPPORTED_PYTHON)
        reasons.append(f"Python {found['python']} is not supported (supported: {supported})")
    if found["max"] == NOT_INSTALLED:
        reasons.append(f"MAX is not installed: pip install 'max=={TESTED_MAX}.*'")
    elif _release(found["max"]) != TESTED_MAX:
        reasons.append(f"MAX {found['max']} is untested: pip install 'max=={TESTED_MAX}.*'")
    if _numbers(found["torch"]) < _numbers(OLDEST_TORCH):
        reasons.append(f"torch {found['torch']} is older than {OLDEST_TORCH}")
    return reasons


def structure_reasons(target: str) -> list[str]:
    """Where the openai-whisper at hand is not what `target` was written for."""
    return [
        *_signature_reasons(target),
        *_attribute_reasons(target),
        *_code_reasons(target),
    ]


def _signature_reasons(target: str) -> Iterator[str]:
    for name, known in SIGNATURES[target].items():
        function = _find(name)
        if function is None:
            yield f"whisper.{name} is missing"
        elif not isinstance(function, FunctionType):
            yield f"whisper.{name} is not a Python function but {type(function).__name__}"
        elif (signature := _signature(function)) != known:
            yield f"whisper.{name} takes {signature}; whisper_max knows it with {known}"


def _attribute_reasons(target: str) -> Iterator[str]:
    owners = dict.fromkeys(name.rpartition(".")[0] for name in SIGNATURES[target])
    for owner in owners:
        constructor = _find(f"{owner}.__init__")
        for attribute in INSTANCE_ATTRIBUTES.get(owner, ()):
            if isinstance(constructor, FunctionType) and not _names(constructor, attribute):
                yield f"whisper.{owner} sets no attribute {attribute!r}"

    dimensions = _find("model.ModelDimensions")
    if not dataclasses.is_dataclass(dimensions):
        yield "whisper.model.ModelDimensions is not a dataclass"
    else:
        fields = tuple(field.name for field in dataclasses.fields(dimensions))
        if fields != MODEL_DIMENSIONS:
            yield f"whisper.model.ModelDimensions has the fields {', '.join(fields)}"

    # Hooks on attention weights work by this switch (since 20240930). We must see it flipped.
    if _find("model.disable_sdpa") is not None:
        if not isinstance(_find("model.MultiHeadAttention.use_sdpa"), bool):
            yield "whisper.model.MultiHeadAttention.use_sdpa is not the switch of disable_sdpa()"


def _code_reasons(target: str) -> Iterator[str]:
    version = installed()["openai-whisper"]
    for name in MIRRORED_CODE[target]:
        thing = _find(name)
        if thing is None:
            yield f"whisper.{name} is missing"
            continue
        digest = code_digest(thing)
        if digest is None and version not in TESTED_WHISPER:
            yield (
                f"the source of whisper.{name} cannot be read, and openai-whisper {version} "
                f"is untested (tested: {', '.join(TESTED_WHISPER)})"
            )
        elif digest is not None and digest not in KNOWN_CODE[name]:
            yield (
                f"the code of whisper.{name} is not that of openai-whisper "
                f"{', '.join(TESTED_WHISPER)} (installed: {version}{_strangers(thing)})"
            )


def _find(name: str) -> object | None:
    """Upstream's own object called whisper.`name`, or None. Inherited attributes do not count."""
    module, *path = name.split(".")
    dotted = f"whisper.{module}"
    found: object = importlib.import_module(dotted)
    for part in path:
        dotted = f"{dotted}.{part}"
        found = activation.originals.get(dotted, vars(found).get(part))
        if found is None:
            return None
    return found


def _signature(function: FunctionType) -> str:
    """Its parameters and defaults as written, without annotations."""
    if function.__code__.co_filename.endswith("torch/utils/_contextlib.py"):
        function = function.__wrapped__  # upstream's own @torch.no_grad()
    signature = inspect.signature(function, follow_wrapped=False)
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    return str(inspect.Signature(bare))


def _names(function: FunctionType, attribute: str) -> bool:
    # `self.x = …` leaves x in co_names, register_buffer("x", …) leaves it in co_consts.
    return attribute in function.__code__.co_names or attribute in function.__code__.co_consts


def code_digest(thing: object) -> str | None:
    """A digest of the source of a function, or of all functions in a class's own body.

    Blank lines and comment lines do not count. None where the source cannot be read, as in
    programs frozen to bytecode.
    """
    sources = [_source(function) for function in _functions(thing)]
    if None in sources:
        return None
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=256)
def _source(function: FunctionType) -> str | None:
    # Not inspect.getsource(function): it would look through a wrapper at what it wraps.
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    if len(lines) < code.co_firstlineno:
        return None
    block = inspect.getblock(lines[code.co_firstlineno - 1 :])
    kept = [line.rstrip() for line in block if not re.match(r"\s*(#|$)", line)]
    return textwrap.dedent("\n".join(kept)) + "\n"


def code_digests() -> dict[str, str | None]:
    """The digest of every part in `upstream_structure.KNOWN_CODE`, as it is installed here."""
    return {name: code_digest(_find(name)) for name in KNOWN_CODE}


def _functions(thing: object) -> list[FunctionType]:
    owned = vars(thing) if isinstance(thing, type) else {"": thing}
    return [owned[name] for name in sorted(owned) if isinstance(owned[name], FunctionType)]


def _strangers(thing: object) -> str:
    """Which packages put functions of theirs into upstream's class, if any did."""
    modules = {function.__globals__.get("__name__", "?") for function in _functions(thing)}
    foreign = sorted(module for module in modules if not module.startswith("whisper."))
    return f"; part of it comes from {', '.join(foreign)}" if foreign else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _release(version: str) -> str:
    return ".".join(str(number) for number in _numbers(version))
