"""Linear probe of a frozen encoder: logistic regression, a grid of classifiers, or a published protocol.

    accelerate launch pipelines/linear_probe.py encoder.init=RUN_OR_EXPORT data.train=SHARDS data.val=SHARDS
        logistic regression on features that are extracted once, its penalty chosen on a part of the training set
    ... --config configs/linear_probe/sweep.yaml encoder.init=... data.train=... data.val=...
        a grid of learning rate x weight decay x pooling x number of last blocks, chosen on a part of the training set
    ... --config configs/linear_probe/mae_in1k.yaml encoder.init=... data.train=... data.val=...
        a published protocol, trained on augmented views; others and the attentive probe are beside it

Leaves result.json with linear/top1, sweep/top1 or heads/top1, its standard error and the protocol in words.
"""

from ssl_vit import cli

if __name__ == "__main__":
    cli.evaluate(__doc__, __file__, default="linear_probe/features.yaml", trains="probe")
