"""Every number that the verdict's rules compare with, and the units that a distance from them is counted in."""

from __future__ import annotations

THRESHOLDS = {
    "solved_accuracy": 0.80,
    "solved_bound": 0.60,
    "accuracy_drop": 0.05,
    "mcnemar_p": 0.01,
    "margin_drop": 0.25,
    "carries": 2 / 3,
    "carries_not": 1 / 3,
    "separation_kept": 2 / 3,
    "attention_kept": 0.50,
    "random_heads": 1 / 3,
    "repelled": 0.0,
    "spared": 0.15,
    "spared_answer": 0.50,
    "suffices": 0.90,
}
"""`spared`: harm keys sit on both options, more on the correct one; `spared_answer`: a correct-answer key does not.
`suffices` chooses the heads whose scores are taken apart, see `mediation.first_that_suffice`."""

TYPICAL_ERRORS = {"share": 0.2, "behaviour": 0.1, "score": 1.0}
"""Units of a share of the loss, of an accuracy or a margin's fall, and of a score. They are conventions, set by hand:
what a distance in them is worth is counted on planted models (`calibration`)."""
