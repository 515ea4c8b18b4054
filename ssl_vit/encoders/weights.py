"""Filling encoders and objectives from files of any published layout, with every key accounted for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ssl_vit.config import InputError
from ssl_vit.encoders.base import Encoder
from ssl_vit.encoders.files import encoder_config, find_weights, load_state
from ssl_vit.encoders.positions import row_column_table, sincos2d_table
from ssl_vit.encoders.release_names import OWN_PREFIX, objective_names

__all__ = ["LoadReport", "encoder_config", "fill_encoder", "fill_objective", "find_weights", "load_state"]

PREFIXES = ("", OWN_PREFIX, "encoder.", "backbone.", "model.")
NOT_ENCODER = (
    "decoder", "mask_token", "masked_embed", "head", "fc.", "lm_head", "cls_pt_", "pooler.", "classifier.",
    "cls_classifier.", "distillation_classifier.",
)  # fmt: skip


@dataclass(frozen=True)
class LoadReport:
    """What became of a file's tensors.

    Attributes:
        source: the file.
        loaded: tensors that were filled.
        total: tensors there are to fill.
        ignored: groups of tensors in the file that have no place here.
        notes: tensors that were renamed, resized or computed anew.
    """

    source: str
    loaded: int
    total: int
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        ignored = f"; ignored: {', '.join(self.ignored)}" if self.ignored else ""
        return "; ".join([f"{self.source}: {self.loaded}/{self.total} tensors loaded{ignored}", *self.notes])


def fill_encoder(encoder: Encoder, path: str | Path) -> LoadReport:
    """Fill an encoder (``encoder.init=``).

    Takes the layouts of MAE, BEiT, DeiT, SimMIM, DINO and iBOT (of a whole checkpoint the teacher), timm's,
    transformers', our checkpoints, timm folders and runs. Position tables of another grid are resized, or computed anew
    where both are MAE's fixed table.

    Args:
        encoder: the encoder to fill.
        path: a file or folder.

    Raises:
        InputError: a tensor of the encoder is missing or has another shape, or the file has one that is not known.
    """
    where = f"encoder.init={path}"
    state, ignored = _encoder_part(load_state(path), encoder.anchor, where)
    state, notes = encoder.fitted(state, _stored_grid(path), where)
    own = encoder.model.state_dict()
    if "norm.weight" in own and "norm.weight" not in state and "fc_norm.weight" in state:
        state = {name.replace("fc_norm.", "norm."): tensor for name, tensor in state.items()}
        notes.append("fc_norm used as the final norm (here before the pooling)")
    fresh = {name: tensor for name, tensor in own.items() if name.startswith("fc_norm.") and name not in state}
    if fresh:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")} | fresh
        notes.append("norm left out: fc_norm, behind the pooling, starts anew")
    _compare_names(state, own, where)
    if "pos_embed" in own:
        state["pos_embed"], note = _fit_positions(encoder, state["pos_embed"], _stored_grid(path), where)
        if getattr(encoder, "pos_embed", None) == "learned2d":
            state["pos_embed"] = row_column_table(state["pos_embed"], encoder.grid_size)
        notes += [note] if note else []
    _compare_shapes(state, own, where)
    encoder.model.load_state_dict(state)
    return LoadReport(str(find_weights(path)), len(own) - len(fresh), len(own), ignored, tuple(notes))


def fill_objective(objective: nn.Module, path: str | Path) -> LoadReport:
    """Fill a whole objective, decoder and heads included (``objective.init=``).

    Takes the whole files of MAE and BEiT as released and as transformers has them, our checkpoints and runs. BEiT's
    tokenizer stays the recipe's where the file has none.

    Args:
        objective: the objective to fill.
        path: a file or folder.

    Raises:
        InputError: the file holds an encoder only, or a tensor is missing, unknown or of another shape.
    """
    where = f"objective.init={path}"
    encoder = objective.encoder
    assert isinstance(encoder, Encoder)
    state, own = load_state(path, whole=True), objective.state_dict()
    if any(name.startswith("backbone.") for name in state):
        raise InputError(f"{where}: a file of DINO or iBOT, whose heads are not read; give it as encoder.init=")
    if encoder.anchor in state:
        state = objective_names(state, own)
    others = [name for name in own if not name.startswith(("encoder.", "tokenizer."))]
    if others and not any(name in state for name in others):
        kind = "a fine-tuned classifier" if "head.weight" in state else "an encoder only"
        raise InputError(
            f"{where}: holds {kind}, nothing of {', '.join(_groups(others))}; give it as encoder.init=, "
            "or take the full file"
        )
    if any(name.startswith("teacher.") for name in own) and not any(name.startswith("teacher.") for name in state):
        raise InputError(f"{where}: holds no teacher, as files of DeiT do not; give it as encoder.init=")
    _compare_names(state, own, where)
    notes = []
    if f"{OWN_PREFIX}pos_embed" in own:
        given = state[f"{OWN_PREFIX}pos_embed"]
        fitted, note = _fit_positions(encoder, given, _stored_grid(path), where)
        state[f"{OWN_PREFIX}pos_embed"] = fitted
        notes += [note] if note else []
        if fitted is not given:  # another grid: the decoder's table is of that grid too
            fixed = [n for n, p in objective.named_parameters() if n.endswith("pos_embed") and not p.requires_grad]
            for name in [name for name in fixed if not name.startswith("encoder.")]:
                state[name] = own[name]
                notes.append(f"{name}: computed anew")
    _compare_shapes(state, own, where)
    objective.load_state_dict(state)
    return LoadReport(str(find_weights(path, whole=True)), len(own), len(own), (), tuple(notes))


def _encoder_part(state: dict[str, Tensor], anchor: str, where: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The encoder's tensors under timm's names, and the groups of the others."""
    prefix = next((prefix for prefix in PREFIXES if prefix + anchor in state), None)
    if prefix is None:
        raise InputError(
            f"{where}: no encoder tensor matches: {anchor} is not there, under none of the prefixes "
            f"{', '.join(p for p in PREFIXES if p)}; its names: {_some(state)}"
        )
    ignored = {
        name for name in state if not name.startswith(prefix) or name.removeprefix(prefix).startswith(NOT_ENCODER)
    }
    kept = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name not in ignored}
    return kept, _groups(name for name in state if name in ignored)


def _groups(names: Iterable[str]) -> tuple[str, ...]:
    """First parts of names, ``decoder_embed, decoder_blocks ...`` as ``decoder*``."""
    firsts = (name.split(".")[0] for name in names)
    return tuple(dict.fromkeys("decoder*" if first.startswith("decoder") else first for first in firsts))


def _compare_names(state: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    if missing or unknown:
        parts = [f"{len(own) - len(missing)}/{len(own)} tensors match"]
        parts += [f"missing in the file: {_some(missing)}"] if missing else []
        parts += [f"unknown here: {_some(unknown)}"] if unknown else []
        raise InputError(f"{where}: {'; '.join(parts)}; name, depth and class_token should be the file's")


def _compare_shapes(state: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    differing = [name for name in own if state[name].shape != own[name].shape]
    if not differing:
        return
    first = next((name for name in differing if name.endswith(Encoder.anchor)), None)
    if first:
        settings = [
            f"{key}={theirs} in the file, {ours} here"
            for key, theirs, ours in zip(
                ("embed_dim", "in_chans", "patch_size"), state[first].shape, own[first].shape, strict=False
            )
            if theirs != ours
        ]
        raise InputError(f"{where}: {first} does not fit: encoder {'; '.join(settings)}")
    shapes = [f"{name} {list(state[name].shape)} in the file, {list(own[name].shape)} here" for name in differing]
    raise InputError(f"{where}: {len(differing)} tensors have another shape: {_some(shapes, '; ')}")


def _some(names: Iterable[str], separator: str = ", ") -> str:
    names = list(names)
    return separator.join(names[:6]) + (f"{separator}... ({len(names)} in all)" if len(names) > 6 else "")


def _stored_grid(path: str | Path) -> tuple[int, int] | None:
    """The patch grid stated beside a file, or None."""
    try:
        config = encoder_config(path)
    except InputError:
        return None
    size, patch = config.get("img_size", 224), config.get("patch_size")
    height, width = (size, size) if isinstance(size, int) else size
    return (height // patch, width // patch) if patch else None


def _fit_positions(
    encoder: Encoder, table: Tensor, stored: tuple[int, int] | None, where: str
) -> tuple[Tensor, str | None]:
    """The file's position table for the encoder's grid, and what was done to it if anything."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    own: Tensor = encoder.model.pos_embed
    num_prefix = own.shape[1] - math.prod(encoder.grid_size)
    if table.ndim != 3 or table.shape[2] != own.shape[2]:
        return table, None  # the comparison of shapes names it
    grid, fixed = _grid_of(table[:, num_prefix:], stored, encoder.grid_size, where)
    if grid == encoder.grid_size:
        if fixed or own.requires_grad:
            return table, None
        return table, "pos_embed: not MAE's fixed table; taken from the file and not trained"
    change = f"{grid[0]}x{grid[1]} to {encoder.grid_size[0]}x{encoder.grid_size[1]} patches"
    if fixed and not own.requires_grad:
        computed = sincos2d_table(encoder.grid_size, encoder.embed_dim, num_prefix)
        return computed, f"pos_embed: fixed table computed anew, {change}"
    resized = resample_abs_pos_embed(table, list(encoder.grid_size), list(grid), num_prefix_tokens=num_prefix)
    return resized, f"pos_embed: resized (bicubic), {change}"


def _grid_of(
    patches: Tensor, stored: tuple[int, int] | None, own: tuple[int, int], where: str
) -> tuple[tuple[int, int], bool]:
    """The grid of a position table (1, N, D), and whether it is MAE's fixed table, which tells its own grid."""
    count, width = patches.shape[1], patches.shape[2]
    grids = [(h, count // h) for h in range(1, count + 1) if count % h == 0]
    side = math.isqrt(count)
    likely = [grid for grid in (stored, own, (side, side)) if grid in grids]
    for grid in dict.fromkeys(likely + grids) if width % 4 == 0 else ():
        table = sincos2d_table(grid, width)
        if torch.allclose(patches[0, -1].float(), table[0, -1], atol=3e-3) and torch.allclose(
            patches.float(), table, atol=3e-3
        ):
            return grid, True
    if stored in grids:
        return stored, False
    if side * side == count:
        return (side, side), False
    if own in grids:
        return own, False
    raise InputError(f"{where}: pos_embed has {count} patches, not a square, and no config.json tells their grid")
