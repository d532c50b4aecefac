"""What is done to a deployment, and when: drawn from a seed, so that a run can be repeated.

Pure. A round has each kind of fault once, in an order of its own, so that a short run has had
many kinds and a long one has had all of them equally often.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

ROUTER = "router"
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
FRONT = "front"  # the router's host, where there are several
HOSTS = (FRONT, "prefill", "decode")


class Kind(StrEnum):
    KILL = "kill"
    KILL_PAIR = "kill-pair"
    KILL_ALL = "kill-all"
    TERM = "term"
    STOP_SHORT = "stop-short"
    STOP = "stop"
    ROLES = "roles"
    CLOCK = "clock"
    ROUTER_KILL = "router-kill"
    ROUTER_TERM = "router-term"
    ROUTER_STOP = "router-stop"
    DISK = "disk"
    CUT = "cut"


ABOUT = {
    Kind.KILL: "SIGKILL to a worker",
    Kind.KILL_PAIR: "SIGKILL to a prefill and a decode worker at once",
    Kind.KILL_ALL: "SIGKILL to all workers at once",
    Kind.TERM: "SIGTERM to a worker; the supervisor starts it again",
    Kind.STOP_SHORT: "a worker stands still for up to 3 s (SIGSTOP, SIGCONT)",
    Kind.STOP: "a worker stands still for 7 to 12 s, and comes back from the dead",
    Kind.ROLES: "`pdserve scale` to other roles, and back",
    Kind.CLOCK: "wall clocks jump by an hour, of every other process the other way",
    Kind.ROUTER_KILL: "SIGKILL to the router",
    Kind.ROUTER_TERM: "SIGTERM to the router; the supervisor starts it again",
    Kind.ROUTER_STOP: "the router stands still for 2 to 9 s",
    Kind.DISK: "no room in the run folder, and a worker and the router killed meanwhile",
    Kind.CUT: "every packet between two of three hosts lost for 1 to 12 s",
}
APART = {Kind.CUT}  # done to another deployment: on hosts of its own
DEADLY = {Kind.KILL, Kind.KILL_PAIR, Kind.KILL_ALL}
_LASTS_S = {
    Kind.STOP_SHORT: (0.5, 3.0),
    Kind.STOP: (7.0, 12.0),
    Kind.ROUTER_STOP: (2.0, 9.0),
    Kind.ROLES: (1.0, 4.0),
    Kind.CLOCK: (1.0, 4.0),
    Kind.DISK: (2.0, 6.0),
    Kind.CUT: (1.0, 12.0),
}
_QUIET_S = (0.5, 4.0)


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault. ``quiet_s`` passes before it, ``lasts_s`` until it is taken back."""

    number: int
    kind: Kind
    victims: tuple[str, ...]
    quiet_s: float
    lasts_s: float

    def __str__(self) -> str:
        whom = f" {', '.join(self.victims)}" if self.victims else ""
        return f"{self.number}: {self.kind}{whom}, {self.lasts_s:.1f} s"


def strikes(seed: int, kinds: Sequence[Kind]) -> Iterator[Strike]:
    """Without an end."""
    assert kinds
    rng = random.Random(seed)
    number = 0
    while True:
        for kind in rng.sample(kinds, len(kinds)):
            quiet_s = rng.uniform(*_QUIET_S)
            lasts_s = rng.uniform(*_LASTS_S.get(kind, (0.0, 0.0)))
            yield Strike(number, kind, _victims(kind, rng), quiet_s, lasts_s)
            number += 1


def _victims(kind: Kind, rng: random.Random) -> tuple[str, ...]:
    match kind:
        case Kind.KILL_PAIR:
            return rng.choice(WORKERS[:2]), rng.choice(WORKERS[2:])
        case Kind.KILL_ALL:
            return WORKERS
        case Kind.ROLES | Kind.CLOCK:
            return ()
        case Kind.ROUTER_KILL | Kind.ROUTER_TERM | Kind.ROUTER_STOP:
            return (ROUTER,)
        case Kind.DISK:
            return rng.choice(WORKERS), ROUTER
        case Kind.CUT:
            one, other = rng.sample(HOSTS, 2)
            return one, other
        case _:
            return (rng.choice(WORKERS),)
