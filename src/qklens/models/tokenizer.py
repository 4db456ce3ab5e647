"""The tokenizer of a model: a fast one, because spans come from its character offsets."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qklens.errors import QklensError, reason
from qklens.files import read_json
from qklens.models.checkpoint import Checkpoint


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model; nothing is fetched and no code of the directory runs.

    Raises:
        QklensError: a tokenizer file that is not a JSON object, none that can be used, or one without offsets.
    """
    path = checkpoint.path
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = read_json(path / name) if (path / name).is_file() else {}
        if not isinstance(content, dict):
            raise QklensError(
                f"{path / name}: holds a {type(content).__name__}, expected a JSON object; download it again"
            )
        for key in ("auto_map", "fast_tokenizer_files"):
            if content.get(key):
                raise QklensError(
                    f"{path / name}: key {key!r} asks for other code or files; remove it to load the model"
                )
    where, options = checkpoint.source
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises many kinds here; all mean the same to the user
        raise QklensError(
            f"{path}: no usable tokenizer ({reason(error)}); expected tokenizer.json and tokenizer_config.json as "
            "transformers writes them"
        ) from error
    if not tokenizer.is_fast:
        raise QklensError(
            f"{path}: tokenizer {type(tokenizer).__name__} gives no character offsets; expected a fast tokenizer "
            "(tokenizer.json): convert it with transformers"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer
