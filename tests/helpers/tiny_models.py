"""Random models of a few thousand weights, saved as a user's would be, and their answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from pdserve.core.card import ModelCard
from pdserve.core.config import Deployment
from pdserve.core.params import SamplingParams
from pdserve.core.plan import NewSequence, Row, StepPlan
from pdserve.engine.build import build_engine
from pdserve.engine.engine import TorchEngine
from pdserve.engine.model import Heads
from pdserve.engine.shape import eos_token_ids, read_shape

VOCAB = 307
# Large enough for a GPU's kernels, small enough for a reference on the CPU.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "eos_token_id": 7,
}
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


def save(config: PretrainedConfig, folder: Path, **options: Any) -> None:
    """Random weights, large enough to make the answers varied."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
            else:
                weight.normal_(0.0, 0.12)
    model.save_pretrained(folder, **options)


def card_of(folder: Path, **changes: Any) -> ModelCard:
    shape = read_shape(folder)
    fields = {
        "name": folder.name,
        "folder": str(folder),
        "fingerprint": folder.name,
        "architecture": shape.family.value,
        "vocab_size": shape.vocab_size,
        "max_context": shape.max_context,
        "eos_token_ids": eos_token_ids(folder),
    }
    return ModelCard(**{**fields, **changes})


def engine_of(
    folder: Path,
    *,
    device: str = "cpu",
    max_slots: int = 8,
    max_step_tokens: int = 512,
    block_size: int = 16,
    memory: str = "64MiB",
    dummy: bool = False,
    **model: Any,
) -> TorchEngine:
    sections = {
        "model": {"path": str(folder), **model},
        "kv": {"block_size": block_size, "memory": memory},
    }
    return build_engine(
        card_of(folder, dummy=dummy),
        Deployment.model_validate(sections),
        device=torch.device(device),
        memory_share=1.0,
        num_threads=1,
        max_slots=max_slots,
        max_step_tokens=max_step_tokens,
    )


class Answers:
    """What transformers' ``generate`` says, greedily, in fp32; end tokens do not end it."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        ids = torch.tensor([list(prompt)])  # [1, T]
        mask = torch.ones_like(ids)
        out = self.model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=max_tokens, pad_token_id=0
        )
        return [int(token) for token in out[0, len(prompt) :]]

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """``[T, vocab]`` for every position."""
        found: torch.Tensor = self.model(torch.tensor([list(tokens)])).logits[0]
        return found

    def largest_gap(self, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        """How far a token's logit lies under the best, in standard deviations of the logits;
        teacher-forced: every token given those that were chosen before it."""
        logits = self.logits([*prompt, *tokens])[len(prompt) - 1 : -1]  # [T, vocab]
        chosen = logits.gather(1, torch.tensor(list(tokens))[:, None])[:, 0]
        return float(((logits.max(-1).values - chosen) / logits.std(-1)).max())


def random_prompt(length: int, seed: int, vocab: int = VOCAB) -> list[int]:
    draw = torch.Generator().manual_seed(1000 * seed + length)
    return [int(token) for token in torch.randint(0, vocab, (length,), generator=draw)]


def new(slot: int, prompt: list[int], blocks: tuple[int, ...]) -> NewSequence:
    return NewSequence(slot, tuple(prompt), len(prompt), GREEDY, blocks)


def first(heads: Heads, count: int) -> Heads:
    """Of the first tokens."""
    return Heads(heads.q[:count], heads.k[:count], heads.v[:count])


def launch(engine: TorchEngine, fill: NewSequence | None, row: Row) -> list[int]:
    plan = StepPlan((fill,) if fill is not None else (), (row,))
    return [token.token_id for token in engine.launch(plan).wait().tokens]
