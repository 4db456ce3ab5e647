"""Byte-level tokenizers trained on the items, cut beforehand as GPT-2, Llama 3 or a hostile family cuts."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qklens.data.items import Item, load_dataset
from qklens.data.render import (
    CONDITIONS,
    INSTRUCTION,
    ORDERS,
    PLAIN_TEMPLATE,
    Condition,
    LetterForm,
    Order,
)

ITEMS = load_dataset("harm_pressure").items
BARE, SPACED, OPENED = LetterForm("", ""), LetterForm("", " "), LetterForm("(", "")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 += r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def text_of(item: Item, condition: Condition, order: Order) -> str:
    """The user turn, written a second time from the contract."""
    intent = {"none": "", "harm": item.harmful_intent + " ", "benign": item.benign_intent + " "}[condition]
    a, b = (item.correct, item.incorrect) if order == "correct_first" else (item.incorrect, item.correct)
    return f"{intent}{item.question}\n(A) {a}\n(B) {b}\n{INSTRUCTION}"


def corpus() -> list[str]:
    texts = []
    for item in ITEMS[:40]:
        texts += [PLAIN_TEMPLATE.format(content=text_of(item, c, o)) + " A B" for c in CONDITIONS for o in ORDERS]
    return texts


def byte_tokenizer(
    pattern: str = GPT2, *, vocabulary: int = 700, texts: list[str] | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the items, cut beforehand as GPT-2 (or another family) cuts."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(corpus() if texts is None else texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def joining(pattern: str, joined: str) -> PreTrainedTokenizerFast:
    """A byte tokenizer whose pieces include what `pattern` joins, often enough to become one token."""
    tokenizer = byte_tokenizer(f"{pattern}|{GPT2}", texts=[*corpus(), *[joined] * 500])
    assert len(tokenizer(joined, add_special_tokens=False)["input_ids"]) == 1
    return tokenizer
