"""Inferences and tasks as objects: extended, copied, exchanged, wrapped; as upstream's are."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import whisper
from whisper import decoding
from whisper.model import Whisper

import whisper_max
from harness import on_pytorch, with_fallback
from recordings import samples
from strategies import numbers, small, token_rows
from test_decoding_options import assert_same

FEATURES, TOKENS = numbers((1, 60, 128), 2), token_rows((2, 30), 100, 3)
PROMPT = 3
OPTIONS = decoding.DecodingOptions(fp16=False, language="en", without_timestamps=True)

pytestmark = pytest.mark.allow_fallback


@pytest.fixture(scope="module")
def model():
    return small().build()


@pytest.fixture
def mel():
    return whisper.log_mel_spectrogram(whisper.pad_or_trim(samples("en02")))[None]


def assert_upstreams_loop_runs(decode, plain, checkpoint, reason: str) -> None:
    """It gives what it gives unpatched, for this reason."""
    expected = decode(plain)
    with with_fallback():
        found = decode(checkpoint)
        reasons = whisper_max.status().targets["decoding_loop"].reasons
    if isinstance(expected, RuntimeError):
        assert (type(found), str(found)) == (type(expected), str(expected))
    else:
        assert_same(found, expected)
    assert reason in reasons


def with_more_tokens(model: Whisper, count: int) -> Whisper:
    """A copy whose vocabulary has some more tokens, which are as likely as the first ones."""
    copied = Whisper(dataclasses.replace(model.dims, n_vocab=model.dims.n_vocab + count)).eval()
    state = dict(model.state_dict())
    embedding = state["decoder.token_embedding.weight"]
    state["decoder.token_embedding.weight"] = torch.cat([embedding, embedding[:count]])
    copied.load_state_dict(state)
    return copied


@pytest.mark.parametrize("of_task", [True, False])
@pytest.mark.parametrize("options", [{}, {"beam_size": 3}], ids=["greedy", "beams"])
def test_an_inference_of_another_model(plain, checkpoint, mel, of_task, options):
    options = dataclasses.replace(OPTIONS, sample_len=8, **options)

    def decode(model):
        other = with_more_tokens(model, 2000)
        first, second = (other, model) if of_task else (model, other)
        task = decoding.DecodingTask(first, options)
        task.inference = decoding.PyTorchInference(second, len(task.initial_tokens))
        if options.beam_size:
            task.decoder.inference = task.inference
        return task.run(mel)[0]

    reason = "the inference decodes another model than the task's"
    assert_upstreams_loop_runs(decode, plain, checkpoint, reason)


@pytest.mark.parametrize("name", ["logits", "rearrange_kv_cache", "cleanup_caching"])
def test_upstreams_inference_wrapped_after_patch(plain, checkpoint, mel, monkeypatch, name):
    options = dataclasses.replace(OPTIONS, beam_size=2)
    original = getattr(decoding.PyTorchInference, name)
    calls = []

    def wrapped(self, *arguments):
        calls.append(len(self.kv_cache))
        return original(self, *arguments)

    def decode(model):
        calls.clear()
        return whisper.decode(model, mel, options)[0], list(calls)

    upstream = decoding.PyTorchInference
    monkeypatch.setattr(upstream, name, wrapped)
    expected, expected_calls = decode(plain)
    monkeypatch.undo()
    with with_fallback():
        usual, no_calls = decode(checkpoint)
        monkeypatch.setattr(upstream, name, wrapped)
        found, found_calls = decode(checkpoint)
    assert_same(found, expected)
    assert found_calls == expected_calls and not no_calls


def test_an_inference_whose_caches_are_kept(plain, checkpoint, mel):
    def keep(model):
        task = decoding.DecodingTask(model, OPTIONS)
        task.inference.cleanup_caching = lambda: None
        task.run(mel)
        caches = [cache.shape for cache in task.inference.kv_cache.values()]
        for hook in task.inference.hooks:
            hook.remove()
        return caches

    expected = keep(plain)
    with with_fallback():
        assert keep(checkpoint) == expected


@torch.no_grad()
def test_an_inference_that_has_decoded_before_its_task_runs(plain, checkpoint, mel):
    def decode(model):
        task = decoding.DecodingTask(model, dataclasses.replace(OPTIONS, sample_len=5))
        features = model.embed_audio(mel)
        task.inference.logits(torch.tensor([task.initial_tokens]), features)
        try:
            return task.run(features)[0]
        except RuntimeError as error:  # 20231117 cannot mask scores of so many keys
            return error

    reason = "the inference is in the middle of a decode"
    assert_upstreams_loop_runs(decode, plain, checkpoint, reason)


def test_a_subclass_with_names_of_its_own(plain, checkpoint, mel):
    """Whatever ours are called: a subclass of upstream's may have those names."""

    def decode(model):
        class Own(decoding.PyTorchInference):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                self.session = self.features = self.tokens = self._kv_cache = "mine"

            def start(self):
                raise AssertionError

            _step = _choose = _end = _resume = leave_to_pytorch = decode_of = is_open = start

            def logits(self, tokens, features):
                return super().logits(tokens, features) * 1

        task = decoding.DecodingTask(model, OPTIONS)
        task.inference = Own(model, len(task.initial_tokens))
        return task.run(mel)[0]

    expected = decode(plain)
    with with_fallback():
        assert_same(decode(checkpoint), expected)
        assert whisper_max.status().targets["inference"].max_calls > 1


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("steps", [0, 2])
@torch.no_grad()
def test_copies_in_the_middle_of_a_decode(model, how, steps):
    def outcome(model):
        inference = decoding.PyTorchInference(model, PROMPT)
        for count in range(PROMPT, PROMPT + steps):
            inference.logits(TOKENS[:, :count], FEATURES)
        copied = how(inference) if how is not pickle.dumps else inference
        logits = [copied.logits(TOKENS[:, : PROMPT + steps], FEATURES)]
        if how is pickle.dumps:  # upstream's hooks cannot be pickled
            inference.cleanup_caching()
            copied = pickle.loads(pickle.dumps(inference))
            logits.append(copied.logits(TOKENS[:, :PROMPT], FEATURES))
        copied.cleanup_caching()
        inference.cleanup_caching()
        return logits

    expected = outcome(on_pytorch(model))
    with with_fallback():
        found = outcome(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("steps", [1, 2])
@torch.no_grad()
def test_buffers_filled_anew_before_pytorch_goes_on(model, windows, steps):
    """Upstream has taken what it needs of the features, and of all tokens but the last."""

    def outcome(model):
        features, tokens = numbers((windows, 60, 128), 6), TOKENS.clone()
        inference = decoding.PyTorchInference(model, PROMPT)
        for count in range(PROMPT, PROMPT + steps):
            inference.logits(tokens[:, :count], features)
        features.zero_(), tokens[:, : PROMPT + steps - 1].zero_()
        caches = {name: cache.clone() for name, cache in enumerate(inference.kv_cache.values())}
        logits = inference.logits(tokens[:, : PROMPT + steps], features)
        inference.cleanup_caching()
        return caches, logits

    expected = outcome(on_pytorch(model))
    with with_fallback():
        found = outcome(model)
        assert whisper_max.status().targets["inference"].max_calls == steps
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("later", [None, FEATURES.double(), FEATURES.half()])
@torch.no_grad()
def test_features_of_a_later_step_that_upstream_cannot_take(model, later):
    def outcome(model):
        inference = decoding.PyTorchInference(model, PROMPT)
        inference.logits(TOKENS[:, :PROMPT], FEATURES)
        try:
            inference.logits(TOKENS[:, : PROMPT + 1], later)
        except (AttributeError, RuntimeError) as error:
            return type(error), str(error)
        finally:
            inference.cleanup_caching()

    expected = outcome(on_pytorch(model))
    assert expected is not None
    with with_fallback():
        assert outcome(model) == expected


def test_pickles_load_without_us(plain, checkpoint, mel, tmp_path):
    with with_fallback():
        task = decoding.DecodingTask(checkpoint, OPTIONS)
        expected = task.run(mel)[0]
        (tmp_path / "task").write_bytes(pickle.dumps((task, mel)))
    program = (
        "import pickle, sys; task, mel = pickle.load(open(sys.argv[1], 'rb'));"
        "assert 'whisper_max' not in sys.modules; print(task.run(mel)[0].tokens)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "task"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == str(expected.tokens), done.stderr


@pytest.mark.parametrize("rows", [[1.0, 0.0], (1, 0), [True, False]], ids=str)
@torch.no_grad()
def test_rows_that_are_not_integers(model, rows):
    def outcome(model):
        inference = decoding.PyTorchInference(model, PROMPT)
        try:
            inference.logits(TOKENS[:, :PROMPT], FEATURES)
            inference.rearrange_kv_cache(rows)
            return inference.logits(TOKENS[:, : PROMPT + 1], FEATURES)
        except (IndexError, RuntimeError, TypeError) as error:
            return type(error)
        finally:
            inference.cleanup_caching()

    expected = outcome(on_pytorch(model))
    with with_fallback():
        found = outcome(model)
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:
        assert found is expected


def hook_result(decoder, heard):
    return decoder.register_forward_hook(
        lambda module, given, found: heard.append(given[0].tolist()) or found + 1
    )


def hook_tokens(decoder, heard):
    return decoder.register_forward_pre_hook(
        lambda module, given: heard.append(given[0].tolist()) or (given[0] + 1, *given[1:])
    )


class Replaced:
    """A method of this one decoder that records what it is given and adds 1, until removed."""

    def __init__(self, name, decoder, heard):
        self._decoder, self._name, original = decoder, name, getattr(decoder, name)

        def changed(tokens, *given, **named):
            heard.append(tokens.tolist())
            return original(tokens, *given, **named) + 1

        setattr(decoder, name, changed)

    def remove(self):
        delattr(self._decoder, self._name)


@pytest.mark.parametrize(
    "change",
    [
        hook_result,
        hook_tokens,
        functools.partial(Replaced, "forward"),
        functools.partial(Replaced, "_call_impl"),
    ],
    ids=["hook", "pre-hook", "forward", "_call_impl"],
)
@pytest.mark.parametrize("steps", [0, 1])
@torch.no_grad()
def test_a_decoder_changed_in_the_middle(model, change, steps):
    def outcome(model):
        inference, heard = decoding.PyTorchInference(model, PROMPT), []
        for count in range(PROMPT, PROMPT + steps):
            inference.logits(TOKENS[:, :count], FEATURES)
        changed = change(model.decoder, heard)
        logits = [
            inference.logits(TOKENS[:, :count], FEATURES)
            for count in range(PROMPT + steps, PROMPT + steps + 2)
        ]
        changed.remove()
        inference.cleanup_caching()
        return logits, heard

    expected, expected_heard = outcome(on_pytorch(model))
    with with_fallback():
        found, heard = outcome(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert heard == expected_heard and len(heard) == 2


class Functional:
    """torch.nn.functional, with one function that halves its result."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> object:
        found = getattr(F, name)
        return found if name != self.name else lambda *given, **named: found(*given, **named) / 2


@pytest.mark.parametrize(
    ("owner", "attribute", "other"),
    [
        (F, "log_softmax", Functional("log_softmax").log_softmax),
        (decoding, "F", Functional("log_softmax")),
        (whisper.model, "F", Functional("linear")),
        (F, "gelu", F.silu),
        (F, "gelu", lambda x, approximate="none": torch.relu(x)),
        (F, "layer_norm", F.group_norm),
    ],
    ids=["log_softmax", "decoding.F", "model.F", "silu", "relu", "group_norm"],
)
def test_other_functions(plain, checkpoint, mel, monkeypatch, owner, attribute, other):
    def decode(model):
        try:
            return whisper.decode(model, mel, OPTIONS)[0]
        except (RuntimeError, TypeError, ValueError) as error:
            return type(error)

    with with_fallback():
        usual = decode(checkpoint)
        monkeypatch.setattr(owner, attribute, other)
        found = decode(checkpoint)
        monkeypatch.undo()
    monkeypatch.setattr(owner, attribute, other)
    expected = decode(plain)
    if isinstance(expected, type):
        assert found is expected
    else:
        assert_same(found, expected)
        assert found.avg_logprob != usual.avg_logprob


@pytest.mark.parametrize("length", [1.0, 5.0, "3", True])
def test_sample_len_that_is_no_integer(plain, checkpoint, mel, length):
    def decode(model):
        try:
            return whisper.decode(model, mel, dataclasses.replace(OPTIONS, sample_len=length))[0]
        except TypeError as error:
            return str(error)

    expected = decode(plain)
    with with_fallback():
        found = decode(checkpoint)
    if isinstance(expected, str):
        assert found == expected
    else:
        assert_same(found, expected)


def test_word_timestamps_call_a_model_with_a_call_of_its_own(plain, checkpoint):
    def outcome(model):
        calls = []

        class Own(Whisper):
            def __call__(self, *given, **named):
                calls.append(len(given))
                return super().__call__(*given, **named)

        own = Own(model.dims).eval()
        own.load_state_dict(model.state_dict())
        own.set_alignment_heads = None
        own.register_buffer("alignment_heads", model.alignment_heads, persistent=False)
        result = own.transcribe(
            samples("en02"), language="en", fp16=False, word_timestamps=True
        )
        return calls, [word["word"] for s in result["segments"] for word in s["words"]]

    expected = outcome(plain)
    with with_fallback():
        assert outcome(checkpoint) == expected
    assert expected[0]


@torch.no_grad()
def test_audio_in_a_buffer_that_is_filled_again_and_grows(checkpoint, mel):
    """PyTorch never again changes the size of memory that NumPy has seen."""
    buffer = torch.empty(0)
    with with_fallback():
        for windows in (1, 1, 2):
            torch.cat([mel] * windows, out=buffer)
            whisper.decode(checkpoint, buffer, OPTIONS)
        assert whisper_max.status().targets["encoder"].max_calls
        features = checkpoint.embed_audio(mel).clone()
        for _ in range(2):
            checkpoint.decoder(torch.tensor([[1, 2]]), features)
        features.resize_(2, *features.shape[1:])


def test_another_module_that_is_called_max(tmp_path):
    (tmp_path / "max.py").write_text("largest = 1\n")
    (tmp_path / "script.py").write_text(
        "import whisper, whisper_max\n"
        "from whisper_max import demo\n"
        "whisper_max.patch()\n"
        "model = whisper.load_model(str(demo.CHECKPOINT), device='cpu')\n"
        "print(model.transcribe(demo.read_wav(demo.RECORDING), fp16=False)['text'])\n"
        "print(whisper_max.status())\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "MAX cannot be imported" in done.stdout
