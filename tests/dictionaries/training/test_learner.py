"""Between gradients and weights: Adam by blocks, the decoder's norm, the first encoders, and rows in random order."""

from __future__ import annotations

import pytest
import torch

from qklens.dictionaries.training import adam
from qklens.dictionaries.training.adam import Moments, adam_rows, part_norms, without_radial, zero_moments
from qklens.dictionaries.training.buffer import ShuffleBuffer
from qklens.dictionaries.training.config import TrainingConfig
from qklens.dictionaries.training.layout import layout_of
from qklens.dictionaries.training.learner import Learner
from qklens.dictionaries.training.rows import HeldRows
from qklens.errors import QklensError

WIDTH, FEATURES, ROWS = 6, 40, 32
KINDS = {"sae": (0,), "crosscoder": (0, 2, 5), "model_diff": (4,)}


def config(kind: str, activation: str, **changes: object) -> TrainingConfig:
    number = {"k": 3} if "topk" in activation else {"sparsity": 0.3}
    given = {"kind": kind, "layers": KINDS[kind], "features": FEATURES, "activation": activation, "steps": 50,
             "batch": ROWS, "learning_rate": 1e-2}  # fmt: skip
    return TrainingConfig.parse({**given, **number, **changes})


def learner(c: TrainingConfig) -> tuple[Learner, torch.Tensor]:
    layout = layout_of(c, WIDTH)
    rows = torch.randn(ROWS, layout.width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return Learner(c, layout, rows.mean(dim=0)), rows


@pytest.mark.parametrize("begun", [0, 7])
def test_adam_by_blocks_is_adam(begun: int) -> None:
    draw = torch.Generator().manual_seed(0)
    c = config("sae", "topk", beta1=0.8, beta2=0.95, epsilon=1e-6)
    mine = torch.randn(10, WIDTH, generator=draw, dtype=torch.float64)
    theirs = mine.clone().requires_grad_()
    reference = torch.optim.Adam([theirs], lr=1e-2, betas=(0.8, 0.95), eps=1e-6)
    moments: Moments = zero_moments(mine)
    for step in range(begun + 3):
        gradient = torch.randn(10, WIDTH, generator=draw, dtype=torch.float64)
        theirs.grad = gradient.clone()
        reference.step()
        for begin, end in ((0, 4), (4, 10)):
            adam_rows(c, mine, moments, gradient[begin:end], step=step, learning_rate=1e-2, begin=begin)
    torch.testing.assert_close(mine, theirs.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("parts", [1, 3])
def test_without_its_radial_part_a_gradient_leaves_the_norm_alone(parts: int) -> None:
    draw = torch.Generator().manual_seed(1)
    decoder, gradient = (torch.randn(5, 3 * WIDTH, generator=draw, dtype=torch.float64) for _ in range(2))
    adam.scale_to_one(decoder, parts)

    leaf = decoder.clone().requires_grad_()
    (slope,) = torch.autograd.grad(part_norms(leaf, parts).sum(), leaf)
    assert (gradient * slope).sum(dim=1).abs().max() > 0.1
    assert (without_radial(gradient.clone(), decoder, parts) * slope).sum(dim=1).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["topk", "batch_topk", "relu", "jumprelu"])
def test_decoder_rows_keep_the_norm_of_their_kind(kind: str, activation: str) -> None:
    """Counted features the whole row's, penalised ones the sum over streams."""
    own, rows = learner(config(kind, activation))
    for _ in range(4):
        own.update(rows)
    for group, weights in zip(own.layout.groups, own.weights.groups, strict=True):
        streams = len(group.writes) if "topk" not in activation else 1
        lengths = weights.decoder.unflatten(1, (streams, -1)).norm(dim=2).sum(dim=1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["topk", "batch_topk", "relu"])
def test_first_encoders_give_reconstructions_of_the_best_length(kind: str, activation: str) -> None:
    """Scaled by any other factor than 1 they leave more: the derivative of the squared error there is 0."""
    own, rows = learner(config(kind, activation))
    own.fit_encoders(rows)
    losses = []
    for factor in (0.99, 1.0, 1.01):
        other, _ = learner(config(kind, activation, sparsity_warmup_steps=9))
        other.fit_encoders(rows)
        for group in other.weights.groups:
            group.encoder.mul_(factor)
        losses.append(other.update(rows).loss)
    assert losses[1] < min(losses[0], losses[2])


def test_a_loss_that_is_no_number_is_refused_before_the_weights_change() -> None:
    own, rows = learner(config("sae", "topk"))
    before = {name: tensor.clone() for name, tensor in own.weights.tensors().items()}
    with pytest.raises(QklensError, match=r"step 0: the loss is (inf|nan); lower the learning rate"):
        own.update(rows * 1e200)
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.weights.tensors().items())


@pytest.mark.parametrize(("capacity", "chunk"), [(300, 100), (450, 90), (5000, None)])
def test_every_row_is_drawn_and_none_far_more_often(capacity: int, chunk: int | None) -> None:
    """Whether the pool holds a part of the rows, or more than all."""
    buffer = ShuffleBuffer(HeldRows([torch.arange(900.0)[:, None]], chunk), capacity, seed=0)
    drawn = torch.cat([buffer.take(50) for _ in range(90)])[:, 0].long()
    counts = torch.bincount(drawn, minlength=900)
    assert counts.sum() == 4500
    assert counts.min() >= 2
    assert counts.max() <= 8
    assert not torch.equal(drawn[:900].sort().values, drawn[:900])


def test_a_buffer_goes_on_from_its_state() -> None:
    source = HeldRows([torch.arange(900.0)[:, None]], 100)
    whole = ShuffleBuffer(source, 300, seed=3)
    expected = [whole.take(40) for _ in range(60)]
    other = ShuffleBuffer(source, 300, seed=3)
    for n, rows in enumerate(expected):
        if n % 7 == 3:
            state = {name: tensor.clone() for name, tensor in other.state().items()}
            other = ShuffleBuffer(source, 300, seed=99)
            other.restore(state)
        assert torch.equal(other.take(40), rows), n
