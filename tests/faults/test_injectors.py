"""Each injector takes effect on a real process or connection, and its proof fails where it was aimed at nothing."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shoal.bench.faults import injectors
from shoal.bench.faults.hostile import NoFiles, SlowLoris
from shoal.bench.faults.injectors import Fault, NotInjected
from shoal.bench.faults.proxy import ProxyThread, Rules
from shoal.bench.http_client import ConnectionLost, Exchange, fetch
from shoal.bench.processes import Process, descendants, find, open_files, resident_bytes
from tests.serve.running import until, wait_until

SLEEP = "import time; print(flush=True); time.sleep(600)"
CHILD = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], stdout=-3)"
PARENT = f"import subprocess, sys, time; {CHILD}; print(flush=True); time.sleep(600)"


@contextlib.contextmanager
def processes(program: str = SLEEP, count: int = 2) -> Iterator[list[Process]]:
    """They sleep when they are handed over."""
    started = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for one in started:
            assert one.stdout is not None and one.stdout.readline()
        found = [process for one in started if (process := find(one.pid)) is not None]
        wait_until(lambda: all(process.state == "S" for process in found), "all to sleep")
        yield found
    finally:
        for one in started:
            for child in descendants(one.pid):
                with contextlib.suppress(ProcessLookupError):
                    subprocess.run(["kill", "-9", str(child.pid)], check=False)
            one.kill()
            one.wait()
            assert one.stdout is not None
            one.stdout.close()


async def prove(fault: Fault, is_seen: Callable[[Any], object] = lambda fault: True) -> str:
    """`is_seen`: whether the fault has lasted for long enough to be proved."""
    try:
        await fault.inject()
        await until(lambda: is_seen(fault), "the fault to last")
        return await fault.verify()
    finally:
        await fault.heal()


@pytest.mark.parametrize(
    ("make", "is_seen"),
    [
        (injectors.Kill, lambda fault: True),
        (injectors.Hang, lambda fault: len(fault._states) >= 3),
        (injectors.Slow, lambda fault: fault._cycles >= 3),
    ],
)
def test_signals(make: Callable[[Process, Process], Fault], is_seen: Callable[[Any], object]) -> None:
    with processes() as (target, other):
        with pytest.raises(NotInjected):
            asyncio.run(prove(make(other, target), is_seen))
        assert target.state == "S", "the control left it alone"
        assert str(target.pid) in asyncio.run(prove(make(target, target), is_seen))
        assert target.lives == (make is not injectors.Kill)
        assert target.state != "T", "healed"


def test_a_gone_target_is_no_proof() -> None:
    with processes() as (target, other):
        asyncio.run(prove(injectors.Kill(target, target)))
        with pytest.raises(NotInjected, match="gone before"):
            asyncio.run(prove(injectors.Kill(other, target)))


def test_a_hang_that_is_interrupted_is_no_proof() -> None:
    async def act(target: Process) -> None:
        fault = injectors.Hang(target, target)
        await fault.inject()
        await until(lambda: fault._states, "a look at it")
        subprocess.run(["kill", "-CONT", str(target.pid)], check=True)
        await until(lambda: target.state == "S", "it to go on")
        seen = len(fault._states)
        await until(lambda: len(fault._states) > seen, "another look")
        try:
            await fault.verify()
        finally:
            await fault.heal()

    with processes(count=1) as (target,), pytest.raises(NotInjected, match="not stopped"):
        asyncio.run(act(target))


def test_a_child_dies_and_its_parent_lives() -> None:
    with processes(PARENT) as (target, other):
        wait_until(lambda: descendants(target.pid) and descendants(other.pid), "their children")
        with pytest.raises(NotInjected):
            asyncio.run(prove(injectors.KillChild(other, target)))
    with processes(PARENT, count=1) as (target,):
        wait_until(lambda: descendants(target.pid), "its child")
        assert "was alive" in asyncio.run(prove(injectors.KillChild(target, target)))
        assert target.lives


def test_flapping() -> None:
    with processes(count=3) as targets:
        left = list(targets)

        def serving() -> Process | None:
            while left and not left[0].lives:
                left.pop(0)
            return left[0] if left else None

        assert "gone" in asyncio.run(prove(injectors.Flap(None, serving)))
        assert not any(target.lives for target in targets)
    with processes() as (target, other), pytest.raises(NotInjected, match="killed 1 of 3"):
        asyncio.run(prove(injectors.Flap(other, lambda: target)))


def test_processes_are_not_mixed_up() -> None:
    with processes(count=1) as (target,):
        assert Process(target.pid, target.started - 1).state == "", "another process had this pid before"
        assert open_files(target.pid) >= 3
        assert resident_bytes(target.pid) > 1 << 20
    assert not target.lives
    assert open_files(target.pid) == resident_bytes(target.pid) == 0


# --- connections ------------------------------------------------------------------------------------------------------


class InParts(http.server.BaseHTTPRequestHandler):
    """A body of 20 kB: a part at once, and nineteen when there is to be more."""

    more = threading.Event()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "20000")
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(b"x" * 1000)
            self.more.wait()
            for _ in range(19):
                self.wfile.write(b"x" * 1000)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    one = http.server.ThreadingHTTPServer(("127.0.0.1", 0), InParts)
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one.server_address[1]
    one.shutdown()
    one.server_close()


@pytest.fixture
def proxies(server: int) -> Iterator[tuple[ProxyThread, ProxyThread]]:
    """One that is used, one that is not."""
    InParts.more.set()
    both = ProxyThread("127.0.0.1", server), ProxyThread("127.0.0.1", server)
    yield both
    for proxy in both:
        proxy.close()


async def under(fault: Fault, used: ProxyThread) -> tuple[str, bytes | Exception]:
    """The proof, and what became of a download that was under way: the first part has come, the others have not."""

    async def download() -> bytes:
        return (await fetch(used.url, "/", seconds=60)).body

    InParts.more.clear()
    before = used.counters().bytes_to_client
    task = asyncio.create_task(download())
    await until(lambda: used.counters().bytes_to_client >= before + 1000, "the first part")
    try:
        await fault.inject()
        InParts.more.set()
        proof = await fault.verify()
    finally:
        await fault.heal()
        (result,) = await asyncio.gather(task, return_exceptions=True)
    assert not isinstance(result, BaseException) or isinstance(result, ConnectionLost), result
    return proof, result


LINKS = [
    (injectors.reset, False),
    (injectors.cut, False),
    (injectors.partition, True),
    (injectors.partition_replies, True),
    (injectors.delay, True),
    pytest.param(injectors.throttle, True, marks=pytest.mark.full_faults),
]


@pytest.mark.parametrize(("make", "arrives"), LINKS)
def test_links(
    proxies: tuple[ProxyThread, ProxyThread], make: Callable[[ProxyThread, ProxyThread], Fault], arrives: bool
) -> None:
    used, unused = proxies
    with pytest.raises(NotInjected, match="no .* at the proxy"):
        asyncio.run(under(make(unused, used), used))
    proof, result = asyncio.run(under(make(used, used), used))
    assert int(proof.split()[0]) > 0
    if arrives:
        assert result == b"x" * 20000, "what was held comes late, whole and once"
    else:
        assert isinstance(result, ConnectionLost)
    assert asyncio.run(fetch(used.url, "/", seconds=60)).body == b"x" * 20000, "healed"


def test_a_proxy_refuses(proxies: tuple[ProxyThread, ProxyThread]) -> None:
    used, _ = proxies
    used.set_rules(Rules(refuse=True))
    with pytest.raises(ConnectionLost):
        asyncio.run(fetch(used.url, "/", seconds=60))
    assert used.counters().refused == 1
    assert used.counters().bytes_to_server == 0


def test_a_partition_holds_new_connections_too(proxies: tuple[ProxyThread, ProxyThread]) -> None:
    used, _ = proxies

    async def act() -> bytes:
        used.set_rules(Rules(blocked=("to_client",)))
        task = asyncio.create_task(fetch(used.url, "/", seconds=60))
        await asyncio.sleep(0.3)
        assert not task.done()
        assert used.counters().bytes_to_client == 0
        used.set_rules(Rules())
        return (await task).body

    assert asyncio.run(act()) == b"x" * 20000


def test_slow_connections_need_someone_to_connect_to(server: int) -> None:
    assert "16 connections" in asyncio.run(
        prove(SlowLoris(f"http://127.0.0.1:{server}"), lambda fault: fault._sent >= 16)
    )
    with pytest.raises(NotInjected):
        asyncio.run(prove(SlowLoris("http://127.0.0.1:9")))


ACCEPTS = (
    "import socket, time\n"
    "s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); kept = []\n"
    "while True:\n"
    "    try: kept.append(s.accept())\n"
    "    except OSError: time.sleep(0.05)\n"
)


def test_files_run_out() -> None:
    started = subprocess.Popen([sys.executable, "-c", ACCEPTS], stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None
        url = f"http://127.0.0.1:{int(started.stdout.readline())}"
        target = find(started.pid)
        assert target is not None
        with processes(count=1) as (other,), pytest.raises(NotInjected):
            asyncio.run(prove(NoFiles(other, target, url)))
        assert "had all" in asyncio.run(prove(NoFiles(target, target, url, connections=64)))

        async def connects() -> None:
            (await Exchange.connect(url)).close()

        asyncio.run(connects())
    finally:
        started.kill()
        started.wait()
        assert started.stdout is not None
        started.stdout.close()
