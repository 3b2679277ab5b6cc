"""Predictions against measured end-to-end rows: errors, bias, and how often the intervals hold.

    python benchmarks/accuracy.py --rows e2e_measured.csv [--json OUT]
    python benchmarks/accuracy.py --machine        and, behind it, this machine's: calibration.py, 10 minutes

The error is predicted / measured - 1. The constants of `core/cost` were chosen by hand with these rows in view, so the
first tables are in-sample; the last one leaves a GPU, a model, an engine or one setup of them out of what is fitted by
program: each engine's middle ratio of measured and predicted, and the interval around it.
See accuracy_rows.py for how a row becomes a question.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parents[1])]

from benchmarks.accuracy_rows import METRICS, Answer, CannotAnswer, Question, answer, read, rows_of  # noqa: E402

Pair = tuple[Question, Answer]


def default_rows() -> Path:
    shared = os.environ.get("SHOAL_DATA", str(Path(__file__).parents[2] / "shared"))
    for found in (Path(shared) / "e2e_measured.csv", Path(shared) / "data" / "e2e_measured.csv"):
        if found.exists():
            return found
    return Path(shared) / "e2e_measured.csv"


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def summary(pairs: list[Pair], asked: int, metric: str) -> dict[str, float]:
    """Of the rows that have the metric."""
    errors, inside = [], 0
    for question, found in pairs:
        if metric not in question.measured:
            continue
        measured = question.measured[metric]
        errors.append(found.predicted[metric] / measured - 1)
        inside += found.low[metric] <= measured <= found.high[metric]
    absolute = [abs(error) for error in errors]
    return {
        "rows": asked,
        "answered": len(errors),
        "median": median(absolute) if absolute else float("nan"),
        "p90": quantile(absolute, 0.9),
        "bias": median(errors) if errors else float("nan"),
        "coverage90": inside / len(errors) if errors else float("nan"),
    }


def ask(rows: list[dict[str, str]]) -> tuple[list[Question], list[Pair], Counter[str]]:
    questions, pairs, refusals = [], [], Counter[str]()
    for number, row in enumerate(rows):
        question = read(row)
        questions.append(question)
        try:
            pairs.append((question, answer(row)))
        except CannotAnswer as error:
            refusals[f"{question.model} on {question.device}, {question.engine}, {question.mode}: {error}"] += 1
        if sys.stderr.isatty() and number % 20 == 0:
            print(f"\r{number}/{len(rows)}", end="", file=sys.stderr)
    return questions, pairs, refusals


def table(questions: list[Question], pairs: list[Pair]) -> None:
    columns = f"{'rows':>5} {'answ.':>5} {'median':>7} {'p90':>7} {'bias':>7} {'cover':>6}"
    print(f"{'source, GPU, engine':58} {'metric':10} {columns}")
    groups = sorted({group_of(question) for question in questions})
    for group in groups:
        for metric in METRICS:
            asked = sum(1 for question in questions if group_of(question) == group and metric in question.measured)
            if not asked:
                continue
            line = summary([pair for pair in pairs if group_of(pair[0]) == group], asked, metric)
            show(", ".join(group), metric, line)


def group_of(question: Question) -> tuple[str, ...]:
    mode = [question.mode] if question.mode != "agg" else []
    return (question.source[:24], question.device[:22], question.engine, *mode)


def show(name: str, metric: str, line: dict[str, float]) -> None:
    print(
        f"{name:58} {metric:10} {line['rows']:5} {line['answered']:5} {line['median']:7.1%} {line['p90']:7.1%} "
        f"{line['bias']:+7.1%} {line['coverage90']:6.1%}"
    )


HELD_OUT: dict[str, Callable[[Question], object]] = {
    "GPU": lambda question: question.device,
    "model": lambda question: question.model,
    "engine": lambda question: question.engine,
    "setup": lambda question: (question.device, question.model, question.engine),
}
"""What is left out, one at a time."""


def held_out(pairs: list[Pair], metric: str, group_of: Callable[[Question], object]) -> dict[str, float]:
    """Each group's rows by what the others say alone: their middle ratio corrects the prediction, their quantiles are
    its interval. Of the same engine where it has 30 rows among the others, else of all."""
    ratios: dict[object, list[tuple[str, float]]] = {}
    for question, found in pairs:
        if metric in question.measured and not (question.doubtful and metric == "throughput"):
            ratio = question.measured[metric] / found.predicted[metric]
            ratios.setdefault(group_of(question), []).append((question.engine, ratio))
    errors, inside = [], 0
    for group, rows in ratios.items():
        others = [row for other, of in ratios.items() if other != group for row in of]
        for engine in sorted({engine for engine, _ in rows}):
            same = [ratio for name, ratio in others if name == engine]
            known = same if len(same) >= 30 else [ratio for _, ratio in others]
            if not known:
                continue
            middle, low, high = median(known), quantile(known, 0.04), quantile(known, 0.96)
            for ratio in (ratio for name, ratio in rows if name == engine):
                errors.append(middle / ratio - 1)
                inside += low <= ratio <= high
    return {
        "rows": len(errors),
        "answered": len(errors),
        "median": median(map(abs, errors)) if errors else float("nan"),
        "p90": quantile([abs(error) for error in errors], 0.9),
        "bias": median(errors) if errors else float("nan"),
        "coverage90": inside / len(errors) if errors else float("nan"),
    }


def residuals(pairs: list[Pair]) -> dict[str, tuple[float, float, float, int]]:
    """Measured over predicted, as `core/cost/residuals.py` has them: the 4th, 50th and 96th of a hundred.

    So, on rows of devices and models that were not among them, some 90 of a hundred lie between. Of engines with 30
    rows or more.
    """
    ratios: dict[str, list[float]] = {}
    for question, found in pairs:
        for metric, measured in question.measured.items():
            if question.doubtful and metric == "throughput":
                continue
            for name in (metric, f"{metric}/{question.engine}"):
                ratios.setdefault(name, []).append(measured / found.predicted[metric])
    return {
        name: (
            round(quantile(values, 0.04), 2),
            round(median(values), 2),
            round(quantile(values, 0.96), 2),
            len(values),
        )
        for name, values in sorted(ratios.items())
        if len(values) >= 30
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=default_rows(), help="measured rows (CSV)")
    parser.add_argument("--json", type=Path, help="write the errors of each metric here")
    parser.add_argument("--residuals", action="store_true", help="print the quantiles that intervals are made of")
    parser.add_argument("--machine", action="store_true", help="then calibrate and measure this machine, too")
    arguments = parser.parse_args()
    if not arguments.rows.exists():
        parser.error(f"--rows {arguments.rows}: there is no such file")
    began = time.perf_counter()
    questions, pairs, refusals = ask(rows_of(arguments.rows))
    table(questions, pairs)
    result = {
        metric: summary(pairs, sum(metric in question.measured for question in questions), metric) for metric in METRICS
    }
    print()
    for metric, line in result.items():
        show("all", metric, line)
    print("\nheld out, one at a time: corrected, and with intervals, by the rows of the others alone")
    for name, group in HELD_OUT.items():
        for metric in METRICS:
            show(name, metric, held_out(pairs, metric, group))
    print(f"\n{len(pairs)} of {len(questions)} rows answered in {time.perf_counter() - began:.0f} s; not answered:")
    for reason, count in refusals.most_common():
        print(f"  {count:4}  {reason}")
    if arguments.residuals:
        for name, (low, middle, high, count) in residuals(pairs).items():
            print(f'        "{name}": Residual({low}, {middle}, {high}, {count}),')
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if arguments.machine:
        print(flush=True)
        sys.exit(
            subprocess.run([sys.executable, str(Path(__file__).with_name("calibration.py"))], check=False).returncode
        )


if __name__ == "__main__":
    main()
