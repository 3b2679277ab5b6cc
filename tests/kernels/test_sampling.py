"""Tokens drawn by the kernels: the sampler's own tests on them, the same numbers, and settings that come and go.

Shapes: S rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shoal.core.types import Sampling
from shoal.engine.kernels import unavailable_reason
from shoal.engine.random_stream import as_words, exponentials
from shoal.engine.sampler import Sampler
from tests.engine import test_sampler as portable

pytest.importorskip("triton", reason="the package triton is not installed")

from tests.engine.test_sampler import (  # noqa: E402, F401  (run here too, on these kernels)
    test_a_row_with_nothing_left_to_draw_fails,
    test_a_tiny_temperature_is_greedy_and_finite,
    test_equal_probabilities_stay_or_go_together,
    test_greedy_is_the_largest_logit_and_the_lowest_id_among_equals,
    test_logits_that_are_not_finite_fail_their_row_alone,
    test_logprobs_are_of_the_raw_distribution,
    test_min_tokens_masks_stop_tokens_until_enough_were_generated,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if (reason := unavailable_reason(DEVICE)) is not None:
    pytest.skip(reason, allow_module_level=True)

from shoal.engine.kernels import sampling as kernels  # noqa: E402
from shoal.engine.triton_ops import TritonOps  # noqa: E402


@pytest.fixture(autouse=True)
def ops(monkeypatch: pytest.MonkeyPatch) -> TritonOps:
    made = TritonOps(DEVICE, torch.float32)
    monkeypatch.setattr(portable, "TorchOps", lambda device: made)
    # A vocabulary of several chunks, and the smallest blocks, so that their borders are met.
    monkeypatch.setattr(kernels, "CHUNK", 512)
    monkeypatch.setattr(kernels, "_BISECTION_BLOCK", 2048)
    return made


@pytest.mark.parametrize("seed", range(2))
def test_every_setting_against_the_reference(seed: int) -> None:
    portable.test_every_setting_against_the_reference(seed)


def test_draws_are_those_of_the_portable_sampler(ops: TritonOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token for token, over rows of any settings, a sequence of steps long."""
    generator = np.random.default_rng(4)
    settings = [
        Sampling(
            seed=int(generator.integers(-(2**40), 2**62)),
            temperature=float(generator.choice([0.0, 0.4, 1.0, 2.0])),
            top_k=int(generator.choice([0, 1, 3, 50])),
            top_p=float(generator.choice([0.3, 0.9, 1.0])),
            min_p=float(generator.choice([0.0, 0.05])),
            presence_penalty=float(generator.choice([0.0, 0.8])),
            repetition_penalty=float(generator.choice([1.0, 1.3])),
        )
        for _ in range(10)
    ]
    fused = portable.sampler_for(settings, tokens=[1, 2, 2, 9], num_prompt=2)
    monkeypatch.undo()
    plain = portable.sampler_for(settings, tokens=[1, 2, 2, 9], num_prompt=2)
    for step in range(2):
        logits_SV = portable.logits_of(len(settings), step)
        expected = portable.sample(plain, logits_SV, position=60 + step).tokens
        assert portable.sample(fused, logits_SV.to(DEVICE), position=60 + step).tokens == expected


def test_random_numbers_are_those_of_the_stream(ops: TritonOps) -> None:
    """A race of equal weights is won by the smallest number, and weights of 1/E tie it with the next."""
    vocab_size, rows = 1031, 5
    seeds, indices, positions = as_words([1, -1, 2**63, 7, 7]), as_words([0, 1, 2**32 - 1, 3, 4]), as_words(range(rows))
    race_SV = exponentials(seeds, indices, positions, vocab_size, torch.device("cpu"))
    ones_SV = torch.ones(rows, vocab_size, device=DEVICE)
    assert ops.draw(ones_SV, seeds, indices, positions).tolist() == race_SV.argmin(dim=1).tolist()
    # Each token once made the favourite by what its own number says, all but a hair above the winner's.
    for token in (3, 512, vocab_size - 1):
        needed_S = (race_SV[:, token] / race_SV.amin(dim=1)).float()
        for factor, wins in ((1 + 1e-5, True), (1 - 1e-5, False)):
            weights_SV = ones_SV.clone()
            weights_SV[:, token] = (needed_S * factor).to(DEVICE)
            drawn = ops.draw(weights_SV, seeds, indices, positions).cpu() == token
            is_best = race_SV.argmin(dim=1) == token
            assert torch.equal(drawn | is_best, torch.full((rows,), wins) | is_best)


def test_argmax_takes_the_first_of_equals_across_chunks(ops: TritonOps) -> None:
    x_SV = torch.randn(4, 1031, generator=torch.Generator().manual_seed(2)).clamp_(max=1.0)
    x_SV[1, [300, 800]] = 5.0
    x_SV[2, [1030, 5]] = 7.0
    assert ops.argmax(x_SV.to(DEVICE)).tolist() == [int((row == row.max()).nonzero()[0]) for row in x_SV]


def test_a_row_alone_and_in_any_batch_is_the_same(ops: TritonOps) -> None:
    settings = portable.SETTINGS[4:10]
    logits_SV = portable.logits_of(len(settings)).to(DEVICE)
    sampler = portable.sampler_for(settings)
    together = portable.sample(sampler, logits_SV).tokens
    backwards = portable.sample(sampler, logits_SV.flip(0), slots=range(len(settings) - 1, -1, -1)).tokens
    assert backwards[::-1] == portable.sample(portable.sampler_for(settings), logits_SV).tokens == together


def test_slots_that_are_used_again_bring_nothing_along(ops: TritonOps) -> None:
    """More penalised sequences than there is room for at first, released and assigned in another order."""
    vocab_size, count = 300, 9
    penalised = Sampling(temperature=0.0, frequency_penalty=1.0)
    sampler = Sampler(count, vocab_size, ops)
    logits_SV = torch.zeros(count, vocab_size)
    logits_SV[:, 10], logits_SV[:, 11] = 2.5, 2.0
    for _ in range(2):
        for slot in range(count):
            # Slot s has generated token 10 s times: from 1 on it is no longer the best.
            sampler.assign(slot, penalised, 0, [10] * slot, 0, 0, [], None)
        assert portable.sample(sampler, logits_SV.to(DEVICE)).tokens == [10] + [11] * (count - 1)
        # What was drawn is counted: 10 and 11 are at 1.5 and 1 now.
        assert portable.sample(sampler, logits_SV.to(DEVICE)).tokens[:2] == [11 if 1.5 < 2 else 10, 10]
        for slot in reversed(range(count)):
            sampler.release(slot)
    sampler.assign(3, Sampling(temperature=0.0), 0, [10] * 5, 0, 0, [], None)
    assert portable.sample(sampler, logits_SV[:1].to(DEVICE), slots=[3]).tokens == [10]
