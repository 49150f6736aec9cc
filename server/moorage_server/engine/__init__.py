"""What owns the mesh, behind one protocol that takes and gives dataclasses and numpy."""

from moorage_server.engine.api import Batch, Bucket, Device, Engine, EngineInfo, Need

__all__ = ["Batch", "Bucket", "Device", "Engine", "EngineInfo", "Need"]
