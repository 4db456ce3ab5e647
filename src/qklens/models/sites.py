"""Named activations, captured from one pass: only the layers, heads and positions that were asked for are kept.

| site | what it is | shape |
|---|---|---|
| `resid_pre.L` | the stream that layer L reads | batch pos d_model |
| `resid_post.L` | the stream that layer L leaves | batch pos d_model |
| `q_in.L`, `k_in.L` | the normed input to the projections | batch pos d_model |
| `q.L` | queries as they meet the keys, after norm and rotary | batch head pos d_head |
| `k.L` | keys as they meet the queries; heads are key heads | batch kv_head pos d_head |
| `score.L` | u = c ⟨q, k⟩, before a soft cap; −∞ where the model hides the key | batch head q_pos k_pos |
| `pattern.L` | the weights that the head used | batch head q_pos k_pos |
| `head_out.L` | what each head read, before W_O | batch head pos d_head |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qklens.errors import QklensError, nearest
from qklens.models.attention import AttentionRead, pick
from qklens.models.batch import Batch
from qklens.models.copies import Reads
from qklens.models.edits import Edit
from qklens.models.passes import run_pass
from qklens.models.projections import ProjectionSide
from qklens.models.subject import Subject

SiteKind = Literal["resid_pre", "resid_post", "q_in", "k_in", "q", "k", "score", "pattern", "head_out"]
_BY_HEAD = ("q", "k", "score", "pattern", "head_out")
_PROJECTED: dict[str, ProjectionSide] = {"q_in": "query", "k_in": "key"}


@dataclass(frozen=True)
class Site:
    """One named activation, or a part of it.

    Attributes:
        kind: which activation.
        layer: the layer L.
        heads: which heads (key heads for `k`), in this order; None is all.
        positions: tokens of each prompt, counted from its first one, or from its end when negative; None is every
            column of the batch, padding too. For `score` and `pattern` they are query positions.
    """

    kind: SiteKind
    layer: int
    heads: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None

    @staticmethod
    def parse(name: str, heads: Sequence[int] | None = None, positions: Sequence[int] | None = None) -> Site:
        """A site by its name, `score.3`.

        Raises:
            QklensError: no such site.
        """
        kind, _, layer = name.partition(".")
        if kind not in get_args(SiteKind) or not layer.isdecimal():
            raise QklensError(
                f"site {name!r} is unknown; expected one of {list(get_args(SiteKind))} with a layer, like 'score.3'"
                f"{nearest(kind, get_args(SiteKind))}"
            )
        return Site(
            cast(SiteKind, kind),
            int(layer),
            None if heads is None else tuple(heads),
            None if positions is None else tuple(positions),
        )

    def __str__(self) -> str:
        parts = [f"{name} {list(at)}" for name, at in (("heads", self.heads), ("positions", self.positions)) if at]
        return f"{self.kind}.{self.layer}" + (f" ({', '.join(parts)})" if parts else "")


@dataclass(frozen=True, eq=False)
class Capture:
    """What one pass left: the logits at the last column, and one tensor a site.

    Attributes:
        logits: at the last column.
        values: the tensors, each a copy of its own.
    """

    logits: Float[Tensor, "batch vocab"]
    values: dict[Site, Tensor]

    def __getitem__(self, site: Site | str) -> Tensor:
        wanted = Site.parse(site) if isinstance(site, str) else site
        if wanted not in self.values:
            raise QklensError(f"site {wanted} was not captured; this pass kept {[str(s) for s in self.values]}")
        return self.values[wanted]


def capture(subject: Subject, batch: Batch, sites: Sequence[Site | str], edits: Sequence[Edit] = ()) -> Capture:
    """Run the model once, with its own eager attention, and keep some sites.

    Raises:
        QklensError: a site, layer, head or position that does not exist, or an edit that cannot act.
    """
    wanted = [Site.parse(site) if isinstance(site, str) else site for site in sites]
    values: dict[Site, Tensor] = {}
    reads = Reads({}, {})
    sinks: dict[tuple[str, int], list[Callable[[Tensor], None]]] = {}
    attention: dict[int, list[Site]] = {}
    for site in wanted:
        _check(subject, site)
        if site.kind in _BY_HEAD:
            attention.setdefault(site.layer, []).append(site)
            _columns(batch, site)
        else:
            sinks.setdefault((site.kind, site.layer), []).append(_vector_sink(values, site, _columns(batch, site)))
    for (kind, layer), group in sinks.items():
        sink = _all_of(group)
        if kind == "resid_pre":
            reads.residual[layer] = sink
        elif kind == "resid_post":
            reads.after[layer] = sink
        else:
            reads.projected[layer, _PROJECTED[kind]] = sink
    for layer, group in attention.items():
        reads.attention[layer] = _attention_sink(values, batch, group)
    logits = run_pass(subject, batch, edits, reads).logits
    return Capture(logits, {site: values[site] for site in wanted})


def columns_of(batch: Batch, positions: Sequence[int]) -> Int[Tensor, "batch n"]:
    """Where tokens of each prompt stand in a left-padded batch.

    Raises:
        QklensError: a prompt has no such token.
    """
    lengths = batch.attention_mask.sum(dim=1)
    shortest = int(lengths.min())
    for position in positions:
        if not -shortest <= position < shortest:
            raise QklensError(f"position {position} does not exist in a prompt of {shortest} tokens")
    at = torch.tensor(list(positions), dtype=torch.long, device=lengths.device)
    return torch.where(at >= 0, batch.width - lengths[:, None] + at, batch.width + at)


def _columns(batch: Batch, site: Site) -> Int[Tensor, "batch n"] | None:
    return None if site.positions is None else columns_of(batch, site.positions)


def _check(subject: Subject, site: Site) -> None:
    subject.check_head(site.layer, 0)
    if site.heads is None:
        return
    if site.kind not in _BY_HEAD:
        raise QklensError(f"site {site} has no heads; leave `heads` out")
    n = subject.n_kv_heads if site.kind == "k" else subject.n_heads
    for head in site.heads:
        if not 0 <= head < n:
            kind = "key head" if site.kind == "k" else "head"
            raise QklensError(f"site {site}: {kind} {head} does not exist in {subject.name}; expected 0 to {n - 1}")


def _all_of(sinks: Sequence[Callable[[Tensor], None]]) -> Callable[[Tensor], None]:
    def each(value: Tensor) -> None:
        for sink in sinks:
            sink(value)

    return each


def _rows(columns: Tensor) -> Tensor:
    return torch.arange(len(columns), device=columns.device)[:, None]


def _vector_sink(values: dict[Site, Tensor], site: Site, columns: Tensor | None) -> Callable[[Tensor], None]:
    def keep(stream: Tensor) -> None:
        if columns is None:
            values[site] = stream.clone()
        else:
            at = columns.to(stream.device)
            values[site] = stream[_rows(at), at]

    return keep


def _attention_sink(values: dict[Site, Tensor], batch: Batch, sites: Sequence[Site]) -> Callable[[AttentionRead], None]:
    def keep(read: AttentionRead) -> None:
        for site in sites:
            values[site] = _attention_site(read, batch, site)

    return keep


def _attention_site(read: AttentionRead, batch: Batch, site: Site) -> Tensor:
    device = read.query.device
    heads = None if site.heads is None else torch.tensor(site.heads, device=device)
    columns = _columns(batch, site)
    columns = None if columns is None else columns.to(device)
    if site.kind == "score":
        return read.score(heads, columns)
    by_head = {"q": read.query, "k": read.key, "pattern": read.pattern, "head_out": read.output.transpose(1, 2)}
    kept = pick(by_head[site.kind], heads, columns)
    return kept.clone() if heads is None and columns is None else kept
