"""Names of one ViT's tensors in transformers and in timm."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def of_transformers(name: str, own: Mapping[str, Tensor], heads: Mapping[str, nn.Module]) -> Tensor:
    """The tensor that transformers' ViT or DeiT keeps under ``name``.

    Args:
        name: in transformers.
        own: the state of the same ViT in timm.
        heads: linear layers by their name in transformers.
    """
    part = name.rpartition(".")[2]
    fixed = {
        "embeddings.cls_token": "cls_token", "embeddings.distillation_token": "dist_token",
        "embeddings.position_embeddings": "pos_embed",
        f"embeddings.patch_embeddings.projection.{part}": f"patch_embed.proj.{part}",
        f"layernorm.{part}": f"norm.{part}",
    }  # fmt: skip
    head = name.rpartition(".")[0]
    if head in heads:
        return heads[head].state_dict()[part]
    inner = name.partition(".")[2]
    if inner in fixed:
        return own[fixed[inner]]
    layer = next(word for word in name.split(".") if word.isdigit())
    block = f"blocks.{layer}"
    for i, which in enumerate(("query", "key", "value")):
        if f".{which}." in name or f".{which[0]}_proj." in name:
            return own[f"{block}.attn.qkv.{part}"].chunk(3)[i]
    places = {
        "attention.output.dense": "attn.proj", "attention.o_proj": "attn.proj", "intermediate.dense": "mlp.fc1",
        "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2", "layernorm_before": "norm1", "layernorm_after": "norm2",
    }  # fmt: skip
    for theirs, ours in places.items():
        if f".{theirs}." in name:
            return own[f"{block}.{ours}.{part}"]
    assert ".output.dense." in name, name
    return own[f"{block}.mlp.fc2.{part}"]
