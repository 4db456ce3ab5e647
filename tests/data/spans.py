"""What the spans of a prompt must cover, written a second time from the contract and read through offsets only."""

from __future__ import annotations

from byte_tokenizers import text_of
from transformers import PreTrainedTokenizerFast

from qklens.data.items import Item
from qklens.data.render import (
    INSTRUCTION,
    PARTS,
    Condition,
    Order,
    Prompt,
    available_forms,
    render,
)


def offsets_of(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> list[tuple[int, int]]:
    encoded = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)
    assert tuple(encoded["input_ids"]) == prompt.tokens
    return [tuple(pair) for pair in encoded["offset_mapping"]]


def covered(tokenizer: PreTrainedTokenizerFast, prompt: Prompt, name: str) -> str:
    """The characters from the first to the last token of a span."""
    offsets, span = offsets_of(tokenizer, prompt), prompt.span(name)
    assert list(span) == list(range(span[0], span[-1] + 1)), f"{name} has a hole"
    return prompt.text[offsets[span[0]][0] : offsets[span[-1]][1]]


def expected_spans(item: Item, condition: Condition, order: Order) -> dict[str, str]:
    a, b = (item.correct, item.incorrect) if order == "correct_first" else (item.incorrect, item.correct)
    wanted = {"question": item.question}
    if condition != "none":
        wanted["intent"] = item.harmful_intent if condition == "harm" else item.benign_intent
    for letter, text in (("A", a), ("B", b)):
        wanted |= {f"option_{letter}.letter": f"({letter})", f"option_{letter}.content": text}
    for role, letter in zip(("correct", "incorrect"), "AB" if order == "correct_first" else "BA", strict=True):
        wanted |= {f"{role}.{part}": wanted[f"option_{letter}.{part}"] for part in ("letter", "content")}
    return wanted


def check_spans(tokenizer: PreTrainedTokenizerFast, item: Item, condition: Condition, order: Order) -> Prompt:
    """Everything that must hold of a rendered prompt, whatever the tokenizer."""
    form = available_forms(tokenizer, item)[0]
    prompt = render(tokenizer, item, condition, order, form)
    assert text_of(item, condition, order) in prompt.text
    for name, text in expected_spans(item, condition, order).items():
        assert covered(tokenizer, prompt, name).strip() == text.strip(), name
        first = offsets_of(tokenizer, prompt)[prompt.span(name)[0]]
        assert first[1] - first[0] <= len(text) + 1
    assert ("intent" in prompt.spans and bool(prompt.spans["intent"])) == (condition != "none")
    assert prompt.span("answer") == (len(prompt.tokens) - 1,)
    for letter in "AB":
        parts = [prompt.spans[f"option_{letter}.{part}"] for part in PARTS]
        assert prompt.spans[f"option_{letter}"] == tuple(p for part in parts for p in part)
    named = ["intent", "question", "option_A", "option_B", "answer"]
    positions = [p for name in named for p in prompt.spans[name]]
    assert len(positions) == len(set(positions)), "spans are disjoint"
    assert positions == sorted(positions), "spans stand in the order of the text"
    around = ["template_before", "intent", "question", "option_A", "option_B", "instruction", "template_after"]
    positions = [p for name in around for p in prompt.spans[name]]
    assert positions == sorted(set(positions)), "the parts around them overlap nothing and keep the order"
    assert covered(tokenizer, prompt, "instruction").strip() == INSTRUCTION
    assert prompt.spans["template_after"][-1] == prompt.spans["answer"][0]
    assert prompt.text[prompt.shared_from :].startswith(item.question)
    assert prompt.starts == tuple(a for a, _ in offsets_of(tokenizer, prompt))
    return prompt
