"""Why a call cannot run on MAX: every function here collects all its reasons.

They lie in the tensors, or in what PyTorch is doing; those in the module's parts are in
`changed_parts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from .changed_parts import CALLS_OF_ONE, HOOKS

if TYPE_CHECKING:
    import torch
    from torch import nn


# Of the tensors that the graphs take, by the kind of device. Float16 is upstream's on a GPU.
_DTYPES = {"cpu": ("torch.float32",), "cuda": ("torch.float16", "torch.float32")}

ASK_FOR_GPUS = (
    "the graphs for GPUs have never run on one, and patch(device='cuda') has to ask for them"
)
"""Of a reason that a user should hear of: nothing runs faster."""

LARGEST = 1e15
"""Of a mel spectrogram's numbers, and of the norm of audio features: squares of what layers make of
more may overflow."""

LARGEST_WEIGHT = 1e5
"""What a trained model is far from: with more, sums and squares inside may overflow."""


class UnsupportedByMax(RuntimeError):
    """A call cannot run on MAX.

    The one exception that drives fallback: in mode "auto" PyTorch takes over, in mode "strict"
    the user gets to see it. Any other exception is a fault and is never swallowed. An error that
    MAX itself raises becomes such a reason, and is logged as a warning.

    reasons : tuple of str, every reason; the message has all of them
    """

    def __init__(self, *reasons: str) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are; the CPU, where it has none."""
    import torch

    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def device_reasons(device: torch.device, wanted: str | None) -> list[str]:
    """Reasons against running a model that is on this device.

    wanted : the setting `device`
    """
    if device.type not in ("cpu", "cuda"):
        return [f"the model is on {device}"]
    if wanted not in (None, device.type):
        return [f"the model is on {device}, and device is {wanted!r}"]
    if device.type == "cuda" and wanted is None:
        return [f"the model is on {device}: {ASK_FOR_GPUS}"]
    return []


def tensor_reasons(name: str, tensor: object, device: torch.device) -> list[str]:
    """Reasons against taking this as mel spectrograms or audio features, whatever its shape.

    device : where the model is
    """
    import torch

    if type(tensor) is not torch.Tensor:
        return [f"{name} is a {type(tensor).__name__}, not a plain tensor"]
    reasons = []
    if tensor.device != device:
        reasons.append(f"{name} is on {tensor.device}")
    dtypes = _DTYPES[device.type]
    if str(tensor.dtype) not in dtypes:
        names = " or ".join(dtype.removeprefix("torch.") for dtype in dtypes)
        reasons.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, not {names}")
    if tensor.layout is not torch.strided:
        reasons.append(f"{name} has the layout {tensor.layout}")
    if torch.is_grad_enabled() and tensor.requires_grad:
        reasons.append(f"{name} requires gradients")
    return reasons


def mel_reasons(mel: torch.Tensor, n_mels: int, frames: int) -> list[str]:
    """Reasons against encoding this mel spectrogram, a plain tensor.

    Shape (batch, n_mels, frames) is what upstream's forward accepts; anything else goes there, for
    upstream's own error.
    """
    from . import tensor_numbers

    if mel.ndim != 3 or tuple(mel.shape[1:]) != (n_mels, frames) or mel.shape[0] == 0:
        return [f"mel has shape {tuple(mel.shape)}, expected (batch, {n_mels}, {frames})"]
    if not tensor_numbers.all_below(LARGEST, mel):
        return [f"mel holds values that are not finite, or beyond {LARGEST:.0e}"]
    return []


def features_reasons(features: torch.Tensor, n_audio_state: int) -> list[str]:
    """Reasons against decoding these audio features, shape = (windows, n_audio_ctx, n_state).

    On the CPU the kernel that reads their numbers looks at them, see `CrossCache.max_norm`.
    """
    import torch

    if features.ndim != 3 or features.shape[2] != n_audio_state or 0 in features.shape:
        return [
            f"audio features have shape {tuple(features.shape)}, "
            f"expected (batch, n_audio_ctx, {n_audio_state})"
        ]
    if features.device.type == "cpu":
        return []
    return norm_reasons(features.detach().norm(dim=-1, dtype=torch.float32).max().item())


def norm_reasons(max_norm: float) -> list[str]:
    """Reasons that lie in the numbers of audio features, of whose vectors this is the largest norm.

    max_norm : infinite, or not a number, where a number of theirs is
    """
    if not max_norm <= LARGEST:
        return [f"audio features hold values that are not finite, or beyond {LARGEST:.0e}"]
    return []


def tokens_reasons(
    tokens: object, n_text_ctx: int, n_vocab: int, device: torch.device
) -> list[str]:
    """Reasons against decoding these tokens, shape = (rows, count), with a model on a device."""
    import torch

    if type(tokens) is not torch.Tensor:
        return [f"tokens are a {type(tokens).__name__}, not a plain tensor"]
    if tokens.device != device:
        return [f"tokens are on {tokens.device}"]
    if tokens.dtype not in (torch.int64, torch.int32):
        return [f"tokens are {tokens.dtype}"]
    if tokens.ndim != 2 or 0 in tokens.shape or tokens.shape[1] > n_text_ctx:
        return [f"tokens have shape {tuple(tokens.shape)}, at most {n_text_ctx} each fit"]
    if bool((tokens < 0).any()) or bool((tokens >= n_vocab).any()):
        return ["tokens outside the vocabulary"]
    return []


def context_reasons(module: nn.Module) -> list[str]:
    """Reasons that lie in what PyTorch is doing around the call.

    To be looked at first: within a transform or a trace, tensors may not be what they seem.
    """
    import torch
    from torch.autograd import forward_ad
    from torch.fx import _symbolic_trace
    from torch.nn.modules import module as torch_module

    kind = device_of(module).type
    reasons = {
        "autocast is on": torch.is_autocast_enabled(kind if kind in _DTYPES else "cpu"),
        "the call is being traced": torch.jit.is_tracing()
        or torch.jit.is_scripting()
        or _symbolic_trace._is_fx_tracing_flag,
        "the call is being compiled": torch.compiler.is_compiling(),
        "the call is being captured": kind == "cuda" and torch.cuda.is_current_stream_capturing(),
        "the call is in a transform of torch.func": torch._C._functorch.peek_interpreter_stack()
        is not None,
        "forward-mode gradients are wanted": forward_ad._current_level >= 0,
        "a torch dispatch mode is on": torch._C._len_torch_dispatch_stack() > 0,
        "a torch function mode is on": _function_mode_is_on(),
        "global module hooks are installed": any(
            getattr(torch_module, f"_global{name}", None) for name in HOOKS
        ),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if not found and wants_gradients(module):
        found.append("gradients are wanted: wrap the call in torch.no_grad()")
    return found


def wants_gradients(module: nn.Module) -> bool:
    """Whether PyTorch would record what this module computes."""
    import torch

    return torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (*module.parameters(), *module.buffers())
    )


def _function_mode_is_on() -> bool:
    """Whether somebody watches or changes PyTorch's functions, other than by a default device."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def bypass_reasons(name: str, module: nn.Module) -> list[str]:
    """Reasons against computing what a module computes without calling it.

    A hook on the module itself, or a forward of this one instance, would not be run.
    """
    reasons = []
    if any(getattr(module, hooks, None) for hooks in HOOKS):
        reasons.append(f"the {name} has hooks")
    own = vars(module)
    reasons += [
        f"the {name}'s {method} was replaced"
        for method in CALLS_OF_ONE
        if own.get(method) is not None
    ]
    return reasons


def parameter_reasons(parameters: Iterable[torch.Tensor], device: torch.device) -> list[str]:
    """Reasons that lie in the parameters: where they are, and what they are.

    device : where they all should be
    """
    import torch

    reasons: dict[str, None] = {}
    for tensor in parameters:
        if tensor.device != device:
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


def value_reasons(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Reasons that lie in the numbers of a module's parameters and buffers, by name."""
    import torch

    from . import tensor_numbers

    reasons = []
    for name, tensor in tensors.items():
        if name == "mask":
            n_text_ctx = len(tensors["positional_embedding"])
            shape = (n_text_ctx, n_text_ctx)
            causal = torch.full(shape, -torch.inf, device=tensor.device).triu_(1)
            if tensor.ndim != 2 or not torch.equal(tensor[:n_text_ctx, :n_text_ctx], causal):
                reasons.append("mask is not the causal one")
        elif tensor.numel() and not tensor_numbers.all_below_on_any(LARGEST_WEIGHT, tensor):
            reasons.append(
                f"{name} holds values that are not finite, or beyond {LARGEST_WEIGHT:.0e}"
            )
    return reasons


def float16_reasons(matrices: Iterable[torch.Tensor]) -> list[str]:
    """Reasons against holding finite weights in float16."""
    if any(bool(end.half().isinf()) for matrix in matrices for end in matrix.aminmax()):
        return ["weights are beyond float16"]
    return []
