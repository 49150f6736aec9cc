"""moorage: a thin client for a server that keeps language models loaded on a TPU host.

    import moorage

    with moorage.connect("tpu-host:8470") as client:
        model = client.load("google/gemma-2-2b-it")
        scores = model.forward([[2, 651, 5277], [2, 1841]])
        scores.logprobs[0]  # float32, one per token of row 0; the first is NaN

`moorage.aio.connect` gives the same for asyncio. Every exception is a `moorage.Error`.
"""

import os

# Read by gRPC as it is imported: it writes of each connection that ends, across bars and JSON logs.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from moorage import aio
from moorage.answers import Change, Lease, LoadProgress, Model, Stage
from moorage.client import Client, connect
from moorage.credentials import Tls
from moorage.errors import (
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    Error,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    MessageTooLarge,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from moorage.naming import BudgetEstimate, Config, Resolution, SupportedModel
from moorage.options import ForwardOptions
from moorage.scores import Scores, Semantics, Times
from moorage.server_info import (
    Activity,
    Device,
    Limits,
    Memory,
    OutputProfile,
    ParameterLayout,
    ServerInfo,
)

__version__ = "0.1.0"

__all__ = [
    "Activity",
    "BudgetEstimate",
    "Cancelled",
    "Change",
    "Client",
    "Config",
    "DataLoss",
    "DeadlineExceeded",
    "Device",
    "Error",
    "FailedPrecondition",
    "ForwardOptions",
    "InternalError",
    "InvalidRequest",
    "Lease",
    "Limits",
    "LoadProgress",
    "Memory",
    "MessageTooLarge",
    "Model",
    "NotFound",
    "OutputProfile",
    "ParameterLayout",
    "PermissionDenied",
    "Resolution",
    "ResourceExhausted",
    "Scores",
    "Semantics",
    "ServerInfo",
    "Stage",
    "SupportedModel",
    "Times",
    "Tls",
    "Unauthenticated",
    "Unavailable",
    "Unsupported",
    "aio",
    "connect",
]
