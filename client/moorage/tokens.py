"""Token ids out of text, by the tokenizers package (`moorage[text]`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moorage.errors import NotFound, Unsupported


def encode(
    texts: Sequence[str], model_id: str, tokenizer: str | None = None
) -> tuple[list[list[int]], list[list[str]]]:
    """Turns texts into token ids, special tokens included.

    Args:
        texts: The texts.
        model_id: Names the tokenizer on the Hugging Face Hub.
        tokenizer: A tokenizer.json or a folder that holds one, in place of the Hub's.

    Returns:
        The ids and the tokens of each text.

    Raises:
        Unsupported: The tokenizers package is not installed.
        NotFound: There is no such tokenizer.
    """
    encodings = _tokenizer(model_id, tokenizer).encode_batch(list(texts))
    return [e.ids for e in encodings], [e.tokens for e in encodings]


def _tokenizer(model_id: str, path: str | None) -> Any:
    try:
        from tokenizers import Tokenizer  # optional, and slow to import
    except ImportError as error:
        raise Unsupported(
            'text needs the tokenizers package: pip install "moorage[text]"'
        ) from error
    file = Path(path) if path else None
    if file and file.is_dir():
        file /= "tokenizer.json"
    try:
        return Tokenizer.from_file(str(file)) if file else Tokenizer.from_pretrained(model_id)
    except Exception as error:  # tokenizers raises plain Exception
        raise NotFound(
            f"no tokenizer at {file or model_id} ({error}); name a tokenizer.json, or a folder "
            "that holds one, by --tokenizer"
        ) from error
