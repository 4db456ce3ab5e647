"""What reading and editing cost: ratios to a plain eager pass of transformers, and peak memory, in one run.

    python -m benchmarks.cost_of_reading --model DIR --prompts 8 --tokens 128 --rounds 9

Passes alternate within every round, so that a slow machine is slow for all of them; the table gives the median of the
rounds' ratios and their quartiles. Memory is the most that lay allocated at once during a pass, beyond the weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from qklens import Subject, capture, load_subject
from qklens.models.batch import Batch
from qklens.models.edits import VectorEdit
from qklens.models.passes import run_pass
from qklens.studies.resources import model_folder

Pass = Callable[[], object]


def passes(subject: Subject, batch: Batch) -> dict[str, Pass]:
    """The plain pass, and what is compared with it, at the middle layer."""
    layer = subject.n_layers // 2
    mask = torch.zeros(batch.input_ids.shape, dtype=torch.bool, device=batch.input_ids.device)
    mask[:, -1] = True
    edit = VectorEdit(layer, "query", mask, lambda rows, _: rows * 1.1, heads=(0,))
    ours: str = subject.model.config._attn_implementation

    @torch.no_grad()
    def plain() -> object:
        subject.model.set_attn_implementation("eager")
        try:
            return subject.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=1,
            ).logits
        finally:
            subject.model.set_attn_implementation(ours)

    return {
        "plain eager pass": plain,
        "a pass that reads nothing": lambda: run_pass(subject, batch),
        "one layer's q, k and scores": lambda: capture(subject, batch, [f"{s}.{layer}" for s in ("q", "k", "score")]),
        "a query-side edit": lambda: run_pass(subject, batch, [edit]),
    }


def asked_for(subject: Subject, name: str, batch: Batch) -> int:
    """Bytes of what a pass hands out, beyond logits."""
    if "scores" not in name:
        return 0
    rows, width = batch.input_ids.shape
    size = torch.finfo(subject.dtype).bits // 8
    heads = subject.n_heads * subject.d_head + subject.n_kv_heads * subject.d_head + subject.n_heads * width
    return rows * width * heads * size


def peak_bytes(run: Pass, device: torch.device) -> int:
    """The most that lay allocated at once during a pass, beyond what lay there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        kept = run()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del kept
    return peak


def seconds(run: Pass, device: torch.device) -> float:
    """One timed pass."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="organism")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    chosen = parser.parse_args()
    subject = load_subject(model_folder(chosen.model), device=chosen.device, dtype=chosen.dtype)
    generator = torch.Generator().manual_seed(0)
    vocabulary = subject.model.config.vocab_size
    tokens = torch.randint(0, vocabulary, (chosen.prompts, chosen.tokens), generator=generator)
    batch = subject.batch(tokens.tolist())
    runs = passes(subject, batch)
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(chosen.rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, subject.device))
    reference = next(iter(runs))
    base = peak_bytes(runs[reference], subject.device)
    print(
        f"{subject.name}, {chosen.prompts} prompts of {chosen.tokens} tokens, {chosen.dtype} on {subject.device}, "
        f"{torch.get_num_threads()} threads, {chosen.rounds} rounds"
    )
    print(f"{'':30}{'ratio':>7}{'quartiles':>15}{'peak MiB':>10}{'beyond plain':>14}{'asked for':>11}")
    for name, run in runs.items():
        ratios = [mine / plain for mine, plain in zip(times[name], times[reference], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if chosen.rounds > 1 else ratios * 3
        peak = peak_bytes(run, subject.device)
        row = f"{name:30}{middle:7.3f}{f'{low:.3f}-{high:.3f}':>15}{peak / 2**20:10.1f}{(peak - base) / 2**20:14.2f}"
        print(f"{row}{asked_for(subject, name, batch) / 2**20:11.2f}")


if __name__ == "__main__":
    main()
