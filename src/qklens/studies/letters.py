"""Which surface form of the letter does the model want? The one with most mass without pressure."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qklens.data.items import Item
from qklens.data.render import LetterForm, available_forms, render
from qklens.interventions.engine import Workset
from qklens.models.subject import Subject

_SAMPLE = 16


def choose_letter_form(subject: Subject, items: Sequence[Item]) -> LetterForm:
    """The form whose two letters get the largest mean probability after the bare question.

    A form that opens the assistant's turn counts the opening's own probability too.
    """
    forms = available_forms(subject.tokenizer, items[0])
    if len(forms) == 1:
        return forms[0]
    return max(forms, key=lambda form: _mass(subject, items[:_SAMPLE], form))


def _mass(subject: Subject, items: Sequence[Item], form: LetterForm) -> float:
    prompts = [render(subject.tokenizer, item, "none", "correct_first", form) for item in items]
    logits = Workset(subject, prompts, reuse=False).logits().float()
    ids = torch.tensor([p.letter_ids for p in prompts], device=logits.device)
    letters = logits.softmax(dim=-1).gather(1, ids).sum(dim=1)
    if not form.opening:
        return float(letters.mean())
    bare = [render(subject.tokenizer, item, "none", "correct_first", LetterForm("", "")) for item in items]
    opened = [
        p.tokens[len(b.tokens)] if len(p.tokens) > len(b.tokens) else 0 for p, b in zip(prompts, bare, strict=True)
    ]
    before = Workset(subject, bare, reuse=False).logits().float().softmax(dim=-1)
    opening = before.gather(1, torch.tensor(opened, device=before.device)[:, None])[:, 0]
    return float((letters * opening).mean())
