"""The shares that the verdict reads, against transformers with the heads' rows mixed by hand in plain hooks."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from planted_raw import attention, margin, margins, opened, prompts, streams
from transformers import PreTrainedModel

from qklens.analyses.mediation import Runs, output_patches, pattern_patches, query_shifts
from qklens.analyses.readings import read_attention, read_patterns, read_streams
from qklens.data.render import Prompt
from qklens.interventions.engine import Workset
from qklens.models.loading import load_subject

Head = tuple[int, int]


def carried(donor: Prompt, receiver: Prompt, row: torch.Tensor) -> torch.Tensor:
    """Tokens before the intent keep their place from the start, those from the question on theirs from the end."""
    shared = sum(start >= donor.shared_from for start in donor.starts)
    before = min(sum(start < p.shared_from for start in p.starts) for p in (donor, receiver))
    result = torch.zeros(len(receiver.tokens))
    result[-shared:] = row[-shared:]
    result[:before] = row[:before]
    result[len(receiver.tokens) - shared - 1] += row[before : len(row) - shared].sum()
    return result


def with_rows(model: PreTrainedModel, prompt: Prompt, rows: dict[Head, torch.Tensor], *, outputs: bool) -> torch.Tensor:
    """The margin when each head's answer output is its row times its own values, or the given output."""
    width = model.config.head_dim
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    with contextlib.ExitStack() as stack:
        for layer in {at for at, _ in rows}:
            block, values = model.model.layers[layer].self_attn, {}

            def keep(_: object, __: object, out: torch.Tensor, values: dict = values) -> None:
                values["v"] = out[0]

            def replace(_: object, args: tuple, layer: int = layer, values: dict = values) -> tuple:
                x = args[0].clone()
                for (at, head), row in rows.items():
                    if at == layer:
                        v = values["v"][:, head // group * width : (head // group + 1) * width]
                        x[0, -1, head * width : (head + 1) * width] = row if outputs else row @ v
                return (x, *args[1:])

            stack.callback(block.v_proj.register_forward_hook(keep).remove)
            stack.callback(block.o_proj.register_forward_pre_hook(replace).remove)
        return margin(model, prompt)


def head_outputs(model: PreTrainedModel, prompt: Prompt, heads: list[Head]) -> dict[Head, torch.Tensor]:
    width, found = model.config.head_dim, {}
    with contextlib.ExitStack() as stack:
        for layer in {at for at, _ in heads}:

            def keep(_: object, args: tuple, layer: int = layer) -> None:
                for at, head in heads:
                    if at == layer:
                        found[at, head] = args[0][0, -1, head * width : (head + 1) * width].clone()

            module = model.model.layers[layer].self_attn.o_proj
            stack.callback(module.register_forward_pre_hook(keep).remove)
        margin(model, prompt)
    return found


@pytest.mark.parametrize("seed", [0, 1], ids=["one layer", "two layers"])
def test_shares_of_patterns_and_outputs_are_those_of_plain_hooks(tmp_path: Path, seed: int) -> None:
    planted, model = opened(tmp_path, "attention_answer_key", "llama_gqa", seed)
    heads = [tuple(head) for head in planted.truth.selecting]
    asked = {c: prompts(planted, c) for c in ("none", "harm")}
    subject = load_subject(planted.folder)
    work = {c: Workset(subject, asked[c]) for c in asked}
    runs = Runs(work["none"], work["harm"], seed=0)
    ours = {
        "patterns": runs.share(*pattern_patches(runs, *(read_patterns(work[c], heads) for c in asked), heads)),
        "outputs": runs.share(*output_patches(*(read_attention(work[c]) for c in asked), heads)),
    }
    clean, harmed = margins(model, asked["none"]).mean(), margins(model, asked["harm"]).mean()
    for what, share in ours.items():
        mixed = {}
        for to, of in (("harm", "none"), ("none", "harm")):
            found = []
            for receiver, donor in zip(asked[to], asked[of], strict=True):
                if what == "outputs":
                    rows = head_outputs(model, donor, heads)
                else:
                    patterns = attention(model, donor)
                    rows = {(at, h): carried(donor, receiver, patterns[at][h]) for at, h in heads}
                found.append(with_rows(model, receiver, rows, outputs=what == "outputs"))
            mixed[to] = torch.stack(found).mean()
        assert share.restored == pytest.approx(float((mixed["harm"] - harmed) / (clean - harmed)), abs=1e-4)
        assert share.caused == pytest.approx(float((clean - mixed["none"]) / (clean - harmed)), abs=1e-4)
        assert share.restored > 0.5
        assert share.ci[0] <= share.through <= share.ci[1]


def with_queries(model: PreTrainedModel, prompt: Prompt, given: dict[Head, torch.Tensor]) -> torch.Tensor:
    """The margin when each head's query at the answer is that of another residual."""
    width = model.config.head_dim
    with contextlib.ExitStack() as stack:
        for layer in {at for at, _ in given}:
            block = model.model.layers[layer]

            def replace(module: torch.nn.Linear, _: object, out: torch.Tensor, layer: int = layer) -> torch.Tensor:
                out = out.clone()
                for (at, head), x in given.items():
                    if at == layer:
                        normed = model.model.layers[layer].input_layernorm(x.float()[None])
                        mine = slice(head * width, (head + 1) * width)
                        out[0, -1, mine] = torch.nn.functional.linear(normed, module.weight, module.bias)[0, mine]
                return out

            stack.callback(block.self_attn.q_proj.register_forward_hook(replace).remove)
        return margin(model, prompt)


@pytest.mark.parametrize(("mechanism", "by_need"), [("attention_answer_key", False), ("need_lost", True)])
def test_the_query_is_given_back_along_need_and_across_it(tmp_path: Path, mechanism: str, by_need: bool) -> None:
    planted, model = opened(tmp_path, mechanism, "llama_gqa")
    heads = [tuple(head) for head in planted.truth.selecting]
    layer = heads[0][0]
    asked = {c: prompts(planted, c) for c in ("harm", "benign")}
    work = {c: Workset(load_subject(planted.folder), asked[c]) for c in asked}
    w = planted.basis["need"].float()
    sides = [(asked[c], read_streams(work[c], [layer])) for c in asked]
    ours = work["harm"].margins_each(query_shifts(work["harm"].subject, heads, {layer: w}, *sides), idle_ok=True)
    x = {c: [s[-1] for s in streams(model, asked[c], layer)] for c in asked}
    unit = w.double() / w.double().norm()
    mean = torch.stack([calm - pressed for pressed, calm in zip(x["harm"], x["benign"], strict=True)]).mean(dim=0)
    common = mean - (mean @ unit) * unit
    common = common / common.norm()
    for mine, along in zip(ours, (True, False), strict=True):
        by_hand = []
        for prompt, pressed, calm in zip(asked["harm"], x["harm"], x["benign"], strict=True):
            on = unit if along else common
            to = pressed + ((calm - pressed) @ on) * on
            by_hand.append(with_queries(model, prompt, dict.fromkeys(heads, to)))
        torch.testing.assert_close(mine, torch.stack(by_hand), atol=1e-4, rtol=1e-4)
        harmed, clean = margins(model, asked["harm"]).mean(), margins(model, asked["benign"]).mean()
        share = float((mine.mean() - harmed) / (clean - harmed))
        assert share > 0.8 if along == by_need else abs(share) < 0.1
