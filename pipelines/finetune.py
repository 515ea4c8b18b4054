"""Fine-tune an encoder on labels: layer-wise learning rates, Mixup, CutMix, RandAugment, erasing, drop path, EMA.

    accelerate launch pipelines/finetune.py encoder.init=RUN data.train=folder:/my/classes data.val=folder:/my/val
        any encoder: a run of any objective, an export, a timm folder, a file of MAE, BEiT, DeiT or timm
    ... --config configs/finetune/mae_vit_base_patch16_in1k.yaml encoder.init=RUN data.train=SHARDS data.val=SHARDS
        the published recipe of a method; the others are beside it
    ... encoder.img_size=384            other sizes: positions are resized
    ... objective.tune_blocks=4         only the last blocks
    ... --config configs/finetune/distilled_images.yaml objective.teacher.weights=RUN
        labels and a teacher together: the logits of any classifier that was trained here, or of timm's
    ... encoder.name=vit_base_patch16_224 encoder.init=null      from scratch, to compare

Leaves what train_supervised.py leaves: RUN/encoder, the classifier in RUN/checkpoints, result.json (accuracy/top1).
"""

from ssl_vit import cli

if __name__ == "__main__":
    cli.pretrain(
        __doc__, __file__, "classification", default="finetune/digits.yaml", images="finetune/images.yaml",
        also=("deit",),
    )  # fmt: skip
