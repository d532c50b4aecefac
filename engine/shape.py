"""What a model looks like: its config.json, read into plain data.

Dense decoders of the Llama family differ in four things that matter here: biases, a norm
on the heads of q and k, the rotary table, and a window. Everything else that a
config.json may ask for is refused in words: running it anyway would give wrong tokens.
No torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from ..core.errors import WeightsError
from ..core.files import reason


class Family(StrEnum):
    """The architectures of Hugging Face's ``config.json`` that are run."""

    LLAMA = "LlamaForCausalLM"  # SmolLM2 is one
    MISTRAL = "MistralForCausalLM"
    QWEN2 = "Qwen2ForCausalLM"
    QWEN3 = "Qwen3ForCausalLM"


_MODEL_TYPES = {
    "llama": Family.LLAMA,
    "mistral": Family.MISTRAL,
    "qwen2": Family.QWEN2,
    "qwen3": Family.QWEN3,
}
_MAX_POSITIONS = {
    Family.LLAMA: 2048,
    Family.MISTRAL: 131072,
    Family.QWEN2: 32768,
    Family.QWEN3: 32768,
}  # where config.json leaves it to the family's default
_QWEN = (Family.QWEN2, Family.QWEN3)


class RopeType(StrEnum):
    DEFAULT = "default"
    LINEAR = "linear"  # position interpolation (Chen et al., 2023)
    LLAMA3 = "llama3"  # by wavelength, as Llama 3.1 does
    YARN = "yarn"  # Peng et al., 2023


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding. The fields after ``factor`` belong to llama3 and yarn alone."""

    theta: float
    type: RopeType = RopeType.DEFAULT
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    amplitude: float = 1.0  # cosines and sines are multiplied by it


@dataclass(frozen=True, slots=True)
class ModelShape:
    """All that the engine needs beside the weights.

    ``max_context`` is the longest sequence that full attention computes correctly: a
    sliding window ends it.
    """

    family: Family
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope: Rope
    tied: bool  # lm_head is the embedding
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    max_context: int

    @property
    def qkv_width(self) -> int:
        return (self.num_q_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Matrices only: norms and biases are less than a thousandth."""
        attention = self.hidden_size * (self.qkv_width + self.num_q_heads * self.head_dim)
        mlp = 3 * self.hidden_size * self.intermediate_size
        tables = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.num_layers * (attention + mlp) + tables


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; WeightsError where there is none or it is not JSON."""
    return _read_json(folder / "config.json")


def read_shape(folder: Path) -> ModelShape:
    """The folder's config.json as a shape; WeightsError with a sentence."""
    return parse_shape(read_config(folder), str(folder / "config.json"))


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """End tokens by config.json and generation_config.json together, ascending.

    Not the tokenizer's: its ``eos_token`` is what ends a text in training, and some
    converters get it wrong.
    """
    ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if name == "config.json" or path.exists():
            value = _read_json(path).get("eos_token_id")
            found = [] if value is None else value if isinstance(value, list) else [value]
            if not all(type(token_id) is int for token_id in found):
                raise WeightsError(f"{path}: eos_token_id is {value!r}, not one token or several")
            ids |= set(found)
    return tuple(sorted(ids))


def parse_shape(config: Mapping[str, Any], where: str) -> ModelShape:
    """A shape from what config.json says; ``where`` names it in errors."""
    try:
        return _parse_shape(_Reader(config, where))
    except (TypeError, ValueError, AttributeError) as error:  # a text where a number should be
        raise WeightsError(f"{where}: is not a model's: {error}") from error


def _parse_shape(reader: _Reader) -> ModelShape:
    config, where = reader.config, reader.where
    family = reader.family()
    reader.refuse_what_is_not_run()
    hidden = reader.size("hidden_size")
    num_q_heads = reader.size("num_attention_heads")
    num_kv_heads = reader.size(
        "num_key_value_heads", num_q_heads if family is Family.LLAMA else None
    )
    head_dim = reader.size("head_dim", 128 if family is Family.QWEN3 else hidden // num_q_heads)
    if num_q_heads % num_kv_heads:
        raise WeightsError(
            f"{where}: {num_q_heads} attention heads can't share {num_kv_heads} key-value heads"
        )
    if head_dim % 2:
        raise WeightsError(f"{where}: head_dim is {head_dim}, rotary embedding needs an even one")
    attention_bias = bool(config.get("attention_bias", False)) and family is not Family.MISTRAL
    rope = reader.rope()
    context = reader.size("max_position_embeddings", _MAX_POSITIONS[family])
    if rope.type is RopeType.LINEAR:
        context = int(context * rope.factor)
    elif rope.type is RopeType.YARN:
        context = int(rope.original_context * rope.factor)
    window = reader.window(family)
    return ModelShape(
        family=family,
        num_layers=reader.size("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=reader.size("intermediate_size"),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=reader.size("vocab_size"),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=rope,
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or family is Family.QWEN2,
        o_bias=attention_bias and family is not Family.QWEN2,
        qk_norm=family is Family.QWEN3,
        max_context=context if window is None else min(context, window),
    )


class _Reader:
    """Typed access to one config.json."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where

    def family(self) -> Family:
        names = self.config.get("architectures") or ()
        for family in Family:
            if family.value in names:
                return family
        model_type = self.config.get("model_type")
        if not names and model_type in _MODEL_TYPES:
            return _MODEL_TYPES[model_type]
        found = ", ".join(map(str, names)) or model_type or "none"
        raise WeightsError(
            f"{self.where}: architecture {found} is not supported; "
            f"supported are {', '.join(Family)}"
        )

    def size(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        if value is None:
            value = default
        if type(value) is not int or value < 1:
            found = "missing" if value is None else f"{value!r}"
            raise WeightsError(f"{self.where}: {key} is {found}, a positive integer is expected")
        return value

    def refuse_what_is_not_run(self) -> None:
        config = self.config
        act = config.get("hidden_act", "silu")
        if act not in ("silu", "swish"):
            raise WeightsError(f"{self.where}: hidden_act {act} is not supported, silu is")
        if config.get("mlp_bias"):
            raise WeightsError(f"{self.where}: mlp_bias is not supported")
        if config.get("partial_rotary_factor", 1.0) != 1.0:
            raise WeightsError(f"{self.where}: partial_rotary_factor is not supported")
        if quantized := config.get("quantization_config"):
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise WeightsError(
                f"{self.where}: weights quantized by {method} are not supported; "
                "use bf16, fp16 or fp32 safetensors, or a GGUF file"
            )

    def window(self, family: Family) -> int | None:
        """The sliding window, where any layer uses one."""
        config = self.config
        window = config.get("sliding_window", 4096 if family is Family.MISTRAL else None)
        if window is None or family is Family.LLAMA:
            return None
        if family in _QWEN and not config.get("use_sliding_window", False):
            return None
        kinds = config.get("layer_types")
        if kinds:
            slides = "sliding_attention" in kinds
        else:
            slides = family is Family.MISTRAL or (
                self.size("num_hidden_layers") > config.get("max_window_layers", 28)
            )
        return self.size("sliding_window", window) if slides else None

    def rope(self) -> Rope:
        """``rope_parameters`` of transformers 5, or the older ``rope_theta`` + ``rope_scaling``."""
        config = self.config
        given = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
            raise WeightsError(f"{self.where}: rope_parameters by layer are not supported")
        name = given.get("rope_type", given.get("type", "default"))
        kind = next((kind for kind in RopeType if kind.value == name), None)
        if kind is None:
            raise WeightsError(
                f"{self.where}: rope type {name} is not supported; "
                f"supported are {', '.join(RopeType)}"
            )
        if given.get("partial_rotary_factor", 1.0) != 1.0:
            raise WeightsError(f"{self.where}: partial_rotary_factor is not supported")
        theta = float(given.get("rope_theta", config.get("rope_theta", 10000.0)))
        if kind is RopeType.DEFAULT:
            return Rope(theta)
        try:
            return _scaled_rope(kind, theta, given, self.size("max_position_embeddings", 2048))
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{self.where}: rope type {name}: {error} is wrong") from None


def _scaled_rope(kind: RopeType, theta: float, given: Mapping[str, Any], context: int) -> Rope:
    """Raises KeyError, TypeError or ValueError for what is missing or no number."""
    factor = float(given["factor"])
    if kind is RopeType.LINEAR:
        return Rope(theta, kind, factor)
    original = int(given.get("original_max_position_embeddings") or context)
    if kind is RopeType.LLAMA3:
        return Rope(
            theta,
            kind,
            factor,
            original,
            low_freq_factor=float(given["low_freq_factor"]),
            high_freq_factor=float(given["high_freq_factor"]),
        )
    amplitude = given.get("attention_factor")
    if amplitude is None:
        scales = float(given.get("mscale") or 0), float(given.get("mscale_all_dim") or 0)
        upper, lower = scales if all(scales) else (1.0, 0.0)
        amplitude = _yarn_amplitude(factor, upper) / _yarn_amplitude(factor, lower)
    return Rope(
        theta,
        kind,
        factor,
        original,
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        truncate=bool(given.get("truncate", True)),
        amplitude=float(amplitude),
    )


def _yarn_amplitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise WeightsError(f"{path.parent}: no {path.name}; is it a model's folder?") from None
    except OSError as error:
        raise WeightsError(f"{path}: {reason(error)}") from None
    except ValueError:
        raise WeightsError(f"{path}: not valid JSON") from None
    if not isinstance(data, dict):
        raise WeightsError(f"{path}: not a JSON object")
    return data
