"""Fixtures: every synthetic outcome, validated once and drawn once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from synthetic_results import HOSTILE, all_outcomes, build

from qklens.report.figures import draw
from qklens.studies.results import Results


@pytest.fixture(scope="session")
def outcomes() -> dict[str, Results]:
    """Every synthetic outcome by name."""
    return {name: Results.model_validate(values) for name, values in all_outcomes().items()}


@pytest.fixture(scope="session")
def make() -> Callable[..., Results]:
    """Builds results with chosen fields replaced."""

    def with_changes(**changes: Any) -> Results:
        return Results.model_validate({**build(), **changes})

    return with_changes


@pytest.fixture(scope="session")
def manifest() -> dict[str, Any]:
    """A manifest such as the study writes."""
    return {
        "command": "qklens study harm-pressure --out run",
        "config": {"seed": 0, "items": 129, "dtype": "float32", "device": "cpu"},
        "hashes": {"model": "9f" * 32, "dictionary": "ab" * 32, "data": "0c" * 32},
        "versions": {"qklens": "0.1.0", "torch": "2.13.0"},
        "note": HOSTILE,
    }


@pytest.fixture(scope="session")
def drawings(outcomes: dict[str, Results]) -> dict[str, dict[str, str]]:
    """Every outcome's figures, drawn once for all tests; one more would show nothing new."""
    return {name: draw(results) for name, results in outcomes.items() if name != "no_effect"}
