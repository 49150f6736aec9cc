"""The servicer of NamingService: what names mean, and whether it can be loaded."""

from __future__ import annotations

from typing import Any

import grpc.aio

from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc
from moorage_models.checkpoint import name_of
from moorage_models.errors import ModelError
from moorage_models.families import FAMILIES, PRESETS
from moorage_models.naming import ModelNaming, find_preset
from moorage_models.plan import Plan, preset_plan
from moorage_server import convert
from moorage_server.cache import ModelCache
from moorage_server.calls import caller
from moorage_server.engine import Engine

Context = grpc.aio.ServicerContext[Any, Any]


class NamingService(pb_grpc.NamingServiceServicer):
    """What names mean."""

    def __init__(self, cache: ModelCache, engine: Engine) -> None:
        self._cache = cache
        self._engine = engine

    async def ResolveName(  # noqa: N802
        self, request: pb.ResolveNameRequest, context: Context
    ) -> pb.ResolveNameResponse:
        """Naming attributes, and with a source whether it can be loaded."""
        wanted = convert.to_request(request.model)
        preset = _preset(request.model.model_id)
        if request.check_source or (request.estimate and preset is None):
            try:
                checkpoint = await self._cache.looks.look(wanted, caller().name)
            except ModelError as error:
                return _refused(request.model.model_id, error)
            response, plan = convert.loadable(checkpoint), checkpoint.plan
        else:
            naming = ModelNaming(model_id=request.model.model_id)
            response = pb.ResolveNameResponse(
                name=convert.to_name(naming, request.model.model_id),
                checked=["name"] + ["preset"] * (preset is not None),
                loadable=True,
            )
            if preset is None:
                return response
            response.config.CopyFrom(convert.to_config(preset))
            plan = preset_plan(preset, request.model.dtype)
        if request.estimate:
            self._estimate(plan, wanted.compute_dtype or plan.dtype, response)
        return response

    def _estimate(
        self, plan: Plan[Any], compute_dtype: str, response: pb.ResolveNameResponse
    ) -> None:
        """Says what a load would take, find and evict."""
        need, budget = self._engine.need(plan, compute_dtype), self._cache.budget
        devices = {device.id: need.weights for device in self._engine.info().devices}
        response.device_bytes.extend(convert.to_device_bytes(devices))
        evicted = self._cache.estimate(need)
        response.budget.CopyFrom(
            pb.BudgetEstimate(
                needed_bytes=need.weights + need.temporaries,
                free_bytes=budget.capacity - budget.reserved(),
                fits=evicted is not None,
                evicted=evicted or (),
            )
        )

    async def ListSupportedModels(  # noqa: N802
        self, request: pb.ListSupportedModelsRequest, context: Context
    ) -> pb.ListSupportedModelsResponse:
        """Every preset."""
        return pb.ListSupportedModelsResponse(
            models=[
                pb.SupportedModel(
                    model_config_id=name,
                    model_config_category=FAMILIES[config.family].category,
                    config=convert.to_config(config),
                )
                for name, config in sorted(PRESETS.items())
            ]
        )


def _preset(model_id: str) -> Any:
    naming = name_of(model_id)
    return find_preset(naming.model_config_id) if naming else None


def _refused(model_id: str, error: ModelError) -> pb.ResolveNameResponse:
    return pb.ResolveNameResponse(
        name=convert.to_name(name_of(model_id), model_id),
        checked=["name", "source"],
        reason=str(error.reason),
        message=error.message,
    )
