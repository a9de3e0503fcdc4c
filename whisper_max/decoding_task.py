"""A batch of windows with several rows each: `whisper.decoding.DecodingTask.run`.

Upstream's run pairs the rows of beam search, or of best_of, with the windows of a batch wrongly,
and fails. Each window is decoded on its own here, as `decode` does with a single one.
"""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor
from whisper.decoding import DecodingResult, DecodingTask

from . import activation, on_one_thread
from .activation import originals
from .changed_parts import has_replaced

_BEFORE_THE_LOOP = ("_get_audio_features", "_detect_language")

upstream_run = originals.get("whisper.decoding.DecodingTask.run", DecodingTask.run)


def max_run(self: DecodingTask, mel: Tensor) -> list[DecodingResult]:
    """One result for each window, as upstream's `DecodingTask.run`.

    mel : torch.Tensor, shape = (windows, n_mels, 2 * n_audio_ctx)
        log-mel spectrograms; or encoded audio, (windows, n_audio_ctx, n_audio_state)
    """
    with on_one_thread.decode() if _computes_little(self) else nullcontext():
        off = activation.why_off("decoding_loop", getattr(self.model, "decoder", None))
        if off is not None or not _fails_upstream(self, mel):
            return upstream_run(self, mel)
        return [result for window in mel.split(1) for result in upstream_run(self, window)]


def _fails_upstream(task: DecodingTask, mel: Tensor) -> bool:
    """Whether these are several windows with several rows each; not what nobody could decode.

    For the language alone, upstream does not come to where it fails; and somebody may mend that.
    """
    if type(task) is not DecodingTask or task.n_group == 1 or task.options.task == "lang_id":
        return False
    if any(has_replaced(task, name, "whisper.decoding") for name in _BEFORE_THE_LOOP):
        return False
    return isinstance(mel, Tensor) and mel.ndim == 3 and len(mel) > 1


def _computes_little(task: DecodingTask) -> bool:
    """Whether its loop only chooses among logits: upstream's and stable-ts's, unless extended."""
    if type(task).__module__ not in ("whisper.decoding", "stable_whisper.decode"):
        return False
    computing = (*task.logit_filters, task.decoder)
    return all(type(part).__module__ == "whisper.decoding" for part in computing)
