"""One encoder on many labelled sets, one table: VTAB, or any list of sets of your own.

    accelerate launch pipelines/transfer.py --config MY_SETS.yaml encoder.init=RUN_OR_EXPORT
        a list of sets with name, group, train and val; configs/transfer/digits.yaml is a small one
    ... --config configs/transfer/vtab.yaml encoder.init=... train_images=1000
        VTAB's 19 sets, of what is at hand; 800 images to train on and 200 to choose on; null: the whole sets

Leaves RUN/transfer.md, RUN/result.json, and a run for each set in RUN/sets/NAME. What was stopped goes on.
"""

from ssl_vit import cli

if __name__ == "__main__":
    cli.transfer(__doc__, __file__, default="transfer/digits.yaml")
