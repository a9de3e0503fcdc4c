"""Forward hooks that run beside MAX: those that look at what passes through a model.

stable-ts, whisper-timestamped and much research code hang forward hooks on cross attention, on the
token embedding, on the decoder's last LayerNorm or on the encoder's first convolution. Such a hook
is called with the inputs and the output that upstream's module would have had, and in upstream's
order. One that changes its module's output, by returning another or in place, ends the call on
MAX: PyTorch goes on with that output, and no hook is called twice. Hooks of any other kind or in
any other place are reasons for PyTorch from the start (`changed_parts`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn
from whisper import model as upstream

from . import on_one_thread
from .changed_parts import can_listen
from .dispatch import refuse

if TYPE_CHECKING:
    from .runtime.paths import Session

Output = Union[Tensor, tuple[Tensor, Optional[Tensor]]]

_UNCHANGED = object()


class Places(NamedTuple):
    """Where in an encoder or decoder hooks may listen.

    parts : by name, in the order of their calls
    norms : a decoder's LayerNorms before cross attention
    """

    parts: Mapping[str, nn.Module]
    norms: Sequence[nn.Module]

    def reasons(self) -> list[str]:
        """Reasons against MAX where it has nothing to tell hooks."""
        return [f"{name} has hooks" for name, part in self.parts.items() if part._forward_hooks]

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """PyTorch calls none of the hooks meanwhile."""
        with ExitStack() as stack:
            for part in self.parts.values():
                stack.enter_context(_hooks_instead(part, _UNCHANGED))
            yield


def places_of(module: nn.Module) -> Places:
    """Those of an encoder or decoder that is as upstream made it."""
    if "conv1" in module._modules:
        return Places({"conv1": module.conv1}, ())
    attention = {f"blocks.{i}.cross_attn": b.cross_attn for i, b in enumerate(module.blocks)}
    parts = {"token_embedding": module.token_embedding, **attention, "ln": module.ln}
    return Places(parts, [block.cross_attn_ln for block in module.blocks])


class Pass:
    """The hooks of one forward pass: each called once, whether MAX or PyTorch gets to the end."""

    def __init__(self) -> None:
        self._called: dict[nn.Module, object] = {}

    @contextmanager
    def on_pytorch(self) -> Iterator[None]:
        """Upstream's modules run: they call no hook that was called, and changed outputs stand."""
        with ExitStack() as stack:
            for part, output in self._called.items():
                stack.enter_context(_hooks_instead(part, output))
            yield

    def encoder(self, places: Places, mel: Tensor) -> None:
        """Calls the hooks of an encoder; mel, shape = (batch, n_mels, frames).

        Raises UnsupportedByMax where MAX cannot go on.
        """
        if _are_hooks(places, mel.device):
            conv1 = places.parts["conv1"]
            self._tell("conv1", conv1, (mel,), conv1.forward(mel))

    def decoder(
        self, places: Places, session: Session, tokens: Tensor, features: Tensor
    ) -> Tensor:
        """Decodes tokens, shape = (rows, count), in an open session; calls a decoder's hooks.

        features : the audio features as upstream's decoder would get them

        Returns logits, shape = (rows, count, n_vocab), in fresh memory. Raises UnsupportedByMax
        where MAX cannot go on.
        """
        rows, count = tokens.shape
        if not _are_hooks(places, tokens.device):
            if session.length == 0:
                return session.prefill(tokens, range(count))
            return session.step(tokens, range(rows * count)).view(rows, count, -1)

        own = tokens.to(torch.int32, copy=True)  # whatever a hook does to the caller's
        (_, embedding), *attention, (_, ln) = places.parts.items()
        if embedding._forward_hooks:
            self._tell("token_embedding", embedding, (tokens,), embedding.forward(tokens))
        layers = [layer for layer, (_, part) in enumerate(attention) if part._forward_hooks]
        scored = layers if _forms_scores() else []
        logits, seen = session.observed_step(own, range(rows * count), scored)
        for layer in layers:
            before, after = seen.before[layer], seen.after[layer]
            inputs = (places.norms[layer].forward(before), features)
            self._tell(*attention[layer], inputs, (after - before, seen.scores.get(layer)))
        if ln._forward_hooks:
            self._tell("ln", ln, (seen.end,), ln.forward(seen.end))
        return logits.view(rows, count, -1)

    def _tell(
        self, name: str, part: nn.Module, inputs: tuple[Tensor, ...], output: Output
    ) -> None:
        """Calls the hooks of one part, as `torch.nn.Module` does."""
        tensors = [*inputs, *(output if isinstance(output, tuple) else (output,))]
        tensors = [tensor for tensor in tensors if tensor is not None]
        versions = [tensor._version for tensor in tensors]
        result = output
        with on_one_thread.interrupted():
            for hook in list(part._forward_hooks.values()):
                replaced = hook(part, inputs, result)
                result = result if replaced is None else replaced
        changed = result is not output or versions != [tensor._version for tensor in tensors]
        self._called[part] = result if changed else _UNCHANGED
        if changed:
            refuse([f"a hook changed what {name} returns"])


def _are_hooks(places: Places, device: torch.device) -> bool:
    """Whether there is anybody to tell.

    Raises UnsupportedByMax where hooks cannot be called rightly: on a GPU, whose graphs do not tell
    what they see; in inference mode, where PyTorch does not count changes; or of another kind.
    """
    heard = {name: part for name, part in places.parts.items() if part._forward_hooks}
    if device.type == "cpu" and not torch.is_inference_mode_enabled():
        refused = {name: part for name, part in heard.items() if not can_listen(part)}
    else:
        refused = heard
    refuse([f"{name} has hooks" for name in refused])
    return bool(heard)


def _forms_scores() -> bool:
    """Whether upstream's attention returns its scores: not while it uses PyTorch's SDPA."""
    return not (
        getattr(upstream, "SDPA_AVAILABLE", False) and upstream.MultiHeadAttention.use_sdpa
    )


@contextmanager
def _hooks_instead(part: nn.Module, output: object) -> Iterator[None]:
    """For the time being a part has no hooks, or one that replaces its output."""
    hooks = part._forward_hooks
    part._forward_hooks = OrderedDict()
    if output is not _UNCHANGED:
        part._forward_hooks[0] = lambda *call: output
    try:
        yield
    finally:
        part._forward_hooks = hooks
