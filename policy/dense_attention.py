"""Attention of transformers' models over packed documents, without a [T, T] mask, and their decoding cache.

Registered with transformers under `ATTENTION`: a model built with that name calls `_packed_attention` in every layer, and
asks transformers for no mask. What a forward pass attends to travels beside its inputs, as the keyword `attend`.
Shape letters are those of deepseek.py; G key and value heads, S positions that the cache has room for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.config import PolicyConfigError
from policy.deepseek import Packing

ATTENTION = "groupzero_packed"
# (layer, q [B, H, n, d], k and v [B, G, n, d], scale, window) -> [B, n, H, d]
Attend = Callable[[int, Tensor, Tensor, Tensor, float, int | None], Tensor]


def register_attention() -> None:
    """Make `ATTENTION` known to transformers; once or many times is the same."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _packed_attention)


class KeyValueCache:
    """The decoding cache: rotated keys and values [layers, B, S, G, d], and how many positions each sequence has used."""

    def __init__(self, keys: Tensor, values: Tensor, lengths: Tensor):
        self.keys, self.values, self.lengths = keys, values, lengths

    @property
    def capacity(self) -> int:
        """Positions that there is room for, per sequence."""
        return self.keys.shape[2]

    def select(self, rows: Tensor, capacity: int) -> KeyValueCache:
        """A copy of sequences `rows` [B'] (repeats allowed) with room for `capacity` tokens each."""
        # Not the lengths alone: tokens that were decoded just now may lie behind them.
        kept = min(capacity, self.capacity)
        keys, values = (old.new_zeros(old.shape[0], len(rows), capacity, *old.shape[3:]) for old in self._both)
        for fresh, old in zip((keys, values), self._both, strict=True):
            fresh[:, :, :kept] = old[:, rows, :kept]
        return KeyValueCache(keys, values, self.lengths[rows])

    @property
    def _both(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


@dataclass(frozen=True)
class Documents:
    """Causal attention within each of the documents of a flat batch [1, T]; `cache` takes their keys and values."""

    packing: Packing
    cache: KeyValueCache | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """q [1, H, T, d], k and v [1, G, T, d] -> [1, T, H, d]."""
        padded = [self.packing.pad(flat[0].transpose(0, 1)) for flat in (q, k, v)]  # [B, L, heads, d]
        if self.cache is not None:
            for stored, new in ((self.cache.keys, padded[1]), (self.cache.values, padded[2])):
                stored[layer, :, : self.packing.longest] = new
        q, k, v = (rectangle.transpose(1, 2) for rectangle in padded)
        # Padding is on the right and attention is causal, so no token sees it.
        positions = torch.arange(self.packing.longest, device=q.device)
        mask = None if window is None or window >= self.packing.longest else visible(positions, positions, window)
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
        return self.packing.unpad(out.transpose(1, 2))[None]


@dataclass(frozen=True)
class Continuation:
    """Attention of n more tokens per sequence to all that the cache holds of it, and causally to each other."""

    cache: KeyValueCache

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """q [B, H, n, d], k and v [B, G, n, d], both of which the cache keeps -> [B, n, H, d]."""
        cache, (batch, heads, count, width), groups = self.cache, q.shape, k.shape[1]
        places = cache.lengths[:, None] + torch.arange(count, device=q.device)  # [B, n]
        rows = torch.arange(batch, device=q.device)[:, None]
        cache.keys[layer, rows, places] = k.transpose(1, 2)
        cache.values[layer, rows, places] = v.transpose(1, 2)
        span = int(cache.lengths.max()) + count
        keys, values = (stored[layer, :, :span].transpose(1, 2) for stored in (cache.keys, cache.values))
        # The query heads of a group as more queries of its key head: keys and values are read once, never repeated.
        q = q.reshape(batch, groups, heads // groups * count, width)
        mask = visible(places, torch.arange(span, device=q.device), window)  # [B, n, span]
        mask = mask.repeat(1, heads // groups, 1)[:, None]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
        return out.reshape(batch, heads, count, width).transpose(1, 2)


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Whether a query at position [..., n] sees a key at position [m]: [..., n, m]; a window counts the query itself."""
    ahead = queries[..., None] - keys
    seen = ahead >= 0
    return seen if window is None else seen & (ahead < window)


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    attend: Attend | None = None,
    position_ids: Tensor | None = None,
    use_cache: bool = False,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls; whatever changes attention and is not computed here is refused by name."""
    del position_ids, use_cache  # of the layer, not of attention
    asked = {**others, "attention_mask": attention_mask, "dropout": dropout or None}
    if refused := [name for name, value in asked.items() if value is not None and value is not False]:
        raise PolicyConfigError(
            f"{type(module).__name__} asks attention for {', '.join(refused)}, which packed attention does not compute"
        )
    if attend is None:
        raise PolicyConfigError(
            f"{type(module).__name__} does not pass keyword arguments through to attention: "
            "this architecture cannot be packed"
        )
    layer: Any = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(layer, query, key, value, scale, sliding_window), None
