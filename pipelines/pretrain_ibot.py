"""Pretrain a Vision Transformer with iBOT (class tokens across views, masked patches, a teacher that is an average).

    accelerate launch pipelines/pretrain_ibot.py
        digits, 2 CPU cores, minutes
    ... data.train=folder:/my/images data.val=folder:/my/labelled run.dir=runs/mine
        any folder of pictures, ViT-Tiny
    ... --config configs/pretrain/ibot_vit_tiny_cifar10.yaml data.train=...
        small images: ViT with patch 8 at 32 px, 2 CPU cores, 45 minutes
    ... --config configs/pretrain/ibot_vit_small_patch16_in1k.yaml data.train=...
        as published: 16 GPUs of 32 GB, days

Leaves RUN/encoder (the teacher's, a timm folder), metrics.jsonl, TensorBoard and result.json. Watch cls_entropy and
cls_kl: entropy near 0, or near ln(out_dim) with a KL divergence that stays near 0, is a collapse.
"""

from ssl_vit import cli

if __name__ == "__main__":
    cli.pretrain(__doc__, __file__, "ibot", default="pretrain/ibot_digits.yaml", images="pretrain/ibot_images.yaml")
