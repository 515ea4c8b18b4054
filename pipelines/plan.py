"""What a run will cost: parameters, FLOPs, memory of each strategy, hours, disk, the largest micro-batch that fits.

    python pipelines/plan.py --config configs/pretrain/mae_vit_huge_patch14_in1k.yaml gpus=8 gpu_memory=80
        nothing is allocated: ViT-H takes seconds on a laptop
    ... mfu=0.4 peak_tflops=312     an A100 that reaches 40 %
    ... --json                      for scripts
    ... --measure                   also run a few steps on this machine's GPU

Takes the same --config and key=value as the pipeline that it plans.
"""

from ssl_vit.preflight import door

if __name__ == "__main__":
    door.main(__doc__, __file__, default="pretrain/mae_vit_base_patch16_in1k.yaml")
