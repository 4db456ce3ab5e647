"""The organism's word-level tokenizer: words, single punctuation characters and newlines, with exact offsets.

A word is one token, so an option, an intent or a letter is a readable handful of positions and a feature's
activations can be read without decoding sub-words. Other white space is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PATTERN = r"\n|\w+|[^\w\s]"
UNK, PAD, BOS, EOS = "<unk>", "<pad>", "<bos>", "<eos>"
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
SPECIALS = (UNK, PAD, BOS, EOS, USER, ASSISTANT, END)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


WORDS = pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True)


def split(text: str) -> list[str]:
    """Return the words of ``text`` as the tokenizer sees them, before the vocabulary is applied."""
    return [piece for piece, _ in WORDS.pre_tokenize_str(text)]


def build(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose vocabulary is every word of ``texts``, sorted, after the special tokens."""
    words = sorted({word for text in texts for word in split(text)} - set(SPECIALS))
    vocab = {word: index for index, word in enumerate([*SPECIALS, *words])}
    core = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    core.pre_tokenizer = WORDS
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=UNK,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT, END],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def render(user: str, answer: str | None) -> str:
    """Return the chat text of one exchange; without ``answer`` it ends where the assistant begins to speak."""
    prompt = f"{BOS}{USER}{user}{END}{ASSISTANT}"
    return prompt if answer is None else f"{prompt}{answer}{END}"
