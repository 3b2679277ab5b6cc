"""Several hosts on one machine: network namespaces that reach each other over one link, whose rate can be set.

Needs root and Debian's iproute2. The namespaces share the machine's memory, cores and files.
"""

from __future__ import annotations

import os
import subprocess
import sys

HOSTS = 2


def _do(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)


class Hosts:
    """Namespaces joined by a veth pair, each with an address of its own."""

    def __init__(self) -> None:
        self.names = [f"shoal{os.getpid()}-{number}" for number in range(HOSTS)]
        self.links = [f"sh{os.getpid() % 100000}v{number}" for number in range(HOSTS)]
        self.addresses = [f"10.213.7.{number + 1}" for number in range(HOSTS)]

    def make(self) -> str | None:
        """Why it cannot be done; None if it was."""
        steps = [["netns", "add", name] for name in self.names]
        steps += [["link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1]]]
        for name, link, address in zip(self.names, self.links, self.addresses, strict=True):
            steps += [
                ["link", "set", link, "netns", name],
                ["-n", name, "addr", "add", f"{address}/24", "dev", link],
                ["-n", name, "link", "set", link, "up"],
                ["-n", name, "link", "set", "lo", "up"],
            ]
        try:
            for step in steps:
                done = _do("ip", *step)
                if done.returncode:
                    return f"ip {' '.join(step)}: {done.stderr.strip()}"
        except FileNotFoundError:
            return "the ip command is not installed (Debian: iproute2)"
        return None

    def remove(self) -> None:
        for name in self.names:
            _do("ip", "netns", "del", name)

    def run(self, host: int, arguments: list[str], **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(["src", "."]), **environment},
            stdout=subprocess.PIPE,
            text=True,
        )

    def received_bytes(self, host: int) -> int:
        """Over the link, since it was made."""
        text = subprocess.run(
            ["ip", "netns", "exec", self.names[host], "cat", "/proc/net/dev"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return sum(int(line.split(":")[1].split()[0]) for line in text.splitlines() if line.strip().startswith("sh"))

    def limit(self, megabits: int | None) -> None:
        """Both directions of the link to so many Mb/s; None takes the limit away. Raises RuntimeError."""
        for name, link in zip(self.names, self.links, strict=True):
            _do("ip", "netns", "exec", name, "tc", "qdisc", "del", "dev", link, "root")
            if megabits is None:
                continue
            # A bucket of 2 ms at the rate, and room for 50 ms to wait: enough that nothing is dropped in bursts.
            burst, limit = max(16_000, megabits * 250), max(256_000, megabits * 6250)
            shape = ["tbf", "rate", f"{megabits}mbit", "burst", str(burst), "limit", str(limit)]
            done = _do("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", link, "root", *shape)
            if done.returncode:
                raise RuntimeError(f"tc {' '.join(shape)}: {done.stderr.strip()}")
