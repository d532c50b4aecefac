"""Kernels of a step that begin while the one before them ends (programmatic dependent launch).

A kernel that takes part is launched with ``launch_pdl`` and says ``await_previous`` before it
touches anything that another kernel wrote or still reads. What it does before, such as asking
for its weights, overlaps with the end of its predecessor.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import cuda


@triton.jit
def await_previous(OVERLAP: tl.constexpr):
    """All that came before on the stream is done and visible; the next kernel may come up."""
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


def overlap() -> bool:
    """Whether kernels may be launched so; the interpreter knows no launches."""
    return not knobs.runtime.interpret
