"""Models that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import LlamaConfig

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama of two layers."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    config = LlamaConfig(
        vocab_size=tiny_models.VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=7,
    )
    tiny_models.save(config, folder)
    return folder


@pytest.fixture(scope="session")
def answers(llama_folder: Path) -> tiny_models.Answers:
    return tiny_models.Answers(llama_folder)
