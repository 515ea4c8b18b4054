"""Pretrain a Vision Transformer with BEiT or BEiT v2: predict a tokenizer's codes of the masked patches.

    accelerate launch pipelines/train_tokenizer.py
    accelerate launch pipelines/pretrain_beit.py objective.tokenizer.sha256=...
        digits: first a tokenizer, whose last lines say its hash; 2 CPU cores, 2 and 4 minutes
    ... data.train=folder:/my/images objective.tokenizer.path=RUN/tokenizer objective.tokenizer.sha256=...
        small pictures with their own tokenizer, 2 CPU cores, 25 minutes
    ... --config configs/pretrain/beitv2_vit_base_patch16_in1k.yaml data.train=...
        as published: 16 GPUs of 32 GB, days

Leaves RUN/encoder (a timm folder), metrics.jsonl, TensorBoard and result.json with the masked accuracy on data.val.
"""

from ssl_vit import cli

if __name__ == "__main__":
    cli.pretrain(
        __doc__, __file__, "beit", default="pretrain/beit_digits.yaml", images="pretrain/beit_vit_tiny_cifar10.yaml"
    )
