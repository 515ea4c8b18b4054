"""Features of every image of a set of shards as files, with keys and labels; on many processes, resumable.

    accelerate launch pipelines/embed.py encoder.init=RUN_OR_EXPORT data.train=SHARDS run.dir=runs/features

Leaves RUN/features/part-000000.parquet ... (key, label, feature), one a shard, and RUN/result.json with counts and the
hashes of encoder and data. What was stopped goes on with the same command. embed.format=npy: arrays, jsonl of keys.
"""

from ssl_vit import cli

if __name__ == "__main__":
    cli.embed(__doc__, __file__, default="embed/features.yaml")
