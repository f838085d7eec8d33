"""Keys and values of the sequences being decoded together, one row each.

Rows stay packed: when one leaves, the last takes its place. So a step works on the first rows of
one tensor per layer, whatever the sequences' lengths, and copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .config import LanguageConfig
from .model import Attend, attend_causally

_GRANULE = 64  # capacity grows in multiples of so many tokens


class RowCache:
    """Tensors ``[rows, kv_heads, capacity, head_size]`` per layer; ``lengths`` of live rows."""

    def __init__(self, config: LanguageConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.lengths: list[int] = []
        self._dtype = dtype
        self._device = device
        self._heads = config.num_key_value_heads
        self._size = config.head_size
        self._keys = [self._empty(0, 0) for _ in range(config.num_hidden_layers)]
        self._values = [self._empty(0, 0) for _ in range(config.num_hidden_layers)]

    def join(self, lengths: Sequence[int]) -> Attend:
        """Add rows of these lengths; the prefill, padded on the right, must attend by the result.

        The rows count at once: on failure let them :meth:`leave`.
        """
        first = len(self.lengths)
        self.lengths += lengths
        self._reserve(len(self.lengths), max(self.lengths) + 1)
        rows = slice(first, len(self.lengths))

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self._keys[layer][rows, :, : key.shape[2]] = key
            self._values[layer][rows, :, : value.shape[2]] = value
            return attend_causally(layer, query, key, value)

        return attend

    def step(self) -> tuple[Tensor, Attend]:
        """Make room for one more token in each row: its positions ``[rows, 1]`` and how to attend."""
        count, longest = len(self.lengths), max(self.lengths) + 1
        self._reserve(count, longest)
        positions = torch.tensor(self.lengths, device=self._device)
        rows = torch.arange(count, device=self._device)
        seen = torch.arange(longest, device=self._device) <= positions[:, None]
        mask = seen[:, None, None, :]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self._keys[layer], self._values[layer]
            keys[rows, :, positions] = key[:, :, 0]
            values[rows, :, positions] = value[:, :, 0]
            # The queries that share a key become its sequence: no key is copied per query.
            grouped = query.reshape(count, self._heads, -1, self._size)
            met = functional.scaled_dot_product_attention(
                grouped, keys[:count, :, :longest], values[:count, :, :longest], attn_mask=mask
            )
            return met.reshape(query.shape)

        self.lengths = [length + 1 for length in self.lengths]
        return positions[:, None], attend

    def leave(self, row: int) -> None:
        """Drop a row; the last one moves into its place."""
        last = len(self.lengths) - 1
        if row != last:
            for tensor in (*self._keys, *self._values):
                tensor[row] = tensor[last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def clear(self) -> None:
        """Drop every row and give the memory back."""
        self.lengths = []
        self._keys = [self._empty(0, 0) for _ in self._keys]
        self._values = [self._empty(0, 0) for _ in self._values]

    def _empty(self, rows: int, capacity: int) -> Tensor:
        shape = (rows, self._heads, capacity, self._size)
        # Zeros, because a masked place still takes part in the sum, and 0 x NaN is NaN.
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _reserve(self, rows: int, capacity: int) -> None:
        held_rows, held = self._keys[0].shape[0], self._keys[0].shape[2]
        if rows <= held_rows and capacity <= held:
            return
        new_rows = max(rows, held_rows)
        new_capacity = held
        if capacity > held:
            new_capacity = -(-max(capacity, held * 3 // 2) // _GRANULE) * _GRANULE
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                tensors[layer] = self._empty(new_rows, new_capacity)
                tensors[layer][:held_rows, :, :held] = old
