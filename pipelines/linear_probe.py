"""Linear probe of a frozen encoder: logistic regression, its penalty chosen on a part of the training set.

    accelerate launch pipelines/linear_probe.py encoder.init=RUN_OR_EXPORT data.train=SHARDS data.val=SHARDS

Leaves result.json with linear/top1 and its standard error. Minutes for ImageNet on one GPU, seconds for small sets.
"""

from ssl_vit import cli

if __name__ == "__main__":
    cli.evaluate(__doc__, __file__, default="linear_probe/features.yaml")
