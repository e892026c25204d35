"""What a layer keeps of each token, made from its projections and stored in the token's slot: normalised, rotated, packed.

A slot is block * page + offset in a cache of pages [blocks, page, entry]; a cache without pages [slots, entry] has pages of one.
The stored bytes are those of the model's own entries (`rowwise`, rounded to the projections' dtype) under the `fp8` packing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.dispatch import triton_form
from rorqual.kernels.fp8 import pack_index_key, pack_latent
from rorqual.kernels.rowwise import hadamard_transform, layer_norm, rms_norm, turn_half_split, turn_interleaved


def write_latents(cache: Tensor, slots: Tensor, projected: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> None:
    """Store [RMSNorm(latent) | RoPE(rope key)] of each row in its slot, in place; the rope key is not normalised.

    cache [blocks, page, entry] or [slots, entry], contiguous: bfloat16, float16 or float32 with entry = L + R, or uint8 in the
    layout of `pack_latent` with entry = L + 4 L / 128 + 2 R (656 bytes in the release). slots integer [N], negative: the row is
    not stored; no slot twice. projected [N, L + R]: the layer's product wkv_a(x). weight [L] and eps: the latent's norm.
    cos, sin float32 [N, R/2]: each row's angles (interleaved pairs).
    """
    form = triton_form("write_latents", cache, slots, projected, weight, cos, sin, file="cache_writers")
    (form or write_latents_plain)(cache, slots, projected, weight, eps, cos, sin)


@torch.no_grad()
def write_latents_plain(
    cache: Tensor, slots: Tensor, projected: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> None:
    L = len(weight)
    store, there = cache.view(-1, cache.shape[-1]), slots >= 0
    latent, rope = rms_norm(projected[:, :L], weight, eps), turn_interleaved(projected[:, L:], cos, sin)
    entries = pack_latent(latent, rope) if cache.dtype == torch.uint8 else torch.cat([latent, rope], -1).to(cache.dtype)
    if entries.shape[1] != store.shape[1]:
        raise ValueError(f"cache: expected entries of {entries.shape[1]} for {cache.dtype}, found {store.shape[1]}")
    store[slots[there].long()] = entries[there]


def write_index_keys(
    cache: Tensor, slots: Tensor, projected: Tensor, weight: Tensor, bias: Tensor, eps: float, cos: Tensor, sin: Tensor,
    *, interleaved: bool = False, hadamard: bool = False,
) -> None:  # fmt: skip
    """Store the index key of each row in its slot, in place: LayerNorm, then RoPE on the FIRST R dims.

    cache [blocks, page, entry] or [slots, entry], contiguous: bfloat16, float16 or float32 with entry = C, or uint8 with
    entry = C + 4 (132 bytes in the release), in which each block holds first its page * C e4m3 values, then its page float32
    scales, as `select_tokens_triton.select_cached_tokens` reads it. slots integer [N], negative: the row is not stored; no slot
    twice. projected [N, C]: the indexer's product wk(x). weight, bias [C] and eps: the key norm. cos, sin float32 [N, R/2].
    interleaved: RoPE on pairs (x0, x1) instead of (x_i, x_{i + R/2}). hadamard: the orthonormal transform last.
    """
    form = triton_form("write_index_keys", cache, slots, projected, weight, bias, cos, sin, file="cache_writers")
    (form or write_index_keys_plain)(
        cache, slots, projected, weight, bias, eps, cos, sin, interleaved=interleaved, hadamard=hadamard
    )


@torch.no_grad()
def write_index_keys_plain(
    cache: Tensor, slots: Tensor, projected: Tensor, weight: Tensor, bias: Tensor, eps: float, cos: Tensor, sin: Tensor,
    *, interleaved: bool = False, hadamard: bool = False,
) -> None:  # fmt: skip
    R, C = 2 * cos.shape[1], projected.shape[1]
    normed = layer_norm(projected, weight, bias, eps)
    turn = turn_interleaved if interleaved else turn_half_split
    keys = torch.cat([turn(normed[:, :R], cos, sin), normed[:, R:]], -1)
    keys, there = hadamard_transform(keys) if hadamard else keys, slots >= 0
    slots, keys = slots[there].long(), keys[there]
    expected = C + 4 if cache.dtype == torch.uint8 else C
    if cache.shape[-1] != expected:
        raise ValueError(f"cache: expected entries of {expected} for {cache.dtype}, found {cache.shape[-1]}")
    if cache.dtype != torch.uint8:
        cache.view(-1, C)[slots] = keys.to(cache.dtype)
        return
    values, scales = index_key_parts(cache)
    page = values.shape[1]
    packed = pack_index_key(keys)
    values[slots // page, slots % page], scales[slots // page, slots % page] = packed[:, :C], packed[:, C:]


def index_key_parts(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views of an FP8 index-key cache uint8 [blocks, page, C + 4] or [slots, C + 4]: values [blocks, page, C] and the bytes of
    the scales [blocks, page, 4]."""
    blocks, page, C = cache.shape[0], cache.shape[1] if cache.dim() == 3 else 1, cache.shape[-1] - 4
    flat = cache.view(blocks, -1)
    return flat[:, : page * C].unflatten(1, (page, C)), flat[:, page * C :].unflatten(1, (page, 4))
