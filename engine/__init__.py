"""Tensors only: weights, model, KV pool, sampler, step."""
