"""What a checkpoint says of its tokenizer, for those who make and cut the token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from moorage_models.headers import read_json
from moorage_models.sources import Repository
from moorage_models.sources.source import within

_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.*",
)

# A description of a model goes to everybody, again and again: it stays small.
_MAX_ID = 2**31 - 1
_MAX_ENDS, _MAX_FILES, _MAX_NAME_BYTES = 256, 64, 255


@dataclass(frozen=True)
class TokenizerFacts:
    """What a checkpoint says of its tokenizer.

    Attributes:
        files: The tokenizer's files, relative to the checkpoint; of very many, the first.
        bos_id: The token that begins a sequence.
        eos_ids: Every token that ends one, up to 256; the configuration's own first.
        pad_id: The token that pads.
        has_chat_template: Whether there is a chat template.
    """

    files: tuple[str, ...] = ()
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    has_chat_template: bool = False


def read_tokenizer_facts(repository: Repository) -> TokenizerFacts:
    """Reads `config.json`, `generation_config.json` and `tokenizer_config.json`, as they are there.

    Raises:
        ModelError: CHECKPOINT_CORRUPT if one of them is not a JSON object.
    """
    config, generation, tokenizer = (
        read_json(repository, name) if name in repository.files else {}
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    files = sorted(filter(_is_shown, repository.files))[:_MAX_FILES]
    separate = any(name.startswith("chat_template.") for name in repository.files)
    ends = [*_ids(config, "eos_token_id"), *_ids(generation, "eos_token_id")]
    return TokenizerFacts(
        files=tuple(files),
        bos_id=_first("bos_token_id", generation, config),
        eos_ids=tuple(dict.fromkeys(ends))[:_MAX_ENDS],
        pad_id=_first("pad_token_id", generation, config),
        has_chat_template=separate or "chat_template" in tokenizer,
    )


def _is_shown(name: str) -> bool:
    """Whether a file is a tokenizer's, and its name can be told: it need not be text."""
    shown = within(name) and len(name.encode()) <= _MAX_NAME_BYTES
    return shown and any(fnmatch(name, pattern) for pattern in _FILES)


def _ids(raw: Mapping[str, Any], key: str) -> list[int]:
    """The ids under a key of a file or of its `text_config`: one, a list, or none."""
    inner = raw.get("text_config")
    value = raw.get(key, inner.get(key) if isinstance(inner, dict) else None)
    values = value if isinstance(value, list) else [value]
    return [i for i in values if type(i) is int and 0 <= i <= _MAX_ID]


def _first(key: str, *raws: Mapping[str, Any]) -> int | None:
    return next((i for raw in raws for i in _ids(raw, key)), None)
