"""Types that the tables of `results.json` share."""

from __future__ import annotations

from typing import Literal

Condition = Literal["none", "harm", "benign"]
Interval = tuple[float, float]
HeadIndex = tuple[int, int]
Estimate = tuple[float, float, float]
"""A mean and its 95% interval: mean, low, high; bootstrap over items."""
