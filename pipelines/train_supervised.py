"""Train a ViT or a ResNet as a classifier on labels: the baseline of every pretraining, and a teacher for DeiT.

    accelerate launch pipelines/train_supervised.py
        digits, 2 CPU cores, 3 minutes
    ... data.train=folder:/my/classes data.val=folder:/my/val run.dir=runs/mine
        any pictures with a folder a class, ViT-Tiny
    ... --config configs/pretrain/classification_vit_base_patch16_in1k.yaml data.train=... data.val=...
        AugReg's recipe; beside it DeiT's (..._deit) and those of ViT-L and ViT-H

Leaves RUN/encoder (a timm folder), the classifier in RUN/checkpoints, metrics.jsonl and result.json (accuracy/top1).
"""

from ssl_vit import cli

if __name__ == "__main__":
    cli.pretrain(
        __doc__, __file__, "classification",
        default="pretrain/classification_digits.yaml", images="pretrain/classification_images.yaml",
    )  # fmt: skip
