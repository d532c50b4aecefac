"""The parameters of a model as the step uses them: q, k, v in one matrix, gate and up in one.

Loading reads one tensor after the other straight to the device and copies it into its
place, cast on the way: the peak is the model and one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import OutOfMemory, WeightsError
from ..core.progress import Progress
from .checkpoint import Checkpoint, open_checkpoint
from .device import Precision
from .shape import ModelShape

DUMMY_SEED = 20
_DUMMY_STD = 0.02
_ALIGNMENT = 128  # elements


@dataclass(frozen=True, slots=True)
class Linear:
    weight: Tensor  # [out, in]
    bias: Tensor | None = None  # [out]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Norms and biases are of the activations' type, matrices of the weights'."""

    input_norm: Tensor  # [hidden]
    qkv: Linear  # [(Hq + 2 Hkv) * D, hidden]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    o: Linear  # [hidden, Hq * D]
    post_norm: Tensor  # [hidden]
    gate_up: Linear  # [2 * intermediate, hidden]
    down: Linear  # [hidden, intermediate]


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embedding: Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [hidden]
    lm_head: Tensor  # [vocab, hidden]; the embedding itself where they are tied

    @property
    def step_bytes(self) -> int:
        """What a decode step reads of the weights: every matrix once."""
        tensors = [self.lm_head]
        for layer in self.layers:
            tensors += [m.weight for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def nbytes(self) -> int:
        untied = 0 if self.lm_head is self.embedding else self.embedding.nbytes
        return self.step_bytes + untied


def load_weights(
    folder: Path, shape: ModelShape, precision: Precision, device: torch.device
) -> ModelWeights:
    """Reads a folder of safetensors; WeightsError where a tensor is missing or misshapen."""
    checkpoint = open_checkpoint(folder)
    weights = _allocate(shape, precision, device)
    with ExitStack() as stack:
        reader = _Reader(checkpoint, device, stack)
        progress = stack.enter_context(Progress("loading the weights", weights.nbytes))
        for name, target in _named(weights, shape):
            reader.copy(name, target)
            progress.advance(target.nbytes)
    return weights


def dummy_weights(shape: ModelShape, precision: Precision, device: torch.device) -> ModelWeights:
    """Random weights, the same ones on every device of a kind."""
    weights = _allocate(shape, precision, device)
    generator = torch.Generator(device).manual_seed(DUMMY_SEED)
    for name, target in _named(weights, shape):
        if name.endswith("norm.weight"):
            target.fill_(1)
        else:
            target.normal_(0, _DUMMY_STD, generator=generator)
    return weights


class _Reader:
    """Copies tensors of a checkpoint into their places."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, stack: ExitStack) -> None:
        self._checkpoint = checkpoint
        self._device = str(device)
        self._stack = stack
        self._open: dict[Path, safe_open] = {}

    def copy(self, name: str, target: Tensor) -> None:
        entry = self._checkpoint.tensors.get(name)
        if entry is None:
            raise WeightsError(f"{self._checkpoint.folder}: no tensor {name} in the weights")
        if entry.shape != tuple(target.shape):
            raise WeightsError(
                f"{entry.file}: {name} is {list(entry.shape)}, "
                f"config.json says {list(target.shape)}"
            )
        try:
            file = self._open.get(entry.file)
            if file is None:
                opened = safe_open(str(entry.file), framework="pt", device=self._device)
                file = self._open[entry.file] = self._stack.enter_context(opened)
            source = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{entry.file}: {error}") from None
        if not source.is_floating_point() or source.element_size() < 2:
            raise WeightsError(f"{entry.file}: {name} is {entry.dtype}; use bf16, fp16 or fp32")
        target.copy_(source)


class _Arena:
    """All matrices in one allocation. On a CPU it lies in huge pages, which numpy asks for:
    a step streams the weights, and every page is one more address to look up."""

    def __init__(self, shape: ModelShape, precision: Precision, device: torch.device) -> None:
        num_matrices = 4 * shape.num_layers + 2
        size = (shape.num_parameters + num_matrices * _ALIGNMENT) * precision.weights.itemsize
        try:
            if device.type == "cpu":
                buffer = torch.from_numpy(np.empty(size, np.uint8))
            else:
                buffer = torch.empty(size, dtype=torch.uint8, device=device)
        except (torch.cuda.OutOfMemoryError, MemoryError) as error:
            raise OutOfMemory(
                f"the weights ({size / 2**30:.1f} GiB) do not fit on {device}; use another "
                "pools.*.device, a smaller model.dtype, or fewer workers on it"
            ) from error
        self._left = buffer.view(precision.weights)  # [elements]

    def matrix(self, rows: int, columns: int) -> Tensor:
        taken = self._left[: rows * columns].view(rows, columns)
        self._left = self._left[-(-rows * columns // _ALIGNMENT) * _ALIGNMENT :]
        return taken


def _allocate(shape: ModelShape, precision: Precision, device: torch.device) -> ModelWeights:
    """OutOfMemory where the device has no room for it."""
    arena = _Arena(shape, precision, device)
    hidden, width = shape.hidden_size, shape.num_q_heads * shape.head_dim

    def vector(length: int) -> Tensor:
        return torch.empty(length, dtype=precision.activations, device=device)

    def linear(rows: int, columns: int, biased: bool = False) -> Linear:
        return Linear(arena.matrix(rows, columns), vector(rows) if biased else None)

    layers = tuple(
        LayerWeights(
            input_norm=vector(hidden),
            qkv=linear(shape.qkv_width, hidden, shape.qkv_bias),
            q_norm=vector(shape.head_dim) if shape.qk_norm else None,
            k_norm=vector(shape.head_dim) if shape.qk_norm else None,
            o=linear(hidden, width, shape.o_bias),
            post_norm=vector(hidden),
            gate_up=linear(2 * shape.intermediate_size, hidden),
            down=linear(hidden, shape.intermediate_size),
        )
        for _ in range(shape.num_layers)
    )
    embedding = arena.matrix(shape.vocab_size, hidden)
    lm_head = embedding if shape.tied else arena.matrix(shape.vocab_size, hidden)
    return ModelWeights(embedding, layers, vector(hidden), lm_head)


def _named(weights: ModelWeights, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its name in a Hugging Face checkpoint, with the place it goes to."""
    yield "model.embed_tokens.weight", weights.embedding
    q_width = shape.num_q_heads * shape.head_dim
    kv_width = shape.num_kv_heads * shape.head_dim
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        yield prefix + "input_layernorm.weight", layer.input_norm
        yield prefix + "post_attention_layernorm.weight", layer.post_norm
        attention = prefix + "self_attn."
        yield from _split(
            layer.qkv,
            (attention + "q_proj", attention + "k_proj", attention + "v_proj"),
            [q_width, kv_width, kv_width],
        )
        if layer.q_norm is not None and layer.k_norm is not None:
            yield attention + "q_norm.weight", layer.q_norm
            yield attention + "k_norm.weight", layer.k_norm
        yield from _split(layer.o, (attention + "o_proj",), [shape.hidden_size])
        mlp = prefix + "mlp."
        yield from _split(
            layer.gate_up, (mlp + "gate_proj", mlp + "up_proj"), [shape.intermediate_size] * 2
        )
        yield from _split(layer.down, (mlp + "down_proj",), [shape.hidden_size])
    yield "model.norm.weight", weights.final_norm
    if weights.lm_head is not weights.embedding:
        yield "lm_head.weight", weights.lm_head


def _split(
    linear: Linear, names: tuple[str, ...], sizes: list[int]
) -> Iterator[tuple[str, Tensor]]:
    for name, part in zip(names, torch.split(linear.weight, sizes), strict=True):
        yield name + ".weight", part
    if linear.bias is not None:
        for name, part in zip(names, torch.split(linear.bias, sizes), strict=True):
            yield name + ".bias", part
