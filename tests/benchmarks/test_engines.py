"""Runner processes: answers, errors, what happens when one dies, and that none computes unless it is asked to."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import engines

RUNNERS = Path(engines.__file__).parent / "runners"
RUNNER = f"""
import os, sys, time
sys.path.insert(0, {str(RUNNERS)!r})
from protocol import Recorder, serve

class Fake:
    def load(self, options):
        print("libraries may print to stdout")
        self.options = options
        if options.get("fail"):
            raise ValueError("no such model")
        return {{"first_token_at": time.monotonic(), "pid": os.getpid()}}

    def run(self, items):
        recorder = Recorder(items)
        for index, item in enumerate(items):
            if item["prompt"] == ["die"]:
                os._exit(3)
            if item["prompt"] == ["hang"]:
                time.sleep(60)
            recorder.add(index, item["prompt"])
        return recorder.result(extra=7)

    def close(self):
        pass

serve(Fake())
"""


@pytest.fixture
def start(tmp_path):
    started = []

    def make(options=None, timeout=20.0):
        script = tmp_path / "runner.py"
        script.write_text(RUNNER)
        spec = engines.EngineSpec("fake", "float32", str(script), options or {}, timeout=timeout)
        process = engines.EngineProcess(spec, Path(sys.executable), tmp_path / "log")
        started.append(process)
        return process

    yield make
    for process in started:
        process.close()


def state_of(pid):
    """Letter of proc(5): R runs, S sleeps, T is stopped; None for no process or one that has ended."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return None
    return None if letter == "Z" else letter


def wait_for_state(pid, state):
    for _ in range(500):
        if state_of(pid) == state:
            return True
        time.sleep(0.01)
    return False


def item(*prompt, max_tokens=None):
    return {"prompt": list(prompt), "max_tokens": len(prompt) if max_tokens is None else max_tokens}


def test_answers_come_past_what_libraries_print(start):
    process = start()
    result = process.call("run", items=[item(1, 2), item(3)])
    assert (result["tokens"], result["extra"]) == ([[1, 2], [3]], 7)
    assert [len(times) for times in result["token_times"]] == [2, 1]
    assert result["seconds"] >= max(map(max, result["token_times"])) > 0
    assert result["peak_rss_bytes"] > 1 << 20
    assert process.start_seconds > 0


def test_a_process_is_stopped_unless_it_is_asked(start):
    process = start()
    assert wait_for_state(process.facts["pid"], "T")
    process.call("run", items=[item(1)])
    assert wait_for_state(process.facts["pid"], "T")
    process.close()
    assert wait_for_state(process.facts["pid"], None)


def test_a_wrong_number_of_tokens_is_an_error_and_the_engine_goes_on(start):
    process = start()
    with pytest.raises(engines.EngineFailed, match="request 1 got 2 tokens instead of 5"):
        process.call("run", items=[item(1), item(1, 2, max_tokens=5)])
    assert process.call("run", items=[item(4)])["tokens"] == [[4]]


def test_an_engine_that_cannot_load_says_why(start):
    with pytest.raises(engines.EngineFailed, match="no such model"):
        start({"fail": True})


def test_death_is_an_error(start):
    process = start()
    with pytest.raises(engines.EngineFailed, match="the process ended"):
        process.call("run", items=[item("die")])


def test_silence_is_an_error_and_ends_the_process(start):
    process = start(timeout=3.0)
    with pytest.raises(engines.EngineFailed, match="no answer in 3 s"):
        process.call("run", items=[item("hang")])
    assert wait_for_state(process.facts["pid"], None)


def test_no_orphan_when_the_benchmark_is_killed(tmp_path):
    (tmp_path / "runner.py").write_text(RUNNER)
    parent = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(RUNNERS.parent)!r})
import engines
spec = engines.EngineSpec("fake", "float32", {str(tmp_path / "runner.py")!r}, {{}})
process = engines.EngineProcess(spec, Path(sys.executable), Path({str(tmp_path / "log")!r}))
print(process.facts["pid"], flush=True)
time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, env=environment) as benchmark:
        pid = int(benchmark.stdout.readline())
        assert state_of(pid) is not None
        benchmark.send_signal(signal.SIGKILL)
    assert wait_for_state(pid, None)
