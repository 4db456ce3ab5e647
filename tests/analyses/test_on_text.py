"""A head on ordinary text: every number by brute force in every family, the kinds and the patterns by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from qklens.analyses.head_tally import HeadReading, Tally, look
from qklens.analyses.key_kinds import ANSWER_KINDS, FIRST_QUERY, TEXT_KINDS, answer_kinds, text_kinds
from qklens.analyses.on_text import TextReading, heads_on_text, in_words, read_at_answers, read_on_text, writes_ratio
from qklens.analyses.readings import read_attention
from qklens.analyses.text_windows import TextWindow
from qklens.data.render import ORDERS, Prompt, available_forms, render
from qklens.errors import QklensError
from qklens.interventions.engine import Workset
from qklens.models.attention import AttentionRead
from qklens.models.batch import left_padded
from qklens.models.copies import Reads
from qklens.models.families import load_family
from qklens.models.passes import run_pass
from qklens.models.subject import Subject, wrap_model
from tiny_families import CASES, LAYERS, tiny_model

CPU = torch.device("cpu")
PROSE = (
    "Which gas do plants take in? Plants take in the gas. Which animal is the largest? The largest animal is big.\n\n"
)


def window(*tokens: int) -> TextWindow:
    """A window whose token t is written "t,"."""
    pieces = [f"{token}," for token in tokens]
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    return TextWindow(tokens, "".join(pieces), tuple(zip([0, *ends], ends, strict=False)), 0)


def random_windows(lengths: tuple[int, ...], vocabulary: int = 6) -> list[TextWindow]:
    generator = torch.Generator().manual_seed(3)
    return [window(*(8 + torch.randint(vocabulary, (n,), generator=generator)).tolist()) for n in lengths]


def kind_names(*tokens: int, padding: int = 0, unknown: int | None = None) -> list[list[str]]:
    """Names by query and key of one row; hidden keys are "-"."""
    rows = [list(tokens)] if not padding else [list(tokens), [99] * (len(tokens) + padding)]
    kinds = text_kinds(left_padded(rows, 0, CPU), unknown)[0].tolist()
    return [["-" if k < 0 else TEXT_KINDS[k] for k in row] for row in kinds]


def test_kinds_by_hand():
    first, self_, previous, induction, duplicate, other = TEXT_KINDS
    names = kind_names(1, 7, 8, 9, 7, 8)
    assert names[4] == [first, duplicate, induction, previous, self_, "-"]
    assert names[5] == [first, other, duplicate, induction, previous, self_]
    assert names[3] == [first, other, previous, self_, "-", "-"]


def test_the_first_kind_that_holds_is_the_kind():
    """first before duplicate and previous; self before induction; previous before duplicate; induction before it."""
    assert kind_names(5, 5, 5, 5, 5)[1] == ["first", "self", "-", "-", "-"]
    assert kind_names(5, 5, 5, 5, 5)[4] == ["first", "induction", "induction", "previous", "self"]
    assert kind_names(5, 6, 5)[2] == ["first", "previous", "self"]
    assert kind_names(5, 6, 7, 5)[3] == ["first", "induction", "previous", "self"]


def test_unknown_words_are_not_one_word():
    assert kind_names(1, 3, 8, 9, 3, unknown=3)[4] == ["first", "other", "other", "previous", "self"]


def test_padding_hides_keys_and_moves_nothing():
    tokens = (1, 7, 8, 9, 7, 8, 7)
    padded = kind_names(*tokens, padding=3)
    assert [row[3:] for row in padded[3:]] == kind_names(*tokens)
    assert {name for row in padded for name in row[:3]} == {"-"}


def test_every_visible_key_has_one_kind_and_no_other_key_has_one():
    batch = left_padded([w.tokens for w in random_windows((23, 11, 4))], 0, CPU)
    kinds = text_kinds(batch)
    real = batch.attention_mask.bool()
    visible = torch.ones(23, 23).tril().bool() & real[:, None, :]
    assert torch.equal(kinds >= 0, visible)
    assert set(kinds.unique().tolist()) == {-1, *range(len(TEXT_KINDS))}


def by_hand(subject: Subject, rows: torch.Tensor, tokens: list[int], shown: int = 0) -> Tally:
    """A tally of head 0 of layer 0 given its whole pattern, `q_pos k_pos`."""
    n, tally = len(tokens), Tally(1, len(TEXT_KINDS), shown)
    batch = left_padded([tokens], 0, CPU)
    reads = look(subject, batch, [0], text_kinds(batch), batch.position_ids >= FIRST_QUERY, {(0, 0): tally})
    reads.residual[0](torch.ones(1, n, subject.d_model))
    if shown:
        reads.projected[0, "value"](torch.ones(1, n, subject.d_model))
    pattern = torch.zeros(1, subject.n_heads, n, n)
    pattern[:, 0] = rows
    query, key = torch.zeros(1, subject.n_heads, n, subject.d_head), torch.zeros(1, subject.n_kv_heads, n, 1)
    key = key.expand(-1, -1, -1, subject.d_head)
    reads.attention[0](AttentionRead(0, query, key, pattern, torch.ones(1, n, subject.n_heads, subject.d_head), 1.0))
    return tally


def test_shares_entropy_and_activity_of_a_pattern_by_hand(tiny_llama):
    """Tokens a b c a b: query 3 (a) sees first, induction, previous, self; query 4 (b) duplicate and induction too."""
    rows = torch.zeros(5, 5)
    rows[0, 0] = rows[1, 1] = rows[2, 2] = 1.0
    rows[3] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0])
    rows[4] = torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0])
    subject = tiny_llama()
    reading = by_hand(subject, rows, [7, 8, 9, 7, 8]).reading(TEXT_KINDS)
    want = {"first": 0.05, "self": 0.2, "previous": 0.15, "induction": 0.35, "duplicate": 0.25, "other": 0, "sink": 0}
    assert reading.share == pytest.approx(want)
    assert reading.active == pytest.approx(0.75)
    row = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert reading.entropy == pytest.approx((float(-(row * row.log()).sum()) + float(torch.tensor(2.0).log())) / 2)
    assert reading.share_where_present["duplicate"] == pytest.approx(0.5), "only query 4 has one"
    assert reading.share_where_present["induction"] == pytest.approx(0.35)
    assert reading.share_where_present["other"] is None
    norm = float(subject.output_weight(0)[:, 0].sum(dim=-1).norm())
    assert (reading.output_norm, reading.queries) == (pytest.approx(norm), 2)
    assert reading.writes == pytest.approx(norm / subject.d_model**0.5)


def test_a_previous_token_head_and_an_induction_head_are_told_apart(tiny_llama):
    tokens = [1, 7, 8, 9, 10, 7, 8, 9, 10]
    previous, induction = torch.zeros(9, 9), torch.zeros(9, 9)
    previous[0, 0] = induction[0, 0] = 1.0
    for p in range(1, 9):
        previous[p, p - 1] = 1.0
        induction[p, p - 3 if p >= 5 else 0] = 1.0
    first, second = (by_hand(tiny_llama(), rows, tokens).reading(TEXT_KINDS) for rows in (previous, induction))
    assert first.share["previous"] == pytest.approx(1.0)
    assert second.share == pytest.approx({**dict.fromkeys(first.share, 0.0), "first": 2 / 6, "induction": 4 / 6})
    assert second.share_where_present["induction"] == pytest.approx(1.0)


def test_rounding_is_no_sink_but_a_learned_sink_is_one(tiny_llama, word_tokenizer):
    model = tiny_model("gpt_oss", len(word_tokenizer), torch.float32)
    learned = wrap_model(model, word_tokenizer, load_family("gpt_oss"))
    rows = torch.full((4, 4), 0.24).tril()
    rows[3] = torch.tensor([0.1, 0.2, 0.3, 0.2])
    plain, sunk = (by_hand(s, rows, [7, 8, 9, 10]).reading(TEXT_KINDS) for s in (tiny_llama(), learned))
    assert (plain.share["sink"], plain.share["first"]) == (0.0, pytest.approx(0.1 / 0.8))
    assert (sunk.share["sink"], sunk.share["first"]) == (pytest.approx(0.2), pytest.approx(0.1))
    parts = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2])
    assert sunk.entropy == pytest.approx(float(-(parts * parts.log()).sum()), rel=1e-5)
    assert sunk.active == pytest.approx(0.5)


def plain_pass(subject: Subject, tokens: tuple[int, ...], layer: int) -> tuple[torch.Tensor, ...]:
    """Pattern, values by query head, what each head adds to the stream, what each key adds, and the stream."""
    seen: dict[str, torch.Tensor] = {}
    reads = Reads(
        {layer: lambda x: seen.__setitem__("stream", x[0])},
        {layer: lambda a: seen.update(pattern=a.pattern[0], output=a.output[0])},
    )
    norm = subject.family.output_norm(subject.layers[layer])
    hook = subject.attention(layer).register_forward_hook(lambda _m, _i, out: seen.__setitem__("whole", out[0][0]))
    prefix = run_pass(subject, left_padded([tokens], 0, CPU), reads=reads, keep=True).own
    hook.remove()
    values = prefix.pairs[layer][1][0].repeat_interleave(subject.n_heads // subject.n_kv_heads, dim=0)
    weight, bias = subject.output_weight(layer), subject.output_bias(layer)
    written = torch.einsum("dhe,phe->phd", weight, seen["output"])
    added = torch.einsum("dhe,hke->hkd", weight, values)[:, None] * seen["pattern"][..., None]
    if norm is not None:
        # The norm of a sum is a sum once its scale is the observed one: the module gives that scale, term by term.
        whole = seen["whole"]
        gain = subject.output_norm(layer, whole.dtype).gamma
        root = (gain * whole / norm(whole)).mean(dim=-1)
        written, added = written * gain / root[:, None, None], added * gain / root[None, :, None, None]
        assert torch.allclose(written.sum(dim=1), norm(whole))
    else:
        assert torch.allclose(written.sum(dim=1) + (0 if bias is None else bias), seen["whole"])
    assert torch.allclose(added.sum(dim=2).transpose(0, 1), written)
    return seen["pattern"], written, added, seen["stream"]


@pytest.mark.parametrize("case", CASES)
def test_every_number_by_brute_force_in_every_family(case, word_tokenizer):
    model = tiny_model(case, len(word_tokenizer), torch.float64)
    subject = wrap_model(model, word_tokenizer, load_family(model.config.model_type))
    windows, heads = random_windows((13, 9, 12)), [(0, 3), (1, 0), (1, 2), (LAYERS - 1, 1)]
    readings = read_on_text(subject, windows, heads)
    assert list(readings) == heads
    for layer, head in heads:
        shares, entropies, norms, relative, pairs = [], [], [], [[], [], []], {}
        for w, at in enumerate(windows):
            pattern, written, added, stream = plain_pass(subject, at.tokens, layer)
            names = kind_names(*at.tokens)
            for p in range(3, len(at.tokens)):
                row = pattern[head, p, : p + 1]
                sink = 1 - float(row.sum())
                share = dict.fromkeys((*TEXT_KINDS, "sink"), 0.0) | {"sink": sink}
                for j, a in enumerate(row.tolist()):
                    share[names[p][j]] += a
                    if 0 < j < p:
                        found = (float(added[head, p, j].norm()), w, p, j, a, names[p][j])
                        key = at.tokens[p], at.tokens[j]
                        pairs[key] = max(pairs.get(key, found), found)
                shares.append(share)
                entropies.append(-sum(a * torch.tensor(a).log().item() for a in [*row.tolist(), sink] if a > 1e-12))
                norms.append(float(written[p, head].norm()))
                relative[w].append(norms[-1] / float(stream[p].norm()))
        got, n = readings[layer, head], len(shares)
        for kind in (*TEXT_KINDS, "sink"):
            assert got.share[kind] == pytest.approx(sum(s[kind] for s in shares) / n, abs=1e-6)
        assert sum(got.share.values()) == pytest.approx(1.0)
        assert got.entropy == pytest.approx(sum(entropies) / n, abs=1e-5)
        assert got.output_norm == pytest.approx(sum(norms) / n)
        assert got.writes_by_part == pytest.approx([sum(r) for r in relative])
        assert got.writes == pytest.approx(sum(map(sum, relative)) / n)
        assert got.queries_by_part == tuple(len(r) for r in relative)
        best = sorted(pairs.values(), reverse=True)[:10]
        assert [(e.window, e.query, e.key, e.kind) for e in got.examples] == [(*b[1:4], b[5]) for b in best]
        assert [e.weight for e in got.examples] == pytest.approx([b[0] for b in best])
        assert [e.attention for e in got.examples] == pytest.approx([b[4] for b in best])
    assert ("gpt_oss" in case) == (readings[0, 3].share["sink"] > 1e-6)


def test_examples_are_pairs_of_tokens_told_once_with_their_surroundings(tiny_llama):
    windows = random_windows((40, 31), vocabulary=3)
    (reading,) = read_on_text(tiny_llama(), windows, [(1, 1)]).values()
    pairs = [(e.query_token, e.key_token) for e in reading.examples]
    assert len(pairs) == len(set(pairs)) == 9, "three tokens have nine pairs"
    for e in reading.examples:
        tokens = windows[e.window].tokens
        assert (e.query_token, e.key_token) == (f"{tokens[e.query]},", f"{tokens[e.key]},")
        assert e.query_context[0] == "".join(f"{t}," for t in tokens[max(e.query - 6, 0) : e.query])
        assert e.key_context[1] == "".join(f"{t}," for t in tokens[e.key + 1 : e.key + 7])


def test_a_pair_that_fills_the_top_many_times_over_hides_no_other(tiny_llama):
    """57 times the same two pairs, all stronger than a third; every value has the same norm."""
    tokens, rows = [1, 9, *([7, 8] * 29)], torch.zeros(60, 60)
    for p in range(3, 60):
        rows[p, p - 1], rows[p, 1] = 0.8 + p / 1000, 0.1 - p / 1000
    tally = by_hand(tiny_llama(), rows, tokens, shown=3)
    assert [e.tokens for e in tally.examples] == [(8, 7), (7, 8), (8, 9)]
    assert [(e.query, e.key) for e in tally.examples] == [(59, 58), (58, 57), (3, 1)]


def test_how_windows_fall_into_batches_changes_nothing(tiny_llama):
    subject, windows = tiny_llama(dtype=torch.float64), random_windows((19, 7, 12, 19, 8, 5))
    heads = [(0, 0), (2, 3)]
    together, alone, some = (read_on_text(subject, windows, heads, tokens_per_batch=n) for n in (10**6, 1, 25))
    for head in heads:
        for other in (alone[head], some[head]):
            for field in dataclasses.fields(TextReading):
                mine, theirs = getattr(together[head], field.name), getattr(other, field.name)
                if field.name != "examples":
                    assert mine == pytest.approx(theirs), field.name
            key = [(e.window, e.query, e.key) for e in other.examples]
            assert key == [(e.window, e.query, e.key) for e in together[head].examples]


def prompts_of(subject: Subject, items, n: int = 3) -> list[Prompt]:
    form = available_forms(subject.tokenizer, items[0])[0]
    return [render(subject.tokenizer, item, "harm", order, form) for item in items[:n] for order in ORDERS]


def test_answers_agree_with_the_reading_of_attention(tiny_llama, items):
    """Prompts of different lengths, padded together; options and output as `read_attention` has them."""
    subject = tiny_llama()
    work = Workset(subject, prompts_of(subject, items))
    assert len({len(p.tokens) for p in work.prompts}) > 1
    whole = read_attention(work)
    for (layer, head), got in read_at_answers(work, [(2, 1), (0, 2)]).items():
        assert got.share["options"] == pytest.approx(float(whole.mass[:, layer, head, :2].sum(dim=-1).mean()), rel=1e-5)
        assert tuple(got.share) == (*ANSWER_KINDS, "sink")
        assert sum(got.share.values()) == pytest.approx(1.0)
        written = whole.outputs[:, layer, head] @ subject.output_weight(layer)[:, head].T
        assert got.output_norm == pytest.approx(float(written.norm(dim=-1).mean()), rel=1e-5)
        assert got.queries_by_part == (1,) * len(work)


def test_answer_kinds_by_hand():
    spans = {"option_A": (0, 2), "option_B": (3, 5), "answer": (5,)}
    one = Prompt("", (1, 7, 8, 9, 6, 2), spans, 0, (), (0, 0), "A")
    two = Prompt("", (1, 7, 8, 2), {"option_A": (1,), "option_B": (2,)}, 0, (), (0, 0), "A")
    kinds = answer_kinds(left_padded([one.tokens, two.tokens], 0, CPU), [one, two])[:, 0].tolist()
    first, self_, options, other = range(4)
    assert kinds[0] == [first, other, options, options, other, self_], "what is first or self is no option"
    assert kinds[1] == [-1, -1, first, options, options, self_]


def reading(writes: list[float], queries: list[int]) -> HeadReading:
    total = sum(writes) / sum(queries)
    return HeadReading({"first": 1.0}, {}, 0.25, 0.0, 1.0, total, sum(queries), tuple(writes), tuple(queries))


def test_ratio_and_interval():
    text = reading([10.0, 30.0], [100, 300])
    assert writes_ratio(text, reading([0.2] * 4, [1] * 4)) == (pytest.approx(0.5), pytest.approx((0.5, 0.5)))
    assert writes_ratio(text, reading([0.0] * 4, [1] * 4)) == (None, None)
    answers = reading([0.1, 0.3, 0.1, 0.3], [1] * 4)
    apart, (low, high) = writes_ratio(text, answers)
    assert apart == pytest.approx(0.5)
    assert low < 0.5 < high
    assert writes_ratio(text, answers, items=[4, 4, 9, 9]) == (pytest.approx(0.5), pytest.approx((0.5, 0.5))), (
        "both items have the same mean, so resampling whole items moves nothing"
    )
    with pytest.raises(QklensError, match="2 items named for 4 prompts"):
        writes_ratio(text, answers, items=[1, 2])


def test_a_window_without_queries_has_no_part_in_the_interval():
    text = reading([0.0, 0.0, 10.0, 30.0], [0, 0, 100, 300])
    assert writes_ratio(text, reading([0.2] * 4, [1] * 4))[1] == pytest.approx((0.5, 0.5))


def test_a_file_beside_answers_gives_json_and_one_sentence_a_head(tiny_llama, items, tmp_path):
    subject, path = tiny_llama(), tmp_path / "prose.txt"
    path.write_text(PROSE * 40)
    work = Workset(subject, prompts_of(subject, items))
    found = heads_on_text(work, path, [(2, 1), (0, 0)], items=[0, 0, 1, 1, 2, 2])
    assert [(f.layer, f.head) for f in found] == [(2, 1), (0, 0)]
    assert json.loads(json.dumps([dataclasses.asdict(f) for f in found], allow_nan=False))[0]["head"] == 1
    for f in found:
        assert f.ratio == pytest.approx(f.text.writes / f.answers.writes)
        assert f.interval[0] < f.ratio < f.interval[1]
        assert f.words.startswith(f"L{f.layer}H{f.head}: on ordinary text {f.text.active:.0%} of its attention")
        assert f"({f.answers.active:.0%} at MCQ answers)" in f.words
        assert f"writes {f.ratio:.2f} [" in f.words


def test_a_token_cannot_move_the_cursor_from_within_the_sentence(tiny_llama):
    hostile = "\x1b[2J\u202eab\n"
    at = window(8, 9, 10, 11, 12, 13)
    at = dataclasses.replace(at, text=hostile * 6, ranges=tuple((i * 8, i * 8 + 8) for i in range(6)))
    assert len(hostile) == 8
    (text,) = read_on_text(tiny_llama(), [at], [(0, 0)]).values()
    assert text.examples[0].query_token == hostile, "the reading itself keeps the raw characters"
    words = in_words((0, 0), text, text, None, None)
    assert words.isprintable()
    assert "times as much" not in words


@pytest.mark.parametrize(
    ("heads", "message"),
    [([], "no head to look at"), ([(0, 4)], "head 4 does not exist"), ([(-1, 0)], "layer -1 does not exist")],
)
def test_heads_that_are_none_are_refused(heads, message, tiny_llama, items):
    subject = tiny_llama()
    with pytest.raises(QklensError, match=message):
        read_on_text(subject, random_windows((9,)), heads)
    with pytest.raises(QklensError, match=message):
        read_at_answers(Workset(subject, prompts_of(subject, items, 1)), heads)


def test_windows_without_a_query_are_refused(tiny_llama):
    with pytest.raises(QklensError, match="no text window has more than 3 tokens"):
        read_on_text(tiny_llama(), random_windows((3, 2)), [(0, 0)])
