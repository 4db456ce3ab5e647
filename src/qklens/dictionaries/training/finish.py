"""The trained weights as a dictionary at the stream's own scale.

Training sees s x, with a scale s for each stream. z = W s (x − b/s) + c, and x̂ = Σ f d / s + b / s: activations,
thresholds and encoder biases stay as they are.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.dictionaries.activation import Activation, JumpRelu, Relu, Threshold, TopK
from qklens.dictionaries.config import FORMAT, DictionaryConfig
from qklens.dictionaries.crosscoder import Crosscoder
from qklens.dictionaries.model_diff import ModelDiff, ModelDiffConfig
from qklens.dictionaries.training.config import TrainingConfig
from qklens.dictionaries.training.learner import Learner


def inference_activation(config: TrainingConfig, threshold: float) -> Activation:
    """What the dictionary uses; BatchTopK becomes a threshold, the running mean of its cut."""
    if config.activation == "topk":
        assert config.k is not None
        return TopK(k=config.k)
    if config.activation == "batch_topk":
        return Threshold(threshold=threshold)
    return Relu() if config.activation == "relu" else JumpRelu()


def as_crosscoder(learner: Learner, scale: Float[Tensor, " stream"], *, name: str, model_sha256: str) -> Crosscoder:
    """An SAE or a weakly causal crosscoder."""
    config, layers, width = learner.config, learner.config.layers, learner.layout.d_model
    groups, n = learner.weights.groups, learner.config.features
    scale = scale.cpu()
    decoder = {}
    for m, layer in enumerate(layers):
        rows = torch.zeros(len(layers) * n, width)
        for reader in range(m + 1):
            at = (m - reader) * width
            own = groups[reader].decoder[:, at : at + width]
            rows[reader * n : (reader + 1) * n] = own.cpu() / scale[m]
        decoder[layer] = rows
    bias = learner.weights.bias.cpu().unflatten(0, (len(layers), width)) / scale[:, None]
    thresholds = [own.log_threshold for own in groups]
    return Crosscoder(
        config=DictionaryConfig(
            format=FORMAT,
            name=name,
            layers=layers,
            features_per_layer=n,
            d_model=width,
            activation=inference_activation(config, learner.threshold),
            site="resid_pre",
            model_sha256=model_sha256,
            training=config.model_dump(mode="json"),
            fidelity=None,
        ),
        encoder={m: groups[i].encoder.cpu() * scale[i] for i, m in enumerate(layers)},
        encoder_bias={m: groups[i].encoder_bias.cpu().clone() for i, m in enumerate(layers)},
        decoder=decoder,
        decoder_bias={m: bias[i].clone() for i, m in enumerate(layers)},
        thresholds={m: t.exp().cpu() for m, t in zip(layers, thresholds, strict=True) if t is not None},
    )


def as_model_diff(
    learner: Learner, scale: Float[Tensor, " stream"], *, name: str, base_sha256: str, chat_sha256: str
) -> ModelDiff:
    """A crosscoder over two checkpoints."""
    config, width, own = learner.config, learner.layout.d_model, learner.weights.groups[0]
    scale = scale.cpu()
    encoder = own.encoder.cpu().unflatten(1, (2, width)).transpose(0, 1) * scale[:, None, None]
    decoder = own.decoder.cpu().unflatten(1, (2, width)).transpose(0, 1) / scale[:, None, None]
    return ModelDiff(
        config=ModelDiffConfig(
            name=name,
            layer=config.layers[0],
            features=config.features,
            d_model=width,
            activation=inference_activation(config, learner.threshold),
            site="resid_pre",
            base_sha256=base_sha256,
            chat_sha256=chat_sha256,
            training=config.model_dump(mode="json"),
            fidelity=None,
        ),
        encoder=encoder.contiguous(),
        encoder_bias=own.encoder_bias.cpu().clone(),
        decoder=decoder.contiguous(),
        decoder_bias=learner.weights.bias.cpu().unflatten(0, (2, width)) / scale[:, None],
        scale=scale.clone(),
        thresholds=None if own.log_threshold is None else own.log_threshold.exp().cpu(),
    )
