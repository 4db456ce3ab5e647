"""How noisy a planted model is: three levels, and what each number does."""

from __future__ import annotations

from qklens.strict import Strict


class Noise(Strict):
    """One level of noise.

    Attributes:
        weights: every matrix W becomes W + weights · rms(W) · N(0, 1), elementwise.
        heads: each unused head scores by heads · (r₁ · n(x_p)) (r₂ · n(x_j)) and writes 0.1 heads · (r₃ · n(x_j)) r₄, r
            random unit vectors; each r · n(x) is of the size of 1.
        superposition: ρ of the basis; two features' directions have |cos| of about 1.1 ρ / √96.
    """

    weights: float
    heads: float
    superposition: float


LEVELS = (
    Noise(weights=0.0, heads=0.3, superposition=0.0),
    Noise(weights=0.02, heads=1.0, superposition=0.25),
    Noise(weights=0.04, heads=2.0, superposition=0.5),
)
