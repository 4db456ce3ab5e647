"""Run as a program of its own: reads tensors from a .pt file and writes them as safetensors.

    python -I unpickle_weights.py SOURCE TARGET

The one file of the package that opens a pickle, with the unpickler that builds tensors and nothing else. It imports no
qklens, writes no file but TARGET, and may write no more than a limit that is set before the file is opened.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_HEADROOM = 1 << 24
_CPU_SECONDS = 1200


def main(source: Path, target: Path) -> str:
    """Convert; the reason why not, or nothing."""
    import torch
    from safetensors.torch import save_file

    most = 2 * source.stat().st_size + _HEADROOM
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    held = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(held, dict):
        return f"holds a {type(held).__name__}, expected a dictionary of tensors"
    stray = [
        str(key)[:60] for key, value in held.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))
    ]
    if stray:
        return f"entry {stray[0]!r} is no tensor; expected a dictionary of tensors"
    save_file({key: value.detach().contiguous().clone() for key, value in held.items()}, target)
    return ""


if __name__ == "__main__":
    try:
        why = main(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:  # whatever it is, the caller gets one line
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    sys.stderr.write(why)
    sys.exit(1 if why else 0)
