"""config.json, as many converters write it, and what of it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pdserve.core.errors import WeightsError
from pdserve.engine.presets import PRESETS
from pdserve.engine.rotary import inverse_frequencies, rotary_tables
from pdserve.engine.shape import Family, RopeType, eos_token_ids, parse_shape, read_shape

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 1024}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"]}


def test_old_and_new_spellings_of_rope_mean_the_same() -> None:
    scaling = {"factor": 2.0, "rope_theta": 7.0}
    new = parse_shape({**LLAMA, "rope_parameters": {"rope_type": "linear", **scaling}}, "x")
    old = parse_shape(
        {**LLAMA, "rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, "x"
    )
    assert new == old
    assert new.rope.type is RopeType.LINEAR and new.rope.theta == 7.0
    assert new.max_context == 8192
    plain = parse_shape({**LLAMA, "rope_theta": 5e5, "rope_scaling": None}, "x").rope
    assert (plain.theta, plain.type) == (5e5, RopeType.DEFAULT)


@pytest.mark.parametrize(
    ("config", "max_context"),
    [
        ({**MISTRAL, "sliding_window": None}, 4096),
        ({**MISTRAL, "sliding_window": 512}, 512),
        ({**MISTRAL, "sliding_window": 9999}, 4096),
        ({**MISTRAL, "max_position_embeddings": 32768}, 4096),  # the family's own window
        (QWEN2, 4096),
        ({**QWEN2, "use_sliding_window": True}, 4096),  # from layer 28 on: there is none
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": 1}, 1024),
        ({**QWEN2, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, 4096),
    ],
)
def test_a_window_ends_the_context(config: dict[str, Any], max_context: int) -> None:
    assert parse_shape(config, "x").max_context == max_context


def test_a_head_is_wider_than_its_part_where_the_file_says_so() -> None:
    shape = parse_shape({**LLAMA, "head_dim": 32}, "x")
    assert shape.head_dim == 32 and shape.qkv_width == 8 * 32
    assert parse_shape(LLAMA, "x").head_dim == 16


def test_a_family_by_its_model_type() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "architectures"}
    assert parse_shape({**config, "model_type": "qwen3"}, "x").family is Family.QWEN3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported are"),
        ({"architectures": None}, "architecture none is not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"rms_norm_eps": "small"}, "is not a model's: could not convert string to float"),
        ({"rope_parameters": {"rope_theta": []}}, "is not a model's: float() argument must be"),
        ({"architectures": 5}, "is not a model's: "),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two'"),
        ({"num_key_value_heads": 3}, "4 attention heads can't share 3 key-value heads"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized by awq"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type dynamic"),
        ({"rope_parameters": {"full": {"rope_type": "default"}}}, "by layer"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor'"),
    ],
)
def test_what_is_not_run_is_refused_in_words(change: dict[str, Any], words: str) -> None:
    with pytest.raises(WeightsError, match=r"x\.json: ") as caught:
        parse_shape({**LLAMA, **change}, "x.json")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not valid JSON"), ("[]", "not a JSON object"), (None, "is it a model's folder?")],
)
def test_a_file_that_is_no_config(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError) as caught:
        read_shape(tmp_path)
    assert words in str(caught.value)


def test_end_tokens_of_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert eos_token_ids(tmp_path) == (5,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 5, 0]}))
    assert eos_token_ids(tmp_path) == (0, 5, 9)
    (tmp_path / "config.json").write_text("{}")
    assert eos_token_ids(tmp_path) == (0, 5, 9)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(WeightsError, match="eos_token_id is '</s>', not one token or several"):
        eos_token_ids(tmp_path)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_presets_have_the_models_size(name: str, parameters: int) -> None:
    shape = parse_shape(PRESETS[name], name)
    assert shape.num_parameters == pytest.approx(parameters, rel=1e-4)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 1.0,
            "mscale_all_dim": 0.8,
            "truncate": False,
        },
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "attention_factor": 1.25,
        },
    ],
)
def test_frequencies_equal_those_of_transformers(rope: dict[str, Any]) -> None:
    given = {"rope_theta": 5000.0, **rope}
    config = LlamaConfig(**{**LLAMA, "architectures": None}, rope_parameters=dict(given))
    wanted, amplitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    shape = parse_shape({**LLAMA, "rope_parameters": given}, "x")
    assert torch.allclose(inverse_frequencies(shape.rope, 16), wanted, rtol=1e-6, atol=0)
    cos, _ = rotary_tables(shape.rope, 16, 3)
    assert cos[0].tolist() == pytest.approx([amplitude] * 8)
