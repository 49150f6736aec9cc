"""The options of a forward pass: both clients and a model take them by these names."""

from __future__ import annotations

from typing import Literal, TypeAlias, TypedDict

from moorage.rows import Rows

FirstToken: TypeAlias = Literal["nan", "zero"]
LogitScale: TypeAlias = Literal["raw", "scaled"]


class ForwardOptions(TypedDict, total=False):
    """What may be said of a forward pass beside its rows and outputs; every option may be left out.

    Attributes:
        top_k: Adds the output "top_k": how many tokens it gives at each position.
        candidates: Adds the output "candidates": the tokens whose log-probabilities are wanted.
            One flat list for all positions; or for each row an array [positions, tokens], with
            one line for each wanted position of the row, be it none, and as many tokens in all.
        layer: Of "hidden": after how many layers; 0 is the embeddings. None for after the last
            layer and the final norm.
        positions: Of "hidden", "logits" and "score": after which tokens they are wanted. Ragged as
            the rows, rising within each; negative ones count from the row's end. None for all
            wanted positions, and for "score" the last one of each segment. `from_position` then
            is of the other outputs, and is refused without any.
        temperature: The logits are divided by this before the softmax; 1 if left out.
        logit_scale: "raw" gives "logits" as the model has them, "scaled" divided by the
            temperature; "raw" if left out.
        first_token: What stands at the first token of a segment, where there is nothing that it
            could be conditional on: "nan", or "zero" for sums; "nan" if left out.
        from_position: The first position that is wanted, one for all rows or one for each: row r
            has `len(rows[r]) - from_position` entries in the answer. 0 if left out.
        expected_weights_version: Refuses the pass if the model's weights are of another version;
            None takes any.
        timeout: Seconds that the pass may take, retries and all, or None for any time; the
            client's own if left out.
    """

    top_k: int
    candidates: Rows | None
    layer: int | None
    positions: Rows | None
    temperature: float
    logit_scale: LogitScale
    first_token: FirstToken
    from_position: int | Rows
    expected_weights_version: int | None
    timeout: float | None
