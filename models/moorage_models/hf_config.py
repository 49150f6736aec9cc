"""Reads a `config.json` in the spellings of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moorage_models.config import GLOBAL, LOCAL, ModelConfig, RopeScaling
from moorage_models.errors import ModelError, Reason
from moorage_models.families import FAMILIES, Family

Raw = Mapping[str, Any]

#: Keys of `config.json` and the fields that they fill as they are.
FIELDS = {
    "num_hidden_layers": "num_layers",
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "intermediate_size": "hidden_dim",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied",
    "attn_logit_softcapping": "attn_softcap",
    "final_logit_softcapping": "final_softcap",
    "num_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "expert_hidden_dim",
    "norm_topk_prob": "norm_topk",
    "max_position_embeddings": "max_position",
}

#: What transformers 5 calls some of them.
_SYNONYMS = {"num_local_experts": "num_experts"}

#: Keys that change the arithmetic, and the values under which ours is exact.
_EXACT: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "use_bidirectional_attention": (False, None),
    "partial_rotary_factor": (1, None),
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
}

#: Keys that hold whole numbers from one, and the most that is believed of each.
_COUNTS: Mapping[str, int] = {
    **dict.fromkeys(FIELDS, 2**31 - 1),
    **dict.fromkeys(("num_hidden_layers", "num_experts"), 4096),
    **dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern"), 4096),
    "sliding_window": 2**31 - 1,
}
_NUMBERS = {
    "rms_norm_eps",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
}
_SWITCHES = {"tie_word_embeddings", "norm_topk_prob"}
#: Keys for which null is a value.
_NULLABLE = {
    "num_key_value_heads",
    "head_dim",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "sliding_window",
    "sliding_window_pattern",
    "_sliding_window_pattern",
}

#: What two keys cannot say together.
_CONFLICTS: Mapping[str, Callable[[ModelConfig], bool]] = {
    "num_key_value_heads does not divide num_attention_heads": (
        lambda c: c.num_heads % c.num_kv_heads != 0
    ),
    "head_dim is odd": lambda c: c.head_dim % 2 != 0,
    "num_experts_per_tok is more than num_experts": (
        lambda c: 0 < c.num_experts < c.experts_per_token
    ),
    "sliding_window is missing": lambda c: LOCAL in c.layer_kinds and c.window is None,
    "num_hidden_layers times num_experts is above 131072": (
        lambda c: c.num_layers * c.num_experts > 1 << 17  # each is looked for by name
    ),
    "there are more than 2^56 parameters": lambda c: c.num_parameters > 1 << 56,
}

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
LAYER_KINDS = {"sliding_attention": LOCAL, "full_attention": GLOBAL}


def read_config(raw: Raw) -> ModelConfig:
    """The configuration that a `config.json` describes.

    Args:
        raw: The parsed file.

    Returns:
        The text decoder's configuration.

    Raises:
        ModelError: CHECKPOINT_UNSUPPORTED with everything that cannot be run exactly;
            CHECKPOINT_CORRUPT if a value has the wrong type.
    """
    try:
        family = _family(raw)
        text = _text(raw, family)
        if damage := list(_damage(text)):
            raise ValueError("; ".join(damage))
        problems = [
            f"{key} = {text[key]!r}"
            for key, exact in _EXACT.items()
            if key in text and text[key] not in exact
        ]
        fields, more = _read(text, family)
        problems += more
        if problems:
            raise _unsupported("; ".join(problems))
        config = ModelConfig(**{**fields, **family.switches})
        if conflicts := [what for what, holds in _CONFLICTS.items() if holds(config)]:
            raise ValueError("; ".join(conflicts))
        return config
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ModelError(
            Reason.CHECKPOINT_CORRUPT, f"config.json has a value of the wrong kind: {error}"
        ) from error


def _family(raw: Raw) -> Family:
    architecture = _architecture(raw)
    for family in FAMILIES.values():
        if architecture in family.architectures:
            return family
    known = ", ".join(a for family in FAMILIES.values() for a in family.architectures)
    raise _unsupported(f"architecture {architecture}; the architectures that are known: {known}")


def _architecture(raw: Raw) -> str:
    return str((raw.get("architectures") or ["none"])[0])


def _text(raw: Raw, family: Family) -> dict[str, Any]:
    """The text decoder's part, over the family's defaults, with the whole file's own keys."""
    text = raw.get("text_config") or raw
    whole = {k: raw[k] for k in ("architectures", "id2label", "quantization_config") if k in raw}
    defaults = {**family.defaults, **family.architecture_defaults.get(_architecture(raw), {})}
    text = {_SYNONYMS.get(key, key): value for key, value in text.items()}
    return {**defaults, **text, **whole}


def _damage(text: Raw) -> Iterator[str]:
    """The keys whose values have the wrong type or are out of any range."""
    for key in text.keys() & (_COUNTS.keys() | _NUMBERS | _SWITCHES):
        value = text[key]
        if key in _SWITCHES:
            good = isinstance(value, bool)
        elif key in _NUMBERS:
            good = _is_number(value)
        else:
            good = type(value) is int and 0 < value <= _COUNTS[key]
        if not good and not (value is None and key in _NULLABLE):
            yield f"{key} = {value!r:.40}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and 0 < value < 1e30


def _number(given: Raw, key: str) -> float:
    if not _is_number(given[key]):
        raise ValueError(f"{key} = {given[key]!r:.40}")
    return float(given[key])


def _read(text: Raw, family: Family) -> tuple[dict[str, Any], list[str]]:
    """The config's fields, and what cannot be run exactly."""
    fields = {field: text[key] for key, field in FIELDS.items() if key in text}
    fields["num_kv_heads"] = fields.get("num_kv_heads") or fields["num_heads"]
    fields["head_dim"] = fields.get("head_dim") or fields["embed_dim"] // fields["num_heads"]
    if "query_pre_attn_scalar" in text:
        fields["query_scale"] = text["query_pre_attn_scalar"] ** -0.5
    if _architecture(text).endswith("ForSequenceClassification"):
        fields |= {"num_labels": len(text.get("id2label") or (0, 1)), "tied": False}
    windows, problems = _windows(text, family)
    ropes, more = _ropes(text)
    problems += more
    # An empty hidden_activation means the family's: Gemma 1 was published so.
    given = text.get("hidden_activation") or family.defaults.get("hidden_activation")
    activation = given or text.get("hidden_act")
    if ACTIVATIONS.get(str(activation)) != family.switches.get("activation", "silu"):
        problems.append(f"activation {activation!r}")
    return {**fields, **windows, **ropes}, problems


def _windows(text: Raw, family: Family) -> tuple[dict[str, Any], list[str]]:
    """Window and pattern of the layers."""
    layers, types = text["num_hidden_layers"], text.get("layer_types")
    every = text.get("sliding_window_pattern") or text.get("_sliding_window_pattern")
    if types is not None:
        pattern = "".join(LAYER_KINDS.get(kind, "?") for kind in types)
        if "?" in pattern or len(pattern) != layers:
            return {}, [f"layer_types {sorted(set(types))} for {layers} layers"]
    elif every:
        pattern = (LOCAL * (every - 1) + GLOBAL) * layers
    else:
        pattern = GLOBAL
    if LOCAL not in pattern[:layers]:
        return {"pattern": GLOBAL}, []
    if "sliding_window_pattern" not in family.defaults:
        return {}, [f"sliding windows in the {family.name} family"]
    return {"pattern": pattern[:layers], "window": text["sliding_window"]}, []


def _ropes(text: Raw) -> tuple[dict[str, Any], list[str]]:
    """Rotary bases and scaling of global and local layers."""
    given = text.get("rope_parameters") or {}
    nested = any(isinstance(value, Mapping) for value in given.values())
    glob: Raw = (given.get("full_attention") if nested else given or text.get("rope_scaling")) or {}
    local: Raw = (given.get("sliding_attention") or {}) if nested else {}
    fields: dict[str, Any] = {"rope_theta": _number({**text, **glob}, "rope_theta")}
    if "rope_local_base_freq" in text:
        theta = text["rope_local_base_freq"]
        fields["rope_local_theta"] = _number({"rope_theta": theta, **local}, "rope_theta")
    problems = []
    for field, rope in (("rope_scaling", glob), ("rope_local_scaling", local)):
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if rope.get("partial_rotary_factor") not in (1, None):
            problems.append(f"partial_rotary_factor = {rope['partial_rotary_factor']!r}")
        if kind not in _SCALINGS:
            problems.append(f"rotary type {kind!r}")
        elif scaling := _SCALINGS[kind](rope):
            fields[field] = scaling
    return fields, problems


def _llama3(rope: Raw) -> RopeScaling:
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    if low >= high:
        raise ValueError("high_freq_factor is not above low_freq_factor")
    length = int(_number(rope, "original_max_position_embeddings"))
    return RopeScaling("llama3", _number(rope, "factor"), low, high, length)


_SCALINGS: Mapping[str, Callable[[Raw], RopeScaling | None]] = {
    "default": lambda _: None,
    "linear": lambda rope: RopeScaling("linear", _number(rope, "factor")),
    "llama3": _llama3,
}


def _unsupported(what: str) -> ModelError:
    return ModelError(
        Reason.CHECKPOINT_UNSUPPORTED, f"this checkpoint cannot be run exactly: {what}", what=what
    )
