"""The largest activations at fixed tokens: what counts as a change, and what does not."""

from __future__ import annotations

import torch

from qklens.dictionaries.peaks import PEAKS, find_peaks, peak_change

FEATURES = 12


def activations() -> torch.Tensor:
    drawn = torch.rand(6, FEATURES, generator=torch.Generator().manual_seed(0)) + 1
    return drawn * (torch.arange(FEATURES) % 3 == 0)


def test_the_change_is_the_largest_as_a_share_of_its_token_s_largest() -> None:
    before = activations()
    peaks = find_peaks({1: before, 4: before})
    assert peaks.feature[1].shape == (6, PEAKS)
    assert peak_change(peaks, {1: before, 4: 1.02 * before})[1] == 0
    assert abs(peak_change(peaks, {4: 1.02 * before})[4] - 0.02) < 1e-6
    one = before.clone()
    token, feature = 3, int(peaks.feature[1][3, 1])
    one[token, feature] += 0.1
    assert abs(peak_change(peaks, {1: one})[1] - 0.1 / float(before[token].max())) < 1e-6
    assert peak_change(peaks, {1: before.roll(1, dims=1)})[1] > 0.9


def test_what_lies_near_a_threshold_does_not_count() -> None:
    before = activations()
    before[:, 1] = 0.01
    before[:, 2] = 0
    peaks = find_peaks({1: before})
    after = before.clone()
    after[:, 1], after[:, 2] = 0, 0.011
    assert peak_change(peaks, {1: after})[1] == 0


def test_a_token_without_any_active_feature_and_another_shape() -> None:
    before = activations()
    before[0] = 0
    peaks = find_peaks({1: before})
    assert peak_change(peaks, {1: before})[1] == 0
    assert peak_change(peaks, {1: before[:, :5]})[1] == torch.inf
    assert peak_change(peaks, {2: before})[2] == torch.inf
    assert peak_change(peaks, {1: before[:3]})[1] == torch.inf
