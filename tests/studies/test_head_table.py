"""Every head as a candidate: each column against an independent computation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from head_tables import by_item, lab_of, row, table_of
from qklens.analyses.readings import read_patterns
from qklens.analyses.statistics import bootstrap_means
from qklens.data.render import CONDITIONS, PARTS
from qklens.interventions.engine import Workset
from qklens.interventions.patch import PatternPatch, align_rows
from qklens.models.families import load_family
from qklens.models.subject import wrap_model
from qklens.models.trace import trace
from qklens.studies.lab import Lab
from qklens.studies.tables.head_table import HeadTable
from tiny_families import tiny_model
from word_level import make_word_tokenizer

HEADS = [(0, 1), (1, 3), (2, 0)]


@pytest.fixture(scope="module")
def lab(tiny_llama, items) -> Lab:
    return lab_of(tiny_llama(seed=1), items)


@pytest.fixture(scope="module")
def table(lab) -> HeadTable:
    return table_of(lab)


def family_lab(case: str, word_tokenizer, items) -> Lab:
    model = tiny_model(case, len(word_tokenizer), torch.float32)
    return lab_of(wrap_model(model, word_tokenizer, load_family(model.config.model_type)), items, 4)


@pytest.mark.parametrize("case", ["llama gqa", "gemma2 low cap", "gpt2"])
def test_attention_and_scores_are_those_of_a_trace(case, word_tokenizer, items):
    """The cap is on: what is compared is what meets the softmax."""
    lab = family_lab(case, word_tokenizer, items)
    table, cap = table_of(lab, 2), {"gemma2 low cap": 1.5}.get(case)
    for condition in CONDITIONS:
        attention, scores = ({(h, p): [] for h in HEADS for p in ("all", *PARTS)} for _ in range(2))
        for prompt in lab.prompts(condition, "all"):
            here = trace(lab.subject, lab.subject.batch([prompt.tokens]), [0, 1, 2])
            right, wrong = prompt.spans["correct"], prompt.spans["incorrect"]
            for layer, head in HEADS:
                pattern = here.pattern(layer, head, -1)[0]
                u = {j: here.score(layer, head, -1, j) for j in (*right, *wrong)}
                u = {j: score if cap is None else cap * torch.tanh(score / cap) for j, score in u.items()}
                for part in ("all", *PARTS):
                    spans = [name if part == "all" else f"{name}.{part}" for name in ("correct", "incorrect")]
                    mass = [float(pattern[list(prompt.spans[name])].sum()) for name in spans]
                    score = [float(torch.cat([u[j] for j in prompt.spans[name]]).logsumexp(0)) for name in spans]
                    attention[(layer, head), part].append(mass[0] - mass[1])
                    scores[(layer, head), part].append(score[0] - score[1])
        for head in HEADS:
            found, values = row(table, head), attention[head, "all"]
            assert found.attention_difference[condition] == pytest.approx(np.mean(values), abs=1e-5)
            if condition == "none":
                for part in PARTS:
                    expected = pytest.approx(np.mean(attention[head, part]), abs=1e-5)
                    assert found.attention_difference_by_part[part] == expected
                for part in ("all", *PARTS):
                    assert found.score_difference[part] == pytest.approx(np.mean(scores[head, part]), abs=1e-4)
                ends = [float(end[0]) for end in bootstrap_means(by_item(values)[:, None], 0)]
                assert found.attention_difference_ci == pytest.approx(ends, abs=1e-5)


def test_parts_sum_to_the_whole(table):
    for found in table.heads:
        assert sum(found.attention_difference_by_part.values()) == pytest.approx(
            found.attention_difference["none"], abs=1e-5
        )


def test_an_option_that_no_window_shows_has_no_score(word_tokenizer, items):
    table = table_of(family_lab("mistral window", word_tokenizer, items), 2)
    for found in table.heads:
        assert set(found.score_difference.values()) == {None}
        assert found.attention_difference["none"] == 0
    json.dumps(table.model_dump(mode="json"), allow_nan=False)


def test_letters_and_ablations_are_those_of_transformers(lab, table):
    """Hooks on the model itself: what reaches the final norm, and W_O's input with one head's mean in it."""
    subject, d = lab.subject, lab.subject.d_head
    model, prompts = subject.model, lab.prompts("none", "all")
    unembedding = model.lm_head.weight
    for layer, head in HEADS:
        projection, part = model.model.layers[layer].self_attn.o_proj, slice(head * d, (head + 1) * d)

        def margins(layer=layer, part=part, replaced=None, projection=projection):
            found, outputs, letters = [], [], []

            def around(_, inputs):
                x = inputs[0].clone()
                outputs.append(x[0, -1, part].clone())
                if replaced is not None:
                    x[0, -1, part] = replaced
                return (x,)

            stream = []
            handles = [
                projection.register_forward_pre_hook(around),
                model.model.norm.register_forward_pre_hook(lambda _, x: stream.append(x[0][0, -1])),
            ]
            with torch.no_grad():
                for prompt in prompts:
                    logits = model(input_ids=torch.tensor([prompt.tokens])).logits[0, -1]
                    right, wrong = prompt.letter_ids
                    found.append(float(logits[right] - logits[wrong]))
                    sigma = (stream[-1].pow(2).mean() + model.config.rms_norm_eps).sqrt()
                    written = projection.weight[:, part] @ outputs[-1]
                    toward = unembedding[right] - unembedding[wrong]
                    letters.append(float(toward @ (model.model.norm.weight * written / sigma)))
            for handle in handles:
                handle.remove()
            return np.array(found), torch.stack(outputs), letters

        clean, outputs, letters = margins()
        ablated, _, _ = margins(replaced=outputs.mean(dim=0))
        found = row(table, (layer, head))
        assert found.letter_logit == pytest.approx(np.mean(letters), abs=1e-4)
        assert found.ablation_drop == pytest.approx((clean - ablated).mean(), abs=1e-3)
        low, high = bootstrap_means(by_item(clean - ablated)[:, None], 0)
        assert found.ablation_ci == pytest.approx((low[0], high[0]), abs=1e-3), "items are resampled, not prompts"
        assert low[0] <= found.ablation_drop <= high[0]
        assert table.margin["none"] == pytest.approx(clean.mean(), abs=1e-3)


def test_patch_gain_is_that_of_one_prompt_at_a_time(lab, table):
    """Each prompt alone, whole passes."""
    subject = lab.subject
    for head in HEADS:
        gains = []
        for calm, harmed in zip(lab.prompts("none", "all"), lab.prompts("harm", "all"), strict=True):
            donor, receiver = (Workset(subject, [prompt], reuse=False) for prompt in (calm, harmed))
            rows = read_patterns(donor, [head])[head][0]
            patch = PatternPatch({head: [align_rows(calm, harmed, rows)]})
            gains.append(float(receiver.margins([patch]) - receiver.margins()))
        found = row(table, head)
        assert found.patch_gain == pytest.approx(np.mean(gains), abs=1e-3)
        assert found.patch_ci[0] <= found.patch_gain <= found.patch_ci[1]


def test_a_part_without_a_token_of_its_own_is_null(items):
    some = items[:4]
    words = [t for i in some for t in (i.question, i.correct, i.incorrect, i.harmful_intent, i.benign_intent)]
    tokenizer = make_word_tokenizer([*words, "Answer with the letter only."])
    split = [pre_tokenizers.Split(Regex(r"\s+"), "removed"), pre_tokenizers.Split(Regex(r"[^\w\s]"), "isolated")]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **shape))
    table = table_of(lab_of(wrap_model(model, tokenizer, load_family("llama")), some), 2)
    for found in table.heads:
        assert found.attention_difference_by_part["boundary"] is None
        assert found.score_difference["boundary"] is None
        assert math.isfinite(found.score_difference["content"])
    json.dumps(table.model_dump(mode="json"), allow_nan=False)


def test_a_head_without_output_has_no_effect(tiny_llama, items):
    """As in a pruned model: its ablation changes no value, which is no reason to measure nothing."""
    subject = tiny_llama()
    with torch.no_grad():
        subject.layers[1].self_attn.v_proj.weight[: subject.d_head] = 0
    table = table_of(lab_of(subject, items))
    for head in ((1, 0), (1, 1)):
        found = row(table, head)
        assert (found.ablation_drop, found.letter_logit) == (0, 0)
        assert found.patch_gain == pytest.approx(0, abs=1e-5), "its pattern moves, and nothing comes of it"
    assert row(table, (1, 2)).ablation_drop != 0
    json.dumps(table.model_dump(mode="json"), allow_nan=False)


def test_heads_in_another_order_are_the_same_heads(tiny_llama, items):
    tables, order = [], [2, 0, 3, 1]
    for permuted in (False, True):
        subject = tiny_llama(num_key_value_heads=4)
        d = subject.d_head
        rows = torch.cat([torch.arange(h * d, (h + 1) * d) for h in order])
        for layer in subject.layers if permuted else ():
            with torch.no_grad():
                for name in ("q_proj", "k_proj", "v_proj"):
                    weight = getattr(layer.self_attn, name).weight
                    weight.copy_(weight[rows].clone())
                weight = layer.self_attn.o_proj.weight
                weight.copy_(weight[:, rows].clone())
        tables.append(table_of(lab_of(subject, items)))
    first, second = tables
    assert len(first.heads) == len(second.heads) == 12
    for found in second.heads:
        same = row(first, (found.layer, order[found.head]))
        assert found.chosen_in == same.chosen_in
        for name in ("letter_logit", "ablation_drop", "patch_gain", "attention_difference_ci", "score_difference"):
            assert getattr(found, name) == pytest.approx(getattr(same, name), abs=2e-3), name
    assert first.held_out_share == pytest.approx(second.held_out_share, abs=1e-2)
