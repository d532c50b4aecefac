"""Three hosts on this one: a network namespace each, and a router between them that can lose
every packet between two of them, silently, as a pulled cable in the middle does."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_CLONE_NEWNET = 0x40000000
NAMES = ("front", "prefill", "decode")


@dataclass
class Namespace:
    """Lives as long as the process that holds it, which ends with this one."""

    holder: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self.holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo here; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.holder.stdout is not None
        if self.holder.stdout.readline() != "here\n":
            raise OSError("no network namespace of one's own")

    @property
    def path(self) -> str:
        return f"/proc/{self.holder.pid}/ns/net"

    def command(self, *arguments: str) -> list[str]:
        """A command line that runs in it; its process is the command's own."""
        return ["nsenter", f"--net={self.path}", *arguments]

    def do(self, line: str) -> None:
        subprocess.run(self.command("sh", "-ec", line), check=True, capture_output=True)

    def enter(self) -> None:
        """The calling thread opens its sockets there from now on. There is no way back."""
        with Path(self.path).open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))

    def close(self) -> None:
        self.holder.kill()
        self.holder.communicate()


class ThreeHosts:
    def __init__(self, middle: Namespace, hosts: dict[str, Namespace]) -> None:
        self._middle = middle
        self.hosts = hosts

    @staticmethod
    def address(name: str) -> str:
        return f"10.77.{NAMES.index(name)}.2"

    def cut(self, one: str, other: str) -> None:
        self._rules("add", one, other)

    def heal(self, one: str, other: str) -> None:
        self._rules("del", one, other)

    def _rules(self, verb: str, one: str, other: str) -> None:
        for source, target in ((one, other), (other, one)):
            between = f"from {self.address(source)} to {self.address(target)}"
            self._middle.do(f"ip rule {verb} {between} blackhole")


@contextlib.contextmanager
def three_hosts() -> Iterator[ThreeHosts]:
    """Raises OSError or CalledProcessError where this user may not do that here."""
    with contextlib.ExitStack() as stack:

        def namespace() -> Namespace:
            made = Namespace()
            stack.callback(made.close)
            return made

        middle = namespace()
        middle.do("ip link set lo up; echo 1 > /proc/sys/net/ipv4/ip_forward")
        hosts = {}
        for number, name in enumerate(NAMES):
            host = hosts[name] = namespace()
            middle.do(
                f"ip link add name to{number} type veth peer name eth0 netns {host.holder.pid};"
                f"ip addr add 10.77.{number}.1/24 dev to{number}; ip link set to{number} up"
            )
            host.do(
                "ip link set lo up;"
                f"ip addr add {ThreeHosts.address(name)}/24 dev eth0; ip link set eth0 up;"
                f"ip route add default via 10.77.{number}.1"
            )
        yield ThreeHosts(middle, hosts)
