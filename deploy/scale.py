"""``pdserve scale``: other roles for the workers of a running deployment of this user."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ..core.errors import StartupError
from ..core.ids import Role
from .fetch import own, post_events
from .status import Worker, read_cluster

LIMIT_S = 30.0  # for a worker to finish what its old role has begun
_TIMEOUT_S = 5.0
_POLL_S = 0.1


def scale(url: str, wanted: Mapping[Role, int] | None, limit_s: float = LIMIT_S) -> None:
    """Asks, and waits until every worker says that it is what it should be. With None the
    planner chooses again.

    Raises StartupError where the router won't, or a worker does not follow.
    """
    counts = wanted.items() if wanted is not None else ()
    body = {role.value: count for role, count in counts} or {"auto": True}
    headers = {"Authorization": f"Bearer {_token(url)}"}
    for answer in post_events(f"{url.rstrip('/')}/admin/roles", body, _TIMEOUT_S, headers):
        if "error" in answer:
            raise StartupError(str(answer["error"]["message"]))
    end = time.monotonic() + limit_s
    while late := [worker.id for worker in read_cluster(url).workers if _on_its_way(worker)]:
        if time.monotonic() > end:
            raise StartupError(f"{', '.join(late)}: still in the old role after {limit_s:.0f} s")
        time.sleep(_POLL_S)


def _on_its_way(worker: Worker) -> bool:
    return worker.state == "ready" and worker.role != worker.wanted_role


def _token(url: str) -> str:
    """That of the router which listens at ``url``: in its run folder."""
    token = own(url).get("token")
    if token is None:
        raise StartupError(f"no deployment that you have started on this host listens at {url}")
    return str(token)
