"""Names of a whole objective's tensors here and in the released files of MAE and BEiT."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

OWN_PREFIX = "encoder.model."
RELEASED = {"head.": "lm_head.", "cls_blocks.": "cls_pt_layers."}
"""First parts of the names of BEiT's head and second path, ours and the release's; all others are the same."""
INDEX = "relative_position_index"
KEPT = "tokenizer."


def released_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An objective's tensors as its release names them, without the tokenizer, which has a file of its own."""
    renamed = {}
    for name, tensor in state.items():
        if not name.startswith(KEPT):
            ours = next((part for part in RELEASED if name.startswith(part)), "")
            renamed[RELEASED.get(ours, "") + name.removeprefix(ours).removeprefix(OWN_PREFIX)] = tensor
    return renamed


def objective_names(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A release's tensors as an objective names them.

    Args:
        state: of the release; positions that are computed are left out.
        own: of the objective, whose tokenizer is kept.
    """
    renamed = {name: tensor for name, tensor in own.items() if name.startswith(KEPT)}
    for name, tensor in state.items():
        if not name.endswith(INDEX):
            ours, theirs = next(((a, b) for a, b in RELEASED.items() if name.startswith(b)), ("", ""))
            name = ours + name.removeprefix(theirs)
            renamed[OWN_PREFIX + name if OWN_PREFIX + name in own else name] = tensor
    return renamed
