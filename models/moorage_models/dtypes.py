"""The dtypes that checkpoints are stored in and models computed in, by their numpy names."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from moorage_models.errors import ModelError, Reason

#: Bytes of one value.
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """A dtype by its numpy name; `bfloat16` is ml_dtypes'."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def check_dtype(name: str) -> None:
    """Refuses a dtype that parameters cannot have; an empty name stands for a default.

    Raises:
        ModelError: INVALID_REQUEST.
    """
    if name and name not in ITEM_BYTES:
        raise ModelError(
            Reason.INVALID_REQUEST, f"dtype {name!r} is none of {', '.join(ITEM_BYTES)}"
        )
