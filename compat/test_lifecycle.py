"""In any order of patching, accelerating, copying and pickling, models stay what they should be."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import torch
import whisper
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from whisper import decoding
from whisper.model import ModelDimensions

import whisper_max
from isolation import pytorch_threads
from strategies import Recipe, numbers, token_rows
from whisper_max import UnsupportedByMax, activation, audio_encoder, live_models, text_decoder
from whisper_max.runtime import model_state
from whisper_max.settings import TARGETS

RECIPES = [
    Recipe(ModelDimensions(8, 20, 64, 1, 1, 50, 10, 64, 1, 1), seed, gain=1.0, float16=True)
    for seed in (1, 2)
]
MEL, FEATURES, TOKENS = numbers((1, 8, 40), 1), numbers((1, 20, 64), 2), token_rows((2, 5), 50, 3)
MOST_MODELS = 4

pytestmark = pytest.mark.allow_fallback


@dataclass
class Part:
    """What an encoder or decoder should be.

    ours : its class is ours
    accelerated, adopted, released : it is known as that
    """

    ours: bool
    accelerated: bool = False
    adopted: bool = False
    released: bool = False


@dataclass
class Live:
    """A model, which recipe it is of, and what its parts should be."""

    model: whisper.model.Whisper
    recipe: int
    parts: dict[str, Part]


@dataclass(frozen=True)
class InForce:
    """What patch() or patched() has switched on."""

    mode: str
    targets: frozenset[str]


def part_of(model, target):
    return getattr(model, target)


def call(model, target):
    return model.encoder(MEL) if target == "encoder" else model.decoder(TOKENS, FEATURES)


def steps(model):
    """A decode by upstream's inference, or ours where that is patched."""
    inference = decoding.PyTorchInference(model, 3)
    try:
        return torch.cat([inference.logits(TOKENS[:, :end], FEATURES) for end in (3, 4, 5)], dim=1)
    finally:
        inference.cleanup_caching()


@lru_cache(maxsize=None)
def expected(recipe, target):
    """PyTorch's own result; first asked for while whisper is unpatched."""
    model = RECIPES[recipe].build()
    return steps(model) if target == "inference" else call(model, target)


@lru_cache(maxsize=None)
def checkpoint(recipe):
    """A file as whisper.load_model reads it."""
    model = RECIPES[recipe].build()
    state = {"dims": vars(model.dims), "model_state_dict": model.state_dict()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


modes = st.sampled_from(["auto", "auto", "strict", "shadow", "off"])
which = st.just(TARGETS) | st.lists(st.sampled_from(TARGETS), unique=True).map(tuple)


class Lifecycle(RuleBasedStateMachine):
    folder = None

    def __init__(self):
        super().__init__()
        self.in_force: InForce | None = None
        self.contexts: list[tuple[str, object, InForce | None]] = []
        self.live: list[Live] = []
        self.add(RECIPES[0].build(), 0, {})

    # The model of what should be

    @property
    def patched(self) -> frozenset[str]:
        return self.in_force.targets if self.in_force else frozenset()

    @property
    def mode(self) -> str:
        return self.in_force.mode if self.in_force else "auto"

    @property
    def disabled(self) -> bool:
        return any(kind == "disabled" for kind, _, _ in self.contexts)

    def add(self, model, recipe, parts):
        """Take a model into the list; parts not given are as those of a new one."""
        new = {target: Part(target in self.patched) for target in ("encoder", "decoder")}
        self.live.append(Live(model.requires_grad_(False), recipe, {**new, **parts}))
        del self.live[:-MOST_MODELS]

    def every_part(self):
        return [part for live in self.live for part in live.parts.values()]

    def switch(self, wanted: InForce | None):
        self.in_force = wanted
        if wanted is None:
            for part in self.every_part():
                if part.adopted and not part.accelerated:
                    part.ours = False
                part.adopted = False

    def on_max(self, live, target) -> bool:
        part = live.parts[target]
        active = target in self.patched or part.accelerated
        return part.ours and active and not self.disabled and self.mode not in ("off", "shadow")

    def pick(self, number) -> Live:
        return self.live[number % len(self.live)]

    # What programs do

    @rule(mode=modes, which=which)
    def patch(self, mode, which):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that differ from those in force
            whisper_max.patch(mode=mode, targets=which, compile="blocking")
        if not self.patched:
            self.switch(InForce(mode, frozenset(which if mode != "off" else ())))

    @rule()
    def unpatch(self):
        whisper_max.unpatch()
        for part in self.every_part():
            if part.accelerated or part.adopted:
                part.ours = part.accelerated = part.adopted = False
        self.switch(None)

    @rule(mode=modes, which=which)
    @precondition(lambda self: len(self.contexts) < 3)
    def enter_patched(self, mode, which):
        context = whisper_max.patched(mode=mode, targets=which, compile="blocking")
        context.__enter__()
        self.contexts.append(("patched", context, self.in_force))
        self.switch(InForce(mode, frozenset(which if mode != "off" else ())))

    @rule()
    @precondition(lambda self: len(self.contexts) < 3)
    def enter_disabled(self):
        context = whisper_max.disabled()
        context.__enter__()
        self.contexts.append(("disabled", context, None))

    @rule()
    @precondition(lambda self: self.contexts)
    def leave(self):
        kind, context, earlier = self.contexts.pop()
        context.__exit__(None, None, None)
        if kind == "patched":
            self.switch(earlier)

    @rule(number=st.integers(0, 3))
    def accelerate(self, number):
        live = self.pick(number)
        try:
            assert whisper_max.accelerate(live.model) is live.model
        except UnsupportedByMax:
            assert self.mode == "strict"
            return
        if self.mode != "off":
            for part in live.parts.values():
                part.ours = part.accelerated = True
                part.released = False

    @rule(number=st.integers(0, 3))
    def restore(self, number):
        live = self.pick(number)
        whisper_max.restore(live.model)
        for part in live.parts.values():
            part.ours = part.accelerated = False
            part.released = True

    @rule(number=st.integers(0, 3))
    def refresh(self, number):
        model = whisper_max.refresh(self.pick(number).model)
        assert model.encoder not in model_state._states

    @rule(number=st.integers(0, 3))
    def decode(self, number):
        live = self.pick(number)
        try:
            found = steps(live.model)
        except UnsupportedByMax:
            assert self.mode == "strict" and not self.disabled
        else:
            torch.testing.assert_close(
                found, expected(live.recipe, "inference"), rtol=1e-4, atol=1e-4
            )
        if "inference" in self.patched:
            for target, part in live.parts.items():
                if target in self.patched and not part.released and not part.ours:
                    part.ours = part.adopted = True

    @rule(recipe=st.integers(0, 1), how=st.sampled_from(["build", "load_model"]))
    def new(self, recipe, how):
        if how == "build":
            self.add(RECIPES[recipe].build(), recipe, {})
            return
        path = self.folder / f"{recipe}.pt"
        path.write_bytes(checkpoint(recipe))
        self.add(whisper.load_model(str(path), device="cpu"), recipe, {})

    @rule(number=st.integers(0, 3), what=st.sampled_from(["model", "parts"]))
    def deep_copy(self, number, what):
        live = self.pick(number)
        if what == "model":
            twin = copy.deepcopy(live.model)
        else:
            twin = copy.copy(live.model)
            twin._modules = {name: copy.deepcopy(part) for name, part in twin.named_children()}
        parts = {name: replace(part, released=False) for name, part in live.parts.items()}
        self.add(twin, live.recipe, parts)

    @rule(number=st.integers(0, 3), what=st.sampled_from(["model", "parts"]))
    def shallow_copy(self, number, what):
        live = self.pick(number)
        twin = copy.copy(live.model)
        if what == "model":
            self.add(twin, live.recipe, live.parts)  # its parts are the very same
            return
        twin._modules = {name: copy.copy(part) for name, part in twin.named_children()}
        parts = {name: replace(part, released=False) for name, part in live.parts.items()}
        self.add(twin, live.recipe, parts)

    @rule(
        number=st.integers(0, 3),
        protocol=st.sampled_from([2, pickle.DEFAULT_PROTOCOL, pickle.HIGHEST_PROTOCOL, None]),
    )
    def save_and_load(self, number, protocol):
        live = self.pick(number)
        buffer = io.BytesIO()
        if protocol is None:
            torch.save(live.model, buffer)
        else:
            pickle.dump(live.model, buffer, protocol)
        assert b"whisper_max" not in buffer.getvalue()
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False) if protocol is None else pickle.load(buffer)
        self.add(twin, live.recipe, {})

    # What holds at any time

    @invariant()
    def whisper_is_patched_as_asked(self):
        for target in TARGETS:
            assert whisper_max.is_patched(target) == (target in self.patched)
            assert whisper_max.status().targets[target].patched == (target in self.patched)
        assert whisper_max.is_patched() == bool(self.patched)
        for target, name in (("encoder", "AudioEncoder"), ("decoder", "TextDecoder")):
            cls = live_models.max_class(target)
            if target not in self.patched:
                cls = live_models.upstream_class(cls)
            assert getattr(whisper.model, name) is cls

    @invariant()
    def classes_are_as_they_should_be(self):
        for live in self.live:
            for target, part in live.parts.items():
                module, cls = part_of(live.model, target), live_models.max_class(target)
                wanted = cls if part.ours else live_models.upstream_class(cls)
                assert type(module) is wanted, (target, part)
                assert (module in activation.accelerated) == part.accelerated

    @invariant()
    def results_are_upstreams(self):
        for live in self.live:
            for target in live.parts:
                counted = whisper_max.status().targets[target]
                found = call(live.model, target)
                now = whisper_max.status().targets[target]
                on_max = self.on_max(live, target)
                wanted = expected(live.recipe, target)
                if on_max:
                    assert now.max_calls == counted.max_calls + 1
                    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
                else:
                    assert torch.equal(found, wanted)
                if not on_max and self.mode != "shadow":
                    assert now.max_calls == counted.max_calls

    def teardown(self):
        while self.contexts:
            self.leave()
        whisper_max.unpatch()
        for live in self.live:
            whisper_max.restore(live.model)
        activation.released.clear()


@pytest.fixture
def one_thread():
    """The models are too small to share out, and the machine may be busy."""
    with pytorch_threads(1):
        yield


@torch.no_grad()
def test_lifecycle(tmp_path, monkeypatch, one_thread):
    monkeypatch.setenv("WHISPER_MAX_COMPILE", "blocking")
    monkeypatch.setattr(Lifecycle, "folder", tmp_path)
    for recipe in range(len(RECIPES)):
        checkpoint(recipe)
        for target in ("encoder", "decoder", "inference"):
            expected(recipe, target)
    run_state_machine_as_test(Lifecycle, settings=hypothesis_settings())


@pytest.mark.parametrize("target", ["encoder", "decoder"])
@torch.no_grad()
def test_unpatch_in_another_thread_in_the_middle_of_a_call(monkeypatch, target):
    """The class of a module may be upstream's again when PyTorch takes the call over."""
    model = RECIPES[0].build()
    wanted = call(model, target)

    def refused(*arguments):
        whisper_max.unpatch()
        whisper_max.restore(model)
        return ["no"]

    module = audio_encoder if target == "encoder" else text_decoder
    monkeypatch.setattr(module, f"{target}_changes", refused)
    with whisper_max.patched(compile="blocking"):
        found = call(whisper_max.accelerate(model), target)
    assert torch.equal(found, wanted)


def test_classes_of_before_are_subclasses_of_what_has_their_name():
    upstream = whisper.model.AudioEncoder
    with whisper_max.patched(compile="cached"):
        assert issubclass(upstream, whisper.model.AudioEncoder)
        assert issubclass(whisper.model.AudioEncoder, upstream)
        assert not issubclass(upstream, whisper.model.TextDecoder)
