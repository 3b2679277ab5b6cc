"""A plan told to people: sections of sentences and tables, which a terminal, a text or a page may show."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal.plan.candidates import Shape
from shoal.plan.planner import Plan
from shoal.plan.setups import Interval, Pool, Verdict
from shoal.plan.units import show_bytes, show_duration, show_money, show_rate

REJECTIONS = 12
"""Lines that are shown unless all are asked for."""


class Section(msgspec.Struct, frozen=True, kw_only=True):
    title: str
    lines: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def sections(plan: Plan, *, all_rejections: bool = False) -> list[Section]:
    told = [_asked(plan), _needed(plan), _answer(plan)]
    if plan.answer is not None:
        told += [_latencies(plan), _time(plan)]
    told += [_ties(plan), _precision(plan), _front(plan), _alone(plan)]
    told.append(_rejections(plan, None if all_rejections else REJECTIONS))
    return [section for section in told if section.lines or section.rows]


def summary(plan: Plan) -> str:
    """One line."""
    if plan.answer is None:
        assert plan.impossible is not None
        return f"No setup on {plan.asked.cluster} meets this: {plan.impossible.bound}"
    setup = plan.answer.setup
    price = "" if setup.dollars_per_hour is None else f", {show_money(setup.dollars_per_hour)}/h"
    return f"{setup} on {_count(setup.devices, plan.asked.device)}{price}"


def plain(told: Sequence[Section]) -> str:
    """As text, columns aligned by blanks."""
    blocks = []
    for section in told:
        lines = [section.title, *(f"  {line}" for line in section.lines)]
        if section.rows:
            table = [section.columns, *section.rows]
            widths = [max(len(row[number]) for row in table) for number in range(len(section.columns))]
            lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


# --- sections --------------------------------------------------------------------------------------------------------


def _asked(plan: Plan) -> Section:
    asked = plan.asked
    links = asked.link + (f", {asked.network} between nodes" if asked.network else "")
    price = "no price is known" if asked.dollars_per_device_hour is None else _price(plan)
    return Section(
        title="Asked",
        lines=(
            f"{asked.model}, {asked.parameters / 1e9:,.1f} B parameters, on {asked.cluster}"
            f" ({_count(asked.devices, asked.device)}, {links}; {price})",
            f"{plan.goal} ({asked.workload})",
        ),
    )


def _price(plan: Plan) -> str:
    dollars = plan.asked.dollars_per_device_hour or 0.0
    source = f", {plan.asked.price_source}" if plan.asked.price_source else ""
    return f"{show_money(dollars)} a GPU-hour{source}"


def _needed(plan: Plan) -> Section:
    rows = tuple(
        ("yes" if signal.present else "no", signal.name, signal.evidence, signal.remedy) for signal in plan.signals
    )
    return Section(
        title="Is distribution needed?",
        lines=(plan.distribution,),
        columns=("", "signal", "evidence", "remedy"),
        rows=rows,
    )


def _answer(plan: Plan) -> Section:
    if plan.answer is None:
        found = plan.impossible
        assert found is not None
        lines = [f"Nothing meets this goal. {found.bound}."]
        if found.nearest:
            by = f" ({found.setup})" if found.setup else ""
            lines.append(f"Nearest that is met: {found.nearest}{by}")
        return Section(title="Answer", lines=tuple(lines))
    one = plan.answer
    rows = tuple(_pool(pool) for pool in one.setup.pools)
    lines = [summary(plan)]
    if one.dollars_per_million_output is not None:
        total = plan.asked.rate * (plan.asked.input + plan.asked.output)
        dollars = one.setup.dollars_per_hour or 0.0
        text = f"{show_money(one.dollars_per_million_output)} per 1M output tokens at {show_rate(plan.asked.rate)}"
        text += f" ({show_money(dollars / (total * 3600) * 1e6)} per 1M of input and output)"
        if one.dollars_per_million_at_capacity is not None:
            text += f"; {show_money(one.dollars_per_million_at_capacity)} at its capacity"
        lines.append(text)
    if one.capacity is not None:
        lines.append(f"It carries up to {show_rate(one.capacity)} under the targets.")
    if plan.pools is not None:
        lines.append(plan.pools.text)
    return Section(
        title="Answer",
        lines=tuple(lines),
        columns=("role", "engines", "layout", "weights", "KV", "token budget", "sequences"),
        rows=rows,
    )


def _pool(pool: Pool) -> tuple[str, ...]:
    engine = pool.engine
    role = "all" if pool.role == "both" else pool.role
    return (
        role,
        str(pool.replicas),
        _split(engine.shape),
        engine.weights,
        engine.cache,
        f"{engine.max_batch_tokens:,}",
        f"{engine.max_sequences:,}",
    )


def _split(shape: Shape) -> str:
    over = shape.ep * shape.attention_dp
    return str(shape) + (f", experts over {over}" if over > 1 else "")


def _latencies(plan: Plan) -> Section:
    one = plan.answer
    assert one is not None
    wanted = {(target.metric, target.percentile): target.seconds for target in plan.asked.targets}
    rows = []
    for name, metric, percentile in (
        ("TTFT p50", "ttft", "p50"),
        ("TTFT p99", "ttft", "p99"),
        ("ITL p50", "itl", "p50"),
        ("ITL p99", "itl", "p99"),
    ):
        target = next((value for key, value in wanted.items() if key == (metric, percentile)), None)
        values = [getattr(of, f"{metric}_{percentile}") for of in (one.prediction, one.degraded) if of is not None]
        rows.append((name, *map(_interval, values), "" if target is None else show_duration(target)))
    loss = () if one.degraded is None else (f"after the loss of a {plan.asked.survive}",)
    return Section(
        title="Predicted",
        lines=(
            f"By the event loop; in brackets where nine of ten cases lie; rests on"
            f" {one.prediction.provenance} figures. {one.prediction.batch:.1f} sequences an engine at once.",
        ),
        columns=("", "predicted", *loss, "target"),
        rows=tuple(rows),
    )


def _interval(found: Interval) -> str:
    return f"{show_duration(found.value)} ({show_duration(found.low)} to {show_duration(found.high)})"


def _time(plan: Plan) -> Section:
    whole = sum(part.seconds for part in plan.parts)
    rows = tuple(
        (part.name, show_duration(part.seconds), f"{part.seconds / whole:.0%}", part.bound, _moved(part.bytes))
        for part in plan.parts
    )
    return Section(
        title="Where a decode step's time goes", columns=("part", "time", "share", "bound by", "bytes a GPU"), rows=rows
    )


def _moved(amount: float) -> str:
    return show_bytes(amount) if amount else ""


def _ties(plan: Plan) -> Section:
    lines = []
    if plan.answer is not None and plan.answer.tie:
        lines.append(f"The answer {plan.answer.tie}.")
    for one in plan.equals:
        carried = "" if one.capacity is None else f", {show_rate(one.capacity)} under the targets"
        lines.append(f"As many GPUs: {one.setup}{carried}" + (f"; {one.tie}" if one.tie else ""))
    lines += [f"Within the band: {one.setup} {one.tie}." for one in plan.near]
    return Section(title="Ties", lines=tuple(lines))


def _precision(plan: Plan) -> Section:
    lines = []
    for one in plan.advice:
        price = "" if one.dollars_per_hour is None else f", {show_money(one.dollars_per_hour)}/h"
        saved = f", {one.saves} fewer" if one.saves else ""
        lines.append(f"{one.precision} weights would do with {one.setup}: {one.devices} GPUs{price}{saved}")
    if lines:
        lines.append("Measure the quality of such a checkpoint first; allow it with --precision.")
    return Section(title="A smaller precision", lines=tuple(lines))


def _front(plan: Plan) -> Section:
    rows = tuple(_front_row(one, plan) for one in plan.front)
    return Section(
        title="Cost, TTFT, ITL, throughput: setups that no other beats in all",
        columns=("GPUs", "setup", "weights", "budget", "TTFT p99", "ITL p99", "carries", "$/1M out", "meets"),
        rows=rows,
    )


def _front_row(one: Verdict, plan: Plan) -> tuple[str, ...]:
    price = one.dollars_per_million_output
    engine = one.setup.pools[-1].engine
    return (
        str(one.setup.devices),
        str(one.setup),
        engine.weights,
        f"{engine.max_batch_tokens:,}",
        show_duration(one.prediction.ttft_p99.value),
        show_duration(one.prediction.itl_p99.value),
        f"< {show_rate(plan.asked.rate)}" if one.capacity is None else show_rate(one.capacity),
        "" if price is None else show_money(price),
        ("answer" if plan.answer is not None and one == plan.answer else "yes") if one.meets else "no",
    )


def _alone(plan: Plan) -> Section:
    if len(plan.alone) < 2:
        return Section(title="")
    rows = tuple(
        (
            str(step.devices),
            show_duration(step.seconds),
            "" if step.fits else "does not fit",
            "yes" if step.crosses_nodes else "",
            step.goes,
        )
        for step in plan.alone
    )
    lines = (plan.turning_point + ".",) if plan.turning_point else ()
    return Section(
        title="One sequence alone over more GPUs (tp)",
        lines=lines,
        columns=("GPUs", "a token", "", "crosses nodes", "where the time goes"),
        rows=rows,
    )


def _rejections(plan: Plan, most: int | None) -> Section:
    shown = plan.rejections if most is None else plan.rejections[:most]
    lines = [str(one) for one in shown]
    if len(shown) < len(plan.rejections):
        lines.append(f"... and {len(plan.rejections) - len(shown)} further families: --all, --json or --html FILE")
    title = f"Why not ({plan.looked_at:,} engines looked at, {plan.closer} setups in the event loop)"
    return Section(title=title, lines=tuple(lines))


def _count(devices: int, device: str) -> str:
    return f"{devices} x {device}"
