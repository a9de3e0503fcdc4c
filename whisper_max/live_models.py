"""Models already loaded: run their encoder and decoder on MAX by swapping two classes, and back.

`model.encoder.__class__ = MaxAudioEncoder` changes what `forward` does and nothing else:
parameters, buffers, state_dict keys, hooks, isinstance and every reference to the module survive.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from . import activation, settings, versions

if TYPE_CHECKING:
    from torch import nn

Model = TypeVar("Model", bound="nn.Module")


def reasons_against(model: nn.Module) -> dict[str, Sequence[str]]:
    """Why the encoder or decoder of a model cannot be taken, by target.

    Raises TypeError when the model has no encoder and decoder.
    """
    against = {
        target: _reasons_against(target, module) for target, module in _encoder_and_decoder(model)
    }
    return {target: reasons for target, reasons in against.items() if reasons}


def take(model: nn.Module, *, except_for: Container[str]) -> None:
    """Swaps the classes of the encoder and decoder, unless a target is excepted."""
    for target, module in _encoder_and_decoder(model):
        if target not in except_for:
            module.__class__ = max_class(target)
            activation.accelerated.add(module)
            activation.released.discard(module)


def give_back(model: nn.Module) -> None:
    """Swaps them back. Raises TypeError when the model has no encoder and decoder."""
    for _, module in list(_encoder_and_decoder(model)):
        _swap_back(module)
        activation.released.add(module)


def refresh(model: Model) -> Model:
    """Take the weights of `model` anew at the next call.

    Needed only after changing a part of a weight in a way that PyTorch does not count: through
    `.data` or a storage, through a NumPy or DLPack view, through the memory of a vector that
    parameters were made of, or by a collective of `torch.distributed`.
    Other changes are noticed, and in training, where PyTorch runs the model, these are as well.
    Raises TypeError when the model has no encoder and decoder.
    """
    for _, module in _encoder_and_decoder(model):
        forget(module)
    return model


def adopt(model: nn.Module) -> None:
    """Take up a model loaded before patch(), when it comes by for a decode.

    Swaps the modules whose target is patched and whose class is exactly upstream's, unless
    restore(model) released them. Cheap when there is nothing to do.
    """
    for target in ("encoder", "decoder"):
        # Upstream's inference takes whatever has a decoder: the other part may not be there.
        module = getattr(model, target, None)
        if not activation.is_active(target):
            continue
        cls = max_class(target)
        # A module of another class need not even be one that a set could hold.
        if type(module) is upstream_class(cls) and module not in activation.released:
            module.__class__ = cls
            activation.adopted.add(module)


def release_adopted() -> None:
    """Swap back what `adopt` swapped: the state of live models before patch().

    Models made while patched keep our class, which is upstream's in all but name now, for the next
    patch(); what MAX kept for them is freed.
    """
    for module in list(activation.adopted):
        if module not in activation.accelerated:
            _swap_back(module)
    activation.adopted.clear()
    if (model_state := activation.model_state()) is not None:
        model_state.drop_all(keep=activation.accelerated)


def restore_all() -> None:
    """Swap back every live model: taken up by a decode or accelerate(model), or made patched."""
    release_adopted()
    for module in [*activation.accelerated, *activation.made]:
        _swap_back(module)


def forget(module: nn.Module) -> None:
    """Drop what MAX keeps for this module (packed weights, remembered results), if anything."""
    if is_max(module):
        module.drop_max_state()


def is_max(module: nn.Module) -> bool:
    """Whether the class of `module` is exactly one of ours, not a subclass of it."""
    return type(module).__module__ in ("whisper_max.audio_encoder", "whisper_max.text_decoder")


def max_class(target: str) -> type[nn.Module]:
    """Our class for "encoder" or "decoder"."""
    if target == "encoder":
        from .audio_encoder import MaxAudioEncoder

        return MaxAudioEncoder
    from .text_decoder import MaxTextDecoder

    return MaxTextDecoder


def upstream_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of whisper.model that `cls` extends: the one imported with it, before patch()."""
    return next(base for base in cls.__mro__[1:] if base.__module__ == "whisper.model")


def _encoder_and_decoder(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for target in ("encoder", "decoder"):
        module = getattr(model, target, None)
        if module is None:
            raise TypeError(
                f"expected a model of whisper.load_model(), which has an encoder and a decoder; "
                f"this {type(model).__name__} has no {target}"
            )
        yield target, module


def _reasons_against(target: str, module: nn.Module) -> list[str]:
    if settings.active().mode == "off":
        return ["mode is 'off'"]
    reasons = versions.reasons_against(target)
    if reasons:
        return reasons
    cls = max_class(target)
    if type(module) in (cls, upstream_class(cls)):
        return []
    found = type(module)
    return [
        f"its class is {found.__module__}.{found.__qualname__}, "
        f"not whisper.model.{upstream_class(cls).__name__}"
    ]


def _swap_back(module: nn.Module) -> None:
    activation.accelerated.discard(module)
    if is_max(module):
        forget(module)
        module.__class__ = upstream_class(type(module))
