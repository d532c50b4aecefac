"""The prefill phase: queue, chunks, holding for transfer. No torch."""
