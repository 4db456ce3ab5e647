"""MLPs that multiply: size · gate · (plus − minus), with the two activations of the families.

SwiGLU   silu(g x) · u x                 one neuron; the gate's weight is large enough that silu is nearly relu
GELU     ½ gelu(d + M (gate − ½)) − ½ gelu(−d + M (gate − ½)) = d well above gate ½, 0 well below, d = plus − minus
"""

from __future__ import annotations

from typing import Any

import torch

from qklens.bench.planted.basis import READ, Basis
from qklens.bench.planted.blueprint import CONSTANT, CONSTANT_AMOUNT, PlannedFlip

_GATE, _STEP = 5.0, 8.0


def write_flip(model: Any, architecture: str, flip: PlannedFlip, basis: Basis) -> None:  # noqa: ANN401
    """Write an MLP's first neurons."""
    plus, minus = (basis[name] for name in flip.reads)
    difference = (plus - minus) / READ
    half = 0.5 * flip.size * (basis[flip.writes[0]] - basis[flip.writes[1]])
    always = basis[CONSTANT] / CONSTANT_AMOUNT / READ
    gate = basis[flip.gate] / READ if flip.gate else always
    if architecture == "gpt2":
        mlp = model.transformer.h[flip.layer].mlp
        for neuron, sign in enumerate((1.0, -1.0)):
            mlp.c_fc.weight[:, neuron] = (sign * difference + _STEP * gate).float()
            mlp.c_fc.bias[neuron] = -_STEP / 2
            mlp.c_proj.weight[neuron] = (0.5 * sign * half).float()
        return
    mlp = model.model.layers[flip.layer].mlp
    open_ = float(torch.nn.functional.silu(torch.tensor(_GATE)))
    mlp.gate_proj.weight[0] = (_GATE * gate).float()
    mlp.up_proj.weight[0] = difference.float()
    mlp.down_proj.weight[:, 0] = (half / open_).float()
