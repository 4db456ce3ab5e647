"""The gradients written by hand equal autograd of the dense formula, in float64, for every kind and activation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qklens.dictionaries.training.codes import DenseCode, SparseCode, pairs_code
from qklens.dictionaries.training.config import TrainingConfig
from qklens.dictionaries.training.layout import Layout, layout_of
from qklens.dictionaries.training.parallel import Ranks
from qklens.dictionaries.training.selection import batch_topk_codes, largest
from qklens.dictionaries.training.sparse_step import Gradient, GradientMaker, StepNumbers
from qklens.dictionaries.training.weights import Weights, first_weights

ROWS, WIDTH, FEATURES, K = 24, 6, 160, 3
KINDS = {"sae": (0,), "crosscoder": (0, 2, 5), "model_diff": (4,)}
ACTIVATIONS = ("topk", "batch_topk", "relu", "jumprelu")


def config(kind: str, activation: str, **changes: object) -> TrainingConfig:
    number = {"k": K} if "topk" in activation else {"sparsity": 0.7}
    fixed = {"steps": 10, "batch": ROWS, "learning_rate": 1e-3, "bandwidth": 0.5, "auxiliary_k": 4}
    given = {"kind": kind, "layers": KINDS[kind], "features": FEATURES, "activation": activation}
    return TrainingConfig.parse({**given, **number, **fixed, **changes})


class Jump(torch.autograd.Function):
    """1[z > t] with the rectangle kernel as its derivative by t, and none by z."""

    @staticmethod
    def forward(ctx, z: Tensor, t: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(z, t)
        ctx.width = width
        return (z > t).to(z)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor, None]:
        z, t = ctx.saved_tensors
        near = ((z - t).abs() < ctx.width / 2).to(z)
        return None, (-gradient * near / ctx.width).sum(dim=0), None


class JumpRelu(torch.autograd.Function):
    """z · 1[z > t]; its derivative by t is −t/ε times the kernel (Rajamanoharan et al. 2024, equation 11)."""

    @staticmethod
    def forward(ctx, z: Tensor, t: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(z, t)
        ctx.width = width
        return z * (z > t)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        z, t = ctx.saved_tensors
        near = ((z - t).abs() < ctx.width / 2).to(z)
        return gradient * (z > t), (-t / ctx.width * gradient * near).sum(dim=0), None


def dense_loss(c: TrainingConfig, layout: Layout, leaves: dict[str, Tensor], x: Tensor, dead: list[Tensor]) -> Tensor:
    """The formula of `sparse_step`, on dense codes."""
    centred = x - leaves["bias"]
    before = [centred[:, g.read_columns] @ leaves[f"{i}.encoder"].T + leaves[f"{i}.encoder_bias"]
              for i, g in enumerate(layout.groups)]  # fmt: skip
    penalty = x.new_zeros(())
    if c.activation == "topk":
        codes = [z.relu() * (z >= z.topk(K, dim=1).values[:, -1:]) for z in before]
    elif c.activation == "batch_topk":
        everything = torch.cat([z.detach().flatten() for z in before])
        cut = everything.sort(descending=True).values[K * len(before) * len(x)]
        codes = [z * (z > max(float(cut), 0.0)) for z in before]
    elif c.activation == "relu":
        codes = [z.relu() for z in before]
        penalty = torch.stack([f.sum() for f in codes]).sum()
    else:
        thresholds = [leaves[f"{i}.log_threshold"].exp() for i in range(len(before))]
        pairs = list(zip(before, thresholds, strict=True))
        codes = [JumpRelu.apply(z, t, c.bandwidth) for z, t in pairs]
        penalty = torch.stack([Jump.apply(z, t, c.bandwidth).sum() for z, t in pairs]).sum()
    written = torch.zeros_like(x)
    for i, group in enumerate(layout.groups):
        columns = torch.zeros_like(x)
        columns[:, group.written_columns] = codes[i] @ leaves[f"{i}.decoder"]
        written = written + columns
    error = centred - written
    loss = (error.pow(2).sum() + (c.sparsity or 0.0) * penalty) / len(x)
    for i, group in enumerate(layout.groups):
        number = int(dead[i].sum())
        if not number or not c.auxiliary_weight:
            continue
        assert c.auxiliary_k is not None
        own = before[i][:, dead[i]]
        k = min(c.auxiliary_k, number)
        kept = own.relu() * (own >= own.topk(k, dim=1).values[:, -1:])
        left = error[:, group.written_columns].detach() - kept @ leaves[f"{i}.decoder"][dead[i]]
        loss = loss + c.auxiliary_weight * min(1.0, number / c.auxiliary_k) * left.pow(2).sum() / len(x)
    return loss


def problem(c: TrainingConfig) -> tuple[Layout, Weights, Tensor]:
    draw = torch.Generator().manual_seed(3)
    layout = layout_of(c, WIDTH)
    x = torch.randn(ROWS, layout.width, generator=draw, dtype=torch.float64)
    weights = first_weights(c, layout, x.mean(dim=0), draw)
    for tensor in weights.tensors().values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype)
    return layout, weights, x


def by_hand(c: TrainingConfig, layout: Layout, weights: Weights, x: Tensor, dead: list[Tensor]) -> Gradient:
    return GradientMaker(c, layout, Ranks())(weights, x, StepNumbers(c.sparsity or 0.0, K, tuple(dead)))


def flat(gradient: Gradient) -> dict[str, Tensor]:
    found = {"bias": gradient.bias}
    for i, group in enumerate(gradient.groups):
        for matrix in ("encoder", "decoder"):
            blocks = [group.block(matrix, at, min(at + 50, FEATURES)) for at in range(0, FEATURES, 50)]
            found[f"{i}.{matrix}"] = torch.cat(blocks)
        found[f"{i}.encoder_bias"] = group.encoder_bias
        if group.log_threshold is not None:
            found[f"{i}.log_threshold"] = group.log_threshold
    return found


def dead_features(case: str, layout: Layout) -> list[Tensor]:
    some = torch.zeros(FEATURES, dtype=torch.bool)
    some[{"none": slice(0), "few": slice(0, 6), "many": slice(10, 150)}[case]] = True
    return [some for _ in layout.groups]


@pytest.mark.parametrize("dead", ["none", "few", "many"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_autograd_of_the_dense_formula(kind: str, activation: str, dead: str) -> None:
    c = config(kind, activation)
    layout, weights, x = problem(c)
    flags = dead_features(dead, layout)
    leaves = {name: t.clone().requires_grad_() for name, t in weights.tensors().items()}
    loss = dense_loss(c, layout, leaves, x, flags)
    loss.backward()
    gradient = by_hand(c, layout, weights, x, flags)
    found = flat(gradient)
    assert found.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(found[name], leaf.grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    total = gradient.squares.sum() + (c.sparsity or 0.0) * gradient.penalty + gradient.auxiliary
    torch.testing.assert_close(total / ROWS, loss.detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_sparse_and_dense_codes_give_the_same(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which one is taken hangs on how many pairs are active; here each is forced in turn."""
    c = config("crosscoder", activation)
    layout, weights, x = problem(c)
    found = []
    for share, kind in ((1.0, SparseCode), (0.0, DenseCode)):

        def forced(before: Tensor, keep: Tensor, share: float = share) -> SparseCode | DenseCode:
            return pairs_code(before, keep, share)

        monkeypatch.setattr("qklens.dictionaries.training.sparse_step.pairs_code", forced)
        gradient = by_hand(c, layout, weights, x, dead_features("few", layout))
        assert isinstance(gradient.groups[0].main.code, kind)
        found.append(flat(gradient))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("features", "k"), [(512, 3), (4096, 32), (4097, 32), (96, 90), (64, 64)])
def test_the_largest_of_each_row_are_found(features: int, k: int) -> None:
    before = torch.randn(30, features, generator=torch.Generator().manual_seed(5))
    before[0], before[1, 7] = before[0].sort().values, 9.0  # all of the largest beside each other
    values, at = largest(before, k)
    expected = before.topk(k, dim=1)
    assert torch.equal(values, before.gather(1, at))
    assert torch.equal(values.sort(dim=1).values, expected.values.sort(dim=1).values)


@pytest.mark.parametrize(("features", "mean"), [(512, 0.0), (129, 0.0), (512, -4.0)])
def test_the_largest_of_a_batch_are_found(features: int, mean: float) -> None:
    """Also where fewer are positive than are wanted."""
    draw = torch.Generator().manual_seed(6)
    befores = [torch.randn(20, features, generator=draw) + mean for _ in range(2)]
    codes, cut = batch_topk_codes(befores, 100, Ranks())
    ordered = torch.cat([b.flatten() for b in befores]).sort(descending=True).values
    expected = ordered[:100][ordered[:100] > 0]
    assert torch.equal(torch.cat([code.values for code in codes]).sort(descending=True).values, expected)
    assert cut == max(float(ordered[100]), 0.0)
