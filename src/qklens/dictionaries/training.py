"""Train a weakly causal crosscoder with BatchTopK on activations held in memory.

Loss: Σ_m ‖x_m − x̂_m‖² / mean‖x_m‖², plus an auxiliary term in which dead features explain the error (Gao et al. 2024).
Each layer is scaled to unit mean square while training, and the scale is folded back into the weights at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.dictionaries.activation import Threshold
from qklens.dictionaries.config import FORMAT, DictionaryConfig
from qklens.dictionaries.crosscoder import Crosscoder
from qklens.strict import Strict


class TrainingConfig(Strict):
    """How a crosscoder is trained; every number that changes the result."""

    features_per_layer: int
    active_per_layer: int
    steps: int
    batch: int
    learning_rate: float
    auxiliary_weight: float
    dead_after_steps: int
    seed: int


def train_crosscoder(
    activations: dict[int, Float[Tensor, "row d_model"]],
    config: TrainingConfig,
    *,
    name: str,
    model_sha256: str,
    report: Callable[[int, dict[str, float]], None],
) -> Crosscoder:
    """Train on rows of resid_pre at each layer (the same row is the same token in every layer).

    Args:
        activations: per layer, the rows.
        config: hyper-parameters.
        name: what reports call the dictionary.
        model_sha256: hash of the model's weights, kept in the config.
        report: called now and then with the step and the metrics (loss, fvu, l0, dead).
    """
    trainer = _Trainer(activations, config)
    for step in range(config.steps):
        metrics = trainer.step(step)
        if step % 100 == 0 or step == config.steps - 1:
            report(step, metrics)
    return trainer.finish(name, model_sha256)


class _Trainer:
    def __init__(self, activations: dict[int, Tensor], config: TrainingConfig) -> None:
        self.config, self.layers = config, tuple(sorted(activations))
        self.generator = torch.Generator().manual_seed(config.seed)
        self.scale = {m: float(x.pow(2).mean().rsqrt()) for m, x in activations.items()}
        self.rows = torch.stack([activations[m] * self.scale[m] for m in self.layers], dim=1)
        n_layers, width, group = len(self.layers), self.rows.shape[-1], config.features_per_layer
        decoder = torch.randn(n_layers, group, n_layers, width, generator=self.generator)
        # A feature starts as one direction in every layer it writes, and its encoder as that direction's transpose.
        decoder = torch.nn.functional.normalize(decoder[:, :, :1].expand(-1, -1, n_layers, -1), dim=-1) * 0.2
        causal = torch.tril(torch.ones(n_layers, n_layers)).T[:, None, :, None]
        self.causal = causal
        self.decoder = (decoder * causal).clone().requires_grad_(True)
        self.encoder = (decoder[:, :, 0] * 5.0).clone().requires_grad_(True)
        self.encoder_bias = torch.zeros(n_layers, group, requires_grad=True)
        self.bias = self.rows.mean(dim=0).clone().requires_grad_(True)
        self.parameters = [self.decoder, self.encoder, self.encoder_bias, self.bias]
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.learning_rate, betas=(0.9, 0.99))
        self.threshold = 0.0
        self.last_active = torch.zeros(n_layers, group, dtype=torch.long)

    def step(self, step: int) -> dict[str, float]:
        config = self.config
        index = torch.randint(0, len(self.rows), (config.batch,), generator=self.generator)
        x = self.rows[index]
        before = torch.einsum("nld,lfd->nlf", x - self.bias, self.encoder) + self.encoder_bias
        positive = torch.relu(before)
        keep = config.batch * config.active_per_layer * len(self.layers)
        cut = positive.detach().flatten().kthvalue(positive.numel() - keep).values
        active = positive * (positive > cut)
        reconstruction = torch.einsum("nlf,lfmd->nmd", active, self.decoder * self.causal) + self.bias
        error = x - reconstruction
        variance = (x - x.mean(dim=0)).pow(2).sum()
        fvu = error.pow(2).sum() / variance
        loss = fvu + config.auxiliary_weight * self._auxiliary(positive, error.detach(), step)
        self.optimizer.zero_grad()
        loss.backward()
        remaining = 1 - step / config.steps
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, 5 * remaining) * min(1.0, (step + 1) / 50)
        self.optimizer.step()
        with torch.no_grad():
            # Decoder norms are bounded so that activations carry the scale.
            norms = self.decoder.mul_(self.causal).pow(2).sum(dim=(2, 3), keepdim=True).sqrt()
            self.decoder.div_(norms.clamp(min=1e-6))
            fired = (active > 0).any(dim=0)
            self.last_active[fired] = step
            decay = 0.0 if step == 0 else 0.98
            self.threshold = decay * self.threshold + (1 - decay) * float(cut)
        dead = (step - self.last_active) > config.dead_after_steps
        return {
            "loss": float(loss.detach()),
            "fvu": float(fvu.detach()),
            "l0": float((active > 0).sum() / config.batch / len(self.layers)),
            "dead": float(dead.float().mean()),
        }

    def _auxiliary(self, positive: Tensor, error: Tensor, step: int) -> Tensor:
        dead = (step - self.last_active) > self.config.dead_after_steps
        if not dead.any():
            return positive.new_zeros(())
        flat = (positive * dead).flatten(1)
        k = min(32, int(dead.sum()))
        values, where = flat.topk(k, dim=1)
        sparse = torch.zeros_like(flat).scatter(1, where, values)
        explained = (sparse @ (self.decoder * self.causal).flatten(0, 1).flatten(1)).view_as(error)
        return (error - explained).pow(2).sum() / error.pow(2).sum().clamp(min=1e-6)

    def finish(self, name: str, model_sha256: str) -> Crosscoder:
        """Fold the layers' scales into the weights."""
        config, layers = self.config, self.layers
        scales = torch.tensor([self.scale[m] for m in layers])
        decoder = (self.decoder * self.causal).detach() / scales[None, None, :, None]
        encoder = self.encoder.detach() * scales[:, None, None]
        bias = self.bias.detach() / scales[:, None]
        return Crosscoder(
            config=DictionaryConfig(
                format=FORMAT,
                name=name,
                layers=layers,
                features_per_layer=config.features_per_layer,
                d_model=decoder.shape[-1],
                activation=Threshold(threshold=self.threshold),
                site="resid_pre",
                model_sha256=model_sha256,
                training=config.model_dump(),
                fidelity=None,
            ),
            encoder={m: encoder[i] for i, m in enumerate(layers)},
            encoder_bias={m: self.encoder_bias.detach()[i] for i, m in enumerate(layers)},
            decoder={m: decoder[:, :, i].flatten(0, 1) for i, m in enumerate(layers)},
            decoder_bias={m: bias[i] for i, m in enumerate(layers)},
        )
