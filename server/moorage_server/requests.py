"""What is wanted of some rows, and which programs of the head give it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int, Int32

from moorage_models.config import ModelConfig
from moorage_server.engine import Bucket
from moorage_server.engine.outputs import About, Profile, choose
from moorage_server.errors import Reason, ServerError
from moorage_server.rows import Rows, check_rows

#: The largest answer, in bytes.
MAX_OUTPUT_BYTES = 1 << 30

_COLDEST = 1e-30  # logits of real models, divided by less, are not finite in float32

_NO_IDS = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Wanted:
    """What is wanted of some rows, and what it shall mean.

    Attributes:
        outputs: Names from the table of outputs.
        top_k: How many tokens a top-k gives.
        candidates: Tokens whose log-probabilities are wanted, all sets one after another.
        candidate_count: How many make one set; a single set is for every position.
        layer: After how many layers hidden states are wanted; None for after the final norm.
        positions: The tokens after which something is wanted, as indices into those of all rows;
            outputs about tokens go by `from_positions` only.
        from_positions: The first wanted position of each row, one for all rows, or none.
        temperature: The logits are divided by it.
        scales_logits: Whether the logits that are given are, too.
        first_value: What stands at the first token of a segment.
    """

    outputs: tuple[str, ...]
    top_k: int = 0
    candidates: Int32[np.ndarray, " c"] = field(default_factory=lambda: _NO_IDS)
    candidate_count: int = 0
    layer: int | None = None
    positions: Int32[np.ndarray, " p"] = field(default_factory=lambda: _NO_IDS)
    from_positions: Sequence[int] = ()
    temperature: float = 1.0
    scales_logits: bool = False
    first_value: float = math.nan

    @property
    def sizes(self) -> dict[str, int]:
        """The asked top-k and number of candidates, by output."""
        return {"top_k": self.top_k, "candidates": self.candidate_count}

    @property
    def has_whole_sets(self) -> bool:
        """Whether the candidates are sets of as many as is said; where nothing is wanted, none."""
        return self.candidate_count > 0 and self.candidates.size % self.candidate_count == 0


@dataclass(frozen=True)
class Part:
    """What is wanted of one program of the head.

    Attributes:
        profile: The program.
        names: The outputs that are wanted of it.
        temperature: The logits are divided by it.
        size: How many tokens of a top-k, or candidates, are wanted.
        offsets: Where each row's entries begin, and where the last one's end.
        after: The position in its row after which the head is asked; -1 where nothing can be said,
            as of the first token of a segment.
        targets: The token that is asked about.
        candidates: Other tokens that are asked about: a set for each entry, or one for all.
    """

    profile: Profile
    names: tuple[str, ...]
    temperature: float
    size: int
    offsets: Int[np.ndarray, " r"]
    after: Int32[np.ndarray, " n"]
    targets: Int32[np.ndarray, " n"]
    candidates: Int32[np.ndarray, "m c"]

    def of(self, row: int) -> slice:
        """The entries of a row."""
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))


def plan_parts(
    rows: Rows,
    wanted: Wanted,
    config: ModelConfig,
    buckets: Sequence[Bucket],
    profiles: Sequence[Profile],
) -> list[Part]:
    """Says which programs of the head are to be asked what; refuses what cannot be computed.

    Args:
        rows: The rows.
        wanted: What is wanted.
        config: The model's configuration.
        buckets: The compiled shapes.
        profiles: The programs that the model is served with.

    Raises:
        ServerError: TOKEN_OUT_OF_RANGE, SEQUENCE_TOO_LONG, OUTPUT_NOT_SERVED, OUTPUT_TOO_LARGE or
            INVALID_REQUEST.
    """
    check_rows(rows, config.vocab_size, buckets[-1].length)
    _check_wanted(rows, wanted, config)
    chosen = choose(wanted.outputs, wanted.sizes, profiles)
    if chosen is None:
        raise ServerError(
            Reason.OUTPUT_NOT_SERVED,
            f"{_described(wanted)} is not served; programs of this model are: "
            + ", ".join(profile.name for profile in profiles),
        )
    _check_positions(wanted, {profile.about for profile in chosen})
    parts = [_part(rows, wanted, profile, names) for profile, names in chosen.items()]
    size = sum(_bytes_of(part, config) for part in parts)
    if size > MAX_OUTPUT_BYTES:
        raise ServerError(
            Reason.OUTPUT_TOO_LARGE,
            f"the answer would have {size} bytes; the limit is {MAX_OUTPUT_BYTES}: send fewer "
            "rows, or ask for fewer positions",
            limit=str(MAX_OUTPUT_BYTES),
        )
    return parts


def _part(rows: Rows, wanted: Wanted, profile: Profile, names: tuple[str, ...]) -> Part:
    chosen = _chosen(rows, wanted, profile.about)
    after, targets = rows.at[chosen], rows.tokens[chosen]
    if profile.about is About.TOKEN:
        after = np.where(rows.begins[chosen], -1, after - 1)
    return Part(
        profile,
        names,
        _temperature(wanted, names),
        wanted.sizes.get(names[-1], 0),
        np.searchsorted(rows.row[chosen], np.arange(len(rows.lengths) + 1)),
        after.astype(np.int32),
        targets,
        _candidates(wanted, len(chosen)) if profile.candidates else np.zeros((1, 0), np.int32),
    )


def _temperature(wanted: Wanted, names: Collection[str]) -> float:
    """What the logits of some outputs are divided by: a score has no softmax."""
    is_raw = "logits" in names and not wanted.scales_logits
    return 1.0 if is_raw or "score" in names else wanted.temperature


def _chosen(rows: Rows, wanted: Wanted, about: About) -> Int[np.ndarray, " n"]:
    """The tokens that an output has values for, as indices into those of all rows."""
    if about is not About.TOKEN and wanted.positions.size:
        return wanted.positions.astype(np.int64)
    first = np.broadcast_to(np.array(wanted.from_positions or 0), len(rows.lengths))
    chosen = rows.at >= first[rows.row]
    if about is About.END:
        chosen &= np.append(rows.begins[1:], True)
    return np.flatnonzero(chosen)


def _candidates(wanted: Wanted, positions: int) -> Int32[np.ndarray, "m c"]:
    sets = wanted.candidates.reshape(-1, wanted.candidate_count)
    if len(sets) not in (1, positions):
        raise ServerError(
            Reason.INVALID_REQUEST,
            f"there are {len(sets)} sets of candidates for {positions} wanted positions; give one "
            "set for each, or one for all",
        )
    return sets


def _bytes_of(part: Part, config: ModelConfig) -> int:
    tensors = part.profile.tensors(part.names).values()
    each = sum(math.prod(tensor.width(config, part.size)) for tensor in tensors)
    return 4 * each * len(part.after)


def _described(wanted: Wanted) -> str:
    """`logprobs, top_k 200`."""
    sizes = wanted.sizes
    return ", ".join(f"{name} {sizes[name]}" if name in sizes else name for name in wanted.outputs)


def _check_positions(wanted: Wanted, asked: Set[About]) -> None:
    """Refuses what would be ignored: each output goes by its own kind of positions."""
    rules = {
        "positions are of hidden, logits and score, of which none is asked for: leave them out, or "
        "give from_positions": not wanted.positions.size or asked != {About.TOKEN},
        "from_positions are given beside positions, which say all of these outputs: leave one of "
        "them out": (
            not wanted.positions.size or not any(wanted.from_positions) or About.TOKEN in asked
        ),
    }
    _check_rules(rules)


def _check_rules(rules: Mapping[str, object]) -> None:
    for problem, holds in rules.items():
        if not holds:
            raise ServerError(Reason.INVALID_REQUEST, problem)


def _check_wanted(rows: Rows, wanted: Wanted, config: ModelConfig) -> None:
    """Refuses what contradicts itself, the rows or the model."""
    tokens, layers, vocabulary = len(rows.tokens), config.num_layers, config.vocab_size
    firsts, positions = wanted.from_positions, wanted.positions
    rules = {
        f"temperature is {wanted.temperature}; give a finite one from {_COLDEST} on": (
            _COLDEST <= wanted.temperature < math.inf
        ),
        f"top_k is {wanted.top_k}; give 1 to {vocabulary} with the output top_k, else none": (
            1 <= wanted.top_k <= vocabulary if "top_k" in wanted.outputs else not wanted.top_k
        ),
        f"there are {wanted.candidates.size} candidates in sets of {wanted.candidate_count}; give "
        "whole sets with the output candidates, else leave them out": (
            wanted.has_whole_sets if "candidates" in wanted.outputs else not wanted.candidates.size
        ),
        f"a candidate is none of the tokens 0 to {vocabulary - 1}": (
            ((wanted.candidates >= 0) & (wanted.candidates < vocabulary)).all()
        ),
        f"layer {wanted.layer} is none of 0 to {layers}": 0 <= (wanted.layer or 0) <= layers,
        "a layer was given without the output hidden, or beside others: ask for it alone": (
            wanted.layer is None or wanted.outputs == ("hidden",)
        ),
        f"from_positions are {len(firsts)} for {len(rows.lengths)} rows; give one for each, one "
        "for all, or none, and none below 0": (
            len(firsts) in (0, 1, len(rows.lengths)) and min(firsts, default=0) >= 0
        ),
        f"positions are not in rising order from 0 to {tokens - 1}": (
            (np.diff(positions, prepend=-1) > 0).all() and (positions < tokens).all()
        ),
    }
    _check_rules(rules)
