"""Which stream a foreign dictionary reads: heads of layer L read resid_pre.L, and resid_post.L is resid_pre.(L+1)."""

from __future__ import annotations

import re
from pathlib import Path

from qklens.errors import QklensError

_RESIDUAL = re.compile(r"blocks\.(\d{1,4})\.hook_resid_(pre|post)")
_OUTPUT = re.compile(r"(?:model\.|transformer\.|gpt_neox\.)?(?:layers|h)\.(\d{1,4})(?:\.output)?")


def reading_layer(hook: str, path: Path) -> int:
    """The layer L whose resid_pre.L a hook point is.

    Args:
        hook: `blocks.L.hook_resid_pre`, `blocks.L.hook_resid_post`, or a layer's output, `model.layers.L.output`.
        path: the file that names it, for errors.

    Raises:
        QklensError: any other site (attention, MLP, a middle of a block, an embedding), or text that is none.
    """
    if match := _RESIDUAL.fullmatch(hook):
        return int(match[1]) + (match[2] == "post")
    if match := _OUTPUT.fullmatch(hook):
        return int(match[1]) + 1
    raise QklensError(
        f"{path}: reads {hook[:80]!r}, which is not the stream that heads read; expected resid_pre.L or resid_post.L, "
        "as blocks.L.hook_resid_post or model.layers.L.output"
    )


def agreed_layer(recorded: int | None, given: int | None, path: Path, why: str) -> int:
    """The layer that files record, or that the user gives where they record none.

    Args:
        recorded: what the files say.
        given: what `--layer` says.
        path: the file or folder, for errors.
        why: what is missing from it.

    Raises:
        QklensError: neither, or both and they differ.
    """
    if recorded is not None and given is not None and recorded != given:
        raise QklensError(
            f"{path}: records a dictionary of resid_pre.{recorded}, --layer says {given}; leave --layer out"
        )
    layer = recorded if recorded is not None else given
    if layer is None:
        raise QklensError(
            f"{path}: {why}; run `qklens dict convert` with --layer L, where it reads resid_pre.L (resid_post.L is "
            "resid_pre.L+1)"
        )
    return layer
