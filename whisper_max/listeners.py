"""Forward hooks that run beside MAX: those of packages that look at what passes through a model.

stable-ts and whisper-timestamped hang forward hooks on cross attention, on the token embedding, on
the decoder's last LayerNorm and on the encoder's first convolution. They are called with the
inputs and the output that upstream's module would have had, and in upstream's order. A hook may do
anything: all others, and those in other places, are reasons for PyTorch (`changed_parts`). Should
one of these change an output after all, PyTorch goes on with that output.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn
from whisper import model as upstream

from . import on_one_thread, settings
from .changed_parts import only_listens
from .dispatch import refuse

if TYPE_CHECKING:
    from .runtime.by_device import Session

Output = Union[Tensor, tuple[Tensor, Optional[Tensor]]]

_UNCHANGED = object()
_replacing = threading.RLock()


class Attention(NamedTuple):
    """A block's cross attention, and the LayerNorm before it."""

    name: str
    part: nn.Module
    norm: nn.Module


class HookPoints(NamedTuple):
    """Where in an encoder or decoder hooks may listen.

    parts : by name
    attention : of a decoder, of all blocks
    """

    parts: Mapping[str, nn.Module]
    attention: tuple[Attention, ...] = ()

    def reasons(self) -> list[str]:
        """The hooks there, as reasons against what has nothing to tell them."""
        return [f"{name} has hooks" for name, part in self.parts.items() if part._forward_hooks]

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """PyTorch calls none of the hooks meanwhile."""
        with _hooks_instead({part: _UNCHANGED for part in self.parts.values()}):
            yield


def hook_points_of(module: nn.Module) -> HookPoints:
    """Those of an encoder or decoder that is as upstream made it."""
    if "conv1" in module._modules:
        return HookPoints({"conv1": module.conv1})
    attention = tuple(
        Attention(f"blocks.{i}.cross_attn", block.cross_attn, block.cross_attn_ln)
        for i, block in enumerate(module.blocks)
    )
    parts = {name: part for name, part, _ in attention}
    parts = {"token_embedding": module.token_embedding, **parts, "ln": module.ln}
    return HookPoints(parts, attention)


class HookCalls:
    """The hooks of one forward pass: each called once, whether MAX or PyTorch gets to the end."""

    def __init__(self) -> None:
        self._called: dict[nn.Module, object] = {}

    @contextmanager
    def on_pytorch(self) -> Iterator[None]:
        """Upstream's modules run: they call no hook that was called, and changed outputs stand."""
        with _hooks_instead(self._called):
            yield

    def encoder(self, points: HookPoints, mel: Tensor) -> None:
        """Calls the hooks of an encoder; mel, shape = (batch, n_mels, frames).

        Raises UnsupportedByMax where MAX cannot go on.
        """
        if _somebody_listens(points, mel.device):
            conv1 = points.parts["conv1"]
            self._call_hooks("conv1", conv1, (mel,), conv1.forward(mel))

    def decoder(
        self, points: HookPoints, session: Session, tokens: Tensor, features: Tensor
    ) -> Tensor:
        """Decodes tokens, shape = (rows, count), in an open session; calls a decoder's hooks.

        features : the audio features as upstream's decoder would get them

        Returns logits, shape = (rows, count, n_vocab), in fresh memory. Raises UnsupportedByMax
        where MAX cannot go on.
        """
        rows, count = tokens.shape
        if not _somebody_listens(points, tokens.device):
            if session.length == 0:
                return _as_a_whole(session.prefill(tokens, range(count)))
            return _as_a_whole(session.step(tokens, range(rows * count)).view(rows, count, -1))

        embedding, ln = points.parts["token_embedding"], points.parts["ln"]
        if embedding._forward_hooks:
            self._call_hooks("token_embedding", embedding, (tokens,), embedding.forward(tokens))
        scored = [i for i, point in enumerate(points.attention) if point.part._forward_hooks]
        logits, seen = session.observed_step(
            tokens, range(rows * count), scored if _forms_scores() else []
        )
        for i, (name, part, norm) in enumerate(points.attention):
            if part._forward_hooks:
                inputs = (norm.forward(seen.before[i]), features)
                output = seen.after[i] - seen.before[i], seen.scores.get(i)
                self._call_hooks(name, part, inputs, output)
        if ln._forward_hooks:
            self._call_hooks("ln", ln, (seen.end,), ln.forward(seen.end))
        return _as_a_whole(logits.view(rows, count, -1))

    def _call_hooks(
        self, name: str, part: nn.Module, inputs: tuple[Tensor, ...], output: Output
    ) -> None:
        """Calls the hooks of one part, as `torch.nn.Module` does."""
        before = _versions(inputs, output)
        result = output
        try:
            with on_one_thread.interrupted():
                for hook in list(part._forward_hooks.values()):
                    replaced = hook(part, inputs, result)
                    result = result if replaced is None else replaced
        except Exception as error:
            error.of_a_hook = True  # so that lack of memory is not taken for MAX's
            raise
        changed = result is not output or before != _versions(inputs, output)
        self._called[part] = result if changed else _UNCHANGED
        if changed:
            refuse([f"a hook changed what {name} returns"])


def _as_a_whole(logits: Tensor) -> Tensor:
    """The same memory, but no view of a tensor: upstream's is none, and can be changed in place."""
    # PyTorch hands out no memory of any other GPU than the current one.
    with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
        return torch.from_dlpack(logits)


def _versions(inputs: tuple[Tensor, ...], output: Output) -> list[int]:
    """How often tensors were changed in place; PyTorch does not count that of inference tensors."""
    tensors = [*inputs, *(output if isinstance(output, tuple) else (output,))]
    return [t._version for t in tensors if t is not None and not t.is_inference()]


def _somebody_listens(points: HookPoints, device: torch.device) -> bool:
    """Whether there is a hook to be told. In mode "shadow", PyTorch tells them.

    Raises UnsupportedByMax where one cannot be called rightly: where it may do more than listen, on
    a GPU, whose graphs do not tell what they see, or where one module stands in two places.
    """
    heard = [part for part in points.parts.values() if part._forward_hooks]
    if not heard or settings.active().mode == "shadow":
        return False
    alike = len(set(points.parts.values())) < len(points.parts)
    if alike or device.type != "cpu" or not all(map(only_listens, heard)):
        refuse(points.reasons())
    return True


def _forms_scores() -> bool:
    """Whether upstream's attention returns its scores: not while it uses PyTorch's SDPA."""
    return not (
        getattr(upstream, "SDPA_AVAILABLE", False) and upstream.MultiHeadAttention.use_sdpa
    )


@contextmanager
def _hooks_instead(outputs: Mapping[nn.Module, object]) -> Iterator[None]:
    """For the time being these parts have no hooks, or one that replaces the output.

    One thread at a time, so that each puts back what was there.
    """
    if not any(part._forward_hooks for part in outputs):
        yield
        return
    with _replacing, ExitStack() as stack:
        for part, output in outputs.items():
            stack.callback(setattr, part, "_forward_hooks", part._forward_hooks)
            part._forward_hooks = OrderedDict()
            if output is not _UNCHANGED:
                part._forward_hooks[0] = lambda *call, output=output: output
        yield
