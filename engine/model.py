"""A dense decoder of the Llama family, run over a batch of decode rows and prompt chunks.

All tokens of the batch go through the linear layers together; attention is called once for
the rows of one new token and once for the chunks. A step is

    enter     embedding -> norm -> q, k, v in one product -> (q/k norm) rope, cache write
    attend    per layer
    cross     from one layer's attention to the next's: o -> norm + residual -> gate, up in one
              product -> silu * up -> down -> norm + residual -> q, k, v ... as above
    leave     the same to the last layer's end

Only ``attend`` depends on how the tokens are divided among sequences, so that the rest can be
captured once for a number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.decode_attention import DecodeWorkspace, decode_attention
from ..kernels.linear import gated_linear, linear, linear_parts
from ..kernels.prefill_attention import PrefillBatch, prefill_attention
from ..kernels.rms_norm import rms_norm
from ..kernels.rope import rope_and_cache
from .shape import ModelShape
from .weights import LayerWeights, Linear, ModelWeights


@dataclass(frozen=True, slots=True)
class Tokens:
    """T tokens: what they are, where they stand, and where their keys and values go."""

    token_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int64
    cache_slots: Tensor  # [T] int64: block * block_size + offset; -1: padding


@dataclass(frozen=True, slots=True)
class Attention:
    """How a step's tokens attend: first those of B rows with one new token, then the chunks'.

    Where the chunks are ``placed`` by the device, ``num_singles`` is the most there may be: what
    is none of them is attended to by the chunks, or is padding.
    """

    num_singles: int
    singles: DecodeWorkspace | None  # prepared for the single rows, where there are any
    chunks: PrefillBatch | None


@dataclass(frozen=True, slots=True)
class Heads:
    """A layer's queries, keys and values, rotated; the cache holds the last two already."""

    q: Tensor  # [T, Hq, D]
    k: Tensor  # [T, Hkv, D]
    v: Tensor  # [T, Hkv, D]


class Model:
    """Weights, rotary tables and KV cache of one model. Stateless but for the cache."""

    def __init__(
        self,
        shape: ModelShape,
        weights: ModelWeights,
        tables: tuple[Tensor, Tensor],
        kv_blocks: Tensor,
    ) -> None:
        """``tables``: cosines and sines ``[max_context, head_dim / 2]`` fp32, on the device;
        ``kv_blocks[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]``."""
        self.shape = shape
        self.weights = weights
        self.kv_blocks = kv_blocks
        self._cos, self._sin = tables
        self._kv_layers = kv_blocks.unbind(1)  # [num_blocks, 2, Hkv, block_size, D] each
        self._scale = shape.head_dim**-0.5

    def hidden(self, tokens: Tokens, attention: Attention, at: Tensor | None = None) -> Tensor:
        """The last layer's normed output ``[S, hidden]`` for the tokens ``at[S]``, None: all.

        Writes the batch's keys and values into the cache.
        """
        attended, residual = self._to_last(tokens, attention)
        x, residual = self._rest(self.shape.num_layers - 1, attended, residual)
        if at is not None:
            x, residual = x.index_select(-2, at), residual.index_select(0, at)
        return rms_norm(x, self.weights.final_norm, self.shape.rms_norm_eps, residual)[0]

    def pass_through(self, tokens: Tokens, attention: Attention, out: Tensor) -> None:
        """As ``hidden`` for all tokens, not normed, into ``out[T, hidden]``."""
        attended, residual = self._to_last(tokens, attention)
        self.leave(attended, residual, out)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """``hidden[S, hidden]`` -> ``[S, vocab]``, into ``out`` where given."""
        return linear(hidden, self.weights.lm_head, out=out)

    def enter(self, tokens: Tokens, out: Tensor | None = None) -> tuple[Heads, Tensor]:
        """The first layer's heads, and the residual ``[T, hidden]``.

        ``out[T, (Hq + 2 Hkv) * D]`` takes the heads where given.
        """
        weights = self.weights
        embedded = weights.embedding.index_select(0, tokens.token_ids)  # [T, hidden]
        x = embedded.to(weights.final_norm.dtype)
        normed, residual = rms_norm(x, weights.layers[0].input_norm, self.shape.rms_norm_eps)
        return self._heads(0, normed, tokens, out), residual

    def attend(
        self, layer: int, heads: Heads, attention: Attention, out: Tensor | None = None
    ) -> Tensor:
        """``[T, Hq * D]``, into ``out[T, Hq, D]`` where given."""
        kv_layer, count, chunks = self._kv_layers[layer], attention.num_singles, attention.chunks
        q, k, v = heads.q, heads.k, heads.v
        if not count and chunks is not None:
            return prefill_attention(q, k, v, kv_layer, self._scale, chunks, out).flatten(1)
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if count:
            assert attention.singles is not None
            decode_attention(q[:count], kv_layer, self._scale, attention.singles, out[:count])
        if chunks is not None and chunks.placed:
            prefill_attention(q, k, v, kv_layer, self._scale, chunks, out)
        elif chunks is not None:
            prefill_attention(
                *(q[count:], k[count:], v[count:]), kv_layer, self._scale, chunks, out[count:]
            )
        return out.flatten(1)

    def cross(
        self,
        layer: int,
        attended: Tensor,
        residual: Tensor,
        tokens: Tokens,
        out: Tensor | None = None,
    ) -> tuple[Heads, Tensor]:
        """From what ``layer`` attended to, ``[T, Hq * D]``, to the next layer's heads."""
        x, residual = self._rest(layer, attended, residual)
        norm = self.weights.layers[layer + 1].input_norm
        normed, residual = rms_norm(x, norm, self.shape.rms_norm_eps, residual)
        return self._heads(layer + 1, normed, tokens, out), residual

    def leave(self, attended: Tensor, residual: Tensor, out: Tensor) -> None:
        """From what the last layer attended to, to its output ``out[T, hidden]``, not normed."""
        x, residual = self._rest(self.shape.num_layers - 1, attended, residual)
        torch.add(x if x.dim() == 2 else x.sum(0).to(residual.dtype), residual, out=out)

    def final_norm(self, left: Tensor) -> Tensor:
        """Of rows that ``leave`` gave, ``[S, hidden]``."""
        return rms_norm(left, self.weights.final_norm, self.shape.rms_norm_eps)[0]

    def _to_last(self, tokens: Tokens, attention: Attention) -> tuple[Tensor, Tensor]:
        """What the last layer attended to, ``[T, Hq * D]``, and its residual ``[T, hidden]``."""
        heads, residual = self.enter(tokens)
        for layer in range(self.shape.num_layers - 1):
            heads, residual = self.cross(
                layer, self.attend(layer, heads, attention), residual, tokens
            )
        return self.attend(self.shape.num_layers - 1, heads, attention), residual

    def _rest(self, layer: int, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """A layer after its attention: the MLP's output, or its parts, and the residual."""
        weights: LayerWeights = self.weights.layers[layer]
        projected = _parts(weights.o, attended)
        normed, residual = rms_norm(projected, weights.post_norm, self.shape.rms_norm_eps, residual)
        return _parts(weights.down, gated_linear(normed, weights.gate_up.weight)), residual

    def _heads(self, layer: int, normed: Tensor, tokens: Tokens, out: Tensor | None) -> Heads:
        weights, shape = self.weights.layers[layer], self.shape
        qkv = weights.qkv
        parts = _parts(qkv, normed) if out is None else linear(normed, qkv.weight, qkv.bias, out)
        return Heads(
            *rope_and_cache(
                parts,
                self._cos,
                self._sin,
                tokens.positions,
                tokens.cache_slots,
                self._kv_layers[layer],
                num_q_heads=shape.num_q_heads,
                q_norm_weight=weights.q_norm,
                k_norm_weight=weights.k_norm,
                eps=shape.rms_norm_eps,
            )
        )


def _parts(layer: Linear, x: Tensor) -> Tensor:
    return linear_parts(x, layer.weight, layer.bias)
