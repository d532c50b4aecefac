"""A transfer that was not renewed in time is over: why, and what that says of the peer."""

from __future__ import annotations

from ..core.ids import WorkerRef
from ..core.messages import FailureKind


def overdue(
    peer: WorkerRef, heard_at: float | None, now: float, lease_s: float
) -> tuple[FailureKind, str]:
    """``heard_at``: when the peer last said anything at all. A peer that talks, but not of this
    transfer, has forgotten it; a silent one is lost."""
    if heard_at is None or now - heard_at >= lease_s:
        return FailureKind.PEER_LOST, f"{peer} was not heard of for {lease_s:g} s"
    return FailureKind.DROPPED, f"{peer} has not listed the transfer for {lease_s:g} s"
