"""What owns the mesh, behind one protocol that takes and gives dataclasses and numpy."""

from moorage_server.engine.api import (
    Answers,
    Batch,
    Bucket,
    Device,
    Engine,
    EngineInfo,
    Need,
    Probe,
    Question,
)

__all__ = [
    "Answers",
    "Batch",
    "Bucket",
    "Device",
    "Engine",
    "EngineInfo",
    "Need",
    "Probe",
    "Question",
]
