"""What came, held against what comes when nothing fails: tokens lost, repeated, missing or other, and gaps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher

import msgspec

from shoal.bench.faults.clients import Choice, Outcome

_LOGPROB_TOLERANCE = 1e-3
"""A prompt that is computed in other chunks may round otherwise on endpoints without shoal's kernels."""


class TokenDifference(msgspec.Struct, frozen=True, kw_only=True):
    duplicate: int = 0
    """Tokens that repeat the ones right before them."""
    missing: int = 0
    other: int = 0
    """Tokens that the undisturbed answer does not have there."""

    def __add__(self, more: TokenDifference) -> TokenDifference:
        return TokenDifference(
            duplicate=self.duplicate + more.duplicate,
            missing=self.missing + more.missing,
            other=self.other + more.other,
        )


class Tally(msgspec.Struct, kw_only=True):
    """All outcomes of one run."""

    offered: int = 0
    completed: int = 0
    refused: int = 0
    expired: int = 0
    """Ended at a deadline that the client had set."""
    failed: int = 0
    lost: int = 0
    breaks: int = 0
    """Connections that ended before their answer did."""
    unanswered: int = 0
    """Connections that ended before their answer began; the request was sent again."""
    resumed: int = 0
    duplicate_tokens: int = 0
    missing_tokens: int = 0
    other_tokens: int = 0
    unequal: int = 0
    """Completed answers that differ in anything: tokens, text, log-probabilities, why they ended, usage."""
    unstable: int = 0
    """Completed answers to requests whose answers differ without any fault: compared with nothing."""
    tokens: int = 0
    longest_gap: float = 0.0
    """Seconds between two tokens of one choice."""
    gap_at_fault: float = 0.0
    """The longest of those that a fault fell into."""
    longest_ttft: float = 0.0
    complaints: list[str] = []
    """The first few things that went wrong, in words."""


def tally(
    outcomes: Iterable[Outcome],
    references: Mapping[int, Outcome],
    unstable: Iterable[int] = (),
    strikes: Sequence[tuple[float, float]] = (),
) -> Tally:
    """`references`: the undisturbed outcome by number of the spec. `strikes`: monotonic seconds of each fault."""
    result, not_compared = Tally(), frozenset(unstable)
    for outcome in outcomes:
        result.offered += 1
        result.breaks += outcome.breaks
        result.unanswered += outcome.unanswered
        result.resumed += outcome.resumed
        for before, after in outcome.gaps():
            result.longest_gap = max(result.longest_gap, after - before)
            if any(before <= healed and after >= struck for struck, healed in strikes):
                result.gap_at_fault = max(result.gap_at_fault, after - before)
        if outcome.first_token is not None:
            result.longest_ttft = max(result.longest_ttft, outcome.first_token - outcome.sent)
        result.tokens += sum(len(choice.token_ids) for choice in outcome.choices.values())
        if outcome.end == "refused":
            result.refused += 1
        elif outcome.end == "expired":
            result.expired += 1
        elif outcome.end == "failed":
            result.failed += 1
        elif outcome.end == "completed":
            result.completed += 1
        else:
            result.lost += 1
        if outcome.end in ("failed", "lost"):
            _complain(result, f"{outcome.request_id} {outcome.end}: {outcome.error}")
        if outcome.spec in not_compared:
            result.unstable += outcome.end == "completed"
        elif outcome.end != "refused":
            _compare(result, outcome, references[outcome.spec])
    return result


def differences(outcome: Outcome, reference: Outcome) -> list[str]:
    """In words, what a completed outcome has otherwise than the undisturbed one; empty if they are equal."""
    found = []
    if outcome.choices.keys() != reference.choices.keys():
        found.append(f"choices {sorted(outcome.choices)} instead of {sorted(reference.choices)}")
    for index in sorted(outcome.choices.keys() & reference.choices.keys()):
        found += [f"choice {index}: {what}" for what in _of_choice(outcome.choices[index], reference.choices[index])]
    if outcome.usage != reference.usage:
        found.append(f"usage {outcome.usage} instead of {reference.usage}")
    return found


def compare_tokens(got: list[int], expected: list[int], *, whole: bool) -> TokenDifference:
    """`whole`: the answer has ended; else what it lacks at its end is not missing yet."""
    duplicate = missing = other = 0
    if got == expected:
        return TokenDifference()
    for kind, start, end, first, last in SequenceMatcher(None, expected, got, autojunk=False).get_opcodes():
        came, absent = last - first, end - start
        if end == len(expected) and not whole:
            absent = min(absent, came)
        if kind == "insert" and (_repeats_before(got, first, last) or _repeats_after(got, first, last)):
            duplicate += came
        elif kind != "equal":
            missing += max(absent - came, 0)
            other += came
    return TokenDifference(duplicate=duplicate, missing=missing, other=other)


def _repeats_before(tokens: list[int], first: int, last: int) -> bool:
    return tokens[first:last] == tokens[max(0, 2 * first - last) : first]


def _repeats_after(tokens: list[int], first: int, last: int) -> bool:
    """An alignment may call either of two equal runs the inserted one."""
    return tokens[first:last] == tokens[last : 2 * last - first]


def _compare(result: Tally, outcome: Outcome, reference: Outcome) -> None:
    whole = outcome.end == "completed"
    total = TokenDifference()
    for index, choice in outcome.choices.items():
        expected = reference.choices[index].token_ids if index in reference.choices else []
        total += compare_tokens(choice.token_ids, expected, whole=whole)
    result.duplicate_tokens += total.duplicate
    result.missing_tokens += total.missing
    result.other_tokens += total.other
    if whole and (found := differences(outcome, reference)):
        result.unequal += 1
        _complain(result, f"{outcome.request_id} (request {outcome.spec}): {'; '.join(found)}")


def _of_choice(got: Choice, expected: Choice) -> list[str]:
    found = []
    if got.token_ids != expected.token_ids:
        pairs = zip(got.token_ids, expected.token_ids, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(got.token_ids), len(expected.token_ids)))
        found.append(f"{len(got.token_ids)} tokens, unequal from {at} on, instead of {len(expected.token_ids)}")
    elif got.text != expected.text:
        found.append(f"text {got.text[-40:]!r} instead of {expected.text[-40:]!r}")
    if got.finish != expected.finish:
        found.append(f"finish {got.finish} instead of {expected.finish}")
    if len(got.logprobs) != len(expected.logprobs):
        found.append(f"{len(got.logprobs)} log-probabilities instead of {len(expected.logprobs)}")
    elif any(abs(a - b) > _LOGPROB_TOLERANCE for a, b in zip(got.logprobs, expected.logprobs, strict=True)):
        found.append("log-probabilities differ")
    return found


def _complain(result: Tally, what: str) -> None:
    if len(result.complaints) < 8:
        result.complaints.append(what)
