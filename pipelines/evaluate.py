"""All evaluations of a frozen encoder at once: kNN, linear probe, few-shot probe, effective rank.

    accelerate launch pipelines/evaluate.py encoder.init=RUN_OR_EXPORT data.train=SHARDS data.val=SHARDS

Leaves result.json. Any evaluation can be left out (evals.few_shot=null) or changed (evals.knn.k=[20]).
"""

from ssl_vit import cli

if __name__ == "__main__":
    cli.evaluate(__doc__, __file__, default="evaluate/features.yaml")
