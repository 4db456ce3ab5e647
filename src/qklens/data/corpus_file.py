"""Write a corpus that survives a crash: answers batch by batch, then one file and its manifest.

corpus.jsonl                     written whole, when all answers are there
corpus.jsonl.manifest.json       what made it, and its hash
corpus.jsonl.parts/              while it is made: plan.json, then one file a batch; the same command goes on from there
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from qklens.data.corpus import KINDS, Ask, Kind, plan
from qklens.data.items import SHIPPED, load_dataset
from qklens.data.render import PLAIN_TEMPLATE, refuse_special_tokens, render_open
from qklens.errors import QklensError
from qklens.files import atomic_write, read_json, write_json
from qklens.models.generate import continuations
from qklens.models.subject import Subject
from qklens.strict import Strict

BATCH = 16
_USER_AGAIN = "\n" + PLAIN_TEMPLATE.partition("{")[0].rstrip()


class CorpusRequest(Strict):
    """What a corpus holds.

    Attributes:
        counts: chats of each kind.
        data: the set of two-choice items.
        seed: of the choice, the order, and drawn answers.
        temperature: of the model's answers; 0 is greedy.
        most_tokens: of an answer.
    """

    counts: dict[Kind, int] = Field(default_factory=lambda: dict.fromkeys(KINDS, 40))
    data: str = "harm_pressure"
    seed: int = 0
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    most_tokens: int = Field(default=48, ge=1)


class CorpusManifest(Strict):
    """How a corpus was made."""

    schema_: int = Field(default=1, alias="schema")
    request: CorpusRequest
    answers: str = Field(description="`template`, or the name of the model that wrote them")
    model_sha256: str | None
    data_sha256: dict[str, str]
    plan_sha256: str = Field(description="of all the above and the chats to be; what a resumed run compares")
    rows: dict[str, int] = Field(default_factory=dict, description="chats by kind, those left out not counted")
    empty: int = Field(default=0, description="chats left out because the model answered nothing")
    sha256: str = Field(default="", description="of the corpus file")


def write_corpus(
    out: Path,
    request: CorpusRequest,
    subject: Subject | None,
    *,
    tick: Callable[[int], Callable[[], None]] = lambda _: lambda: None,
) -> CorpusManifest:
    """Write a corpus, or go on with one that was broken off; done before, it is left as it is.

    Args:
        out: the .jsonl file.
        request: what it holds.
        subject: the model whose own answers it holds; None for template answers.
        tick: called with the number of batches; what it returns is called after each.

    Raises:
        QklensError: bad items, more chats than there are, a file or half-made corpus of another request, or a disk
            that cannot be written.
    """
    if out.suffix != ".jsonl":
        raise QklensError(f"{out}: expected a name that ends in .jsonl")
    sets = {name: load_dataset(request.data if name == "main" else name) for name in ("main", *SHIPPED[1:])}
    chats = plan(
        {name: s.items for name, s in sets.items()}, request.counts, seed=request.seed, repeats=_draws(request, subject)
    )
    if subject is not None:
        for some in sets.values():
            refuse_special_tokens(subject.tokenizer, some.items)
    known = {
        "request": request.model_dump(mode="json"),
        "answers": "template" if subject is None else subject.name,
        "model_sha256": None if subject is None else subject.sha256,
        "data_sha256": {name: s.sha256 for name, s in sets.items()},
    }
    planned = hashlib.sha256(json.dumps([known, [vars(a) for a in chats]], sort_keys=True).encode()).hexdigest()
    manifest = CorpusManifest.model_validate({**known, "plan_sha256": planned})
    done = _done(out, manifest)
    if done is not None:
        return done
    parts = out.with_name(out.name + ".parts")
    _claim(parts, planned)
    size = len(chats) if subject is None else BATCH
    batches = [range(begin, min(begin + size, len(chats))) for begin in range(0, len(chats), size)]
    step = tick(len(batches))
    lines: list[str] = []
    for number, batch in enumerate(batches):
        lines += _part(parts / f"{number:06d}.jsonl", [chats[i] for i in batch], batch, request, subject)
        step()
    rows = [json.loads(line) for line in lines]
    kept = [line for line, row in zip(lines, rows, strict=True) if row["messages"][-1]["content"]]
    if not kept:
        raise QklensError(f"{out}: the model answered nothing to all {len(lines)} chats; use template answers")
    content = "".join(f"{line}\n" for line in kept).encode()
    counts = Counter(row["kind"] for row in rows if row["messages"][-1]["content"])
    manifest = manifest.model_copy(
        update={
            "rows": {kind: counts[kind] for kind in KINDS if counts[kind]},
            "empty": len(lines) - len(kept),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    )
    atomic_write(out, content)
    write_json(_manifest_file(out), manifest.model_dump(mode="json", by_alias=True))
    shutil.rmtree(parts)
    return manifest


def _draws(request: CorpusRequest, subject: Subject | None) -> bool:
    return subject is not None and request.temperature > 0


def _manifest_file(out: Path) -> Path:
    return out.with_name(out.name + ".manifest.json")


def _done(out: Path, manifest: CorpusManifest) -> CorpusManifest | None:
    """The manifest of a corpus that the same request made; a half-made one is redone, another one is refused."""
    file = _manifest_file(out)
    if not file.is_file():
        if out.exists() and not out.with_name(out.name + ".parts").is_dir():
            raise QklensError(f"{out}: exists, and no corpus of this command; choose another name or remove it")
        return None
    before = read_json(file)
    if not isinstance(before, dict) or before.get("plan_sha256") != manifest.plan_sha256:
        raise QklensError(f"{out}: is a corpus of another request, model or data; choose another name or remove it")
    if not out.is_file() or hashlib.sha256(out.read_bytes()).hexdigest() != before.get("sha256"):
        raise QklensError(f"{out}: is not what its manifest says; remove both to make it again")
    shutil.rmtree(out.with_name(out.name + ".parts"), ignore_errors=True)
    return CorpusManifest.model_validate(before)


def _claim(parts: Path, planned: str) -> None:
    file = parts / "plan.json"
    if file.is_file():
        before: Any = read_json(file)
        if not isinstance(before, dict) or before.get("plan_sha256") != planned:
            raise QklensError(f"{parts}: half of another corpus; remove it or choose another name")
    else:
        write_json(file, {"plan_sha256": planned})


def _part(
    path: Path, chats: Sequence[Ask], index: Sequence[int], request: CorpusRequest, subject: Subject | None
) -> list[str]:
    """A batch's lines, from its file where it was written before."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        if len(lines) != len(chats):
            raise QklensError(f"{path}: holds {len(lines)} chats, expected {len(chats)}; remove it")
        return lines
    answers = [chat.answer for chat in chats] if subject is None else _answers(subject, chats, index, request)
    lines = [json.dumps(_row(chat, a), ensure_ascii=False) for chat, a in zip(chats, answers, strict=True)]
    atomic_write(path, "".join(f"{line}\n" for line in lines))
    return lines


def _row(chat: Ask, answer: str) -> Mapping[str, Any]:
    said = [{"role": "user", "content": chat.user}, {"role": "assistant", "content": answer}]
    return {"messages": said, "kind": chat.kind}


def _answers(subject: Subject, chats: Sequence[Ask], index: Sequence[int], request: CorpusRequest) -> list[str]:
    prompts = [render_open(subject.tokenizer, chat.user).tokens for chat in chats]
    seeds = [(request.seed * 1_000_003 + i) % 2**63 for i in index]
    written = continuations(subject, prompts, request.most_tokens, temperature=request.temperature, seeds=seeds)
    texts = (str(subject.tokenizer.decode(ids, skip_special_tokens=True)) for ids in written)
    # A base model goes on to write the user's next turn.
    return [text.partition(_USER_AGAIN)[0].strip() for text in texts]
