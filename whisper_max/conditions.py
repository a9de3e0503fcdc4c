"""Why a call cannot run on MAX: every function here collects all its reasons.

MAX computes what openai-whisper's own modules compute. Whatever has been hung onto, put into or
taken out of those modules is honoured by running them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

# What the submodules of upstream's encoder and decoder are, with nothing replaced.
_UPSTREAM_MODULES = {
    "whisper.model.Conv1d",
    "whisper.model.LayerNorm",
    "whisper.model.Linear",
    "whisper.model.MultiHeadAttention",
    "whisper.model.ResidualAttentionBlock",
    "torch.nn.modules.activation.GELU",
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.sparse.Embedding",
}
# What an instance of them could be told to do otherwise, by class or by name.
_SETTINGS = {
    "Conv1d": {"padding": (1,), "dilation": (1,), "groups": 1, "padding_mode": "zeros"},
    "conv1": {"stride": (1,)},
    "conv2": {"stride": (2,)},
    "Embedding": {"max_norm": None},
    "GELU": {"approximate": "none"},
    "LayerNorm": {"eps": 1e-5, "elementwise_affine": True},
}
# The parts of a block; where they are linear, outputs and inputs in multiples of n_state.
_ATTENTION = {"": None, ".query": (1, 1), ".key": (1, 1), ".value": (1, 1), ".out": (1, 1)}
_BLOCK_PARTS = {
    **{f"{name}{part}": size for name in ("attn", "cross_attn") for part, size in _ATTENTION.items()},
    **dict.fromkeys(("attn_ln", "cross_attn_ln", "mlp_ln", "mlp", "mlp.1")),
    "mlp.0": (4, 1),
    "mlp.2": (1, 4),
}
_OTHER_PARTS = {"conv1", "conv2", "blocks", "ln_post", "token_embedding", "ln"}
_METHODS = ("forward", "qkv_attention", "_conv_forward")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


class UnsupportedByMax(RuntimeError):
    """A call cannot run on MAX; the message has every reason.

    The one exception that drives fallback: in mode "auto" PyTorch takes over, in mode "strict"
    the user gets to see it. Any other exception is a fault and is never swallowed.
    """


def encoder_input_reasons(mel: object, n_mels: int, frames: int) -> list[str]:
    """Reasons against encoding this mel spectrogram on MAX.

    Shape (batch, n_mels, frames) is what upstream's forward accepts; anything else goes there, for
    upstream's own error.
    """
    reasons = list(_tensor_reasons("mel", mel))
    if not reasons:
        if mel.ndim != 3 or tuple(mel.shape[1:]) != (n_mels, frames) or mel.shape[0] == 0:
            reasons.append(
                f"mel has shape {tuple(mel.shape)}, expected (batch, {n_mels}, {frames})"
            )
        elif not bool(mel.isfinite().all()):
            reasons.append("mel holds values that are not finite")
    return reasons


def features_reasons(features: object, n_audio_state: int) -> list[str]:
    """Reasons against decoding these audio features, shape = (windows, n_audio_ctx, n_state)."""
    reasons = list(_tensor_reasons("audio features", features))
    if not reasons:
        if features.ndim != 3 or features.shape[2] != n_audio_state or 0 in features.shape:
            reasons.append(
                f"audio features have shape {tuple(features.shape)}, "
                f"expected (batch, n_audio_ctx, {n_audio_state})"
            )
        elif not bool(features.isfinite().all()):
            reasons.append("audio features hold values that are not finite")
    return reasons


def tokens_reasons(tokens: object, n_text_ctx: int, n_vocab: int) -> list[str]:
    """Reasons against decoding these tokens, shape = (rows, count)."""
    import torch

    if type(tokens) is not torch.Tensor:
        return [f"tokens are a {type(tokens).__name__}, not a plain tensor"]
    if tokens.device.type != "cpu":
        return [f"tokens are on {tokens.device}"]
    if tokens.dtype not in (torch.int64, torch.int32):
        return [f"tokens are {tokens.dtype}"]
    if tokens.ndim != 2 or 0 in tokens.shape or tokens.shape[1] > n_text_ctx:
        return [f"tokens have shape {tuple(tokens.shape)}, at most {n_text_ctx} each fit"]
    if bool((tokens < 0).any()) or bool((tokens >= n_vocab).any()):
        return ["tokens outside the vocabulary"]
    return []


def module_reasons(
    module: nn.Module, n_state: int, *, sdpa_is_off: bool = False
) -> list[str]:
    """Reasons that lie in the module, in PyTorch's state, and in what others did to either.

    sdpa_is_off : whether a False `use_sdpa` is the caller's own doing, and no reason
    """
    if len(module.blocks) == 0:
        return [*_state_reasons(module), "it has no blocks"]
    heads = getattr(getattr(module.blocks[0], "attn", None), "n_head", None)
    return [
        *_state_reasons(module),
        *_structure_reasons(module, heads, n_state, sdpa_is_off),
        *(head_reasons(heads, n_state) if heads else ()),
    ]


def bypass_reasons(name: str, module: nn.Module) -> list[str]:
    """Reasons against computing what a module computes without calling it.

    A hook on the module itself, or a forward of this one instance, would not be run.
    """
    reasons = []
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        reasons.append(f"the {name} has hooks")
    if "forward" in vars(module):
        reasons.append(f"the {name}'s forward was replaced")
    return reasons


def head_reasons(heads: int, n_state: int) -> list[str]:
    """The kernels know the head size of all Whisper models, and no other."""
    if n_state != 64 * heads:
        return [f"its head_dim is {n_state / heads:g}; the kernels are for 64"]
    return []


def _tensor_reasons(name: str, tensor: object) -> Iterator[str]:
    import torch

    if type(tensor) is not torch.Tensor:
        yield f"{name} is a {type(tensor).__name__}, not a plain tensor"
        return
    if tensor.device.type != "cpu":
        yield f"{name} is on {tensor.device}"
    if tensor.dtype is not torch.float32:
        yield f"{name} is {str(tensor.dtype).removeprefix('torch.')}, not float32"
    if tensor.layout is not torch.strided:
        yield f"{name} has the layout {tensor.layout}"
    if torch.is_grad_enabled() and tensor.requires_grad:
        yield f"{name} requires gradients"


def _state_reasons(module: nn.Module) -> Iterator[str]:
    import torch
    from torch.nn.modules import module as torch_module

    if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
        yield "gradients are wanted: wrap the call in torch.no_grad()"
    if torch.is_autocast_enabled("cpu"):
        yield "autocast is on"
    if torch.jit.is_tracing() or torch.jit.is_scripting():
        yield "the call is being traced"
    if torch.compiler.is_compiling():
        yield "the call is being compiled"
    if any(getattr(torch_module, name, None) for name in _GLOBAL_HOOKS):
        yield "global module hooks are installed"


def _structure_reasons(
    module: nn.Module, attention_heads: int | None, n_state: int, sdpa_is_off: bool
) -> Iterator[str]:
    for name, child in module.named_modules():
        cls = type(child)
        if not name:  # our own class, whose forward stands in for that of upstream's
            if any(_is_changed(base, "forward") for base in cls.__mro__):
                yield "its class was given another forward"
            continue
        where = f"{cls.__module__}.{cls.__qualname__}"
        if where not in _UPSTREAM_MODULES:
            yield f"{name} was replaced by {where}"
        elif any(getattr(child, hooks, None) for hooks in _HOOKS):
            yield f"{name} has hooks"
        elif changed := next(_changed_methods(child), None):
            yield f"{name}.{changed} was replaced"
        elif getattr(child, "parametrizations", None):
            yield f"{name} is parametrized"
        elif changed := _changed_setting(name, child, attention_heads, n_state):
            yield f"{name} {changed}"
        elif _wants_attention(child, name) and not sdpa_is_off:
            yield "use_sdpa is False: attention weights are wanted"
            return


def _wants_attention(child: nn.Module, name: str) -> bool:
    """Whether somebody made upstream's decoder form its attention weights, to look at them."""
    return "cross_attn" in name and getattr(child, "use_sdpa", True) is False


def _changed_methods(child: nn.Module) -> Iterator[str]:
    for name in _METHODS:
        if name in vars(child):
            yield name
            continue
        owner = next((cls for cls in type(child).__mro__ if name in vars(cls)), None)
        if owner is not None and _is_changed(owner, name):
            yield name


def _is_changed(cls: type, name: str) -> bool:
    """Whether a class has a method of this name that was not written for it."""
    return name in vars(cls) and vars(cls)[name].__module__ != cls.__module__


def _changed_setting(
    name: str, child: nn.Module, attention_heads: int | None, n_state: int
) -> str | None:
    """How a part of upstream's class is not what upstream has in this place, if so."""
    kind = type(child).__name__
    for key in (kind, name):
        for setting, value in _SETTINGS.get(key, {}).items():
            if (found := getattr(child, setting, None)) != value:
                return f"has {setting}={found!r}"
    if kind == "MultiHeadAttention" and child.n_head != attention_heads:
        return f"has n_head={child.n_head!r}"
    stem, _, below = name.partition(".")
    part = below.partition(".")[2]
    if stem not in _OTHER_PARTS or (part and part not in _BLOCK_PARTS):
        return "is no part of upstream's"
    size = _BLOCK_PARTS.get(part) or ((1,) if kind == "LayerNorm" else None)
    if size is not None and child.weight.shape != tuple([n * n_state for n in size]):
        return f"has weights of shape {tuple(child.weight.shape)}"
    return None


def parameter_reasons(parameters: Iterable[torch.Tensor]) -> list[str]:
    """Reasons that lie in the parameters: where they are, and what they are."""
    import torch

    reasons: dict[str, None] = {}
    for tensor in parameters:
        if tensor.device.type != "cpu":
            reasons[f"the model is on {tensor.device}"] = None
        elif tensor.dtype is not torch.float32:
            reasons[f"the parameters are {str(tensor.dtype).removeprefix('torch.')}"] = None
        elif tensor.is_inference():
            reasons["the parameters are inference tensors, which do not tell of changes"] = None
        elif type(tensor) not in (torch.nn.Parameter, torch.Tensor):
            reasons[f"the parameters are of the class {type(tensor).__name__}"] = None
        elif tensor.layout is not torch.strided:
            reasons[f"the parameters have the layout {tensor.layout}"] = None
    return list(reasons)
