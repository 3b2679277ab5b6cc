"""The same questions asked of `shoal plan` and of NVIDIA's aiconfigurator, both answers side by side, as Markdown.

    python benchmarks/rival_planner.py [--only NAME] [--tables capacity,sizing] [--rows e2e_measured.csv]

Each question is a process of its own, whose CPU time and peak RSS include its start. See README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parents[1])]

from benchmarks.accuracy import default_rows  # noqa: E402
from benchmarks.rival_answers import (  # noqa: E402
    Answer,
    ask_ours,
    best,
    estimate,
    failure,
    most_rate,
    plan_layout,
    read_answers,
)

from benchmarks import accuracy_rows, machine, peer_builds  # noqa: E402
from shoal.core.cost.types import CachePrecision, WeightPrecision  # noqa: E402

INPUT, OUTPUT = 4000, 500
TTFT_MS, TPOT_MS = 1000.0, 30.0
TOO_MUCH = 1000
"""Requests a second that no cluster here carries: `shoal plan` then says what it does carry."""
HALVINGS = 4
"""Of the interval in which the most that is met lies, each a plan of its own."""
BEYOND = 1.1
"""How far above what a plan says to be carried at most that is checked."""
LAYOUTS = 3
"""Of the rival's, put to our cost model."""
LIMIT = 600
"""Seconds for one question."""


@dataclass(frozen=True)
class Setting:
    name: str
    model: str
    rival_model: str
    device: str
    system: str
    gpus: int
    rate: float
    """Requests a second that the fewest GPUs are looked for."""
    weights: WeightPrecision
    cache: CachePrecision
    quantise: bool = False
    """The rival has no such checkpoint: give it the model's config.json with FP8 added."""

    def on(self, gpus: int) -> str:
        return f"{gpus}x{self.device}" if gpus <= 8 else f"{gpus // 8}x8x{self.device}:ndr"


SETTINGS = [
    Setting(
        "Llama-3.1-70B FP8, H200", "llama-3.1-70b", "nvidia/Llama-3.1-70B-Instruct-FP8",
        "H200", "h200_sxm", 8, 20, "float8", "float8",
    ),
    Setting(
        "Llama-3.1-70B BF16, H200", "llama-3.1-70b", "meta-llama/Meta-Llama-3.1-70B",
        "H200", "h200_sxm", 8, 10, "bfloat16", "bfloat16",
    ),
    Setting(
        "Llama-3.1-405B FP8, H200", "llama-3.1-405b", "meta-llama/Meta-Llama-3.1-405B",
        "H200", "h200_sxm", 64, 2, "float8", "float8", quantise=True,
    ),
    Setting("Qwen3-32B BF16, H100", "qwen3-32b", "Qwen/Qwen3-32B", "H100", "h100_sxm", 8, 10, "bfloat16", "bfloat16"),
    Setting(
        "DeepSeek-V3 FP8, H200", "deepseek-v3", "deepseek-ai/DeepSeek-V3",
        "H200", "h200_sxm", 32, 4, "float8-block", "float8",
    ),
]  # fmt: skip
TABLES = ("capacity", "sizing", "measured")
"""The first with each planner's layouts by the other's model."""
SIZING_GPUS = 64
"""From which the fewest are looked for; the rival knows no such limit."""

LAUNCHER = """
import json, os, sys, time
began = time.perf_counter()
child = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, used = os.wait4(child, 0)
open(sys.argv[1], "w").write(json.dumps({
    "code": os.waitstatus_to_exitcode(status), "wall": time.perf_counter() - began,
    "cpu": used.ru_utime + used.ru_stime, "rss": used.ru_maxrss * 1024}))
"""
"""A small process in between: peak RSS of a child begins with that of what started it."""


@dataclass(frozen=True)
class Run:
    code: int
    output: str
    errors: str
    wall: float
    cpu: float
    rss: float

    def cells(self) -> str:
        return f"{self.wall:.1f} | {self.cpu:.1f} | {self.rss / 1e6:,.0f}"


def run(command: list[str]) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "used.json"
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-S", "-E", "-c", LAUNCHER, str(note), *command],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        used = json.loads(note.read_text())
    return Run(used["code"], done.stdout, done.stderr, used["wall"], used["cpu"], used["rss"])


# --- the rival --------------------------------------------------------------------------------------------------------


class Rival:
    def __init__(self, python: Path, folder: Path) -> None:
        self._python, self._program, self._folder = python, python.parent / "aiconfigurator", folder

    def model(self, setting: Setting) -> str:
        """Its name for the checkpoint, or a folder with a configuration of FP8 made from its own of BF16."""
        if not setting.quantise:
            return setting.rival_model
        made = self._folder / setting.model
        if not made.exists():
            made.mkdir()
            where = "import aiconfigurator_core, os; print(os.path.dirname(aiconfigurator_core.__file__))"
            found = subprocess.run([str(self._python), "-c", where], capture_output=True, text=True, check=True)
            configs = Path(found.stdout.strip()) / "model_configs"
            (made / "config.json").write_bytes(
                (configs / f"{setting.rival_model.replace('/', '--')}_config.json").read_bytes()
            )
            quantised = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
            (made / "hf_quant_config.json").write_text(json.dumps({"quantization": quantised}))
        return str(made)

    def ask(self, verb: str, setting: Setting, *flags: str) -> tuple[Run, dict[str, list[Answer]], str]:
        """The run, its answers by mode, and why there is none."""
        gpus = setting.gpus if verb == "default" else None
        with tempfile.TemporaryDirectory(dir=self._folder) as saved:
            given = [] if gpus is None else ["--total-gpus", str(gpus)]
            given += ["--ttft", str(TTFT_MS), "--tpot", str(TPOT_MS), "--save-dir", saved, *flags]
            done = self._run(verb, setting, self.model(setting), INPUT, OUTPUT, *given)
            found = read_answers(Path(saved), gpus)
        return done, found, failure(done.output + done.errors)

    def estimate(self, setting: Setting, model: str, lengths: tuple[int, int], batch: int, *flags: str) -> Run:
        return self._run("estimate", setting, model, *lengths, "--batch-size", str(batch), *flags)

    def _run(self, verb: str, setting: Setting, model: str, isl: int, osl: int, *flags: str) -> Run:
        asked = ["--model-path", model, "--system", setting.system, "--isl", str(isl), "--osl", str(osl), "--no-color"]
        backend = [] if "--backend" in flags else ["--backend", "vllm"]
        return run([str(self._program), "cli", verb, *asked, *backend, *flags])


# --- shoal ------------------------------------------------------------------------------------------------------------


def plan(setting: Setting, gpus: int, rate: float) -> tuple[Run, dict]:
    command = [
        sys.executable,
        "-m",
        "shoal",
        "plan",
        setting.model,
        "--on",
        setting.on(gpus),
        "--rate",
        f"{rate:.4g}/s",
    ]
    command += ["--input", str(INPUT), "--output", str(OUTPUT), "--engine", "vllm", "--json"]
    command += ["--ttft-p50", f"{TTFT_MS:g}ms", "--tpot", f"{TPOT_MS:g}ms"]
    command += ["--precision", setting.weights, "--kv", setting.cache]
    done = run(command)
    return done, json.loads(done.output) if done.output.startswith("{") else {"answer": None}


def most(setting: Setting) -> tuple[Run, dict, float, int]:
    """The highest rate that a plan of its own meets, that plan, and how many plans it took."""
    _, told = plan(setting, setting.gpus, TOO_MUCH)
    nearest, bound = most_rate(told)
    done, found = plan(setting, setting.gpus, nearest or 0.01)
    low, high, asked = (nearest, BEYOND * max(bound, nearest), 2) if found["answer"] else (0.0, nearest, 2)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if not middle or high - low < 0.02 * high:
            break
        one, made = plan(setting, setting.gpus, middle)
        asked += 1
        if made["answer"]:
            low, done, found = middle, one, made
        else:
            high = middle
    return done, found, low, asked


# --- tables -----------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(title: str, columns: list[str], rows: list[list[str]], note: str = "") -> None:
    print(f"\n### {title}\n" + (f"\n{note}\n" if note else ""))
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def capacity(rival: Rival, settings: list[Setting]) -> dict[str, tuple[list[Answer], dict]]:
    """The most that so many GPUs carry. Returns the rival's layouts and our plan by setting."""
    rows, kept = [], {}
    for setting in settings:
        say(f"the most of {setting.gpus} GPUs: {setting.name}")
        done, found, why = rival.ask("default", setting)
        name = f"{setting.name}, {setting.gpus} GPUs"
        for mode in ("agg", "disagg"):
            rows.append(
                [name, f"aiconfigurator, {mode}", *_theirs(found.get(mode, []), why), *done.cells().split(" | ")]
            )
        ours, made, rate, asked = most(setting)
        cells = [str(_gpus(made)), f"{rate:.2f}", *_times(made)] if made["answer"] else ["", "", "", ""]
        layout = plan_layout(made) if made["answer"] else _why_not(made, ours)
        rows.append([name, f"shoal ({asked} plans; time of the last)", layout, *cells, *ours.cells().split(" | ")])
        kept[setting.name] = (found.get("agg", []), made)
        theirs = best(found.get("agg", []), TTFT_MS, TPOT_MS)
        if theirs:
            same, at = plan(setting, setting.gpus, theirs.rate)
            cells = [str(_gpus(at)), f"{theirs.rate:.2f}", *_times(at)] if at["answer"] else ["", "", "", ""]
            layout = plan_layout(at) if at["answer"] else _why_not(at, same)
            rows.append([name, "shoal, at the rival's agg rate", layout, *cells, *same.cells().split(" | ")])
    table(
        "The most that so many GPUs carry",
        COLUMNS,
        rows,
        "`default` beside `shoal plan` at rising rates, the highest that its event loop still says yes to. TTFT is the"
        " mean of a full batch for the one, the median of requests that come at random for the other.",
    )
    return kept


COLUMNS = ["question", "planner", "answer", "GPUs", "requests/s", "TTFT ms", "TPOT ms", "wall s", "CPU s", "RSS MB"]


def sizing(rival: Rival, settings: list[Setting]) -> None:
    rows = []
    for setting in settings:
        say(f"the fewest GPUs: {setting.name}")
        name = f"{setting.name}, {setting.rate:g}/s"
        done, found, why = rival.ask("recommend", setting, "--target-request-rate", f"{setting.rate:g}")
        for mode in ("agg", "disagg"):
            rows.append(
                [name, f"aiconfigurator, {mode}", *_theirs(found.get(mode, []), why), *done.cells().split(" | ")]
            )
        ours, made = plan(setting, SIZING_GPUS, setting.rate)
        cells = [str(_gpus(made)), f"{setting.rate:.2f}", *_times(made)] if made["answer"] else ["", "", "", ""]
        layout = plan_layout(made) if made["answer"] else _why_not(made, ours)
        rows.append([name, f"shoal, of {SIZING_GPUS}", layout, *cells, *ours.cells().split(" | ")])
    table(
        "The fewest GPUs for a rate",
        COLUMNS,
        rows,
        "`recommend`, which fills gaps of its tables with estimates (HYBRID, its default), beside `shoal plan`. Its"
        " rate is what the GPUs carry, ours what is asked for.",
    )


def _theirs(found: list[Answer], why: str) -> list[str]:
    one = best(found, TTFT_MS, TPOT_MS)
    if one is not None:
        return [str(one), str(one.gpus), f"{one.rate:.2f}", f"{one.ttft_ms:,.0f}", f"{one.tpot_ms:.1f}"]
    if found:
        near = found[0]
        return [f"none meets the targets; nearest {near}", "", "", f"{near.ttft_ms:,.0f}", f"{near.tpot_ms:.1f}"]
    return [f"no answer: {why or 'none of this mode'}", "", "", "", ""]


def _gpus(made: dict) -> int:
    return int(made["answer"]["setup"]["devices"])


def _times(made: dict) -> list[str]:
    said = made["answer"]["prediction"]
    return [f"{said['ttft_p50']['value'] * 1e3:,.0f}", f"{said['tpot']['value'] * 1e3:.1f}"]


def _why_not(made: dict, done: Run) -> str:
    told = made.get("impossible") or {}
    return told.get("bound") or f"no answer: {done.errors.strip()[-160:]}"


def cross(rival: Rival, settings: list[Setting], kept: dict[str, tuple[list[Answer], dict]]) -> None:
    """Each planner's layouts by the other's model."""
    rows = []
    for setting in settings:
        theirs, made = kept[setting.name]
        for found in theirs[:LAYOUTS]:
            say(f"by our model: {setting.name}, {found}")
            ours = ask_ours(
                setting.model, setting.on(found.engine_gpus), found, setting.weights, setting.cache, (INPUT, OUTPUT)
            )
            closed, opened = ours.closed, ours.opened
            said = f"{found.rate:.2f}, {found.ttft_ms:,.0f}, {found.tpot_ms:.1f}"
            if closed.refused:
                rows.append([setting.name, f"{found}", str(found.concurrency), said, closed.refused, "", ""])
                continue
            of_ours = f"{closed.requests_per_second * found.engines:.2f}, {closed.ttft.mean * 1e3:,.0f}"
            queue = " (queue grows)" if opened.saturated else ""
            at_random = f"{opened.ttft.p50 * 1e3:,.0f}, {opened.tpot.mean * 1e3:.1f}{queue}"
            name = f"{found}" if ours.exact else f"{found} (the nearest of our layouts)"
            ratio = closed.tpot.mean * 1e3 / found.tpot_ms
            cells = [said, f"{of_ours}, {closed.tpot.mean * 1e3:.1f}", at_random, f"{ratio:.2f}"]
            rows.append([setting.name, name, str(found.concurrency), *cells])
    columns = ["setting", "aiconfigurator's layout", "clients an engine", "it: requests/s, TTFT, TPOT ms"]
    columns += ["shoal, as many clients: requests/s, TTFT, TPOT ms", "shoal, same rate at random: TTFT p50, TPOT ms"]
    table("Its best layouts by our cost model", [*columns, "TPOT, ours / its"], rows)
    rows = [row for setting in settings if (row := _ours_by_theirs(rival, setting, kept[setting.name][1]))]
    columns = ["setting", "shoal's answer", "sequences an engine", "shoal: requests/s, TTFT p50, TPOT ms"]
    columns += ["it: requests/s, TTFT, TPOT ms"]
    table("Our answers by its `estimate`", columns, rows)


def _ours_by_theirs(rival: Rival, setting: Setting, made: dict) -> list[str]:
    if not made["answer"] or len(made["answer"]["setup"]["pools"]) > 1:
        return []
    pool, rate = made["answer"]["setup"]["pools"][0], made["asked"]["rate"]
    sizes, said = pool["engine"]["shape"], made["answer"]["prediction"]
    groups = sizes["attention_dp"]
    ways = groups * sizes["pp"]
    # Its batch is of one group and of one of as many batches as there are stages.
    batch = max(1, math.ceil(said["batch"] / ways))
    tp = sizes["tp"] * sizes["ep"]
    flags = ["--tp-size", str(tp), "--pp-size", str(sizes["pp"]), "--attention-dp-size", str(groups)]
    if setting.model == "deepseek-v3":
        flags += ["--moe-tp-size", str(sizes["tp"]), "--moe-ep-size", str(sizes["ep"] * groups)]
    row = [setting.name, plan_layout(made), f"{batch * ways}", f"{rate:.2f}, " + ", ".join(_times(made))]
    if sizes["cp"] > 1:
        return [*row, "it has no cp"]
    done = rival.estimate(setting, rival.model(setting), (INPUT, OUTPUT), batch, *flags)
    said_of_it = estimate(done.output)
    if not said_of_it:
        return [*row, failure(done.output + done.errors)]
    its_rate = said_of_it["tokens_per_second"] / OUTPUT * pool["replicas"]
    return [*row, f"{its_rate:.2f}, {said_of_it['ttft_ms']:,.0f}, {said_of_it['tpot_ms']:.1f}"]


# --- measured rows ----------------------------------------------------------------------------------------------------


def measured(rival: Rival, rows: list[dict[str, str]], clients: list[str]) -> None:
    """Setups of these settings that somebody has measured: all three figures."""
    chosen = [row for row in rows if _is_asked(row) and row["concurrency"] in clients]
    lines, errors = [], {name: ([], []) for name in ("TTFT", "TPOT")}
    for number, row in enumerate(chosen):
        say(f"measured row {number + 1} of {len(chosen)}")
        setting = next(one for one in SETTINGS if one.system == "h200_sxm" and one.weights == "float8")
        setting = Setting(**{**vars(setting), "system": row["gpu"]})
        share = 0.9 if "uniform[0.8" in row["len_note"] else 1.0
        lengths = (round(int(row["isl"]) * share), round(int(row["osl"]) * share))
        flags = ["--tp-size", row["tp"], "--backend", row["engine"]]
        done = rival.estimate(setting, setting.rival_model, lengths, int(row["concurrency"]), *flags)
        theirs, ours = estimate(done.output), accuracy_rows.answer(row).predicted
        cells = []
        for name, column, key in (("TTFT", "ttft_ms", "ttft"), ("TPOT", "tpot_ms", "tpot")):
            real, own = float(row[column]), ours[key] * 1e3
            errors[name][1].append(own / real - 1)
            if theirs:
                errors[name][0].append(theirs[column] / real - 1)
            digits = ",.0f" if name == "TTFT" else ".1f"
            cells += [f"{real:{digits}}", f"{theirs[column]:{digits}}" if theirs else "–", f"{own:{digits}}"]
        load = f"{row['isl']}/{row['osl']}, {row['concurrency']} clients"
        what = f"{row['gpu'][:4].upper()} {row['engine']} tp{row['tp']}, {load}"
        lines.append([what, *cells, "" if theirs else failure(done.output + done.errors)[:60]])
    columns = ["Llama-3.1-70B FP8"]
    columns += [f"{name} ms {who}" for name in ("TTFT", "TPOT") for who in ("measured", "aiconfigurator", "shoal")]
    told = "; ".join(
        f"{name}: {who} {median(map(abs, some)):.0%} ({median(some):+.0%}) over {len(some)} rows"
        for name, both in errors.items()
        for who, some in zip(("aiconfigurator", "shoal"), both, strict=True)
        if some
    )
    table("Setups that are measured", [*columns, "note"], lines, f"Median |error| (median error). {told}.")


def _is_asked(row: dict[str, str]) -> bool:
    return (
        row["model"] == "meta-llama/Llama-3.1-70B"
        and row["weights"] == "fp8"
        and row["mode"] == "agg"
        and row["gpu"] in ("h100_sxm", "h200_sxm")
        and (row["isl"], row["osl"]) in (("1024", "1024"), ("8192", "1024"))
        and row["engine"] == "vllm"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="settings whose name has this; may be repeated")
    parser.add_argument("--rows", type=Path, default=default_rows(), help="measured rows (CSV)")
    parser.add_argument("--clients", default="4,16,64", help="of measured rows (%(default)s)")
    parser.add_argument("--tables", default=",".join(TABLES), help="of %(default)s")
    parser.add_argument("--venvs", type=Path, default=Path("~/.cache/shoal/bench-venvs").expanduser())
    parser.add_argument("--pip-option", action="append", default=[], help="handed to pip; may be repeated")
    options = parser.parse_args()
    settings = [one for one in SETTINGS if not options.only or any(word in one.name for word in options.only)]
    if not settings:
        parser.error(f"--only {options.only}: settings are {', '.join(one.name for one in SETTINGS)}")
    tables = options.tables.split(",")
    if unknown := set(tables) - set(TABLES):
        parser.error(f"--tables {', '.join(sorted(unknown))}: there are {', '.join(TABLES)}")
    try:
        peer = peer_builds.build("aiconfigurator", options.venvs, jobs=1, pip_options=options.pip_option, say=say)
    except peer_builds.PeerUnavailable as error:
        sys.exit(f"aiconfigurator cannot be made here: {error}")
    facts = machine.describe()
    from shoal import __version__

    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    print(f"`python {' '.join(['benchmarks/rival_planner.py', *sys.argv[1:]])}`, {now}\n")
    print(f"- {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['system']}")
    print(f"- Python {facts['python']}; shoal {__version__}; {peer.version}, its tables of vLLM 0.24.0")
    print(
        f"- {INPUT} tokens in, {OUTPUT} out, TTFT <= {TTFT_MS:g} ms, TPOT <= {TPOT_MS:g} ms; vLLM's kernels on both"
        " sides; wall and CPU seconds and peak RSS of the whole process"
    )
    with tempfile.TemporaryDirectory() as folder:
        rival = Rival(peer.executable, Path(folder))
        if "capacity" in tables:
            cross(rival, settings, capacity(rival, settings))
        if "sizing" in tables:
            sizing(rival, settings)
        if "measured" in tables and options.rows.exists():
            measured(rival, accuracy_rows.rows_of(options.rows), options.clients.split(","))


if __name__ == "__main__":
    main()
