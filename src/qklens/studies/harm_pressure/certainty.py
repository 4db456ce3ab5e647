"""How far the items at hand carry a verdict: few of them cap its confidence, and what stays open is said.

The rules compare means with thresholds, and a bootstrap over four items that agree has no width at all. What n items
can show at most is bounded without it: if all n agree, Wilson's 95% lower bound of the share that does is

    n / (n + z²),   z = 1.96

(0.51 for 4 items, 0.80 for 16, 0.86 for 24). Where that is below 0.80, no verdict is surer than it.
"""

from __future__ import annotations

from collections.abc import Mapping

from qklens.analyses.statistics import wilson
from qklens.studies.harm_pressure.thresholds import THRESHOLDS
from qklens.studies.results import ConditionBehaviour, HeadsDetails, Verdict

SUPPORTED_SHARE = 0.80
WIDE_INTERVAL = 0.25
UNSETTLED = 0.5
_WORDS = {"none": "with no intent", "harm": "after a harmful intent", "benign": "after a benign intent"}


def qualified(
    verdict: Verdict, behaviour: Mapping[str, ConditionBehaviour], heads: HeadsDetails | None, n_report: int
) -> Verdict:
    """The verdict with its confidence capped by what the items can show, and a caveat for each thing they leave open.

    Args:
        verdict: what the rules decided.
        behaviour: accuracies with their Wilson intervals.
        heads: the joint patch, whose interval may hold the threshold that its mean was compared with.
        n_report: items of the report half.
    """
    supported, _ = wilson(n_report, n_report)
    limit, caveats = 1.0, list[str]()
    if supported < SUPPORTED_SHARE:
        limit = supported
        caveats.append(
            f"the report half holds {n_report} items: even if all of them agree, the share of such items that would is "
            f"only known to exceed {supported:.2f} (95%)"
        )
    name, row = max(behaviour.items(), key=lambda pair: pair[1].ci[1] - pair[1].ci[0])
    if row.ci[1] - row.ci[0] > WIDE_INTERVAL:
        low, high = (f"{100 * bound:.0f}%" for bound in row.ci)
        caveats.append(f"accuracy {_WORDS.get(name, name)} is known only to lie between {low} and {high}")
    edge = _patch_threshold(verdict)
    if heads is not None and edge is not None and heads.restored_ci[0] <= edge <= heads.restored_ci[1]:
        low, high = heads.restored_ci
        caveats.append(f"the restored share's interval, {low:.2f} to {high:.2f}, holds the rule's threshold {edge:g}")
        limit = min(limit, UNSETTLED)
    return verdict.model_copy(
        update={
            "confidence": round(min(verdict.confidence, limit), 3),
            "limit": limit,
            "caveats": [*verdict.caveats, *caveats],
        }
    )


def _patch_threshold(verdict: Verdict) -> float | None:
    """The threshold that the verdict's rule held the restored share against."""
    if verdict.mechanism == "late_flip":
        return THRESHOLDS["carries_not"]
    return THRESHOLDS["carries"] if verdict.mechanism.startswith("attention") else None
