"""The arithmetic of the graphs for GPUs, built for the CPU in float32, against upstream's modules.

What is compiled for a GPU is the same functions with another device and dtype: that they compute
Whisper is shown here, that a GPU does is not.

Compiling them takes minutes, so it is done on demand, and else these tests are skipped:
    python -m pytest -m slow compat/test_gpu_graphs.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from math import nan
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import whisper
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef
from torch import Tensor, nn
from whisper.decoding import ApplyTimestampRules, SuppressTokens
from whisper.model import ModelDimensions, MultiHeadAttention, Whisper

from harness import exact, exact_logits, load_checkpoint
from strategies import Recipe, numbers
from tolerances import assert_precise
from whisper_max import demo, settings
from whisper_max.graphs.gpu.build import ENCODER
from whisper_max.graphs.gpu.specification import Target
from whisper_max.graphs.specification import MASKED
from whisper_max.runtime import artifacts, compilation
from whisper_max.runtime.gpu.engine import MOST_BEAMS, RANKED
from whisper_max.runtime.gpu.state import key_of, sizes_of
from whisper_max.runtime.tensors import int32, to_buffer, to_torch
from whisper_max.selection import Rules

DIMS = ModelDimensions(8, 12, 128, 2, 2, 120, 20, 128, 2, 2)
EOT, NO_TIMESTAMPS, TIMESTAMP_BEGIN = 70, 75, 76
disable_sdpa = getattr(whisper.model, "disable_sdpa", nullcontext)  # 20231117 has no SDPA
AUDIO, TEXT = (
    Target(sizes_of(part, vars(DIMS)), DType.float32, DeviceRef.CPU())
    for part in ("encoder", "decoder")
)
WEIGHTS = {
    "encoder": list(AUDIO.encoder_weights()),
    "cross_kv": list(TEXT.cross_kv_weights()),
    "decoder_prefill": list(TEXT.decoder_weights()),
    "decoder_greedy_step": list(TEXT.decoder_weights()),
    "decoder_step": list(TEXT.decoder_weights()),
    "decoder_alignment": list(TEXT.decoder_weights()),
}


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Instead of the CPU's graphs, which no test here runs."""


class Graphs:
    """Graphs of graphs/gpu for one small model, on the CPU: compiled if `on_demand`, or found."""

    def __init__(self, on_demand: bool) -> None:
        self.on_demand = on_demand
        self._loaded: dict = {}

    def execute(self, name: str, *operands: Buffer) -> list[Buffer]:
        """Runs a graph; skips the test where it is not compiled and must not be."""
        if name not in self._loaded:
            self._load("encoder" if name in ENCODER else "decoder")
        return self._loaded[name].execute(*operands)

    def _load(self, part: str) -> None:
        active = settings.active()
        sizes = (AUDIO if part == "encoder" else TEXT).sizes
        key = key_of(part, sizes, "float32", "cpu", active.cpu_level)
        policy = "blocking" if self.on_demand else "cached"
        state = compilation.ensure(key, active.cache_dir, policy, limit_seconds=3600)
        if state.name == "missing" and not self.on_demand:
            pytest.skip("compiled on demand only: -m slow")
        assert state.ready, state.reason
        session = InferenceSession(devices=[CPU()])
        compiled = artifacts.read(key, active.cache_dir)
        self._loaded.update(session.init_all(compiled, weights_registry={}))


@pytest.fixture(scope="module")
def graphs(request) -> Graphs:
    """Compiled where tests that are slow are asked for."""
    return Graphs(on_demand="slow" in request.config.option.markexpr)


class Case:
    """One model, its features and its caches; rows are windows * beams."""

    def __init__(self, graphs: Graphs, windows: int = 2, beams: int = 3, seed: int = 1) -> None:
        self.graphs = graphs
        self.model: Whisper = Recipe(DIMS, seed=seed, gain=1.0, float16=False).build()
        self.windows, self.beams = windows, beams
        self.features = numbers((windows, DIMS.n_audio_ctx, DIMS.n_audio_state), seed)
        self.cross = [
            to_buffer(part) for part in upstream_cross(self.model.decoder, self.features)
        ]
        shape = (windows, beams, DIMS.n_text_head, DIMS.n_text_ctx, 64)
        # What was never written is never read.
        self.cache = [to_buffer(torch.full(shape, nan)) for _ in range(2 * DIMS.n_text_layer)]

    def run(self, graph: str, *operands: Buffer) -> list[Tensor]:
        """One graph on the CPU."""
        state = self.model.state_dict()
        weights = [to_buffer(state[name]) for name in WEIGHTS[graph]]
        return [to_torch(result) for result in self.graphs.execute(graph, *operands, *weights)]

    def prefill(self, tokens: Tensor, start: int, parents: list[int], wanted: list[int]) -> Tensor:
        """tokens, shape = (rows, count) -> logits, (wanted, n_vocab)."""
        operands = self._place(tokens, start, parents)
        return self.run("decoder_prefill", *operands, int32(wanted), *self.cache, *self.cross)[0]

    def step(
        self,
        tokens: Tensor,
        start: int,
        parents: list[int],
        mask: Tensor,
        rules: list[list[int]],
        graph: str = "decoder_step",
    ) -> list[Tensor]:
        """tokens, shape = (rows, 1) -> log probabilities and tokens, ranked."""
        operands = self._place(tokens, start, parents)
        rules = int32(np.reshape(rules, (self.windows, self.beams, 5)))
        return self.run(graph, *operands, to_buffer(mask), rules, *self.cache, *self.cross)

    def upstream(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of whole texts, (rows, count, n_vocab): upstream's, and in float64."""
        features = self.features.repeat_interleave(self.beams, dim=0)
        decoder = self.model.decoder
        return decoder(tokens, features), exact_logits(decoder, tokens, features)

    def _place(self, tokens: Tensor, start: int, parents: list[int]) -> list[Buffer]:
        rows = (self.windows, self.beams)
        return [
            int32(tokens.reshape(*rows, -1).numpy()),
            int32(range(start, start + tokens.shape[-1])),
            int32(np.reshape(parents, rows)),
        ]


def upstream_cross(decoder: nn.Module, features: Tensor) -> list[Tensor]:
    """Keys and values of cross attention by layer: (windows, heads, n_audio_ctx, 64)."""
    return [
        part.unflatten(2, (DIMS.n_text_head, 64)).transpose(1, 2).contiguous()
        for block in decoder.blocks
        for part in (block.cross_attn.key(features), block.cross_attn.value(features))
    ]


def drawn_tokens(rows: int, count: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, DIMS.n_vocab, (rows, count), generator=generator)


def test_the_weights_are_those_of_upstream():
    state = Whisper(DIMS).state_dict()
    shapes = {
        name: tuple(int(size) for size in value.shape)
        for part in (AUDIO.encoder_weights, TEXT.cross_kv_weights, TEXT.decoder_weights)
        for name, value in part().items()
    }
    assert shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert sum(len(set(names)) for names in list(WEIGHTS.values())[:3]) == len(state)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_encoder(graphs, batch):
    case = Case(graphs)
    mel = numbers((batch, DIMS.n_mels, 2 * DIMS.n_audio_ctx), 4)
    (found,) = case.run("encoder", to_buffer(mel))
    assert_precise(found, case.model.encoder(mel), exact(case.model.encoder)(mel.double()))


@pytest.mark.slow
def test_keys_and_values_of_cross_attention(graphs):
    case = Case(graphs)
    decoder = case.model.decoder
    on_torch = upstream_cross(decoder, case.features)
    in_float64 = upstream_cross(exact(decoder), case.features.double())
    found = [to_buffer(torch.zeros_like(part)) for part in on_torch]
    case.run("cross_kv", *found, to_buffer(case.features))
    for one in zip(found, on_torch, in_float64):
        assert_precise(to_torch(one[0]), *one[1:])


@pytest.mark.slow
@pytest.mark.parametrize(("windows", "beams"), [(1, 1), (1, 5), (2, 3), (1, 2 * MOST_BEAMS)])
def test_prompt_at_once_and_in_parts(graphs, windows, beams):
    case = Case(graphs, windows, beams)
    rows = windows * beams
    tokens = drawn_tokens(rows, 11)
    expected, in_float64 = case.upstream(tokens)
    same = list(range(rows))
    begin = 0
    for end in (4, 5, 11):
        count = end - begin
        wanted = [row * count + count - 1 for row in same]
        found = case.prefill(tokens[:, begin:end], begin, same, wanted)
        assert_precise(found, expected[:, end - 1], in_float64[:, end - 1])
        begin = end


@pytest.mark.slow
def test_the_last_place_of_the_cache(graphs):
    case = Case(graphs, 1, 1)
    tokens = drawn_tokens(1, DIMS.n_text_ctx)
    last = DIMS.n_text_ctx - 1
    case.prefill(tokens[:, :last], 0, [0], [0])
    found = case.prefill(tokens[:, last:], last, [0], [0])
    assert_precise(found, *(logits[:, -1] for logits in case.upstream(tokens)))


@pytest.mark.slow
def test_a_cache_that_served_another_text(graphs):
    case = Case(graphs, 1, 1)
    case.prefill(drawn_tokens(1, 15, seed=8), 0, [0], [0])
    tokens = drawn_tokens(1, 3)
    found = case.prefill(tokens, 0, [0], [2])
    assert_precise(found, *(logits[:, -1] for logits in case.upstream(tokens)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "parents", [[[2, 0, 0], [3, 5, 4]], [[*range(1, MOST_BEAMS), 0]], [[0], [1]]], ids=str
)
def test_beams_go_on_from_other_beams(graphs, parents):
    case = Case(graphs, len(parents), len(parents[0]))
    parents = sum(parents, [])
    rows = len(parents)
    tokens = drawn_tokens(rows, 5)
    case.prefill(tokens[:, :4], 0, list(range(rows)), [0])
    tokens = torch.cat([tokens[parents, :4], tokens[:, 4:]], dim=1)
    found = case.prefill(tokens[:, 4:], 4, parents, list(range(rows)))
    assert_precise(found, *(logits[:, -1] for logits in case.upstream(tokens)))


def stock_filters(suppressed: list[int]) -> list:
    """Upstream's, with a tokenizer of which they use three numbers."""
    tokenizer = SimpleNamespace(
        eot=EOT, no_timestamps=NO_TIMESTAMPS, timestamp_begin=TIMESTAMP_BEGIN
    )
    return [SuppressTokens(suppressed), ApplyTimestampRules(tokenizer, 1, None)]


@pytest.mark.slow
@pytest.mark.parametrize("loudness", [0.25, 1.0, 4.0])
@pytest.mark.parametrize(
    "sampled",
    [
        [TIMESTAMP_BEGIN],
        [TIMESTAMP_BEGIN, 10],
        [TIMESTAMP_BEGIN, 10, TIMESTAMP_BEGIN + 5],
        [TIMESTAMP_BEGIN, 10, TIMESTAMP_BEGIN + 5, TIMESTAMP_BEGIN + 5],
        [TIMESTAMP_BEGIN, 10, DIMS.n_vocab - 1],
        [TIMESTAMP_BEGIN, 10, DIMS.n_vocab - 1, DIMS.n_vocab - 1],
        [10],
    ],
)
@pytest.mark.parametrize(
    "suppressed", [[], [3, 4, 50], [token for token in range(120) if token not in (2, 90)]]
)
def test_a_step_ranks_what_upstreams_filters_leave(graphs, sampled, suppressed, loudness):
    case = Case(graphs, 2, 1)
    with torch.no_grad():
        case.model.decoder.token_embedding.weight[TIMESTAMP_BEGIN:] *= loudness
    tokens = torch.tensor([[7, *sampled], [8, *sampled]])
    last = tokens.shape[1] - 1
    rules = Rules((*suppressed, NO_TIMESTAMPS), 1, TIMESTAMP_BEGIN, EOT, DIMS.n_vocab)
    mask = torch.zeros(DIMS.n_vocab)
    mask[list(rules.suppressed)] = MASKED
    following = [rules.after(row) for row in tokens.tolist()]
    for place in range(last):
        case.step(tokens[:, place : place + 1], place, [0, 1], mask, following)
    # Of a step that is done once more, the cache holds the same again.
    first = case.step(tokens[:, last:], last, [0, 1], mask, following, "decoder_greedy_step")
    logprobs, best = case.step(tokens[:, last:], last, [0, 1], mask, following)
    for one, all_of_them in zip(first, (logprobs, best)):
        torch.testing.assert_close(one, all_of_them[:, :1], rtol=0, atol=0, equal_nan=True)

    logits = case.upstream(tokens)[0][:, -1]
    for logit_filter in stock_filters(suppressed):
        logit_filter.apply(logits, tokens)
    expected = logits.log_softmax(dim=-1)
    for row in range(2):
        if not bool(logits[row].isfinite().any()):
            assert bool(logprobs[row].isnan().all())
            continue
        order = expected[row].sort(descending=True, stable=True)
        torch.testing.assert_close(
            logprobs[row], order.values[:RANKED], atol=1e-4, rtol=2**-20
        )
        possible = min(RANKED, int(order.values.isfinite().sum()))
        assert best[row, :possible].tolist() == order.indices[:possible].tolist()
        assert len(set(best[row].tolist())) == RANKED


@pytest.mark.slow
def test_steps_from_the_first_place_to_the_last_with_beams_that_change(graphs):
    case = Case(graphs, 2, 3)
    text = torch.empty(6, 0, dtype=torch.long)
    new = drawn_tokens(6, DIMS.n_text_ctx)
    everything = [[0, DIMS.n_vocab, DIMS.n_vocab, DIMS.n_vocab, 0]] * 6
    mask = torch.zeros(DIMS.n_vocab)
    for place in range(DIMS.n_text_ctx):
        parents = [0, 1, 2, 3, 4, 5] if place % 3 == 0 else [2, 0, 0, 3, 5, 4]
        text = torch.cat([text[parents], new[:, place : place + 1]], dim=1)
        found, best = case.step(text[:, -1:], place, parents, mask, everything)
        on_torch, in_float64 = (
            logits[:, -1].log_softmax(dim=-1) for logits in case.upstream(text)
        )
        ranked = on_torch.sort(descending=True, stable=True)
        assert best.tolist() == ranked.indices[:, :RANKED].tolist()
        assert_precise(
            found, ranked.values[:, :RANKED], in_float64.gather(1, ranked.indices[:, :RANKED])
        )


@pytest.mark.slow
def test_equals_are_ranked_by_token(graphs):
    case = Case(graphs, 1, 1)
    with torch.no_grad():
        case.model.decoder.token_embedding.weight[:] = 0
    _, best = case.step(torch.tensor([[7]]), 0, [0], torch.zeros(120), [[3, 120, 120, 120, 0]])
    assert best.tolist() == [[3, 4, 5, 6, 7, 8]]


@pytest.mark.slow
def test_without_any_possible_token_all_is_nan(graphs):
    case = Case(graphs, 1, 1)
    mask = torch.full((120,), MASKED)
    logprobs, best = case.step(torch.tensor([[7]]), 0, [0], mask, [[0, 76, 76, 120, 1]])
    assert bool(logprobs.isnan().all())
    assert best.tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.slow
def test_alignment_has_all_logits_and_the_scores_of_chosen_heads(graphs):
    case = Case(graphs, 1, 1)
    tokens = drawn_tokens(1, 9)
    chosen = [(0, 1), (1, 1), (1, 0)]
    heads = np.full((DIMS.n_text_layer, len(chosen)), -1)
    for slot, (layer, head) in enumerate(chosen):
        heads[layer, slot] = head
    logits, scores = case.run(
        "decoder_alignment",
        int32(tokens.reshape(1, 1, 9).numpy()),
        int32(range(9)),
        int32(heads),
        *case.cross,
    )
    assert_precise(logits, *(logits[0] for logits in case.upstream(tokens)))
    expected = upstream_scores(case.model.decoder, tokens, case.features)
    for slot, (layer, head) in enumerate(chosen):
        torch.testing.assert_close(
            scores[0, slot], expected[layer][0, head], atol=1e-4, rtol=1e-4
        )


def upstream_scores(decoder: nn.Module, tokens: Tensor, features: Tensor) -> list[Tensor]:
    """Raw scores of cross attention, one tensor for each layer."""
    scores: list[Tensor] = []
    twin = copy.deepcopy(decoder)
    for block in twin.blocks:
        block.cross_attn.register_forward_hook(lambda _, inputs, out: scores.append(out[1]))
    with disable_sdpa():
        twin(tokens, features)
    return scores


def test_attention_in_tiles_of_float16_is_within_the_tolerance_and_bfloat16_is_not(monkeypatch):
    """Why attention is what it is in float16: twice PyTorch's own error is allowed.

    PyTorch on the CPU stands in for the GPU: what is compared is where numbers are rounded.
    """
    model = load_checkpoint()
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(demo.read_wav(demo.RECORDING)))[None]
    in_float64 = exact(model.encoder)(mel.double())

    def error() -> float:
        return (model.encoder(mel.half()).double() - in_float64).square().mean().sqrt().item()

    def rounded_to(dtype: torch.dtype) -> Callable:
        def attention(self, q, k, v, mask=None):
            q, k, v = (
                part.to(dtype).unflatten(2, (self.n_head, 64)).transpose(1, 2) for part in (q, k, v)
            )
            weights = (q.float() @ k.float().mT / 8).softmax(dim=-1)
            values = (weights.to(dtype).float() @ v.float()).half()
            return values.transpose(1, 2).flatten(2), None

        return attention

    upstream = error()
    monkeypatch.setattr(MultiHeadAttention, "qkv_attention", rounded_to(torch.float16))
    in_tiles = error()
    assert in_tiles < 1.1 * upstream
    monkeypatch.setattr(MultiHeadAttention, "qkv_attention", rounded_to(torch.bfloat16))
    assert error() > 1.5 * in_tiles
