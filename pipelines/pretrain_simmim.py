"""Pretrain a ViT or a Swin with SimMIM (large masked units, raw pixels, one linear layer).

    accelerate launch pipelines/pretrain_simmim.py
        a small ViT on digits, 2 CPU cores, minutes
    ... data.train=folder:/my/images data.val=folder:/my/labelled run.dir=runs/mine
        any folder of pictures, Swin-Tiny
    ... --config configs/pretrain/simmim_swin_base_in1k.yaml data.train=...
        as published: 16 GPUs of 32 GB, a day

Leaves RUN/encoder (a timm folder), metrics.jsonl, TensorBoard, reconstruction pictures and result.json.
"""

from ssl_vit import cli

if __name__ == "__main__":
    cli.pretrain(
        __doc__, __file__, "simmim", default="pretrain/simmim_digits.yaml", images="pretrain/simmim_images.yaml"
    )
