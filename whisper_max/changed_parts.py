"""What of an encoder or decoder is not as upstream made it: missing, added, replaced, adjusted.

MAX computes what openai-whisper's own modules compute. Whatever has been hung onto, put into or
taken out of those modules is honoured by running them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, combinations
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import TYPE_CHECKING, NamedTuple

from .known_parts import Description, describe, is_known, keep

if TYPE_CHECKING:
    import torch
    from torch import nn


class Part(NamedTuple):
    """A submodule of upstream's encoder or decoder.

    cls : the full name of its class
    weight : shape of its weight in multiples of n_state, None for one of any size; empty for a
        part that has none
    kernel : the size of a convolution's kernel, the last axis of its weight
    heard : whether hooks that only listen are called beside MAX, by `listeners`
    shape : of its weight, for one n_state
    settings : what its attributes should be
    """

    cls: str
    weight: tuple[int | None, ...] = ()
    kernel: tuple[int, ...] = ()
    heard: bool = False
    shape: tuple[int | None, ...] = ()
    settings: tuple[tuple[str, object], ...] = ()


def _linear(outputs: int, inputs: int) -> Part:
    return Part("whisper.model.Linear", (outputs, inputs))


_ATTENTION = "whisper.model.MultiHeadAttention"
_EMBEDDING = "torch.nn.modules.sparse.Embedding"
_NORM = Part("whisper.model.LayerNorm", (1,))
_BLOCKS = Part("torch.nn.modules.container.ModuleList")
_MLP = Part("torch.nn.modules.container.Sequential")
_RUN_IN_ORDER = (_BLOCKS.cls, _MLP.cls)
_ENCODER = {
    "conv1": Part("whisper.model.Conv1d", (1, None), (3,), heard=True),
    "conv2": Part("whisper.model.Conv1d", (1, 1), (3,)),
    "blocks": _BLOCKS,
    "ln_post": _NORM,
}
_DECODER = {
    "token_embedding": Part(_EMBEDDING, (None, 1), heard=True),
    "blocks": _BLOCKS,
    "ln": _NORM._replace(heard=True),
}


def _attention(name: str, *, heard: bool = False) -> dict[str, Part]:
    return {
        f".{name}": Part(_ATTENTION, heard=heard),
        **{f".{name}.{part}": _linear(1, 1) for part in ("query", "key", "value", "out")},
        f".{name}_ln": _NORM,
    }


_ENCODER_BLOCK = {
    "": Part("whisper.model.ResidualAttentionBlock"),
    **_attention("attn"),
    ".mlp": _MLP,
    ".mlp.0": _linear(4, 1),
    ".mlp.1": Part("torch.nn.modules.activation.GELU"),
    ".mlp.2": _linear(1, 4),
    ".mlp_ln": _NORM,
}
_DECODER_BLOCK = {**_ENCODER_BLOCK, **_attention("cross_attn", heard=True)}

# What an instance could be told to do otherwise, by class or by name.
_SETTINGS = {
    "Conv1d": {"padding": (1,), "dilation": (1,), "groups": 1, "padding_mode": "zeros"},
    "conv1": {"stride": (1,)},
    "conv2": {"stride": (2,)},
    "Embedding": {"max_norm": None},
    "GELU": {"approximate": "none"},
    "LayerNorm": {"eps": 1e-5, "elementwise_affine": True},
}
_SETTINGS_READ = {
    **{name: tuple(settings) for name, settings in _SETTINGS.items()},
    "Conv1d": (*_SETTINGS["Conv1d"], "stride"),
    "LayerNorm": (*_SETTINGS["LayerNorm"], "normalized_shape"),
    "MultiHeadAttention": ("n_head",),
}
"""All settings that `_change` compares, by class."""
_METHODS = frozenset({"forward", "qkv_attention", "_conv_forward"})
CALLS = ("__call__", "_wrapped_call_impl", "_call_impl")
"""By which `torch.nn.Module` comes to a forward."""
CALLS_OF_ONE = ("forward", "_call_impl", "_compiled_call_impl")
"""What `torch.nn.Module` looks up on an instance, where it may be replaced as well."""
_METHODS_OF_ONE = _METHODS.union(CALLS_OF_ONE)
_NAMES = ("positional_embedding", "mask", "weight", "bias")
_OWN_NAMES = frozenset(_NAMES).union(
    *(name.split(".") for name in (*_ENCODER, *_DECODER, *_DECODER_BLOCK) if name)
) - {""}
"""Of parts, parameters and buffers: a class that has such an attribute shadows them."""
_FUNCTIONS = ("linear", "conv1d", "gelu", "layer_norm", "softmax", "embedding")
"""Of torch.nn.functional, which those methods call."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OTHER_HOOKS = (*HOOKS[1:], "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_LISTENERS = ("stable_whisper", "whisper_timestamped")


def encoder_changes(encoder: nn.Module, *, hooks: bool = True) -> list[str]:
    """How an AudioEncoder differs from upstream's.

    hooks : whether those inside are a difference
    """
    return _changes(encoder, decoder=False, hooks=hooks)


def decoder_changes(decoder: nn.Module, *, hooks: bool = True) -> list[str]:
    """How a TextDecoder differs from upstream's, but for the values of its mask.

    hooks : as for `encoder_changes`
    """
    changes = _changes(decoder, decoder=True, hooks=hooks)
    if decoder._buffers.get("mask") is None:
        changes.append("mask is missing")
    return changes


_first_seen: dict[tuple[str, str], CodeType] = {}
"""The code of methods at first sight, soon after `patch()` has compared it with what it knows."""


def is_replaced(method: object, module: str, owner: type | None = None) -> bool:
    """Whether a method was not written in the module of this name, or was written anew since.

    Its `__module__` does not tell: `functools.wraps` copies that. And who reloads changed sources
    into a running program gives functions other code, or classes other functions.

    owner : the class that it should be of, None for a function
    """
    if getattr(method, "__globals__", {}).get("__name__") != module:
        return True
    # A function as a method has no class in its name: `Module.forward` is one.
    written_in = method.__qualname__.rpartition(".")[0]
    if owner is not None and written_in not in ("", owner.__qualname__):
        return True
    code = method.__code__
    first = _first_seen.setdefault((module, method.__qualname__), code)
    return code is not first and code != first


def has_replaced(thing: object, name: str, module: str) -> bool:
    """Whether an object's method is not that of its class, written in the module of this name.

    Nor is that of a stand-in, which looks up what it is asked for elsewhere.
    """
    owner = next((cls for cls in type(thing).__mro__ if name in vars(cls)), None)
    if owner is None or name in getattr(thing, "__dict__", {}):
        return True
    return is_replaced(vars(owner)[name], module, owner)


def named_parts(module: nn.Module, name: str = "") -> list[tuple[str, nn.Module]]:
    """As `named_modules(remove_duplicate=False)`, which takes three times as long."""
    found = [(name, module)]
    for child_name, child in module._modules.items():
        if child is not None:
            found += named_parts(child, f"{name}.{child_name}" if name else child_name)
    return found


def only_listens(part: nn.Module) -> bool:
    """Whether a part's hooks are plain forward hooks of packages that are known to change nothing.

    Read in stable-ts 2.19.1 and whisper-timestamped 1.15.9. `listeners` calls them.
    """
    own = vars(part)
    return not any(map(own.get, _OTHER_HOOKS)) and all(
        isinstance(hook, FunctionType)
        and str(hook.__globals__.get("__name__")).partition(".")[0] in _LISTENERS
        for hook in own["_forward_hooks"].values()
    )


@lru_cache(maxsize=8)
def _expected(decoder: bool, blocks: int, n_state: int) -> dict[str, Part]:
    """All parts by name, with their shapes and settings."""
    parts, block = (_DECODER, _DECODER_BLOCK) if decoder else (_ENCODER, _ENCODER_BLOCK)
    of_blocks = {f"blocks.{i}{name}": block[name] for i in range(blocks) for name in block}
    return {name: _for(n_state, name, part) for name, part in {**parts, **of_blocks}.items()}


def _for(n_state: int, name: str, part: Part) -> Part:
    sizes = [None if times is None else times * n_state for times in part.weight]
    keys = part.cls.rpartition(".")[2], name
    settings = [item for key in keys for item in _SETTINGS.get(key, {}).items()]
    if part.cls == _NORM.cls:
        settings.append(("normalized_shape", (n_state,)))
    return part._replace(shape=(*sizes, *part.kernel), settings=tuple(settings))


class _Classes:
    """The classes of a module's parts, each looked at once."""

    def __init__(self) -> None:
        self._found: dict[type, tuple[str, str | None]] = {}
        self._replaced: dict[type, str | None] = {}

    def look_at(self, cls: type) -> tuple[str, str | None]:
        """Its full name, and a method of it or of what it extends that was replaced, if any."""
        found = self._found.get(cls)
        if found is None:
            replaced = next(filter(None, map(self._replaced_in, cls.__mro__)), None)
            found = self._found[cls] = f"{cls.__module__}.{cls.__qualname__}", replaced
        return found

    def _replaced_in(self, base: type) -> str | None:
        if base not in self._replaced:
            own = vars(base)
            replaced = [
                name
                for name in (*_METHODS, *CALLS)
                if name in own and is_replaced(own[name], base.__module__, base)
            ]
            replaced += _OWN_NAMES.intersection(own)
            self._replaced[base] = replaced[0] if replaced else None
        return self._replaced[base]


def _changes(module: nn.Module, *, decoder: bool, hooks: bool) -> list[str]:
    named = named_parts(module)
    description = _describe(named)
    parts = [part for _, part in named]
    if is_known(module, decoder, description) and not _are_other_ways(parts, hooks):
        return []
    changes = list(_changes_found(module, decoder=decoder, hooks=hooks))
    # What another thread changes while it is looked at is another state before or after.
    if not changes and description is not None and description == _describe(named_parts(module)):
        # What stands for nothing there may be a method later, under the same name.
        if _METHODS_OF_ONE.isdisjoint(chain.from_iterable(description.attributes)):
            keep(module, decoder, description)
    return changes


def _describe(named: Sequence[tuple[str, nn.Module]]) -> Description | None:
    names, parts = zip(*named)
    return describe(names, parts, _SETTINGS_READ)


def _are_other_ways(parts: Sequence[nn.Module], hooks: bool) -> bool:
    """Whether parts that are upstream's may come to compute something else."""
    if next(_changes_around(), None) is not None:
        return True
    classes = _Classes()
    if any(classes.look_at(cls)[1] for cls in set(map(type, parts))):
        return True
    owns = list(map(vars, parts[1:]))
    return hooks and any(any([own.get(kind) for own in owns]) for kind in HOOKS)


def _changes_found(module: nn.Module, *, decoder: bool, hooks: bool) -> Iterator[str]:
    # Our own class, whose forward stands in for that of upstream's.
    classes = _Classes()
    _, changed = classes.look_at(type(module))
    if changed:
        yield f"its class was given another {changed}"
    if (shadowed := _shadowed(module)) is not None:
        yield f"its {shadowed} was replaced"
    yield from _changes_around()
    positions = _own_tensor(module, "positional_embedding")
    if positions is None or positions.ndim != 2:
        yield "positional_embedding is not a matrix of its own"
        return
    n_state = positions.shape[1]
    found = dict(named_parts(module))
    count = len(found["blocks"]._modules) if "blocks" in found else 0  # it may have no len()
    expected = _expected(decoder, count, n_state)
    if count == 0:
        yield "it has no blocks"
    heads = getattr(found.get("blocks.0.attn"), "n_head", None)
    told: tuple[str, ...] = ("blocks.",) if count == 0 else ()
    for name in (*found, *(expected.keys() - found.keys())):
        if not name or name.startswith(told):  # said of the part that this one belongs to
            continue
        if name not in found:
            change = f"{name} is missing"
        elif name not in expected:
            change = f"{name} is no part of upstream's"
        else:
            change = _change(name, found[name], expected[name], heads, classes, hooks)
        if change is not None:
            yield change
            told += (f"{name}.",)
    if heads:
        yield from head_reasons(heads, n_state)
    elif count:
        yield "it has no heads"


def _changes_around() -> Iterator[str]:
    """What of the functions that all parts come down to somebody has replaced."""
    attention = getattr(sys.modules["whisper.model"], "scaled_dot_product_attention", None)
    if attention not in (None, sys.modules["torch"]._C._nn.scaled_dot_product_attention):
        yield "whisper.model.scaled_dot_product_attention was replaced"
    yield from function_changes("whisper.model", _FUNCTIONS)


def function_changes(module: str, names: Sequence[str]) -> Iterator[str]:
    """What of torch.nn.functional, that upstream's module comes down to, somebody has replaced."""
    functional = sys.modules["torch.nn.functional"]
    if getattr(sys.modules[module], "F", None) is not functional:
        yield f"{module}.F was replaced"
    for name in names:
        function = getattr(functional, name)
        if getattr(function, "__name__", None) != name or (
            not isinstance(function, BuiltinFunctionType)
            and is_replaced(function, functional.__name__)
        ):
            yield f"torch.nn.functional.{name} was replaced"


def head_reasons(heads: int, n_state: int) -> list[str]:
    """The kernels know the head size of all Whisper models, and no other."""
    if n_state != 64 * heads:
        return [f"its head_dim is {n_state / heads:g}; the kernels are for 64"]
    return []


def _change(
    name: str, child: nn.Module, part: Part, heads: int | None, classes: _Classes, hooks: bool
) -> str | None:
    """How a part is not what upstream has in this place, if so."""
    where, changed = classes.look_at(type(child))
    if where != part.cls:
        return f"{name} was replaced by {where}"
    own = vars(child)
    if hooks and any(map(own.get, HOOKS)) and not (part.heard and only_listens(child)):
        return f"{name} has hooks"
    if (shadowed := _shadowed(child)) is not None:
        return f"{name}.{shadowed} was replaced"
    replaced = (method for method in _METHODS_OF_ONE if own.get(method) is not None)
    changed = next(replaced, changed)
    if changed:
        return f"{name}.{changed} was replaced"
    if "parametrizations" in own["_modules"]:
        return f"{name} is parametrized"
    for setting, value in part.settings:
        if (found := getattr(child, setting, None)) != value:
            return f"{name} has {setting}={found!r}"
    if part.cls in _RUN_IN_ORDER and _are_permuted(tuple(own["_modules"])):
        return f"{name} has its layers in another order"
    if part.cls == _ATTENTION and child.n_head != heads:
        return f"{name} has n_head={child.n_head!r}"
    if part.shape and (changed := _changed_parameters(child, part)):
        return f"{name} {changed}"
    return None


def _shadowed(module: nn.Module) -> str | None:
    """A part or tensor whose place something else of this name has taken, if any."""
    own = vars(module)
    places = own, own["_parameters"], own["_buffers"], own["_modules"]
    for place, other in combinations(places, 2):
        if other and not place.keys().isdisjoint(other):
            return min(place.keys() & other.keys())
    return None


def _are_permuted(numbers: tuple[str, ...]) -> bool:
    """Whether layers that are numbered do not stand as they are, which is how upstream runs them.

    One that was taken out and put back under its old number comes last.
    """
    in_order = _numbers(len(numbers))
    return numbers != in_order and set(numbers) == set(in_order)


@lru_cache(maxsize=None)
def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _changed_parameters(child: nn.Module, part: Part) -> str | None:
    """How the weight or bias of a part is not as upstream's, if so."""
    weight, bias = _own_tensor(child, "weight"), _own_tensor(child, "bias")
    if weight is None:
        return "has no weight of its own"
    shape = weight.shape
    if shape != part.shape and (
        len(shape) != len(part.shape)
        or any(size not in (None, length) for size, length in zip(part.shape, shape))
    ):
        return f"has weights of shape {tuple(shape)}"
    if bias is None:
        # A linear layer may go without. But one that is no parameter would go unseen.
        unseen = getattr(child, "bias", None) is not None
        return "has no bias of its own" if unseen or part.cls == _NORM.cls else None
    if bias.shape != shape[:1] or part.cls == _EMBEDDING:
        return f"has a bias of shape {tuple(bias.shape)}"
    return None


def _own_tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter or buffer; None where the attribute is anything else, or is not there."""
    if name in vars(module):
        return None
    found = module._parameters.get(name)
    return module._buffers.get(name) if found is None else found
