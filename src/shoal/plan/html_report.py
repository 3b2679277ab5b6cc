"""A plan as one page that opens offline: the report's sections, and charts drawn as SVG. No script is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from math import ceil, floor, log10

from shoal.plan.planner import Plan
from shoal.plan.report import Section, sections, summary
from shoal.plan.units import show_duration, show_money

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 300, 76, 44, 16, 20
COLOURS = ("#1f6f8b", "#c8553d", "#588157", "#8d6a9f", "#bc8034", "#4a5568", "#2a9d8f", "#9b2226")
Point = tuple[float, float, str, bool]
"""x, y, what it is, whether it is the answer."""

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1a202c;background:#fff}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin:2rem 0 .4rem}
.goal{color:#4a5568;margin-top:0}.answer{font-size:1.2rem;font-weight:600}
table{border-collapse:collapse;font-size:.88rem;display:block;overflow-x:auto}
td,th{padding:.25rem .7rem .25rem 0;text-align:left;vertical-align:top;border-bottom:1px solid #e2e8f0}
th{color:#4a5568;font-weight:500}li{margin:.15rem 0}svg{max-width:100%;height:auto}
.charts{display:flex;flex-wrap:wrap;gap:1.5rem}
figure{margin:0;flex:1 1 24rem;max-width:42rem}figcaption{color:#4a5568;font-size:.88rem}
@media(prefers-color-scheme:dark){body{background:#14181f;color:#e2e8f0}.goal,th,figcaption{color:#a0aec0}
td,th{border-color:#2d3748}svg text{fill:#cbd5e0}svg .axis{stroke:#718096}}
"""


def page(plan: Plan, version: str) -> str:
    """The whole document. Everything that comes from outside is escaped."""
    told = sections(plan, all_rejections=True)
    charts = [chart for chart in (_front_chart(plan), _alone_chart(plan), _parts_chart(plan)) if chart]
    body = "\n".join(_section(section) for section in told)
    title = f"{plan.asked.model} on {plan.asked.cluster}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}: shoal plan</title><style>{_STYLE}</style></head><body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="goal">{escape(plan.goal)}</p>\n'
        f'<p class="answer">{escape(summary(plan))}</p>\n'
        f'<div class="charts">{"".join(charts)}</div>\n{body}\n'
        f'<p class="goal">shoal {escape(version)}</p>\n</body></html>\n'
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.rows:
        parts += [f"<p>{escape(line)}</p>" for line in section.lines]
        head = "".join(f"<th>{escape(column)}</th>" for column in section.columns)
        rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in section.rows)
        parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")
    else:
        parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in section.lines) + "</ul>")
    return "\n".join(parts)


# --- charts ----------------------------------------------------------------------------------------------------------


def _front_chart(plan: Plan) -> str:
    """Cost against ITL p99, of the setups that no other beats."""
    priced = plan.asked.dollars_per_device_hour is not None
    points = [
        (one.setup.cost, one.prediction.itl_p99.value, str(one.setup), plan.answer is not None and one == plan.answer)
        for one in plan.front
    ]
    targets = [target.seconds for target in plan.asked.targets if target.metric == "itl"]
    return _figure(
        points,
        "Cost and ITL p99 of the front" + ("; the line is the target" if targets else ""),
        "$ an hour" if priced else "GPUs",
        (lambda value: show_money(value)) if priced else (lambda value: f"{value:.0f}"),
        show_duration,
        line=targets[0] if targets else None,
    )


def _alone_chart(plan: Plan) -> str:
    """A token of one sequence against the number of GPUs."""
    fastest = min((step.seconds for step in plan.alone), default=0.0)
    points = [
        (float(step.devices), step.seconds, f"tp{step.devices}: {step.goes}", step.seconds == fastest)
        for step in plan.alone
    ]
    caption = "A token of one sequence alone, by GPUs (tp); filled: the fastest"
    return _figure(points, caption, "GPUs", lambda value: f"{value:.0f}", show_duration, joined=True)


def _figure(
    points: Sequence[Point],
    caption: str,
    x_name: str,
    show_x: Callable[[float], str],
    show_y: Callable[[float], str],
    *,
    line: float | None = None,
    joined: bool = False,
) -> str:
    """Points on two logarithmic axes."""
    if len(points) < 2:
        return ""
    ys = [y for _, y, _, _ in points] + ([line] if line is not None else [])
    across, up = _scale([x for x, _, _, _ in points]), _scale(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + across(x) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up(y) * (HEIGHT - BOTTOM - TOP),
        )

    parts = [
        f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#a0aec0"/>',
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end" font-size="12">{escape(x_name)}</text>',
    ]
    for x in sorted({point[0] for point in points}):
        parts.append(_text(place(x, ys[0])[0], HEIGHT - BOTTOM + 16, show_x(x), "middle"))
    for y in _ticks(ys):
        parts.append(_text(LEFT - 6, place(points[0][0], y)[1] + 4, show_y(y), "end"))
    if line is not None:
        height = place(points[0][0], line)[1]
        parts.append(
            f'<path d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}" stroke="{COLOURS[1]}" stroke-dasharray="5 4" fill="none"/>'
        )
    if joined:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (place(x, y) for x, y, _, _ in points))
        parts.append(f'<path d="M{path}" fill="none" stroke="{COLOURS[0]}"/>')
    for x, y, name, chosen in points:
        left, top = place(x, y)
        fill = COLOURS[0] if chosen else "#fff"
        parts.append(
            f'<circle cx="{left:.1f}" cy="{top:.1f}" r="{6 if chosen else 4.5}" fill="{fill}" stroke="{COLOURS[0]}"'
            f' stroke-width="1.5"><title>{escape(name)}: {escape(show_y(y))}</title></circle>'
        )
    return _svg("".join(parts), caption, HEIGHT)


def _parts_chart(plan: Plan) -> str:
    """A decode step of the answer as one bar."""
    whole = sum(part.seconds for part in plan.parts)
    if not whole:
        return ""
    left, drawn = float(LEFT), []
    for number, part in enumerate(plan.parts):
        width = part.seconds / whole * (WIDTH - LEFT - RIGHT)
        colour = COLOURS[number % len(COLOURS)]
        name = f"{part.name}: {show_duration(part.seconds)}, {part.seconds / whole:.0%}"
        drawn.append(
            f'<rect x="{left:.1f}" y="{TOP}" width="{width:.1f}" height="34" fill="{colour}">'
            f"<title>{escape(name)}</title></rect>"
        )
        row, column = divmod(number, 3)
        x, y = LEFT + column * 185, TOP + 60 + row * 20
        drawn.append(f'<rect x="{x}" y="{y - 10}" width="11" height="11" fill="{colour}"/>{_text(x + 17, y, name)}')
        left += width
    rows = ceil(len(plan.parts) / 3)
    return _svg("".join(drawn), f"A decode step of the answer: {show_duration(whole)}", TOP + 60 + rows * 20)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="12">{escape(text)}</text>'


def _svg(content: str, caption: str, height: float) -> str:
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {height:.0f}" width="100%" role="img" aria-label="{escape(caption)}"'
        f' font-family="system-ui,sans-serif">{content}</svg><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _scale(values: Sequence[float]) -> Callable[[float], float]:
    """0 to 1 over the logarithm, with a little room on both sides."""
    low, high = log10(min(values)), log10(max(values))
    room = max(0.05, (high - low) * 0.08)
    span = high - low + 2 * room
    return lambda value: (log10(value) - low + room) / span


def _ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 of every power of ten within the values, and their ends where that is too few."""
    low, high = min(values), max(values)
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    found = [step * 10.0**power for power in powers for step in (1, 2, 5) if low <= step * 10.0**power <= high]
    return found if len(found) >= 2 else [low, high]
