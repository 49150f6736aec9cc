"""Names: from an id or a name to the family, the version and the preset.

An id that has `-` or `.` is in Hugging Face style (`google/gemma-2-2b-it`); one that has only
`_` is a config id (`gemma2_2b_it`). A name that parses is not yet a model that exists.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from moorage_models.config import ModelConfig
from moorage_models.errors import ModelError, Reason
from moorage_models.families import FAMILIES, PRESETS

MAX_ID_LENGTH = 256

#: Shorter ids that mean a preset.
ALIASES = {
    "gemma3_1b": "gemma3_1b_pt",
    "gemma3_4b": "gemma3_4b_pt",
    "gemma3_12b": "gemma3_12b_pt",
    "gemma3_27b": "gemma3_27b_pt",
    "qwen3_30b": "qwen3_30b_a3b",
}

# How names begin, longest first, with the family's standard name and category. A beginning's
# last character is its style's separator.
_BEGINNINGS = sorted(
    (
        (beginning, prefix.family, family.category)
        for family in FAMILIES.values()
        for prefix in family.prefixes
        for beginning in (*prefix.hf, f"{prefix.family}_")
    ),
    key=lambda row: -len(row[0]),
)


@dataclass(frozen=True)
class ModelNaming:
    """The six names of a model; give an id or a name, and the others follow.

    Attributes:
        model_id: A Hugging Face id, a Kaggle handle or a config id; None if only a name was
            given.
        model_name: The id's last segment in lower case, for example `llama-3.1-8b`.
        model_family: The standard family, for example `llama3p1`.
        model_version: What follows the family, for example `8b`.
        model_config_category: The class of configurations, for example `llama3`.
        model_config_id: `<family>_<version>`, for example `llama3p1_8b`.

    Raises:
        ModelError: MODEL_ID_UNPARSEABLE or MODEL_FAMILY_UNKNOWN, with the nearest preset ids in
            `details["nearest"]`; INVALID_REQUEST if a given attribute is not the derived one.
    """

    model_id: str | None = None
    model_name: str = ""
    model_family: str = ""
    model_version: str = ""
    model_config_category: str = ""
    model_config_id: str = ""

    def __post_init__(self) -> None:
        start = self.model_name if self.model_id is None else self.model_id
        _check_text(start)
        name = start if self.model_id is None else _name_of(start)
        family, version, category = _parse(name)
        derived = {
            "model_name": name,
            "model_family": family,
            "model_version": version,
            "model_config_category": category,
            "model_config_id": f"{family}_{version}",
        }
        for attribute, value in derived.items():
            given = getattr(self, attribute)
            if given and given != value:
                raise ModelError(
                    Reason.INVALID_REQUEST,
                    f"{attribute} is given as {given!r}, but {start!r} makes it {value!r}; "
                    f"leave {attribute} out or make the two agree",
                )
            object.__setattr__(self, attribute, value)


def find_preset(config_id: str) -> ModelConfig | None:
    """The preset of a config id or an alias, if there is one."""
    return PRESETS.get(ALIASES.get(config_id, config_id))


def preset_for(config_id: str) -> ModelConfig:
    """The preset of a config id.

    Args:
        config_id: A key of `PRESETS` or of `ALIASES`.

    Raises:
        ModelError: CONFIG_UNKNOWN, with the nearest preset ids in `details["nearest"]`.
    """
    preset = find_preset(config_id)
    if preset is None:
        raise _refusal(
            Reason.CONFIG_UNKNOWN,
            config_id,
            "has no preset; a checkpoint with a config.json needs none",
        )
    return preset


def nearest(text: str, n: int = 3) -> list[str]:
    """At most `n` preset ids that are like an id or a name, the most alike first."""
    name = _standard(text.rsplit("/", 1)[-1][:MAX_ID_LENGTH].lower())
    return difflib.get_close_matches(name, list(PRESETS), n, cutoff=0.4)


def _standard(text: str) -> str:
    return text.replace("-", "_").replace(".", "p")


def _separator(text: str) -> str | None:
    """The separator of the style that a text is in, or None if it is in neither."""
    if "-" in text or "." in text:
        return "-"
    return "_" if "_" in text else None


def _check_text(text: str) -> None:
    """Refuses what cannot be an id or a name, whatever its style."""
    if not text:
        problem = "is empty; give model_id or model_name"
    elif len(text) > MAX_ID_LENGTH:
        problem = f"has {len(text)} characters; the longest id has {MAX_ID_LENGTH}"
    elif not text.isprintable():
        problem = "has characters that cannot be printed; remove them"
    else:
        return
    raise _refusal(Reason.MODEL_ID_UNPARSEABLE, text, problem)


def _name_of(model_id: str) -> str:
    """The model name in an id."""
    name = model_id.rsplit("/", 1)[-1].lower()
    if not name:
        raise _refusal(Reason.MODEL_ID_UNPARSEABLE, model_id, "ends before the model's name")
    if _separator(model_id) is None:
        raise _no_style(model_id)
    return name.removeprefix("meta-") if name.startswith("meta-llama-") else name


def _parse(name: str) -> tuple[str, str, str]:
    """Family, version and category of a name."""
    separator, lowered = _separator(name), name.lower()
    if separator is None:
        raise _no_style(name)
    for beginning, family, category in _BEGINNINGS:
        if beginning.endswith(separator) and lowered.startswith(beginning):
            rest = lowered.removeprefix(beginning).lstrip("-")
            return family, _version(name, rest), category
    style = "in Hugging Face style" if separator == "-" else "as a config id"
    raise _refusal(
        Reason.MODEL_FAMILY_UNKNOWN,
        name,
        f"is of no known family, read {style}; a checkpoint with a config.json needs none",
    )


def _version(name: str, rest: str) -> str:
    version = _standard(rest)
    if not version[:1].isalnum():
        raise _refusal(
            Reason.MODEL_ID_UNPARSEABLE,
            name,
            f"has the version {version!r}; a version begins with a letter or a digit",
        )
    return version


def _no_style(text: str) -> ModelError:
    return _refusal(
        Reason.MODEL_ID_UNPARSEABLE,
        text,
        "is neither in Hugging Face style (it has no '-' or '.') nor a config id (it has no '_')",
    )


def _refusal(reason: Reason, text: object, problem: str) -> ModelError:
    ids = nearest(text) if isinstance(text, str) else []
    hint = f"; the nearest known ids are {', '.join(ids)}" if ids else ""
    return ModelError(
        reason, f"{repr(text)[:MAX_ID_LENGTH]} {problem}{hint}", nearest=",".join(ids)
    )
