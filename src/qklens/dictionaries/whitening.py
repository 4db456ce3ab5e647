"""Whitened differences of class means: the direction of linear discriminant analysis.

    w = Σ⁻¹ Δμ,   Σ = (1 − λ) S + λ (tr S / d) I

S is the covariance within the two classes, pooled. Where the stream varies much for other reasons, Δμ leans that way
and w does not. λ is Ledoit and Wolf's (2004) for pooled rows, at least 1e-3, so that Σ has an inverse however few rows
there are. w is given the length of Δμ, so that raw strengths mean the same along both.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.errors import QklensError

LEAST_SHRINKAGE = 1e-3


def ledoit_wolf(centred: Float[Tensor, "row channel"]) -> float:
    """λ = min(Σₖ ‖xₖ xₖᵀ − S‖² / n², ‖S − m I‖²) / ‖S − m I‖², S = XᵀX / n, m = tr S / d, of rows without their mean.

    It is the share of m I that brings S nearest to the true covariance in expectation (Frobenius norm).
    """
    x = centred.double()
    n, d = x.shape
    covariance = x.T @ x / n
    m = covariance.diagonal().mean()
    squared = covariance.square().sum()
    off = squared - d * m * m
    noise = (x.square().sum(dim=1).square().sum() / n - squared) / n
    return float((noise / off).clamp(0, 1)) if off > 0 else 1.0


def whitened_direction(
    first: Float[Tensor, "row channel"],
    second: Float[Tensor, "other_row channel"],
    difference: Float[Tensor, " channel"],
    where: str,
    shrinkage: float | None = None,
) -> tuple[Float[Tensor, " channel"], float | None]:
    """Σ⁻¹ Δμ at the length of Δμ, and the λ that was used; zero, and no λ, where Δμ is zero.

    Args:
        first: rows of one class.
        second: rows of the other.
        difference: Δμ, first − second; given, because it may weigh rows by their prompt.
        where: what an error calls the classes.
        shrinkage: λ; None is Ledoit and Wolf's.

    Raises:
        QklensError: rows that are not finite or do not vary within their class, or Σ without an inverse.
    """
    if not bool(difference.any()):
        return torch.zeros_like(difference), None
    centred = torch.cat([rows.double() - rows.double().mean(dim=0) for rows in (first, second)])
    if not bool(centred.isfinite().all()):
        raise QklensError(f"{where}: the stream holds NaN or infinity; nothing can be whitened by it")
    n, d = centred.shape
    covariance = centred.T @ centred / n
    m = covariance.diagonal().mean()
    size = torch.cat([first, second]).double().square().mean()
    if not m > 1e-14 * size:
        raise QklensError(
            f"{where}: its {n} tokens do not vary within their class, so there is no covariance to whiten by; give "
            "more items, or use plain directions"
        )
    chosen = max(ledoit_wolf(centred), LEAST_SHRINKAGE) if shrinkage is None else shrinkage
    shrunk = (1 - chosen) * covariance + chosen * m * torch.eye(d, dtype=torch.float64, device=covariance.device)
    factor, failed = torch.linalg.cholesky_ex(shrunk)
    if int(failed):
        raise QklensError(
            f"{where}: the covariance of {n} tokens in {d} dimensions has no inverse at shrinkage {chosen:g}; expected "
            "a larger one"
        )
    delta = difference.double()
    solved = torch.cholesky_solve(delta[:, None], factor)[:, 0]
    return (solved * (delta.norm() / solved.norm())).to(difference), chosen
