"""A dense decoder of the Llama family, run over a batch of decode rows and prompt chunks.

All tokens of the batch go through the linear layers together; attention is called once for
the rows of one new token and once for the chunks. Each layer:

    norm (+ residual) -> q, k, v in one product -> (q/k norm) rope, cache write
    -> attention -> o -> norm + residual -> gate, up in one product -> silu * up -> down
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.cpu_linear import linear as cpu_linear
from ..kernels.decode_attention import DecodeWorkspace, decode_attention
from ..kernels.prefill_attention import PrefillBatch, prefill_attention
from ..kernels.rms_norm import rms_norm
from ..kernels.rope import rope_and_cache
from ..kernels.silu_mul import silu_mul
from .shape import ModelShape
from .weights import LayerWeights, Linear, ModelWeights


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step's T tokens: those of the B rows with one new token, then the chunks'."""

    token_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int64
    cache_slots: Tensor  # [T] int64: block * block_size + offset; -1: padding
    num_singles: int
    singles: DecodeWorkspace  # prepared for the single rows, where there are any
    chunks: PrefillBatch | None


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
        self._cos, self._sin = tables
        self._kv_layers = kv_blocks.unbind(1)  # [num_blocks, 2, Hkv, block_size, D] each
        self._scale = shape.head_dim**-0.5
        self._linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = (
            F.linear if kv_blocks.is_cuda else cpu_linear
        )

    def hidden(self, step: StepInput, at: Tensor | None = None) -> Tensor:
        """The last layer's normed output ``[S, hidden]`` for the tokens ``at[S]``, None: all.

        Writes the batch's keys and values into the cache.
        """
        weights, eps = self.weights, self.shape.rms_norm_eps
        embedded = weights.embedding.index_select(0, step.token_ids)  # [T, hidden]
        x = embedded.to(weights.final_norm.dtype)
        residual: Tensor | None = None
        for layer, kv_layer in zip(weights.layers, self._kv_layers, strict=True):
            normed, residual = rms_norm(x, layer.input_norm, eps, residual)
            attended = self._attention(step, layer, kv_layer, normed)
            normed, residual = rms_norm(attended, layer.post_norm, eps, residual)
            gate_up = self._apply(layer.gate_up, normed)  # [T, 2 * intermediate]
            x = self._apply(layer.down, silu_mul(gate_up))
        if at is not None:
            x = x.index_select(0, at)
            residual = residual.index_select(0, at) if residual is not None else None
        return rms_norm(x, weights.final_norm, eps, residual)[0]

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """``hidden[S, hidden]`` -> ``[S, vocab]``, into ``out`` where given."""
        if out is not None:
            return torch.mm(hidden, self.weights.lm_head.t(), out=out)
        return self._linear(hidden, self.weights.lm_head, None)

    def _attention(
        self, step: StepInput, layer: LayerWeights, kv_layer: Tensor, normed: Tensor
    ) -> Tensor:
        """``normed[T, hidden]`` -> ``[T, hidden]``."""
        q, k, v = rope_and_cache(
            self._apply(layer.qkv, normed),
            self._cos,
            self._sin,
            step.positions,
            step.cache_slots,
            kv_layer,
            num_q_heads=self.shape.num_q_heads,
            q_norm_weight=layer.q_norm,
            k_norm_weight=layer.k_norm,
            eps=self.shape.rms_norm_eps,
        )
        count = step.num_singles
        parts: list[Tensor] = []  # [count, Hq, D], [T - count, Hq, D]
        if count:
            parts.append(decode_attention(q[:count], kv_layer, self._scale, step.singles))
        if step.chunks is not None:
            q, k, v = q[count:], k[count:], v[count:]
            parts.append(prefill_attention(q, k, v, kv_layer, self._scale, step.chunks))
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._apply(layer.o, attended.flatten(1))

    def _apply(self, linear: Linear, x: Tensor) -> Tensor:
        return self._linear(x, linear.weight, linear.bias)
