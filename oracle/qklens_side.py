"""Make the tiny models and write what qklens computes on them: ``python -m oracle.qklens_side``.

Both prompts run as one left-padded batch, as the studies run them. Scores are after the model's scale and soft cap and
before the mask; where a query does not see a key they are −∞. `read` are the scores of the queries and keys that met in
the model; `terms` are the sums of all pair terms of a random dictionary with its bias and error.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from oracle.cases import CASES, EDIT_NORM, HEADS, LAYERS, PROMPTS, RUNS, VOCABULARY, Case
from qklens import Directions, Subject, left_padded, load_subject
from qklens.analyses.lens import head_lens
from qklens.analyses.written import write_prompts
from qklens.models.attention import AttentionRead
from qklens.models.copies import Reads
from qklens.models.edits import VectorEdit
from qklens.models.passes import run_pass
from qklens.models.scores import ScoreMaps, score_maps


def write_model(case: Case) -> None:
    """A random float64 model with every parameter drawn, norms and biases too, so that none can be left out unseen."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.model_type, **case.config)).double()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1.0 + 0.5 * drawn if gain else (0.5 if parameter.ndim == 1 else 0.25) * drawn)
    model.save_pretrained(case.model)
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, VOCABULARY)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    tokenizer.save_pretrained(case.model)
    vector = torch.randn(model.config.hidden_size, generator=generator, dtype=torch.float64)
    save_file({"edit": EDIT_NORM * vector / vector.norm()}, case.edit)


def compute(subject: Subject, vector: Float[Tensor, " d_model"]) -> dict[str, Tensor]:
    """Scores of every head, logits without an edit, and logits under the edit of each head's query alone."""
    batch = left_padded(PROMPTS, subject.pad_id, subject.device)
    streams: dict[int, Tensor] = {}
    attention: dict[int, AttentionRead] = {}
    reads = Reads(
        {layer: lambda x, layer=layer: streams.__setitem__(layer, x) for layer in range(LAYERS)},
        {layer: lambda a, layer=layer: attention.__setitem__(layer, a) for layer in range(LAYERS)},
    )
    out = {"clean": run_pass(subject, batch, reads=reads).logits}
    for row in range(len(PROMPTS)):
        begin = batch.padding(row)
        read, terms = [], []
        for layer in range(LAYERS):
            maps = score_maps(subject, layer)
            read.append(read_scores(maps, attention[layer], row, begin))
            terms.append(summed_terms(subject, maps, streams[layer][row, begin:]))
        out[f"read.{row}"], out[f"terms.{row}"] = torch.stack(read), torch.stack(terms)
    last = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    last[:, -1] = True
    edited = [
        run_pass(subject, batch, [VectorEdit(layer, "query", last, lambda rows, _: rows + vector, (head,))]).logits
        for layer in range(LAYERS)
        for head in range(HEADS)
    ]
    out["edited"] = torch.stack(edited).unflatten(0, (LAYERS, HEADS))
    return out


def read_scores(maps: ScoreMaps, read: AttentionRead, row: int, begin: int) -> Float[Tensor, "head q_pos k_pos"]:
    """The scores of the queries and keys that the model used."""
    query = read.query[row, :, begin:]
    key = read.key[row, [maps.kv_head(head) for head in range(HEADS)], begin:]
    return seen(maps, maps.capped(read.scale * query @ key.transpose(1, 2)))


def summed_terms(
    subject: Subject, maps: ScoreMaps, stream: Float[Tensor, "pos d_model"]
) -> Float[Tensor, "head q_pos k_pos"]:
    """The sums of all (query source, key source) terms: five random directions, their bias and the error."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(6, subject.d_model, generator=generator, dtype=stream.dtype)
    source = Directions(tuple(f"d{i}" for i in range(5)), {maps.layer: drawn[:5]}, {maps.layer: drawn[5]})
    (written,) = write_prompts(subject, source, maps, [{maps.layer: stream}])
    lenses = [head_lens(subject, source, maps.layer, head) for head in range(HEADS)]
    sums = [[lens.terms_by_token(written, p).scores(len(stream)) for p in range(len(stream))] for lens in lenses]
    return seen(maps, maps.capped(torch.stack([torch.stack(rows) for rows in sums])))


def seen(maps: ScoreMaps, scores: Float[Tensor, "head q_pos k_pos"]) -> Float[Tensor, "head q_pos k_pos"]:
    """The scores with −∞ where the query does not see the key."""
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool)
    for position in range(len(hidden)):
        first, end = maps.visible(position, len(hidden))
        hidden[position, first:end] = False
    return scores.masked_fill(hidden, float("-inf"))


def main() -> None:
    """Every case, from nothing: numbers of an earlier run cannot be compared by mistake."""
    logging.disable_progress_bar()
    shutil.rmtree(RUNS, ignore_errors=True)
    for case in CASES:
        case.model.mkdir(parents=True)
        write_model(case)
        subject = load_subject(case.model, dtype="float64")
        numbers = compute(subject, load_file(case.edit)["edit"])
        about = {"weights": case.digest(), "by": f"qklens {version('qklens')}"}
        save_file({name: tensor.contiguous() for name, tensor in numbers.items()}, case.numbers("qklens"), about)


if __name__ == "__main__":
    main()
