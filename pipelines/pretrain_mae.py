"""Pretrain a Vision Transformer with MAE (75 % of the patches masked, asymmetric decoder).

    accelerate launch pipelines/pretrain_mae.py
        the quickstart: digits, 2 CPU cores, 5 minutes
    ... data.train=folder:/my/images data.val=folder:/my/labelled run.dir=runs/mine
        any folder of pictures, ViT-Tiny
    ... --config configs/pretrain/mae_vit_base_patch16_in1k.yaml data.train=...
        as published: 64 GPUs of 32 GB, days

Leaves RUN/encoder (a timm folder), metrics.jsonl, TensorBoard, reconstruction pictures and result.json.
"""

from ssl_vit import cli

if __name__ == "__main__":
    cli.pretrain(__doc__, __file__, "mae", default="pretrain/mae_digits.yaml", images="pretrain/mae_images.yaml")
