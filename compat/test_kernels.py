"""Each kernel on its own, against PyTorch in float64."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import kernel_graphs
from isolation import busy_cpus, pytorch_threads
from packed import ABSENT, panels, stored
from strategies import numbers, seeds
from tolerances import PRODUCTS as PROMISED
from tolerances import ROUNDINGS, assert_precise
from whisper_max import settings
from whisper_max.runtime import artifacts, compilation, hardware
from whisper_max.runtime.artifact_key import ArtifactKey
from whisper_max.runtime.engine import Engine
from whisper_max.runtime.tensors import int32, to_buffer, to_torch

# Around the sizes at which the kernels change their ways: few rows or many, one block or several.
ROWS = st.integers(1, 70) | st.sampled_from([191, 192, 193, 385, 600])
# Widths of a model are multiples of 64; three times the mel channels may be any number.
LENGTHS = st.integers(1, 12).map(lambda n: 16 * n) | st.sampled_from([512, 528, 1024, 1536])
COLUMNS = st.integers(2, 200) | st.sampled_from([512, 513, 1025])

# What weights are held in, and multiplied in, on this machine; "tiles" where those multiply.
LEVEL = hardware.cpu_level(settings.active().cpu_level)
PRODUCTS = [("float16", "float32"), ("int8", "float32")]
if LEVEL != "baseline":
    PRODUCTS += [("float16", "bfloat16")] * hardware.has_bf16()
    PRODUCTS += [("int8", "int8")] * hardware.has_vnni()
if LEVEL == "amx":
    TILED = [("float16", "float32"), ("float32", "float32"), ("float16", "bfloat16")]
    PRODUCTS += [(*way, "tiles") for way in (*TILED, ("int8", "int8"))]

FEW_ROWS = 48  # up to here products are float32, or 16-bit integers: kernels/projection.mojo

NONE_VECTOR, NONE_MATRIX = torch.zeros(1), torch.zeros(1, 1)


@pytest.fixture(scope="module")
def engine() -> Engine:
    """The graphs of kernel_graphs.py, compiled."""
    active = settings.active()
    source = hashlib.sha256(Path(kernel_graphs.__file__).read_bytes()).hexdigest()
    options = (("products", ",".join("*".join(pair) for pair in PRODUCTS)), ("source", source))
    key = ArtifactKey("kernels", "kernel_graphs:build", options, "cpu", LEVEL)
    state = compilation.ensure(key, active.cache_dir, "blocking")
    assert state.ready, state.reason
    return Engine(artifacts.read(key, active.cache_dir))


def run(engine, graph, *operands):
    buffers = [to_buffer(o) if isinstance(o, torch.Tensor) else o for o in operands]
    return to_torch(engine.execute(graph, *buffers)[0])


def run_linear(engine, way, x, packed, factors, bias, *, norm=None, gelu=False, residual=None):
    """The linear layer alone, of weights held and multiplied in these ways."""
    return run(
        engine,
        "_".join(("linear", *way)),
        x,
        *(norm or (NONE_VECTOR, NONE_VECTOR)),
        panels(packed),
        factors,
        bias,
        NONE_MATRIX if residual is None else residual,
        engine.threads,
        torch.tensor(int(gelu), dtype=torch.int32),
    )


def linear_input(dtype, x, norm):
    """What a layer multiplies."""
    x = x.to(dtype)
    if norm is None:
        return x
    return F.layer_norm(x, x.shape[-1:], norm[0].to(dtype), norm[1].to(dtype))


def int16_may_be_off(x, weight):
    """What is left of each output's exactness when rows are rounded to 16 bits.

    The steps of a row are as wide as its largest number wants, and GELU is nowhere steeper than
    1.13.
    """
    steps = x.abs().amax(-1, keepdim=True) / 32767
    deviation = steps / 12**0.5 * weight.double().norm(dim=-1)
    return 1.13 * ROUNDINGS * deviation


def linear_in(dtype, x, weight, bias, norm, gelu, residual):
    """What the kernel should compute, in PyTorch at the given precision."""
    y = F.linear(linear_input(dtype, x, norm), weight.to(dtype), bias.to(dtype))
    y = F.gelu(y) if gelu else y
    return y if residual is None else y + residual.to(dtype)


@given(
    layers=st.integers(1, 3),
    parts=st.integers(1, 3),
    rows=st.integers(1, 100) | st.sampled_from([512, 513]),
    length=LENGTHS | st.sampled_from([3, 15, 249, 523]),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.int8]),
    power=st.sampled_from([-24, -14, 0, 10]),
    rounded=st.booleans(),
    seed=seeds,
)
def test_pack(engine, layers, parts, rows, length, dtype, power, rounded, seed):
    """Bit for bit what PyTorch packs; and whether float16 rounded anything on the way."""
    rows = rows if parts == 1 else 32 * (1 + rows // 32)
    weights = numbers((layers, parts * rows, length), seed, 2.0**power)
    if rounded:
        weights = weights.half().float()
    weights[0, 0] = 0  # of int8, a row without a scale of its own
    pairs = [stored(weight, dtype) for weight in weights]
    expected = torch.stack([panels(held) for held, _ in pairs])
    factors = torch.stack([factor for _, factor in pairs])

    packed = torch.full_like(expected, 7)
    scales = torch.zeros_like(factors)
    inexact = run(
        engine,
        f"pack_{str(dtype).removeprefix('torch.')}",
        packed,
        scales,
        torch.tensor([[part.data_ptr() for part in layer.split(rows)] for layer in weights]),
        torch.tensor([rows], dtype=torch.int32),
        engine.threads,
    )
    assert torch.equal(packed, expected)
    if dtype is torch.int8:
        assert torch.equal(scales, factors)
    lost = (weights.half().float() != weights).any(dim=2).any(dim=0)
    lost = F.pad(lost, (0, -len(lost) % 32)).view(-1, 32).any(dim=1)
    assert torch.equal(inexact.bool(), lost & (dtype is torch.float16))


def test_pack_rounds_to_the_nearest_and_of_two_to_the_even(engine):
    weight = torch.randint(-254, 255, (64, 48)) / 2.0
    weight[:, 0] = 127
    packed, scales = torch.empty(1, 2, 48, 32, dtype=torch.int8), torch.zeros(1, 64)
    sources, rows = torch.tensor([[weight.data_ptr()]]), torch.tensor([64], dtype=torch.int32)
    run(engine, "pack_int8", packed, scales, sources, rows, engine.threads)
    assert (scales == 1).all()
    assert torch.equal(packed[0], panels(weight.round().to(torch.int8)))


LAYERS = {
    "batch": st.integers(1, 3),
    "rows": ROWS,
    "length": LENGTHS | st.sampled_from([3, 15, 249, 523]),
    "columns": COLUMNS,
    "way": st.sampled_from(PRODUCTS),
    "norm": st.booleans(),
    "gelu": st.booleans(),
    "residual": st.booleans(),
    "seed": seeds,
    "scale": st.sampled_from([1e-2, 1.0, 10.0]),
}


@given(**LAYERS)
def test_linear(engine, **layer):
    check_linear(engine, **layer)


@pytest.mark.skipif(("int8", "int8") not in PRODUCTS, reason="the CPU has no VNNI")
@given(**{**LAYERS, "rows": st.integers(1, FEW_ROWS), "way": st.just(("int8", "int8"))})
def test_few_rows_in_int16(engine, **layer):
    check_linear(engine, **{**layer, "batch": 1})


@pytest.mark.skipif(("int8", "int8") not in PRODUCTS, reason="the CPU has no VNNI")
@pytest.mark.parametrize("rows", [1, 5, 48])
@pytest.mark.parametrize("length", [512, 513, 1536])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_of_few_rows_fit(engine, rows, length, sign):
    """All activations and weights are as large as 16 and 8 bits can say."""
    x = torch.full((1, rows, length), 0.5)
    packed = torch.full((64, length), sign * 127, dtype=torch.int8)
    found = run_linear(engine, ("int8", "int8"), x, packed, torch.ones(64), torch.zeros(64))
    torch.testing.assert_close(found, torch.full_like(found, sign * 0.5 * 127 * length))


@pytest.mark.skipif(("int8", "int8") not in PRODUCTS, reason="the CPU has no VNNI")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [3, 60])
def test_numbers_that_are_not_finite_stay_so_in_int8(engine, rows, value):
    """As in float32, where PyTorch's loop is to be told of them."""
    x = numbers((1, rows, 128), 1)
    x[0, 1, 40] = value
    packed = torch.ones(64, 128, dtype=torch.int8)
    found = run_linear(engine, ("int8", "int8"), x, packed, torch.ones(64), torch.zeros(64))
    finite = found.isfinite().all(-1)[0]
    assert finite.sum() == rows - 1 and not finite[1]


def check_linear(engine, batch, rows, length, columns, way, norm, gelu, residual, seed, scale):
    x = numbers((batch, rows, length), seed, scale)
    weight = numbers((columns, length), seed + 1, length**-0.5)
    bias, added = numbers((columns,), seed + 2), numbers((rows, columns), seed + 3)
    ln = (1 + 0.2 * numbers((length,), seed + 4), numbers((length,), seed + 5))
    held, *product = way
    ln = ln if norm and length % 16 == 0 else None
    added = added if residual else None
    packed, factors = stored(weight, getattr(torch, held))
    weight = packed.float() * (factors[:, None] if held == "int8" else 1)
    found = run_linear(
        engine, way, x, packed, factors, bias, norm=ln, gelu=gelu, residual=added
    )
    arguments = (x, weight, bias, ln, gelu, added)
    exact = linear_in(torch.float64, *arguments)
    promise = PROMISED["_".join(product)]
    if rows * batch <= FEW_ROWS:
        promise = PROMISED["float32"]
        if product[0] == "int8":
            off = int16_may_be_off(linear_input(torch.float64, x, ln), weight)
            error = found - exact
            found = (found - error.clamp(-off, off)).float()
    assert_precise(found, linear_in(torch.float32, *arguments), exact, promise)


def test_gelu_everywhere(engine):
    """Through a layer that is the identity: from where it is zero to where it is the identity."""
    x = torch.linspace(-12, 12, 64 * 1000).view(1, 1000, 64)
    identity, way = torch.eye(64).half(), ("float16", "float32")
    found = run_linear(engine, way, x, identity, ABSENT, torch.zeros(64), gelu=True)
    assert_precise(found, F.gelu(x), F.gelu(x.double()))
    # Near zero the relative error counts, too.
    near = x.abs() < 1
    relative = ((found - F.gelu(x.double())) / F.gelu(x.double()))[near].abs().max()
    assert relative < 2**-20


BFLOAT16 = [way for way in PRODUCTS if way[1] == "bfloat16"]


@pytest.mark.skipif(not BFLOAT16, reason="the CPU does not multiply bfloat16")
@pytest.mark.parametrize("way", BFLOAT16)
def test_gelu_of_what_is_rounded_next(engine, way):
    """Many rows have a shorter one, where bfloat16 holds what they are; and far out the same."""
    x = torch.linspace(-12, 12, 64 * 1000).bfloat16().float().view(1, 1000, 64)
    x[0, 0, :2] = torch.tensor([-8192.0, 8192.0])
    found = run_linear(engine, way, x, torch.eye(64).half(), ABSENT, torch.zeros(64), gelu=True)
    error = (found - F.gelu(x.double())).abs()
    assert error.max() < 4.1e-5
    assert error[x.abs() > 6].max() < 1e-7


# Many rows: what gets lost of a mean far from zero is one number per row, and chance.
@given(st.integers(1, 3), st.integers(20, 70), LENGTHS, seeds, st.sampled_from([0.0, 1.0, 100.0]))
def test_layer_norm(engine, batch, rows, length, seed, mean):
    x = numbers((batch, rows, length), seed) + mean
    weight, bias = numbers((length,), seed + 1), numbers((length,), seed + 2)
    found = run(engine, "layer_norm", x, engine.threads, weight, bias)
    exact = F.layer_norm(x.double(), (length,), weight.double(), bias.double())
    assert_precise(found, F.layer_norm(x, (length,), weight, bias), exact)


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 60), st.booleans(), seeds)
def test_conv_patches(engine, batch, channels, frames, of_mel, seed):
    x = numbers((batch, channels, frames), seed)
    stride = 1 if of_mel else 2
    out_frames = -(-frames // stride)
    expected = F.unfold(x.unsqueeze(2), (1, 3), padding=(0, 1), stride=(1, stride))
    expected = expected.view(batch, channels, 3, out_frames).permute(0, 3, 2, 1).flatten(2)
    source = x if of_mel else x.transpose(1, 2)
    graph = "patches_of_mel" if of_mel else "patches"
    found = run(engine, graph, source, torch.empty(out_frames), engine.threads)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("graph", "shape"), [("layer_norm", (1, 40960, 512)), ("patches_of_mel", (1, 4096, 512))]
)
def test_one_thread_where_pytorch_has_one(engine, graph, shape):
    """Beside others, each with a CPU of its own; so much that MAX's waiting for more is little."""
    x, size = numbers(shape, 1), numbers(shape[2:], 2)
    with pytorch_threads(1):
        operands = (engine.threads, size, size) if graph == "layer_norm" else (size, engine.threads)
        assert busy_cpus(lambda: run(engine, graph, x, *operands)) < 1.3


@given(st.integers(1, 4), st.integers(1, 20), st.integers(2, 100), st.integers(0, 30), seeds)
def test_embed(engine, rows, count, n_vocab, offset, seed):
    embedding = numbers((n_vocab, 64), seed).half()
    positional = numbers((50, 64), seed + 1)
    tokens = torch.randint(n_vocab, (rows, count), generator=torch.Generator().manual_seed(seed))
    found = run(
        engine,
        "embed",
        tokens.to(torch.int32),
        int32([offset, 0]),
        panels(embedding),
        ABSENT,
        torch.zeros(n_vocab),
        positional,
    )
    assert torch.equal(found, embedding[tokens].float() + positional[offset : offset + count])
