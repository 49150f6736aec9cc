"""What a name means: the answers of the naming service, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """The numbers of a decoder, as the wire's ConfigSummary names them; a tied head counts once."""

    family: str
    num_layers: int
    vocab_size: int
    embed_dim: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_parameters: int


@dataclass(frozen=True)
class BudgetEstimate:
    """Whether a model would fit beside those that are loaded.

    Attributes:
        needed_bytes: What it would reserve on each device: its parameters, and what its largest
            program takes while it runs.
        free_bytes: What nobody has reserved on each device.
        fits: Whether it could be loaded now, after evictions if need be.
        evicted: The handles of the models that would be evicted for it.
    """

    needed_bytes: int
    free_bytes: int
    fits: bool
    evicted: tuple[str, ...]


@dataclass(frozen=True)
class Resolution:
    """What a name means; a naming attribute that no rule can give is "".

    Attributes:
        checked: What was checked, in order: "name", "preset", "source", "config", "headers".
        loadable: Whether nothing that was checked stands in the way of a load.
        reason: Why not, as in `Error.reason`, or "".
        message: Why not, and what would work, or "".
        config: From the checkpoint or the preset; None if neither is known.
        revision: The resolved commit, version or digest; "" if no source was looked into.
        device_bytes: Bytes by device id; empty unless asked for.
        preset_differences: Where the checkpoint's config.json differs from the preset.
        budget: What a load would find in device memory; None unless asked for.
    """

    model_id: str
    model_name: str
    model_family: str
    model_version: str
    model_config_category: str
    model_config_id: str
    checked: tuple[str, ...]
    loadable: bool
    reason: str
    message: str
    config: Config | None
    revision: str
    device_bytes: Mapping[int, int]
    preset_differences: tuple[str, ...]
    budget: BudgetEstimate | None


@dataclass(frozen=True)
class SupportedModel:
    """One preset: a config id that needs no config.json."""

    model_config_id: str
    model_config_category: str
    config: Config
