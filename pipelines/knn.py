"""Weighted nearest neighbours on a frozen encoder's features (DINO's protocol).

    accelerate launch pipelines/knn.py encoder.init=RUN_OR_EXPORT data.train=SHARDS data.val=SHARDS

Leaves result.json with knn/top1 (20 neighbours), its standard error, and top1 for 10, 100 and 200 neighbours.
"""

from ssl_vit import cli

if __name__ == "__main__":
    cli.evaluate(__doc__, __file__, default="knn/features.yaml")
