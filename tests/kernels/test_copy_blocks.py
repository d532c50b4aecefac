"""Whole blocks out of a pool and back."""

from __future__ import annotations

import torch

from pdserve.kernels.copy_blocks import gather_blocks, move_blocks, scatter_blocks


def test_gather_then_scatter_moves_blocks() -> None:
    pool = torch.randn(8, 3, 2, 2, 16, 4)
    before = pool.clone()
    ids = torch.tensor([6, 1, 3])
    staged = torch.empty(3, *pool.shape[1:])
    gather_blocks(pool, ids, staged)
    assert torch.equal(staged, before[[6, 1, 3]])
    scatter_blocks(pool, torch.tensor([0, 7, 6]), staged)
    assert torch.equal(pool[[0, 7, 6]], before[[6, 1, 3]])
    assert torch.equal(pool[1:6], before[1:6])


def test_blocks_move_from_one_pool_into_another() -> None:
    source = torch.randint(0, 255, (9, 64), dtype=torch.uint8)
    target = torch.zeros(5, 64, dtype=torch.uint8)
    move_blocks(source, target, torch.tensor([[8, 0, 3], [1, 4, 0]]))
    assert torch.equal(target[[1, 4, 0]], source[[8, 0, 3]])
    assert not target[[2, 3]].any()
