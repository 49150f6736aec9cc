"""Names, checkpoints and the decoder of moorage: everything that needs no server."""

from moorage_models.automodel import AutoModel, create_model_from_safe_tensors
from moorage_models.config import ModelConfig, RopeScaling
from moorage_models.decoder import Decoder
from moorage_models.errors import ModelError, Reason
from moorage_models.export import save_pretrained
from moorage_models.naming import ModelNaming
from moorage_models.sources import ModelSource

__all__ = [
    "AutoModel",
    "Decoder",
    "ModelConfig",
    "ModelError",
    "ModelNaming",
    "ModelSource",
    "Reason",
    "RopeScaling",
    "create_model_from_safe_tensors",
    "save_pretrained",
]
