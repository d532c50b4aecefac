"""Tensors of a checkpoint in their places, and checkpoints that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdserve.core.config import Dtype
from pdserve.core.errors import ConfigError, StartupError, WeightsError
from pdserve.engine.device import (
    MemoryState,
    Precision,
    host_memory,
    memory_state,
    resolve_device,
    resolve_precision,
)
from pdserve.engine.shape import read_shape
from pdserve.engine.weights import dummy_weights, load_weights

CPU = torch.device("cpu")
FP32 = Precision(torch.float32, torch.float32)
BF16 = Precision(torch.bfloat16, torch.float32)


def test_matrices_are_merged_in_order(llama_folder: Path) -> None:
    state = load_file(llama_folder / "model.safetensors")
    weights = load_weights(llama_folder, read_shape(llama_folder), FP32, CPU)
    prefix = "model.layers.1."
    layer = weights.layers[1]
    attention = [state[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(layer.qkv.weight, torch.cat(attention))
    mlp = [state[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(layer.gate_up.weight, torch.cat(mlp))
    assert torch.equal(layer.post_norm, state[prefix + "post_attention_layernorm.weight"])
    assert weights.lm_head is weights.embedding, "tied"
    assert weights.nbytes == weights.step_bytes
    matrices = sum(value.numel() for value in state.values() if value.dim() == 2)
    assert weights.step_bytes == 4 * matrices


def test_a_checkpoint_is_cast(llama_folder: Path) -> None:
    state = load_file(llama_folder / "model.safetensors")
    weights = load_weights(llama_folder, read_shape(llama_folder), BF16, CPU)
    assert torch.equal(weights.embedding, state["model.embed_tokens.weight"].bfloat16())
    assert torch.equal(weights.final_norm, state["model.norm.weight"]), "norms stay exact"


def test_dummy_weights_are_the_same_every_time(llama_folder: Path) -> None:
    shape = read_shape(llama_folder)
    first, second = (dummy_weights(shape, FP32, CPU) for _ in range(2))
    assert torch.equal(first.layers[1].down.weight, second.layers[1].down.weight)
    assert not torch.equal(first.layers[0].down.weight, first.layers[1].down.weight)
    assert first.embedding.std().item() == pytest.approx(0.02, rel=0.05)
    assert bool((first.final_norm == 1).all())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "no tensor model.norm.weight in the weights"),
        ("misshapen", "model.norm.weight is [49], config.json says [48]"),
        ("integer", "model.norm.weight is I32; use bf16, fp16 or fp32"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    change: str, words: str, llama_folder: Path, tmp_path: Path
) -> None:
    state = load_file(llama_folder / "model.safetensors")
    norm = state.pop("model.norm.weight")
    if change == "misshapen":
        state["model.norm.weight"] = torch.ones(49)
    elif change == "integer":
        state["model.norm.weight"] = norm.int()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        load_weights(tmp_path, read_shape(llama_folder), FP32, CPU)
    assert words in str(caught.value)


def test_number_formats_of_a_device() -> None:
    assert resolve_precision(Dtype.AUTO, CPU) == FP32
    assert resolve_precision(Dtype.BF16, CPU) == BF16
    gpu = torch.device("cuda", 0)
    assert resolve_precision(Dtype.AUTO, gpu) == Precision(torch.bfloat16, torch.bfloat16)
    assert resolve_precision(Dtype.FP16, gpu) == Precision(torch.float16, torch.float16)
    with pytest.raises(ConfigError, match="fp16 is for GPUs"):
        resolve_precision(Dtype.FP16, CPU)


def test_memory_of_a_host_and_of_a_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 600 kB\nHugePages: 0\n")
    assert host_memory(meminfo, tmp_path) == MemoryState(1000 << 10, 600 << 10)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert host_memory(meminfo, tmp_path) == MemoryState(1000 << 10, 600 << 10)
    (tmp_path / "memory.max").write_text("5000\n")
    assert host_memory(meminfo, tmp_path) == MemoryState(5000, 4000)
    now = memory_state(CPU)
    assert 0 < now.free < now.total


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(StartupError, match="usable GPUs"):
        resolve_device("cuda:99")
