"""Router, prefill and decode worker on hosts of their own, and a network that loses every packet
between two of them without a word, then none. Each answer is that of an undisturbed network,
nothing is held, and who was given up comes back by itself."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from far_apart import FarApart, cut_while_asked, far_apart
from three_hosts import three_hosts


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FarApart]:
    with contextlib.ExitStack() as stack:
        try:
            net = stack.enter_context(three_hosts())
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces need root, unshare, nsenter and ip: {error}")
        yield stack.enter_context(far_apart(net, tmp_path_factory.mktemp("cut")))


def test_between_the_workers_for_longer_than_any_request_waits(deployed: FarApart) -> None:
    """The router sees both: the link is bad, the workers are not, and one of them does it all."""
    epochs = {role: worker["epoch"] for role, worker in deployed.workers().items()}

    def all_have_ended(asked: list[Future[str]]) -> None:
        for one in asked:
            one.result()

    cut_while_asked(deployed, ("prefill", "decode"), all_have_ended)
    assert {role: worker["epoch"] for role, worker in deployed.workers().items()} == epochs


@pytest.mark.parametrize("role", ["decode", pytest.param("prefill", marks=pytest.mark.slow)])
def test_between_router_and_worker_until_it_is_given_up(deployed: FarApart, role: str) -> None:
    before = deployed.workers()[role]
    cut_while_asked(
        deployed,
        ("front", role),
        lambda _: deployed.wait_for("it is given up", lambda: deployed.state_of(role) == "dead"),
    )
    after = deployed.workers()[role]
    assert after["pid"] == before["pid"] and after["epoch"] != before["epoch"]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.0, 30.0])
@pytest.mark.parametrize("pair", [("prefill", "decode"), ("front", "decode"), ("front", "prefill")])
def test_for_a_time(deployed: FarApart, pair: tuple[str, str], seconds: float) -> None:
    cut_while_asked(deployed, pair, lambda _: time.sleep(seconds))
