"""The few numbers that a diagnosis turns on, each with its reason."""

from __future__ import annotations

KV_FULL = 0.9
"""Share of the KV cache from which on a queue is one for memory: a prompt needs its blocks all at once, so admission
stops before the last block is taken."""

PREEMPTED_SHARE = 0.01
"""Preemptions per finished sequence. Each one computes its tokens again, and one in a hundred is what a p99 sees."""

WAITING = 1.0
"""Sequences that wait on the average. Below one the batch takes in whoever comes."""

AT_LIMIT = 0.95
"""Of the limit, from which on the batch counts as full: a place is free for a step between one end and one start."""

STEADY = 0.1
"""Spread of the batch over its mean, below which it looks held by a limit rather than by who happens to come."""

QUEUE_SHARE = 0.5
"""Of the time to first token. From here on waiting costs more than all work on the prompt."""

ITL_TAIL = 5.0
"""p99 over p50 of the time between tokens. Others' prompts stretch some steps severalfold; more is a stall."""

TTFT_TAIL = 15.0
"""p99 over p50 of the time to first token. Prompts alone spread up to 12-fold (Mooncake's conversation trace: p50 6,909
tokens, p99 85,399)."""

COMPUTE_IDLE = 0.5
"""Of the time. NVIDIA's guide to DCGM's profiling metrics calls SM activity below 0.5 a likely sign of ineffective use,
and 0.8 needed for effective use."""

FRONT_END_SECONDS = 0.1
"""Of the mean time to first token outside queue and prefill. 30 to 50 ms for HTTP, tokenisation and streaming are
usual; twice that is not."""

FLAT = 0.3
"""Growth of throughput per growth of the batch (1: in proportion). Below it, more sequences only slow each other."""

BATCH_RANGE = 1.5
"""Largest over smallest batch in a window, from which on that growth can be measured."""

RANK_IMBALANCE = 1.5
"""Rows of the busiest rank over the mean: the others idle a third of each step, waiting for it."""

UNEVEN = 2.0
"""Load of one replica over another's. Queues of random arrivals differ by less when averaged over a window."""

SLOW = 1.5
"""Time between tokens of one replica over another's at no larger a batch: more than batches of equal size vary."""

ENOUGH_FOR_P99 = 100
"""Observations, below which the 99th percentile is the largest one, and the 90th is looked at instead."""
