"""Eight CPU devices, shape annotations checked at run time, and the golden checkpoints."""

from __future__ import annotations

import gc
import os

# Before jax is imported anywhere.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from jaxtyping import install_import_hook

install_import_hook(["moorage_models", "moorage_server"], "beartype.beartype")

from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden() -> Path:
    return GOLDEN


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """What was there before a module is not looked through in each collection of its tests."""
    gc.collect()
    gc.freeze()
