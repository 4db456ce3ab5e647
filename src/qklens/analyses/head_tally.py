"""One head's shares, writing and strongest examples, summed up batch by batch so that no pattern is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qklens.analyses.key_kinds import UNCHOSEN
from qklens.interventions.steer import Head
from qklens.models.attention import AttentionRead
from qklens.models.batch import Batch
from qklens.models.copies import Reads
from qklens.models.subject import Subject


@dataclass(frozen=True)
class HeadReading:
    """What one head does at some queries; every number is a mean over the queries, each counted once.

    Write w_p = M W_O z_p / σ_p for what the head adds to the stream at query p: z_p is its output before W_O, and M and
    σ_p are the linear part and the observed scale of the norm on the attention's output where the family has one, else
    the identity and 1. W_O's bias belongs to no head.

    Attributes:
        share: attention by kind of key, and on the learned `sink` where the family has one; sums to 1.
        share_where_present: the share of each kind of key over those queries that have a key of the kind, so that a
            rare kind is not hidden by its rarity; nothing where no query has one.
        active: 1 − first − self − sink, the attention on keys that the head had to choose.
        entropy: −Σ_j a_j ln a_j over keys and sink, in nats.
        output_norm: ‖w_p‖, in units of the residual stream.
        writes: ‖w_p‖ / ‖x_p‖ with x_p the stream that the layer reads (`resid_pre`) at p.
        queries: how many queries.
        writes_by_part: Σ_p ‖w_p‖ / ‖x_p‖ over the queries of each part, the unit that is resampled.
        queries_by_part: how many queries each part has.
    """

    share: dict[str, float]
    share_where_present: dict[str, float | None]
    active: float
    entropy: float
    output_norm: float
    writes: float
    queries: int
    writes_by_part: tuple[float, ...]
    queries_by_part: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """A (query, key) pair of one part, positions counted from its first token; the key is none of `UNCHOSEN`."""

    part: int
    query: int
    key: int
    kind: int
    attention: float
    weight: float
    tokens: tuple[int, int]


class Tally:
    """Running sums over the queries of one head."""

    def __init__(self, n_parts: int, n_kinds: int, shown: int) -> None:
        """Start at nothing; `shown` is how many examples are kept."""
        self.shown = shown
        self.mass = torch.zeros(n_kinds + 1, dtype=torch.float64)
        self.present = torch.zeros(n_kinds, dtype=torch.long)
        self.entropy = self.output_norm = 0.0
        self.writes = torch.zeros(n_parts, dtype=torch.float64)
        self.queries = torch.zeros(n_parts, dtype=torch.long)
        self.examples: list[Example] = []

    def add(
        self,
        parts: Sequence[int],
        mass: Float[Tensor, "batch q_pos kind_and_sink"],
        present: Bool[Tensor, "batch q_pos kind"],
        entropy: Float[Tensor, "batch q_pos"],
        output_norm: Float[Tensor, "batch q_pos"],
        stream_norm: Float[Tensor, "batch q_pos"],
        queries: Bool[Tensor, "batch q_pos"],
    ) -> None:
        """Add the queries of one batch; the last kind is the learned sink."""
        rows = torch.tensor(list(parts))
        self.mass += mass[queries].double().sum(dim=0).cpu()
        self.present += present[queries].sum(dim=0).cpu()
        self.entropy += float(entropy[queries].double().sum())
        self.output_norm += float(output_norm[queries].double().sum())
        relative = (output_norm.double() / stream_norm.double()).masked_fill(~queries, 0.0)
        self.writes[rows] += relative.sum(dim=1).cpu()
        self.queries[rows] += queries.sum(dim=1).cpu()

    def keep(self, found: Sequence[Example]) -> None:
        """Merge a batch's examples into the strongest of all, each pair of tokens once."""
        best: dict[tuple[int, int], Example] = {}
        for example in sorted([*self.examples, *found], key=lambda e: (-e.weight, e.part, e.query, e.key)):
            best.setdefault(example.tokens, example)
        self.examples = list(best.values())[: self.shown]

    def reading(self, kinds: Sequence[str]) -> HeadReading:
        """The means."""
        n = int(self.queries.sum())
        share = dict(zip((*kinds, "sink"), (self.mass / n).tolist(), strict=True))
        return HeadReading(
            share=share,
            share_where_present={
                kind: float(mass) / int(having) if having else None
                for kind, mass, having in zip(kinds, self.mass[:-1], self.present, strict=True)
            },
            active=1 - share["first"] - share["self"] - share["sink"],
            entropy=self.entropy / n,
            output_norm=self.output_norm / n,
            writes=float(self.writes.sum()) / n,
            queries=n,
            writes_by_part=tuple(self.writes.tolist()),
            queries_by_part=tuple(self.queries.tolist()),
        )


def look(
    subject: Subject,
    batch: Batch,
    parts: Sequence[int],
    kinds: Int[Tensor, "batch q_pos k_pos"],
    queries: Bool[Tensor, "batch q_pos"],
    tallies: Mapping[Head, Tally],
) -> Reads:
    """The sinks of one pass that add a batch to the heads' tallies.

    Args:
        subject: the model.
        batch: the tokens of the pass.
        parts: which part each row is.
        kinds: the kind of each key to each of the batch's last q_pos columns, the first two being `UNCHOSEN`; −1 for
            keys that a column may not see.
        queries: which of these columns count.
        tallies: the heads to read.
    """
    by_layer: dict[int, list[int]] = {}
    for layer, head in tallies:
        by_layer.setdefault(layer, []).append(head)
    held: dict[str, Tensor] = {}

    def hold(name: str) -> Callable[[Tensor], None]:
        return lambda tensor: held.__setitem__(name, tensor)

    def attention(read: AttentionRead) -> None:
        stream, values = held.pop("stream"), held.pop("values", None)
        _add_layer(subject, batch, parts, kinds, queries, tallies, by_layer[read.layer], read, stream, values)

    return Reads(
        dict.fromkeys(by_layer, hold("stream")),
        dict.fromkeys(by_layer, attention),
        projected={(layer, "value"): hold("values") for layer in by_layer if any(t.shown for t in tallies.values())},
    )


def _add_layer(
    subject: Subject,
    batch: Batch,
    parts: Sequence[int],
    kinds: Tensor,
    queries: Tensor,
    tallies: Mapping[Head, Tally],
    heads: Sequence[int],
    read: AttentionRead,
    stream: Tensor,
    normed: Tensor | None,
) -> None:
    device, layer, n = read.pattern.device, read.layer, kinds.shape[1]
    exact = torch.promote_types(read.pattern.dtype, torch.float32)
    kinds, queries = kinds.to(device), queries.to(device)
    weight, after = subject.output_weight(layer).to(device, exact), subject.output_norm(layer, exact)
    output = read.output[:, -n:].to(exact)
    scale = torch.ones_like(output[..., 0, 0])
    if after.gamma is not None:
        whole, bias = torch.einsum("dhe,bphe->bpd", weight, output), subject.output_bias(layer)
        scale = after.scale(whole if bias is None else whole + bias.to(whole))
    stream_norm = stream[:, -n:].to(device, exact).norm(dim=-1)
    has_sink = subject.family.sinks(subject.attention(layer)) is not None
    of_kind = [kinds == kind for kind in range(len(tallies[layer, heads[0]].present))]
    present = torch.stack([where.any(dim=-1) for where in of_kind], dim=-1)
    for head in heads:
        pattern = read.pattern[:, head, -n:].to(exact)
        total = pattern.sum(dim=-1, keepdim=True)
        if not has_sink:
            # In half precision the rows miss 1 by their rounding, which is no sink.
            pattern = pattern / total.clamp(min=torch.finfo(exact).tiny)
        sink = 1 - total[..., 0] if has_sink else torch.zeros_like(total[..., 0])
        tally = tallies[layer, head]
        mass = [pattern.masked_fill(~where, 0).sum(dim=-1) for where in of_kind]
        entropy = torch.special.entr(pattern).sum(dim=-1) + torch.special.entr(sink.clamp(min=0))
        written = after.linear(output[:, :, head] @ weight[:, head].T).norm(dim=-1) / scale
        tally.add(parts, torch.stack([*mass, sink], dim=-1), present, entropy, written, stream_norm, queries)
        if tally.shown and normed is not None:
            value = _values(subject, layer, head, normed.to(device)).to(exact)
            sent = after.linear(value @ weight[:, head].T).norm(dim=-1)
            strength = pattern * sent[:, None, :] / scale[..., None]
            strength = strength.masked_fill((kinds < len(UNCHOSEN)) | ~queries[..., None], 0)
            tally.keep(_strongest(strength, pattern, kinds, batch, parts, tally.shown))


def _values(
    subject: Subject, layer: int, head: int, normed: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos d_head"]:
    """W_V n(x) + b_V of the value head that a query head reads."""
    shared = head // (subject.n_heads // subject.n_kv_heads)
    projection = subject.projection(layer, "value")
    value, bias = normed @ projection.weight([shared])[0].T, projection.bias([shared])
    return value if bias is None else value + bias[0]


def _strongest(
    strength: Float[Tensor, "batch q_pos k_pos"], pattern: Tensor, kinds: Tensor, batch: Batch, parts: Sequence[int],
    shown: int,
) -> list[Example]:  # fmt: skip
    """The pairs of largest strength, each pair of tokens once.

    The n largest are read with n doubled until they hold enough distinct pairs: those before the last one are then
    certainly the largest.
    """
    flat, width, ids = strength.flatten(), batch.width, batch.input_ids.tolist()
    n, n_queries = 16 * shown, strength.shape[1]
    while True:
        values, at = flat.topk(min(n, len(flat)))
        found: dict[tuple[int, int], Example] = {}
        for value, where in zip(values.tolist(), at.tolist(), strict=True):
            if value <= 0 or len(found) == shown:
                return list(found.values())
            row, column, key = where // (n_queries * width), where // width % n_queries, where % width
            query = width - n_queries + column
            tokens, padding = (ids[row][query], ids[row][key]), batch.padding(row)
            example = Example(
                parts[row], query - padding, key - padding, int(kinds[row, column, key]),
                float(pattern[row, column, key]), value, tokens,
            )  # fmt: skip
            found.setdefault(tokens, example)
        if n >= len(flat):
            return list(found.values())
        n *= 2
