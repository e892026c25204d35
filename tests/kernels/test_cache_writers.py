"""The cache writers against float64 formulas, the packed layouts, the model's own entries, and their plain form bit for bit."""

from __future__ import annotations

import pytest
import torch

from rorqual.kernels import cache_writers as plain
from rorqual.kernels import unpack_latent, write_index_keys, write_latents
from rorqual.kernels.cache_writers import index_key_parts, write_index_keys_plain, write_latents_plain
from rorqual.kernels.fp8 import FP8
from tests.kernels.devices import DEVICES, on_each_device

EPS = 1e-6
in_each_form = pytest.mark.parametrize("device", [pytest.param("plain"), *DEVICES])


def form(device, name):
    """A writer and where its tensors lie: the plain one, or the Triton one in the interpreter or on a GPU."""
    if device == "plain":
        return getattr(plain, f"{name}_plain"), "cpu"
    return getattr(pytest.importorskip("rorqual.kernels.cache_writers_triton"), name), device


def angles(N, R, generator):
    turns = torch.rand(N, R // 2, generator=generator, dtype=torch.float64) * 6.28
    return turns.cos(), turns.sin()


def turned(x, cos, sin, interleaved):
    """RoPE of x [N, R] as complex products, in float64."""
    R = x.shape[1]
    a, b = (x[:, 0::2], x[:, 1::2]) if interleaved else (x[:, : R // 2], x[:, R // 2 :])
    z = torch.complex(a, b) * torch.complex(cos, sin)
    parts = torch.stack([z.real, z.imag], -1)
    return parts.flatten(1) if interleaved else parts.transpose(1, 2).flatten(1)


def latents(N, L, R, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, L + R, generator=generator, dtype=torch.float64) * 3
    weight = torch.rand(L, generator=generator, dtype=torch.float64) + 0.5
    cos, sin = angles(N, R, generator)
    x = x.to(dtype).double()
    normed = x[:, :L] / (x[:, :L].square().mean(1, keepdim=True) + EPS).sqrt() * weight.float().double()
    expected = torch.cat([normed, turned(x[:, L:], cos.float().double(), sin.float().double(), True)], 1)
    return x.to(dtype), weight.float(), cos.float(), sin.float(), expected


def index_keys(N, C, R, dtype, interleaved, hadamard, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(N, C, generator=generator, dtype=torch.float64) * 2 + 0.5).to(dtype).double()
    weight = (torch.rand(C, generator=generator, dtype=torch.float64) + 0.5).float().double()
    bias = torch.randn(C, generator=generator, dtype=torch.float64).float().double()
    cos, sin = angles(N, R, generator)
    centred = x - x.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + EPS).sqrt() * weight + bias
    expected = torch.cat([turned(normed[:, :R], cos.float().double(), sin.float().double(), interleaved), normed[:, R:]], 1)
    if hadamard:
        parity = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(C)] for i in range(C)], dtype=torch.float64)
        expected = expected @ parity * C**-0.5
    return x.to(dtype), weight.float(), bias.float(), cos.float(), sin.float(), expected


def slots_of(N, slots, seed=1):
    """Distinct slots in random order, some rows not stored."""
    chosen = torch.randperm(slots, generator=torch.Generator().manual_seed(seed))[:N]
    chosen[::5] = -1  # a single row, then, is not stored at all
    return chosen


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


@in_each_form
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("N", "L", "R", "page"), [(7, 512, 64, 64), (1, 48, 16, 1), (13, 96, 6, 5), (33, 128, 32, 16)])
def test_latents_are_normalised_rotated_and_stored_in_their_slots(device, N, L, R, page, dtype):
    write, device = form(device, "write_latents")
    x, weight, cos, sin, expected = latents(N, L, R, dtype)
    blocks = -(-2 * N // page) + 1
    slots = slots_of(N, blocks * page).to(device)
    cache = torch.full((blocks, page, L + R), 7.0, dtype=dtype, device=device)
    write(cache, slots, *(t.to(device) for t in (x, weight)), eps=EPS, cos=cos.to(device), sin=sin.to(device))
    rows, there = cache.view(-1, L + R).cpu().double(), (slots >= 0).cpu()
    torch.testing.assert_close(rows[slots[slots >= 0].cpu()], expected[there], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 4)
    untouched = torch.ones(blocks * page, dtype=torch.bool)
    untouched[slots[slots >= 0].cpu()] = False
    assert (rows[untouched] == 7).all()


@in_each_form
@pytest.mark.parametrize(("N", "L", "R", "page"), [(7, 512, 64, 64), (3, 128, 32, 1), (19, 256, 16, 4)])
def test_packed_latents_hold_values_scales_and_rope(device, N, L, R, page):
    write, device = form(device, "write_latents")
    x, weight, cos, sin, expected = latents(N, L, R, torch.bfloat16)
    entry = L + L // 32 + 2 * R
    blocks = -(-2 * N // page) + 1
    slots = slots_of(N, blocks * page)
    cache = torch.full((blocks, page, entry), 99, dtype=torch.uint8, device=device)
    write(cache, slots.to(device), *(t.to(device) for t in (x, weight)), eps=EPS, cos=cos.to(device), sin=sin.to(device))
    rows, there = cache.view(-1, entry).cpu(), slots >= 0
    latent, rope = unpack_latent(rows[slots[there]], L, torch.float64)
    torch.testing.assert_close(rope, expected[there][:, L:], rtol=2**-7, atol=1e-2)
    blocked, scale = expected[there][:, :L].unflatten(1, (-1, 128)), None
    scale = blocked.abs().amax(-1, keepdim=True) / 448
    error = (latent.unflatten(1, (-1, 128)) - blocked).abs()
    assert (error <= blocked.abs() * (2**-4 + 2**-7) + scale * 2**-8).all()
    found = rows[slots[there]][:, L : L + L // 32].contiguous().view(torch.float32)
    assert (found.log2() == found.log2().round()).all(), "scales are powers of two"
    untouched = torch.ones(len(rows), dtype=torch.bool)
    untouched[slots[there]] = False
    assert (rows[untouched] == 99).all()


@in_each_form
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "C", "R", "page"), [(7, 128, 64, 64), (5, 32, 8, 3), (1, 64, 64, 1)])
def test_index_keys_are_normalised_and_rotated(device, N, C, R, page, dtype, interleaved, hadamard):
    write, device = form(device, "write_index_keys")
    x, weight, bias, cos, sin, expected = index_keys(N, C, R, dtype, interleaved, hadamard)
    blocks = -(-2 * N // page) + 1
    slots = slots_of(N, blocks * page)
    inputs = [t.to(device) for t in (slots, x, weight, bias)]
    options = {"interleaved": interleaved, "hadamard": hadamard}
    cache = torch.full((blocks, page, C), 7.0, dtype=dtype, device=device)
    write(cache, *inputs, eps=EPS, cos=cos.to(device), sin=sin.to(device), **options)
    rows, there = cache.view(-1, C).cpu().double(), slots >= 0
    slack = TOLERANCE[dtype]
    torch.testing.assert_close(rows[slots[there]], expected[there], rtol=slack, atol=slack * (2 if hadamard else 1))
    untouched = torch.ones(len(rows), dtype=torch.bool)
    untouched[slots[there]] = False
    assert (rows[untouched] == 7).all()


@in_each_form
@pytest.mark.parametrize(("N", "C", "R", "page"), [(7, 128, 64, 64), (5, 32, 8, 3), (1, 64, 64, 1)])
def test_packed_index_keys_hold_a_pages_values_then_its_scales(device, N, C, R, page):
    write, device = form(device, "write_index_keys")
    x, weight, bias, cos, sin, expected = index_keys(N, C, R, torch.bfloat16, False, True)
    blocks = -(-2 * N // page) + 1
    slots = slots_of(N, blocks * page)
    cache = torch.full((blocks, page, C + 4), 99, dtype=torch.uint8, device=device)
    inputs = [t.to(device) for t in (slots, x, weight, bias)]
    write(cache, *inputs, eps=EPS, cos=cos.to(device), sin=sin.to(device), hadamard=True)
    values, scales = index_key_parts(cache.cpu())
    there = slots >= 0
    at = slots[there] // page, slots[there] % page
    scale = scales[at].contiguous().view(torch.float32).double()
    found = values[at].contiguous().view(FP8).double() * scale
    wanted = expected[there]
    assert (scale.log2() == scale.log2().round()).all()
    assert ((found - wanted).abs() <= wanted.abs() * 2**-4 + wanted.abs().amax(1, keepdim=True) * 2**-6).all()
    untouched = torch.ones(blocks * page, dtype=torch.bool)
    untouched[slots[there]] = False
    assert (values.reshape(-1, C)[untouched] == 99).all() and (scales.reshape(-1, 4)[untouched] == 99).all()


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_form_stores_what_the_plain_form_stores(device, dtype):
    """To the bit in all but the few values that stand at a rounding's edge. (The interpreter cuts off what bfloat16 lacks instead
    of rounding, so there it is held to float32 rows, less their bfloat16 rope.)"""
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter does not round to bfloat16")
    x, weight, cos, sin, _ = (t.to(device) for t in latents(40, 512, 64, dtype))
    at = torch.arange(40, device=device)
    caches = [torch.zeros(1, 64, 656, dtype=torch.uint8, device=device) for _ in range(2)]
    for cache, place in zip(caches, (device, "plain"), strict=True):
        form(place, "write_latents")[0](cache, at, x, weight, EPS, cos, sin)
    differ = (caches[0] != caches[1])[:, :40].float()
    assert differ[..., : 528 if device == "cpu" else 656].mean() < 1e-3
    x, weight, bias, cos, sin, _ = (t.to(device) for t in index_keys(40, 128, 64, dtype, False, True))
    caches = [torch.zeros(1, 64, 132, dtype=torch.uint8, device=device) for _ in range(2)]
    for cache, place in zip(caches, (device, "plain"), strict=True):
        form(place, "write_index_keys")[0](cache, at, x, weight, bias, EPS, cos, sin, hadamard=True)
    assert (caches[0] != caches[1]).float().mean() < 1e-3


@pytest.mark.gpu
def test_slots_beyond_two_billion_elements_are_written():
    """3.3 million entries of 656 bytes are 2.2e9: the last slots hold what the first ones hold, and nothing else is touched."""
    S = 3_300_000
    x, weight, cos, sin, _ = (t.cuda() for t in latents(8, 512, 64, torch.bfloat16))
    cache = torch.zeros(S, 656, dtype=torch.uint8, device="cuda")
    at = torch.arange(8, device="cuda")
    write_latents(cache, at, x, weight, EPS, cos, sin)
    write_latents(cache, at + S - 8, x, weight, EPS, cos, sin)
    assert torch.equal(cache[:8], cache[-8:]) and cache[:8].any(1).all() and not cache[8:-8].any()
    x, weight, bias, cos, sin, _ = (t.cuda() for t in index_keys(8, 128, 64, torch.bfloat16, False, False))
    blocks = 2**31 // (64 * 132) + 8
    keys = torch.zeros(blocks, 64, 132, dtype=torch.uint8, device="cuda")
    write_index_keys(keys, at, x, weight, bias, EPS, cos, sin)
    write_index_keys(keys, at + (blocks - 1) * 64, x, weight, bias, EPS, cos, sin)
    assert torch.equal(keys[0], keys[-1]) and keys[0].any() and not keys[1:-1].any()


def test_entries_are_the_models_own(generator):
    """What the layer computes for itself, a bf16 cache holds to the bit."""
    from rorqual.model.attention import Attention
    from rorqual.model.cache import Fresh
    from rorqual.model.rope import rotation
    from tests.model.small_models import small_model

    model = small_model().to(torch.bfloat16)
    layer = next(module for module in model.modules() if isinstance(module, Attention) and module.indexer is not None)
    config, x = model.config, torch.randn(9, model.config.dim, generator=generator).bfloat16()
    turn = rotation(torch.arange(9), config)
    indexer = layer.indexer
    assert indexer is not None
    fresh = Fresh(layer.wkv_a(x), layer.kv_norm, turn, indexer.wk(x), indexer)
    cache = torch.zeros(9, config.kv_lora_rank + config.qk_rope_head_dim, dtype=torch.bfloat16)
    keys = torch.zeros(9, config.index_head_dim, dtype=torch.bfloat16)
    fresh.write(cache, keys, torch.arange(9))
    assert torch.equal(cache, fresh.entries()) and torch.equal(keys, indexer.keys(x, turn))


def test_a_cache_of_another_width_is_refused():
    x, weight, cos, sin, _ = latents(2, 128, 8, torch.float32)
    with pytest.raises(ValueError, match=r"expected entries of 148 for torch.uint8, found 150"):
        write_latents_plain(torch.zeros(4, 150, dtype=torch.uint8), torch.arange(2), x, weight, EPS, cos, sin)
    x, weight, bias, cos, sin, _ = index_keys(2, 32, 8, torch.float32, False, False)
    with pytest.raises(ValueError, match=r"expected entries of 36 for torch.uint8, found 35"):
        write_index_keys_plain(torch.zeros(4, 35, dtype=torch.uint8), torch.arange(2), x, weight, bias, EPS, cos, sin)
