"""The table of families. Adding a family is one file and one entry here."""

from __future__ import annotations

from moorage_models.config import ModelConfig
from moorage_models.families import gemma, gemma2, gemma3, llama3, qwen2, qwen3
from moorage_models.families.family import Family, Prefix

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (gemma, gemma2, gemma3, llama3, qwen2, qwen3)
}

PRESETS: dict[str, ModelConfig] = {
    name: config for family in FAMILIES.values() for name, config in sorted(family.presets.items())
}

__all__ = ["FAMILIES", "PRESETS", "Family", "Prefix"]
