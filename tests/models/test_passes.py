"""A pass runs the model's own code: parity with plain transformers, edits that stay in their lane, clean runs after."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from qklens.errors import QklensError
from qklens.models.attention import AttentionRead
from qklens.models.batch import left_padded
from qklens.models.copies import Reads
from qklens.models.edits import OutputEdit, PatternEdit, VectorEdit
from qklens.models.kept import Beginning
from qklens.models.passes import run_pass
from qklens.models.selfcheck import self_check

LAYOUTS = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True},
    "wide heads": {"head_dim": 16},
    "llama3 rotary": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}
SEQUENCES = [[11, 12, 13, 14, 15, 16, 17], [21, 22, 23, 24], [31, 32, 33, 34, 35, 36, 37, 38, 39, 40]]


def answer_mask(batch) -> torch.Tensor:
    mask = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    mask[:, -1] = True
    return mask


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_plain_transformers_row_by_row(tiny_llama, layout):
    subject = tiny_llama(**LAYOUTS[layout])
    if layout == "biases":
        for layer in subject.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                torch.nn.init.normal_(getattr(layer.self_attn, name).bias)
    plain = LlamaForCausalLM(subject.model.config)
    plain.load_state_dict(subject.model.state_dict())
    plain.eval().set_attn_implementation("eager")
    got = run_pass(subject, left_padded(SEQUENCES, 0, subject.device)).logits
    for row, tokens in enumerate(SEQUENCES):
        with torch.no_grad():
            expected = plain(input_ids=torch.tensor([tokens])).logits[0, -1]
        assert torch.allclose(got[row], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_self_check_rebuilds_every_score(tiny_llama, layout):
    check = self_check(tiny_llama(**LAYOUTS[layout]))
    assert len(check.layers) == 3
    assert max(row.score_error for row in check.layers) < 1e-5
    assert check.pattern_reaches_logits


def test_self_check_refuses_a_model_whose_scores_it_cannot_rebuild(tiny_llama, monkeypatch):
    subject = tiny_llama()
    monkeypatch.setattr(subject.layers[1].self_attn, "scaling", 0.9 * subject.layers[1].self_attn.scaling)
    check = self_check(subject)  # the scale is read from the model, so this one is still exact
    assert max(row.score_error for row in check.layers) < 1e-5
    original = LlamaAttention.forward

    def squared(self, hidden_states, *args, **kwargs):
        return original(self, hidden_states * 1.5, *args, **kwargs)

    monkeypatch.setattr(subject.layers[1].self_attn, "forward", squared.__get__(subject.layers[1].self_attn))
    with pytest.raises(QklensError, match="layer 1: rebuilt scores differ"):
        self_check(subject)


def test_reads_see_every_layer_and_the_final_stream(tiny_llama):
    subject = tiny_llama()
    batch = left_padded(SEQUENCES, 0, subject.device)
    streams, patterns = {}, {}
    reads = Reads(
        {layer: (lambda x, layer=layer: streams.__setitem__(layer, x)) for layer in range(4)},
        {layer: (lambda a, layer=layer: patterns.__setitem__(layer, a)) for layer in range(3)},
    )
    logits = run_pass(subject, batch, reads=reads).logits
    with torch.no_grad():
        hidden = subject.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            output_hidden_states=True,
        ).hidden_states
        final = subject.model.lm_head(subject.model.model.norm(streams[3]))[:, -1]
    for layer in range(3):
        assert torch.equal(streams[layer], hidden[layer])
        read: AttentionRead = patterns[layer]
        assert torch.allclose(read.pattern.sum(-1), torch.ones(read.pattern.shape[:3]), atol=1e-6)
        keys = read.key.repeat_interleave(2, dim=1)
        scores = read.scale * read.query[:, :, -1:] @ keys.transpose(2, 3)
        scores = scores.masked_fill(batch.attention_mask[:, None, None] == 0, float("-inf"))
        assert torch.allclose(scores.softmax(-1), read.pattern[:, :, -1:], atol=1e-6)
    assert torch.allclose(final, logits, atol=1e-6)


@pytest.mark.parametrize("side", ["residual", "query", "key", "value"])
@pytest.mark.parametrize("start", [0, 5, 9])
def test_a_prefix_gives_the_same_logits_as_the_whole_prompt(tiny_llama, side, start):
    subject = tiny_llama()
    batch = left_padded(SEQUENCES, 0, subject.device)
    clean = run_pass(subject, batch, keep=True)
    edit = VectorEdit(1, side, answer_mask(batch), lambda x, _: x + 1.0, heads=None if side == "residual" else (1,))
    whole = run_pass(subject, batch, [edit])
    part = run_pass(subject, batch, [edit], beginning=Beginning(clean.own, start))
    assert whole.changed == (True,)
    assert (whole.logits - clean.logits).abs().max() > 1e-3
    assert torch.allclose(part.logits, whole.logits, atol=1e-5)


def test_a_query_edit_leaves_keys_values_and_other_heads_alone(tiny_llama):
    subject = tiny_llama()
    batch = left_padded(SEQUENCES, 0, subject.device)
    seen = {}

    def run(*edits):
        kept = {}
        reads = Reads({1: lambda x: kept.__setitem__("stream", x)}, {1: lambda a: kept.__setitem__("attention", a)})
        run_pass(subject, batch, edits, reads)
        return kept

    clean = run()
    edited = run(VectorEdit(1, "query", answer_mask(batch), lambda x, _: x + 1.0, heads=(2,)))
    seen["clean"], seen["edited"] = clean["attention"], edited["attention"]
    assert torch.equal(clean["stream"], edited["stream"])
    assert torch.equal(seen["clean"].key, seen["edited"].key)
    others = [0, 1, 3]
    assert torch.equal(seen["clean"].query[:, others], seen["edited"].query[:, others])
    assert torch.equal(seen["clean"].query[:, 2, :-1], seen["edited"].query[:, 2, :-1])
    assert not torch.equal(seen["clean"].query[:, 2, -1], seen["edited"].query[:, 2, -1])


def test_frozen_norm_moves_the_query_linearly(tiny_llama):
    subject = tiny_llama()
    batch = left_padded(SEQUENCES[:1], 0, subject.device)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    queries = []
    for strength in (0.0, 1.0, 2.0):
        edit = VectorEdit(1, "query", answer_mask(batch), lambda x, _, s=strength: x + s * direction, frozen_norm=True)
        run_pass(subject, batch, [edit], Reads({}, {1: lambda a: queries.append(a.query[0, :, -1])}))
    assert torch.allclose(queries[2] - queries[1], queries[1] - queries[0], atol=1e-4)


def test_a_clean_run_after_edits_and_after_an_exception_is_bit_identical(tiny_llama):
    subject = tiny_llama()
    batch = left_padded(SEQUENCES, 0, subject.device)
    before = run_pass(subject, batch).logits
    run_pass(subject, batch, [PatternEdit(0, lambda p, _: p.flip(-1)), OutputEdit(2, lambda o, _: o * 0)])

    def explode(x, _):
        raise RuntimeError("inside a hook")

    with pytest.raises(RuntimeError, match="inside a hook"):
        run_pass(subject, batch, [VectorEdit(1, "residual", answer_mask(batch), explode)])
    assert torch.equal(run_pass(subject, batch).logits, before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in subject.model.modules())


def test_edits_that_cannot_apply_are_refused(tiny_llama):
    subject = tiny_llama()
    batch = left_padded(SEQUENCES, 0, subject.device)
    nothing = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    with pytest.raises(QklensError, match="layer 7 does not exist; expected 0 to 2"):
        run_pass(subject, batch, [VectorEdit(7, "residual", answer_mask(batch), lambda x, _: x)])
    with pytest.raises(QklensError, match="matches no token"):
        run_pass(subject, batch, [VectorEdit(1, "query", nothing, lambda x, _: x)])
    clean = run_pass(subject, batch, keep=True)
    early = nothing.clone()
    early[:, -3] = True
    with pytest.raises(QklensError, match="before 9, which do not run"):
        run_pass(subject, batch, [VectorEdit(1, "key", early, lambda x, _: x + 1)], beginning=Beginning(clean.own, 9))
    with pytest.raises(QklensError, match="returned shape"):
        run_pass(subject, batch, [VectorEdit(1, "query", answer_mask(batch), lambda x, _: x[:1])])


def test_an_edit_whose_hook_never_fires_is_an_error(tiny_llama):
    subject = tiny_llama()
    batch = left_padded(SEQUENCES, 0, subject.device)
    subject.model.set_attn_implementation("eager")  # as if something else had taken the attention over
    with pytest.raises(QklensError, match="never fired"):
        run_pass(subject, batch, [PatternEdit(0, lambda p, _: p.flip(-1))])


def test_a_pass_inside_a_pass_sees_none_of_its_edits_and_leaves_it_alone(tiny_llama):
    """A sink may run the model itself: each pass keeps its own edits and reads."""
    subject = tiny_llama()
    outer, inner = left_padded(SEQUENCES, 0, subject.device), left_padded([[41, 42, 43]], 0, subject.device)
    shift = VectorEdit(1, "residual", answer_mask(outer), lambda rows, _: rows + 1)
    turn = VectorEdit(1, "query", answer_mask(outer), lambda rows, _: rows - 2, (1,))
    own = VectorEdit(1, "residual", answer_mask(inner), lambda rows, _: 3 * rows)
    alone = run_pass(subject, outer, [shift, turn]).logits
    inner_clean, inner_edited = run_pass(subject, inner).logits, run_pass(subject, inner, [own]).logits
    nested: list[torch.Tensor] = []
    streams: list[torch.Tensor] = []

    def sink(read: AttentionRead) -> None:
        nested.append(run_pass(subject, inner).logits)
        nested.append(run_pass(subject, inner, [own]).logits)

    reads = Reads({1: lambda x: streams.append(x.clone())}, {0: sink, 2: sink})
    together = run_pass(subject, outer, [shift, turn], reads).logits
    assert torch.equal(together, alone)
    assert [torch.equal(got, want) for got, want in zip(nested, [inner_clean, inner_edited] * 2, strict=True)] == [
        True
    ] * 4
    assert [x.shape for x in streams] == [(3, 10, subject.d_model)], "only the outer pass's stream is read"
    assert torch.equal(run_pass(subject, inner).logits, inner_clean)


def test_edits_of_the_same_reading_act_one_after_the_other_and_never_in_place(tiny_llama):
    subject = tiny_llama()
    batch = left_padded(SEQUENCES, 0, subject.device)
    mask = answer_mask(batch)
    weights = {name: p.clone() for name, p in subject.model.named_parameters()}
    ids, attention_mask = batch.input_ids.clone(), batch.attention_mask.clone()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def change(rows: torch.Tensor, _: object) -> torch.Tensor:
        seen.append((rows, rows.clone()))
        return rows + 1

    both = [VectorEdit(1, "residual", mask, change), VectorEdit(1, "residual", mask, change)]
    streams: list[torch.Tensor] = []
    run_pass(subject, batch, both, Reads({1: streams.append}, {}))
    clean: list[torch.Tensor] = []
    run_pass(subject, batch, reads=Reads({1: clean.append}, {}))
    assert torch.allclose(streams[0][mask], clean[0][mask] + 2, atol=1e-6)
    assert torch.equal(streams[0][~mask], clean[0][~mask])
    assert all(torch.equal(rows, kept) for rows, kept in seen), "what an edit was given is not written to"
    assert all(torch.equal(p, weights[name]) for name, p in subject.model.named_parameters())
    assert torch.equal(batch.input_ids, ids)
    assert torch.equal(batch.attention_mask, attention_mask)


def test_two_edits_of_one_reading_are_refused_and_of_two_heads_both_act(tiny_llama):
    subject = tiny_llama()
    batch = left_padded(SEQUENCES, 0, subject.device)
    mask = answer_mask(batch)

    def edit(heads: tuple[int, ...] | None, by: float) -> VectorEdit:
        return VectorEdit(1, "query", mask, lambda rows, _: rows + by * rows.abs(), heads)

    with pytest.raises(QklensError, match="two edits of layer 1 on the query side act on the same head and token"):
        run_pass(subject, batch, [edit((1, 2), 1.0), edit((2,), 2.0)])
    with pytest.raises(QklensError, match="act on the same head"):
        run_pass(subject, batch, [edit(None, 1.0), edit((2,), 2.0)])
    both = run_pass(subject, batch, [edit((1,), 1.0), edit((2,), 1.0)]).logits
    assert torch.allclose(both, run_pass(subject, batch, [edit((1, 2), 1.0)]).logits, atol=1e-6)
    assert not torch.allclose(both, run_pass(subject, batch, [edit((1,), 1.0)]).logits, atol=1e-6)


@pytest.mark.parametrize("heads", [(), (-1,), (4,)])
def test_heads_that_do_not_exist_are_refused(tiny_llama, heads):
    subject = tiny_llama()
    batch = left_padded(SEQUENCES, 0, subject.device)
    with pytest.raises(QklensError, match=r"names heads .* expected some of 0 to 3"):
        run_pass(subject, batch, [VectorEdit(1, "query", answer_mask(batch), lambda rows, _: rows + 1, heads)])


def test_a_pattern_edit_that_writes_in_place_touches_only_its_own_copy(tiny_llama):
    subject = tiny_llama()
    batch = left_padded(SEQUENCES, 0, subject.device)
    out = run_pass(subject, batch, [PatternEdit(1, lambda pattern, _: pattern.fill_(0.1))])
    assert out.changed == (True,)


def test_attention_that_went_another_way_is_an_error_not_silence(tiny_llama):
    subject = tiny_llama()
    subject.model.set_attn_implementation("sdpa")
    batch = left_padded(SEQUENCES, 0, subject.device)
    with pytest.raises(QklensError, match=r"attention of layer 1 was not read: the model runs .*'sdpa'"):
        run_pass(subject, batch, reads=Reads({}, {1: lambda read: None}))
