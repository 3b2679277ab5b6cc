"""The three signs that an engine needs more GPUs, as pure functions of what was read.

Each is monotone: more of what speaks for a sign never makes it absent.
"""

from __future__ import annotations

import math

from shoal.plan.diagnose import thresholds as limit
from shoal.plan.diagnose.findings import Action, Evidence, Finding, Targets
from shoal.plan.diagnose.findings import shown_seconds as seconds
from shoal.plan.diagnose.reading import Reading
from shoal.plan.diagnose.tail import Tail, front_end_seconds, tails


def diagnose(reading: Reading, targets: Targets) -> tuple[Finding, Finding, Finding]:
    return does_not_fit(reading), idle_compute(reading, targets), batching_limit(reading, targets)


def engine_queue(reading: Reading) -> tuple[float, str] | None:
    """Sequences that wait in the engine on the average, and the metric that says so. None if none does.

    A gauge is read a few times a window and may miss every burst. By Little's law the seconds that requests spent in
    the queue, per second of the window, are the mean length of that queue: the larger of both counts.
    """
    found = [(value, reading.metric("waiting"))] if (value := reading.gauge("waiting")) is not None else []
    queue = reading.histogram("queue_time")
    if queue is not None and reading.seconds:
        found.append((queue.total / reading.seconds, f"{reading.metric('queue_time')}_sum per second"))
    return max(found) if found else None


def waiting(reading: Reading) -> tuple[float, str] | None:
    """With those that a gateway holds back until the engine has a place: they wait for it no less."""
    queue, ahead = engine_queue(reading), reading.gauge("queued_ahead")
    if not ahead:
        return queue
    inside = queue or (0.0, "")
    return inside[0] + ahead, " + ".join(filter(None, (inside[1], reading.metric("queued_ahead"))))


def has_queue(reading: Reading) -> bool:
    queue = waiting(reading)
    return (queue is not None and queue[0] >= limit.WAITING) or _queue_share(reading) >= limit.QUEUE_SHARE


def places(reading: Reading, targets: Targets) -> int | None:
    """Sequences that the batches of all replicas have room for, as the user or the engine says; None if neither."""
    if targets.max_sequences:
        return targets.max_sequences * max(1, len(reading.parts))
    return int(reading.gauge("slots") or 0) or None


def is_half_empty(reading: Reading, targets: Targets) -> bool:
    """The batch had room for twice as many: as its limit says, or since it held as many within the same window."""
    found, most = reading.gauges.get("running"), places(reading, targets)
    if found is None:
        return False
    return found.mean < limit.COMPUTE_IDLE * most if most else found.mean < limit.COMPUTE_IDLE * found.high


def is_idle(reading: Reading) -> bool:
    """Nothing ran in the window, or since the start."""
    at_work = sum(reading.gauge(name) or 0.0 for name in ("running", "waiting", "queued_ahead"))
    ended = reading.grown("finished") or reading.grown("generated_tokens") or 0.0
    return not at_work and not ended


# --- 1: does not fit --------------------------------------------------------------------------------------------------


def does_not_fit(reading: Reading) -> Finding:
    usage, preempted, queue = reading.gauge("kv_usage"), reading.grown("preemptions"), waiting(reading)
    evidence = []
    if preempted is not None:
        share = _preempted_share(reading)
        each = f", {share:.2g} for each sequence that ended" if 0 < share < math.inf else ""
        evidence.append(Evidence(f"{preempted:.0f} preemptions{each}", preempted, reading.metric("preemptions")))
    if usage is not None:
        found = reading.gauges["kv_usage"]
        spread = f" ({found.low:.0%} to {found.high:.0%})" if found.readings > 1 else " at one moment"
        evidence.append(Evidence(f"KV cache {usage:.0%} full{spread}", usage, reading.metric("kv_usage")))
    if queue is not None:
        evidence.append(Evidence(f"{queue[0]:.1f} sequences wait", *queue))
    if usage is None and preempted is None:
        missing = ("KV cache usage or preemptions",)
        return Finding(
            signal="does_not_fit", state="unknown", summary="no metric of the KV cache was found", missing=missing
        )
    thrashes = _preempted_share(reading) >= limit.PREEMPTED_SHARE
    is_short = _kv_is_full(reading) and has_queue(reading)
    if not thrashes and not is_short:
        near = " (it is nearly full, and serves all who come)" if _kv_is_full(reading) else ""
        summary = f"the KV cache holds what runs{near}"
        return Finding(signal="does_not_fit", state="absent", summary=summary, evidence=tuple(evidence))
    return Finding(
        signal="does_not_fit",
        state="present",
        # A gauge's one reading can be a moment's; a counter cannot, nor several readings.
        certainty="shown" if thrashes or reading.gauges["kv_usage"].readings > 1 else "indicated",
        summary="sequences are thrown out to make room and computed again"
        if thrashes
        else "sequences wait because the KV cache is full",
        evidence=tuple(evidence),
        try_first=_make_room(reading),
        disproved_by="With a larger KV cache (or half the maximal length) preemptions and queue stay as they are.",
    )


def _preempted_share(reading: Reading) -> float:
    """Preemptions per sequence that ended; infinite where none did."""
    preempted = reading.grown("preemptions") or 0.0
    if not preempted:
        return 0.0
    ended = reading.grown("finished") or 0.0
    return preempted / ended if ended else math.inf


def _kv_is_full(reading: Reading) -> bool:
    return (reading.gauge("kv_usage") or 0.0) >= limit.KV_FULL


def wanted_kv(reading: Reading) -> float | None:
    """KV memory over what there is that those who wait would need too, if they are like those who run."""
    running, usage = reading.gauge("running"), reading.gauge("kv_usage")
    queue = waiting(reading)
    if not running or usage is None or queue is None:
        return None
    return usage * (running + queue[0]) / running


def _make_room(reading: Reading) -> tuple[Action, ...]:
    wanted = wanted_kv(reading)
    more = Action("give the KV cache what memory is still free", "kv_memory")
    halve = Action("half the bytes a token; compare answers first", "kv_dtype")
    shorter = Action("if no request is as long as the present maximum: a shorter one", "max_len")
    times = 2 if wanted is None or wanted <= 2 else 4 if wanted <= 4 else 8
    much = f"who runs and who waits would take {wanted:.1f} times the KV cache there is: " if wanted else ""
    split = Action(f"{much}{times} times the present ranks, which share the weights too", "tensor_parallel", str(times))
    # More than twice the cache comes from no setting of one device.
    return (split, halve, more, shorter) if wanted is not None and wanted > 2 else (more, halve, shorter, split)


# --- 2: p99 rises while compute is idle -------------------------------------------------------------------------------


def idle_compute(reading: Reading, targets: Targets) -> Finding:
    found = tails(reading, targets)
    if not found and not is_idle(reading):
        return Finding(
            signal="idle_compute",
            state="unknown",
            summary="no latency was observed",
            missing=("a histogram of time to first token or between tokens, with requests in the window",),
        )
    ahead, outside = _held_back(reading, targets), front_end_seconds(reading)
    late = [tail for tail in found if tail.is_high]
    is_slow_outside = outside is not None and outside >= limit.FRONT_END_SECONDS
    evidence = [tail.evidence() for tail in found]
    if outside is not None:
        says = f"{seconds(max(outside, 0.0))} of the mean time to first token are neither queue nor prefill"
        metric = " - ".join(reading.metric(name) for name in ("ttft", "queue_time", "prefill_time"))
        evidence.append(Evidence(says, outside, metric))
    idle, certain, why = _compute_is_idle(reading, targets)
    evidence += why
    if not (late or is_slow_outside or ahead):
        summary = "nothing ran" if is_idle(reading) else "latencies are close together: no tail to explain"
        return Finding(signal="idle_compute", state="absent", summary=summary, evidence=tuple(evidence))
    if not idle:
        summary = "latency has a tail, but compute is at work or the batch is full: see 1 and 3"
        return Finding(signal="idle_compute", state="absent", summary=summary, evidence=tuple(evidence))
    return Finding(
        signal="idle_compute",
        state="present",
        certainty="shown" if certain and (ahead or is_slow_outside or any(t.is_certain for t in late)) else "indicated",
        summary=_cause(reading, late, ahead, is_slow_outside),
        evidence=tuple(evidence),
        try_first=_find_the_wait(reading, late, ahead, is_slow_outside),
        disproved_by=(
            "Processors of the device are busy (DCGM_FI_PROF_SM_ACTIVE above 0.8) while the tail lasts, or the tail is "
            "that of the longest prompts alone."
        ),
    )


def _held_back(reading: Reading, targets: Targets) -> bool:
    """A gateway queues while the engine has room and nobody waits in it."""
    queue = engine_queue(reading)
    is_ahead = (reading.gauge("queued_ahead") or 0.0) >= limit.WAITING and (queue is None or queue[0] < limit.WAITING)
    return is_ahead and is_half_empty(reading, targets)


_DEVICE = (
    ("sm_active", "processors have work"),
    ("device_busy", "any kernel runs"),
    ("memory_active", "device memory moves data"),
)


def _compute_is_idle(reading: Reading, targets: Targets) -> tuple[bool, bool, list[Evidence]]:
    """Whether it is, whether that was measured rather than inferred from the batch, and on what grounds."""
    evidence = [
        Evidence(f"{what} {share:.0%} of the time", share, reading.metric(name))
        for name, what in _DEVICE
        if (share := reading.gauge(name)) is not None
    ]
    active, busy = reading.gauge("sm_active"), reading.gauge("device_busy")
    if active is not None:
        return active < limit.COMPUTE_IDLE, True, evidence
    # One small kernel after another keeps a device busy that is nearly empty: only the opposite shows something.
    if busy is not None and busy < limit.COMPUTE_IDLE:
        return True, True, evidence
    running, usage, queue = reading.gauge("running"), reading.gauge("kv_usage"), engine_queue(reading)
    if running is None or queue is None:
        return False, False, evidence
    ahead = reading.gauge("queued_ahead") or 0.0
    evidence.append(
        Evidence(f"{running:.1f} sequences run and {queue[0]:.1f} wait", running, reading.metric("running"))
    )
    has_room = queue[0] < limit.WAITING and (usage is None or usage < limit.COMPUTE_IDLE)
    if places(reading, targets) or ahead >= limit.WAITING:
        has_room = has_room and is_half_empty(reading, targets)
    return has_room, False, evidence


def _cause(reading: Reading, late: list[Tail], ahead: bool, is_slow_outside: bool) -> str:
    if ahead:
        return "requests queue ahead of an engine that has room"
    if (reading.gauge("rank_imbalance") or 0.0) >= limit.RANK_IMBALANCE:
        return "ranks wait for the busiest one of them"
    if is_slow_outside:
        return "time to first token goes by outside the engine: HTTP, tokenisation, streaming, network"
    names = " and ".join(tail.title for tail in late)
    return f"the p99 of {names} is high while the batch is small: the host, the network or a pause, not the device"


def _find_the_wait(reading: Reading, late: list[Tail], ahead: bool, is_slow_outside: bool) -> tuple[Action, ...]:
    actions = []
    if ahead:
        actions.append(Action("let the gateway pass on more: max_sequences of models[].endpoints; shoal fleet status"))
    if (reading.gauge("rank_imbalance") or 0.0) >= limit.RANK_IMBALANCE:
        actions.append(Action("place experts by their load: shoal's --expert-load FILE and --redundant-experts 2"))
    if is_slow_outside or ahead:
        actions.append(Action("more processes for HTTP and tokenisation", "front_end", "2"))
    if any(tail.name == "itl" for tail in late):
        actions.append(Action("smaller chunks, so that prompts of others stretch a step less", "batch_tokens", "2048"))
    if not (is_slow_outside or ahead):
        actions.append(Action("look at the host: CPU cores for the engine's process, CUDA graphs on, no swapping"))
    # All-reduces of a decode step are bound by latency: fewer ranks have fewer of them.
    actions.append(Action("if ranks are split over a slow link: half of them", "tensor_parallel", "HALF"))
    return tuple(actions)


# --- 3: batching has hit its limit ------------------------------------------------------------------------------------


def batching_limit(reading: Reading, targets: Targets) -> Finding:
    queue, running = waiting(reading), reading.gauge("running")
    if queue is None or running is None:
        missing = tuple(
            name for name, value in (("sequences running", running), ("sequences waiting", queue)) if value is None
        )
        summary = "no metric of the batch was found"
        return Finding(signal="batching_limit", state="unknown", summary=summary, missing=missing)
    found = reading.gauges["running"]
    spread = f" ({found.low:.0f} to {found.high:.0f})" if found.readings > 1 else " at one moment"
    evidence = [
        Evidence(f"{running:.1f} sequences run{spread}", running, found.metric),
        Evidence(f"{queue[0]:.1f} sequences wait", *queue),
        *_queue_evidence(reading),
        *_step_evidence(reading),
    ]
    elasticity = throughput_per_batch(reading)
    if elasticity is not None:
        says = f"throughput grows by {elasticity:.2f} of what the batch grows by"
        evidence.append(Evidence(says, elasticity, reading.metric("generated_tokens")))
    is_flat = elasticity is not None and elasticity <= limit.FLAT
    itl = next((tail for tail in tails(reading, targets) if tail.name == "itl"), None)
    misses_target = itl is not None and itl.target is not None and itl.is_high
    if does_not_fit(reading).state == "present":
        summary = "the batch ends where memory does: see 1"
        return Finding(signal="batching_limit", state="absent", summary=summary, evidence=tuple(evidence))
    is_ahead = _held_back(reading, targets)
    if (is_ahead or not has_queue(reading)) and not (is_flat and misses_target):
        summary = (
            "who waits is held back ahead of the engine: see 2" if is_ahead else "the batch takes in whoever comes"
        )
        return Finding(signal="batching_limit", state="absent", summary=summary, evidence=tuple(evidence))
    if reading.gauge("deferred") and (reading.gauge("deferred") or 0.0) >= 0.5 * queue[0]:
        summary = "who waits waits for an adapter or a KV transfer, not for a place in the batch"
        return Finding(signal="batching_limit", state="absent", summary=summary, evidence=tuple(evidence))
    is_held = _batch_is_held(reading, targets)
    return Finding(
        signal="batching_limit",
        state="present",
        certainty="shown" if is_held and (is_flat or places(reading, targets) or found.readings > 2) else "indicated",
        summary=_limit(reading, is_held, is_flat),
        evidence=tuple(evidence),
        try_first=_more_batch(reading, is_held=is_held, is_flat=is_flat),
        disproved_by=(
            "With a limit half as high again, tokens per second grow by more than a tenth and the time between tokens "
            "stays in its target: then it was the setting, and one engine still does."
        ),
    )


def _queue_share(reading: Reading) -> float:
    """Of the mean time to first token, how much was spent in the queue; 0 where it is not known."""
    queue, ttft = reading.histogram("queue_time"), reading.histogram("ttft")
    if queue is None or ttft is None or not ttft.mean:
        return 0.0
    return (queue.mean or 0.0) / ttft.mean


def _queue_evidence(reading: Reading) -> list[Evidence]:
    queue = reading.histogram("queue_time")
    share = _queue_share(reading)
    if queue is None or not share:
        return []
    says = f"a request waits {seconds(queue.mean or 0.0)} before it runs: {share:.0%} of its time to first token"
    return [Evidence(says, queue.mean or 0.0, reading.metric("queue_time"))]


def _step_evidence(reading: Reading) -> list[Evidence]:
    steps, generated, prompts = (reading.grown(name) for name in ("steps", "generated_tokens", "prompt_tokens"))
    if not steps or generated is None or prompts is None:
        return []
    says = f"a step computes {prompts / steps:.1f} prompt tokens and generates {generated / steps:.1f}"
    return [Evidence(says, generated / steps, reading.metric("steps"))]


def _batch_is_held(reading: Reading, targets: Targets) -> bool:
    """By a limit of sequences; otherwise by the tokens of a step, which prompts fill."""
    found, most = reading.gauges["running"], places(reading, targets)
    if most:
        return found.mean >= limit.AT_LIMIT * most
    return found.mean > 0 and found.high - found.low <= limit.STEADY * found.mean


def throughput_per_batch(reading: Reading) -> float | None:
    """Slope of log(tokens a second) over log(batch), by least squares. None where batches were too much alike."""
    points = [(i.running, i.tokens_per_second) for i in reading.intervals if i.running > 0 and i.tokens_per_second > 0]
    if len(points) < 3 or max(x for x, _ in points) < limit.BATCH_RANGE * min(x for x, _ in points):
        return None
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    slope: float = sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)
    return slope


def _limit(reading: Reading, is_held: bool, is_flat: bool) -> str:
    if is_flat:
        return "a larger batch brings no more throughput: the device is at its limit"
    if is_held:
        return f"the batch stays at {reading.gauges['running'].high:.0f} sequences, and others wait for a place"
    return (
        "requests wait though neither places nor memory are short: steps are full of prompts, or arrivals come at once"
    )


def _more_batch(reading: Reading, *, is_held: bool, is_flat: bool) -> tuple[Action, ...]:
    running, queue = reading.gauge("running") or 0.0, waiting(reading) or (0.0, "")
    usage = reading.gauge("kv_usage") or 0.0
    wanted, fits = math.ceil(running + queue[0]), math.inf
    if usage and running * limit.KV_FULL < wanted * usage:
        fits = math.floor(running * limit.KV_FULL / usage)
    actions = []
    places = int(min(wanted, fits, 2 * max(reading.gauges["running"].high, 1)))
    if is_held and not is_flat and places > running:
        says = "the KV cache has room for them" if wanted <= fits else f"the KV cache has room for about {fits:.0f}"
        actions.append(
            Action(f"{wanted} want to run, {says}; watch the time between tokens", "max_sequences", str(places))
        )
    if not is_held and not is_flat:
        actions.append(
            Action("more prompt tokens a step, at the price of the time between tokens", "batch_tokens", "8192")
        )
    if not is_held and not is_flat:
        actions.append(Action("if outputs end long before their limit: admit sooner", "admission"))
    times = next((few for few in (2, 4) if wanted <= few * running), 8) if running else 2
    actions.append(Action(f"{times} times the present engines", "replicas", str(times)))
    if is_flat or not actions[:-1]:
        actions.append(Action("twice the present ranks, where a sequence alone is too slow", "tensor_parallel", "2"))
    return tuple(actions)
