"""Are the two sides' numbers the same? ``python -m oracle.compare`` prints the table and exits 1 when a row is off.

Errors are relative to the largest value of that kind. Two rows must be *large*: the edit must move the logits, and
another head's edit must give other logits, or the equalities would say nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor

from oracle.cases import CASES, HEADS, PROMPTS, Case

EXACT, SINGLE = 1e-10, 1e-6
FAR = 100  # how many times the tolerance of equal logits counts as different


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: what is compared.
        absolute: the largest difference, or the smallest where they must differ.
        relative: the same, over the largest value.
        bound: what `relative` may at most be, or must at least be.
        differ: whether the two must differ.
    """

    what: str
    absolute: float
    relative: float
    bound: float
    differ: bool = False

    @property
    def ok(self) -> bool:
        """Whether the row holds; NaN never does."""
        return self.relative >= self.bound if self.differ else self.relative <= self.bound


def rows(case: Case, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[Row]:
    """The table of one family; `ours` from qklens, `theirs` from TransformerLens."""
    same = SINGLE if case.single_softmax else EXACT
    whole = SINGLE if case.single_softmax or case.single_norms else EXACT
    each = range(len(PROMPTS))
    scores = [theirs[f"scores.{row}"] for row in each]
    logits, edited, clean = theirs["edited"], ours["edited"], ours["clean"]
    largest = float(theirs["clean"].abs().max())
    moved = (edited - clean).abs().amax(dim=-1)
    others = torch.stack([(edited - logits.roll(step, dims=1)).abs().amax(dim=-1) for step in range(1, HEADS)])

    def least(what: str, smallest: float) -> Row:
        return Row(f"  {what} by at least", smallest, smallest / largest, FAR * same, differ=True)

    return [
        equal("scores in the model", [ours[f"read.{row}"] for row in each], scores, same),
        equal("scores as sums of pair terms", [ours[f"terms.{row}"] for row in each], scores, whole),
        equal("logits", [clean], [theirs["clean"]], same),
        equal("logits under one head's query edit", [edited], [logits], same),
        least("that edit moves them", float(moved.min())),
        least("another head's differ", float(others.min())),
    ]


def equal(what: str, ours: list[Tensor], theirs: list[Tensor], bound: float) -> Row:
    """The largest difference; infinite where one side masks what the other does not."""
    worst = largest = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        seen = ~torch.isneginf(other)
        if mine.shape != other.shape or not torch.equal(~torch.isneginf(mine), seen):
            return Row(what, float("inf"), float("inf"), bound)
        difference = (mine[seen] - other[seen]).abs().max()
        worst = float(torch.maximum(torch.tensor(worst, dtype=difference.dtype), difference))
        largest = max(largest, float(other[seen].abs().max()))
    return Row(what, worst, worst / largest, bound)


def read(case: Case, side: str) -> tuple[dict[str, Tensor], str]:
    """One side's numbers and who computed them.

    Raises:
        ValueError: they were computed on other weights than those that lie there.
    """
    with safe_open(case.numbers(side), "pt") as file:
        about = file.metadata()
        if about["weights"] != case.digest():
            raise ValueError(f"{case.numbers(side)} was computed on other weights; run `make oracle` again")
        return {name: file.get_tensor(name) for name in file.keys()}, about["by"]  # noqa: SIM118


def main() -> int:
    """Print the table; 1 when a row is off."""
    failed = 0
    for number, case in enumerate(CASES):
        (ours, us), (theirs, them) = read(case, "qklens"), read(case, "lens")
        if number == 0:
            print(f"{us} against {them}, float64, every head of every layer, {len(PROMPTS)} prompts\n")
            print(f"{'family':<9} {'what':<36} {'absolute':>9} {'relative':>9} {'bound':>9}")
        for row in rows(case, ours, theirs):
            sign = "≥" if row.differ else "≤"
            verdict = "ok" if row.ok else "OFF"
            failed += not row.ok
            numbers = f"{row.absolute:>9.1e} {row.relative:>9.1e} {sign} {row.bound:.0e}"
            print(f"{case.model_type:<9} {row.what:<36} {numbers}  {verdict}")
    print(f"\n{failed} rows are off" if failed else "\nall rows hold")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
