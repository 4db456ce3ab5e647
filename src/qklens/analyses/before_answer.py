"""Is the option chosen before the answer? Heads at earlier tokens may look at the options for it.

A head at a token of the chat template, or at the line break that ends an option, can select one, and a head at the
answer then reads it there. Under harm it may be those that look away, while all that looks at the options from the
answer itself stays as it was. So what all heads look at the options with before the answer, from the first option's own
tokens on, is given back and taken away, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qklens.analyses.factorial import shared_tokens
from qklens.analyses.mediation import OPTIONS, Runs, Share
from qklens.data.render import Prompt
from qklens.interventions.blocks import Block, BlockPatch
from qklens.interventions.engine import Workset
from qklens.models.attention import AttentionRead
from qklens.models.batch import Batch
from qklens.models.passes import Reads


def share_before_answer(runs: Runs) -> Share:
    """The share of the lost margin through attention on the options before the answer, from their own tokens on.

    See `mediation` for what a share is; the part is this block of every head's pattern, in all layers.
    """
    return runs.share(
        BlockPatch(option_blocks(runs.clean, runs.harm.prompts)),
        BlockPatch(option_blocks(runs.harm, runs.clean.prompts)),
    )


def option_blocks(donors: Workset, receivers: Sequence[Prompt]) -> list[Block]:
    """What donors look at the options with before the answer, at the receivers' own tokens.

    Args:
        donors: the same items and orders under another condition.
        receivers: the prompts that get it.
    """
    places = [_places(*pair) for pair in zip(receivers, donors.prompts, strict=True)]
    n_layers, n_heads = donors.subject.n_layers, donors.subject.n_heads
    values = [torch.zeros(n_layers, n_heads, len(queries), len(keys)) for queries, keys in places]

    def reads(index: Sequence[int], batch: Batch) -> Reads:
        def attention(read: AttentionRead) -> None:
            for row, i in enumerate(index):
                padding, (queries, keys) = batch.padding(row), places[i]
                rows = read.pattern[row][:, [padding + its for _, its in queries]]
                values[i][read.layer] = rows[..., [padding + its for _, its in keys]].float().cpu()

        return Reads({}, dict.fromkeys(range(n_layers), attention))

    donors.logits(reads=reads)
    return [
        Block([mine for mine, _ in queries], [mine for mine, _ in keys], block)
        for (queries, keys), block in zip(places, values, strict=True)
    ]


_Pairs = list[tuple[int, int]]


def _places(receiver: Prompt, donor: Prompt) -> tuple[_Pairs, _Pairs]:
    """(receiver, donor) positions of the tokens from the first option to the answer, and of the options' own."""
    options = {p for name in OPTIONS for p in receiver.span(name)}
    before = range(min(options), receiver.spans["answer"][0])
    pairs = [(mine, its) for mine, its in shared_tokens(receiver, donor).tolist()]
    return [p for p in pairs if p[0] in before], [p for p in pairs if p[0] in options]
