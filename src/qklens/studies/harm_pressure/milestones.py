"""When does each part of the circuit appear? The first checkpoint that shows it, by a rule that is printed with it.

A quantity with an interval over items has appeared where its 95% interval lies wholly beyond a tenth of what the last
checkpoint shows: an interval that excludes zero by a hair is no appearance. The virtual pair, which is weights alone,
has turned negative where its z is at most −2 against both nulls, mean over heads. What the last checkpoint does not
show itself has no beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qklens.studies.result_types import Estimate
from qklens.studies.results_around import Milestone, Origin

SHARE = 0.1
Z_NEGATIVE = -2.0

_MEASURED: tuple[tuple[str, int, Callable[[Origin], Estimate]], ...] = (
    ("accuracy falls under harm", 1, lambda row: row.accuracy_drop),
    ("refuse-and-redirect appears", 1, lambda row: (row.refuse_contrast, *row.refuse_contrast_ci)),
    ("attention to the correct option is lost under harm", 1, lambda row: row.attention_drop),
    ("the pair pushes the options away on prompts", -1, lambda row: row.refuse_harm_realised),
)


def milestones(rows: Sequence[Origin]) -> list[Milestone]:
    """One row an event, in the order above, then the virtual pair; rows come in the order of training."""
    found = [_first(rows, event, sign, value) for event, sign, value in _MEASURED]
    z = lambda row: max(row.refuse_harm_z, row.refuse_harm_matched_z)  # noqa: E731
    negative = [row for row in rows if z(row) <= Z_NEGATIVE] if z(rows[-1]) <= Z_NEGATIVE else []
    first = negative[0] if negative else None
    found.append(
        Milestone(
            event="the pair is negative in the weights",
            checkpoint=first.checkpoint if first else None,
            step=first.step if first else None,
            value=None if first is None else first.refuse_harm_z,
            interval=None,
            rule=f"z at most {Z_NEGATIVE:g} against random_pairs and matched, mean over heads",
        )
    )
    return found


def _first(rows: Sequence[Origin], event: str, sign: int, value: Callable[[Origin], Estimate]) -> Milestone:
    last = value(rows[-1])
    bound = SHARE * last[0]

    def beyond(estimate: Estimate, limit: float) -> bool:
        return min(sign * estimate[1], sign * estimate[2]) > max(sign * limit, 0.0)

    shown = [row for row in rows if beyond(value(row), bound)] if beyond(last, 0.0) else []
    first = shown[0] if shown else None
    mean, low, high = value(first) if first else (None, 0.0, 0.0)
    return Milestone(
        event=event,
        checkpoint=first.checkpoint if first else None,
        step=first.step if first else None,
        value=mean,
        interval=(low, high) if first else None,
        rule=f"95% interval beyond {bound:+.3g}, a tenth of the last checkpoint's {last[0]:+.3g}",
    )
