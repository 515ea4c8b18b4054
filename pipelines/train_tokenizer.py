"""Train a visual tokenizer for BEiT: VQ-KD on a teacher's features, or a discrete VAE on pixels.

    accelerate launch pipelines/train_tokenizer.py
        a discrete VAE on digits, 2 CPU cores, 2 minutes
    ... --config configs/pretrain/tokenizer_vqkd_vit_base_patch16_in1k.yaml objective.teacher.weights=FILE data...
        as published: 8 GPUs of 32 GB
    ... data.train=folder:/my/images run.dir=runs/mine
        a discrete VAE on any folder of pictures

Leaves RUN/tokenizer (tokenizer.safetensors and tokenizer.json with its sha256), RUN/encoder and result.json with
codebook usage, entropy and the held-out cosine or error.
"""

from ssl_vit import cli

if __name__ == "__main__":
    cli.pretrain(
        __doc__, __file__, "tokenizer_training",
        default="pretrain/tokenizer_dvae_digits.yaml", images="pretrain/tokenizer_dvae_tiny_cifar10.yaml",
    )  # fmt: skip
