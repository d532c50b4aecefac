"""How each kind of fault is done to a world, and taken back."""

from __future__ import annotations

import asyncio
import signal

from apart import Apart
from deployed import Deployed
from plan import Kind, Strike
from world import World

_OTHER_ROLES = ({"prefill": 1, "decode": 3}, {"prefill": 1, "decode": 2, "mixed": 1})
_HOUR_S = 3600.0


def impossible(world: World) -> dict[Kind, str]:
    """What can't be done here, and why."""
    found = {}
    if world.disk is None:
        found[Kind.DISK] = "this user may mount no small file system"
    if world.skew is None:
        found[Kind.CLOCK] = "there is no C compiler"
    return found


async def inflict(made: Deployed, strike: Strike) -> None:
    """Returns when the harm has been taken back."""
    if isinstance(made, Apart):
        assert strike.kind is Kind.CUT
        made.net.cut(*strike.victims)
        try:
            await asyncio.sleep(strike.lasts_s)
        finally:
            made.net.heal(*strike.victims)
        return
    assert isinstance(made, World)
    await _inflict(made, strike)


async def _inflict(world: World, strike: Strike) -> None:
    match strike.kind:
        case Kind.KILL | Kind.KILL_PAIR | Kind.KILL_ALL | Kind.ROUTER_KILL:
            world.signal(signal.SIGKILL, *strike.victims)
        case Kind.TERM | Kind.ROUTER_TERM:
            await world.ended(strike.victims)
        case Kind.STOP | Kind.STOP_SHORT | Kind.ROUTER_STOP:
            world.signal(signal.SIGSTOP, *strike.victims)
            try:
                await asyncio.sleep(strike.lasts_s)
            finally:
                world.signal(signal.SIGCONT, *strike.victims)
        case Kind.ROLES:
            before = world.roles
            other = _OTHER_ROLES[strike.number % len(_OTHER_ROLES)]
            for roles in (other, before):
                if (words := await world.scale(roles)) is not None:
                    raise AssertionError(f"pdserve scale: {words}")
                await world.whole()
                await asyncio.sleep(strike.lasts_s)
        case Kind.CLOCK:
            for seconds in (_HOUR_S, -_HOUR_S, 0.0):
                world.set_clock(seconds)
                await asyncio.sleep(strike.lasts_s)
        case Kind.DISK:
            with world.full_disk():
                world.signal(signal.SIGKILL, *strike.victims)
                await asyncio.sleep(strike.lasts_s)
