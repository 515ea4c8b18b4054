"""The names that transformers gives the tensors of timm's ViTs, BEiTs, Swins and of MAE's decoder."""

from __future__ import annotations

import re

from torch import Tensor

RULES = (
    (r"^blocks\.", "layers."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^dist_token$", "embeddings.distillation_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^rel_pos_bias\.", "shared_position_bias."),
    (r"^norm\.", "layernorm."),
    (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"^(decoder_(embed|pos_embed|norm|pred)|mask_token)", r"decoder.\1"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.gamma_", ".lambda_"),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.([qv])_bias$", r".attention.\1_proj.bias"),
    (r"^(layers\.\d+)\.attn\.relative_position_bias_table$", r"\1.relative_position_bias.relative_position_bias_table"),
    (r"\.attn\.relative_position_bias_table$", ".attention.relative_position_bias.relative_position_bias_table"),
)
"""Our names (timm's) and those of transformers 5, which writes the names of all its versions into files."""
BUFFERS = ("relative_position_index", "attn_mask")


def transformers_names(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Tensors under transformers' names; q, k and v are three there.

    Args:
        state: of a timm model, or of its parts beside a MAE decoder.
        prefix: put before names that are not the decoder's.
    """
    renamed = {}
    for name, tensor in state.items():
        if name.rpartition(".")[2] in BUFFERS:
            continue
        if found := re.match(r"layers\.(\d+)\.(blocks|downsample)\.(.*)", name):  # Swin: a merging ends a stage there
            stage, part, rest = int(found[1]), found[2], found[3]
            name = f"encoder.layers.{stage - (part == 'downsample')}.{part}.{rest}"
        for ours, theirs in RULES:
            name = re.sub(ours, theirs, name)
        name = name if name.startswith("decoder.") else prefix + name
        if ".attn.qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.{letter}_proj.")] = part
        else:
            renamed[name] = tensor
    return renamed
