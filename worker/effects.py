"""What the worker core asks of the threads and sockets around it, to be done in order.

``Tell`` goes to the router. The others are the transfer protocol's, see
``kvtransfer.effects``: each ``SendBlocks`` is answered by ``sent``, each ``Write`` and
``Pull`` by ``written``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ..core.messages import ToRouter
from ..kvtransfer.effects import Pull, Send, SendBlocks, Write


@dataclass(frozen=True, slots=True)
class Tell:
    """One message to the router."""

    message: ToRouter


Effect: TypeAlias = Tell | Send | SendBlocks | Write | Pull
