"""A checkpoint that was looked into: what it is, and the plan to load it. No weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moorage_models.config import ModelConfig
from moorage_models.dtypes import check_dtype
from moorage_models.errors import ModelError
from moorage_models.headers import read_headers, read_json
from moorage_models.hf_config import read_config
from moorage_models.monitor import LoadMonitor
from moorage_models.naming import ModelNaming, preset_for
from moorage_models.orbax_plan import find_orbax, open_tree, tree_files
from moorage_models.plan import Plan, make_plan, preset_plan
from moorage_models.provenance import claims_of, combine
from moorage_models.sources import ModelRequest, Policy, Repository, open_repository
from moorage_models.tokenizer_facts import TokenizerFacts, read_tokenizer_facts


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, resolved.

    Attributes:
        request: What was asked for.
        repository: Where the files are.
        naming: The naming attributes; None for an id that follows no rule, which only labels.
        plan: The plan of its load.
        orbax: Where below the repository the Orbax checkpoint is; None for safetensors.
        compute_dtype: Dtype of the arithmetic.
        tokenizer: What it says of its tokenizer.
        preset_differences: Where the checkpoint's config differs from the preset of its id.
        claims: What is known of the weights' files and the config, by name; see `provenance`.
    """

    request: ModelRequest
    repository: Repository
    naming: ModelNaming | None
    plan: Plan[Any]
    compute_dtype: str
    tokenizer: TokenizerFacts = field(default_factory=TokenizerFacts)
    preset_differences: tuple[str, ...] = ()
    orbax: str | None = None
    claims: Mapping[str, str] = field(default_factory=dict)

    @property
    def weights_digest(self) -> str:
        """A digest over the files that the plan reads and the config: the same while those are.

        It begins with what it is made from: `content:` for the files' bytes, `hub:` for digests
        that a hub states, `revision:` for a hub's place and revision, where it states none, and
        `stat:` for sizes, times of change and headers. Under `Policy.verify` what would be `stat:`
        or `revision:` is `content:` once the files were read, at the end of a load. Made anew on
        each call; empty if nothing was looked into, as for a tree that was not fetched.
        """
        read = {n: f"content:sha256:{d}" for n, d in self.repository.contents.items()}
        known = {name: read.get(name, claim) for name, claim in self.claims.items()}
        return combine(self.repository.files, known)

    @property
    def config(self) -> ModelConfig:
        """The decoder's configuration."""
        return self.plan.config


def open_checkpoint(
    request: ModelRequest,
    policy: Policy | None = None,
    config: ModelConfig | None = None,
    *,
    fetch_tree: bool = True,
    monitor: LoadMonitor | None = None,
) -> Checkpoint:
    """Looks into a source and plans a load, from metadata and headers alone.

    An Orbax tree on a hub is the exception: its shapes lie among its weights, so it is fetched,
    once its id is known to have a configuration.

    Args:
        request: What is wanted.
        policy: What may be read; None allows everything.
        config: Overrides the checkpoint's own configuration.
        fetch_tree: Whether an Orbax tree may be fetched; if not, its plan is that of the
            configuration.
        monitor: Told of the bytes of such a fetch; may cancel it.

    Raises:
        ModelError: Whatever stands in the way of a load, with the reason.
    """
    for dtype in (request.dtype, request.compute_dtype):
        check_dtype(dtype)
    repository = open_repository(request, policy or Policy())
    naming = name_of(request.model_id)
    differences: list[str] = []
    if config is None and "config.json" in repository.files:
        config = read_config(read_json(repository, "config.json"))
        differences = _cross_check(config, naming)
    orbax = find_orbax(repository)
    tensors = read_headers(repository) if orbax is None else {}
    if config is None:
        config = preset_for(ModelNaming(model_id=request.model_id).model_config_id)
    if orbax is not None and repository.local is None and fetch_tree:
        repository.fetch(tree_files(repository, orbax), monitor or LoadMonitor())
        pinned = replace(request, revision=repository.revision)
        repository = open_repository(pinned, policy or Policy())
    plan: Plan[Any]
    if orbax is not None and repository.local is None:
        plan = preset_plan(config, request.dtype)
    elif orbax is None:
        plan = make_plan(config, tensors, request.dtype)
    else:
        plan = open_tree(repository, orbax, config, naming, request)
        differences += plan.config.differences(config)
    compute = request.compute_dtype or plan.dtype
    facts = read_tokenizer_facts(repository)
    return Checkpoint(
        request,
        repository,
        naming,
        plan,
        compute,
        facts,
        tuple(differences),
        orbax,
        claims_of(repository, plan.files),
    )


def name_of(model_id: str) -> ModelNaming | None:
    """The naming attributes of an id, or None if it follows no rule."""
    try:
        return ModelNaming(model_id=model_id)
    except ModelError:
        return None


def _cross_check(config: ModelConfig, naming: ModelNaming | None) -> list[str]:
    try:
        preset = preset_for(naming.model_config_id) if naming else None
    except ModelError:
        preset = None
    return config.differences(preset) if preset else []
