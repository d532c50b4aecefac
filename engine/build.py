"""An engine of a deployment, on one device: weights, cache, tables, and on a GPU its graphs."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import torch

from ..core.card import ModelCard
from ..core.config import Deployment
from ..core.plan import EngineLimits
from ..kernels.decode_attention import DecodeWorkspace
from . import kv
from .chunk_graphs import ChunkGraphs
from .device import Precision, dtype_name, memory_state, resolve_precision
from .engine import TorchEngine
from .graphs import DecodeGraphs
from .model import Model
from .rotary import rotary_tables
from .sampler import Sampler
from .shape import ModelShape, read_shape
from .slots import SlotTable
from .upload import uploader
from .warm_up import warm_up
from .weights import dummy_weights, load_weights
from .whole_graphs import WholeGraphs

log = logging.getLogger(__name__)

GRAPHS_SWITCH = "PDSERVE_CUDA_GRAPHS"  # "0" launches each kernel, to look for a fault
_GPU_RESERVE = 3 << 29  # bytes for graphs, libraries, and what fragments


def build_engine(
    card: ModelCard,
    deployment: Deployment,
    *,
    device: torch.device,
    memory_share: float,
    num_threads: int,
    max_slots: int,
    max_step_tokens: int,
) -> TorchEngine:
    """Loads the model and allocates all that its steps need.

    ``memory_share`` is this worker's part of the device's memory, of 1; ``num_threads`` are
    for the arithmetic of a CPU. Raises WeightsError, ConfigError, or OutOfMemory with the
    setting that asks for less.
    """
    started = time.monotonic()
    torch.set_num_threads(num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    folder = Path(card.folder)
    shape = read_shape(folder)
    precision = resolve_precision(deployment.model.dtype, device)
    wanted = deployment.model.max_context
    max_context = card.max_context if wanted == "auto" else min(wanted, card.max_context)

    if card.dummy:
        weights = dummy_weights(shape, precision, device)
    else:
        weights = load_weights(folder, shape, precision, device)
    layout = kv.plan_layout(
        shape,
        dtype=precision.activations,
        block_size=deployment.kv.block_size,
        max_context=max_context,
        memory=deployment.kv.memory,
        on_gpu=device.type == "cuda",
        state=memory_state(device),
        memory_share=memory_share,
        weight_bytes=weights.nbytes,
        workspace_bytes=_workspace_bytes(shape, precision, max_step_tokens, max_slots, device),
    )
    pool = kv.new_pool(layout, precision.activations, device, deployment.kv_transfer)
    cos, sin = rotary_tables(shape.rope, shape.head_dim, max_context)
    model = Model(shape, weights, (cos.to(device), sin.to(device)), pool.blocks)
    upload = uploader(device)
    table = SlotTable(
        max_slots=max_slots,
        max_context=max_context,
        block_size=layout.block_size,
        num_blocks=layout.num_blocks,
        vocab_size=shape.vocab_size,
        upload=upload,
        device=device,
    )

    def new_workspace(max_batch: int) -> DecodeWorkspace:
        return DecodeWorkspace(
            max_batch=max_batch,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            block_size=layout.block_size,
            dtype=precision.activations,
            device=device,
        )

    graphs = whole_graphs = chunk_graphs = None
    if device.type == "cuda" and os.environ.get(GRAPHS_SWITCH) != "0":
        with torch.inference_mode():
            graphs = DecodeGraphs(model, table, new_workspace, max_slots)
            graphs.capture_all()
            chunk_graphs = ChunkGraphs(model, table, max_step_tokens)
            chunk_graphs.capture_all()
            whole_graphs = WholeGraphs(
                model,
                table,
                new_workspace,
                max_tokens=max_step_tokens,
                worth=chunk_graphs.worth,
            )
            whole_graphs.capture_all()
    engine = TorchEngine(
        model=model,
        table=table,
        sampler=Sampler(table, card.eos_token_ids, upload),
        new_workspace=new_workspace,
        kv=pool,
        limits=EngineLimits(
            max_slots=max_slots,
            max_context=max_context,
            max_step_tokens=max_step_tokens,
            vocab_size=shape.vocab_size,
            eos_token_ids=card.eos_token_ids,
            max_inflight=2 if device.type == "cuda" else 1,
            step_sizes=whole_graphs.step_sizes if whole_graphs is not None else (),
        ),
        upload=upload,
        precision=precision,
        graphs=graphs,
        whole_graphs=whole_graphs,
        chunk_graphs=chunk_graphs,
    )
    if device.type == "cuda":
        warm_up(engine)
    log.info(
        "%s on %s in %s: %d KV blocks of %d tokens, ready in %.1f s",
        card.name,
        device,
        dtype_name(precision.weights),
        layout.num_blocks,
        layout.block_size,
        time.monotonic() - started,
    )
    return engine


def _workspace_bytes(
    shape: ModelShape,
    precision: Precision,
    max_step_tokens: int,
    max_slots: int,
    device: torch.device,
) -> int:
    """What the largest step allocates for a while, a little generously."""
    attention = 3 * shape.qkv_width
    mlp = 3 * shape.intermediate_size
    per_token = (4 * shape.hidden_size + attention + mlp) * precision.activations.itemsize
    per_row = shape.vocab_size * (2 * precision.activations.itemsize + 4 * 4)  # logits, in fp32
    reserve = _GPU_RESERVE if device.type == "cuda" else 0
    return max_step_tokens * per_token + max_slots * per_row + reserve
