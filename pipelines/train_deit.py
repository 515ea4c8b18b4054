"""Train a ViT with a distillation token that learns from a teacher (DeiT).

    accelerate launch pipelines/train_supervised.py --config configs/pretrain/classification_resnet_digits.yaml
    accelerate launch pipelines/train_deit.py
        digits: first the teacher, then the student; 2 CPU cores, 5 minutes
    ... data.train=folder:/my/classes data.val=folder:/my/val objective.teacher.weights=RUN run.dir=runs/mine
        any pictures with a folder a class, a teacher trained on them
    ... --config configs/pretrain/deit_vit_base_patch16_in1k.yaml data.train=... objective.teacher.weights=FILE
        as published: teacher RegNetY-16GF, 300 epochs

Leaves RUN/encoder (a timm folder), both classifiers in RUN/checkpoints, metrics.jsonl and result.json (accuracy/top1).
"""

from ssl_vit import cli

if __name__ == "__main__":
    cli.pretrain(__doc__, __file__, "deit", default="pretrain/deit_digits.yaml", images="pretrain/deit_images.yaml")
