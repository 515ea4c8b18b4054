"""Images a second, memory and checkpoints of one process and of each strategy, in one run on the same work.

    python scripts/bench_scale.py [processes=2] [steps=8] [only=one,ddp,zero2] [json=FILE] [FILE.yaml] [key=value ...]

The default is MAE with ViT-B/16 at 224 pixels, a global batch of 8, on the built-in digits: the machine is measured,
not the data. Processes share the cores. Rounds are not repeated: quote ratios, not seconds. Memory is the largest
resident size of a process on CPUs and the largest allocation on GPUs; "load" is reading a checkpoint, comparing its
checksums and taking it up.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = ("one", "ddp", "zero1", "zero2", "zero3", "fsdp2")
DEFAULT = (str(ROOT / "configs" / "pretrain" / "mae_vit_base_patch16_in1k.yaml"),
           "data.train=builtin:digits-train", "data.val=null",
           "optim.batch_size=8", "optim.warmup_epochs=1steps", "run.workers=1")  # fmt: skip


def rank(file: str, out: str) -> None:
    """In each process: train as the recipe says, note what it took."""
    import torch

    from ssl_vit import distributed
    from ssl_vit.config import check, load
    from ssl_vit.recipe import Recipe, check_recipe
    from ssl_vit.run import run
    from ssl_vit.training.checkpoint import read_checkpoint
    from ssl_vit.training.trainer import Trainer

    found: dict[str, Any] = {"save": []}
    fit, save = Trainer.fit, Trainer._save

    def timed_save(self: Trainer, *words: Any, **options: Any) -> None:
        start = time.perf_counter()
        save(self, *words, **options)
        found["save"].append(time.perf_counter() - start)

    def timed_fit(self: Trainer) -> None:
        cuda = self.strategy.device.type == "cuda"
        fit(self)
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found["memory"] = torch.cuda.max_memory_allocated() if cuda else rss
        start = time.perf_counter()
        folder = self.checkpoints.path(self.plan.total_steps)
        saved = read_checkpoint(folder)
        self.strategy.load(saved.weights, saved.optimizer)
        found["load"] = time.perf_counter() - start
        found["bytes"] = sum(f.stat().st_size for f in folder.iterdir())
        found["device"] = torch.cuda.get_device_name() if cuda else "CPU"

    Trainer.fit, Trainer._save = timed_fit, timed_save
    run(check_recipe(check(Recipe, load([Path(file)], []))))
    Path(f"{out}.{distributed.rank()}").write_text(json.dumps(found))
    distributed.barrier()
    distributed.shutdown()


def measure(name: str, processes: int, words: list[str], folder: Path) -> dict[str, Any]:
    """Start one strategy and collect what its processes noted."""
    from ssl_vit.config import check, load, to_yaml
    from ssl_vit.recipe import Recipe, check_recipe
    from ssl_vit.training.metrics import read_metrics

    files = [Path(w) for w in words if w.endswith(".yaml")]
    values = load(files, [w for w in words if not w.endswith(".yaml")] + [f"run.dir={folder / name}"])
    values["evals"] = {}
    (folder / f"{name}.yaml").write_text(to_yaml(check_recipe(check(Recipe, values))))
    cores = len(os.sched_getaffinity(0))
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores if name == "one" else max(cores // processes, 1))}
    if name == "one":
        command = [sys.executable]
    else:
        import torch

        config = "cpu_2" if name == "ddp" and not torch.cuda.is_available() else name
        if not torch.cuda.is_available():
            environment["DS_ACCELERATOR"] = "cpu"
        file = str(ROOT / "configs" / "accelerate" / f"{config}.yaml")
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
        command += ["--num_processes", str(processes)]
    command += [__file__, "--rank", str(folder / f"{name}.yaml"), str(folder / f"{name}.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        raise SystemExit(f"{name}: failed")
    notes = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{name}.json.*"))]
    lines = [line for line in read_metrics(folder / name / "metrics.jsonl") if "loss" in line]
    speeds = sorted(line["images_per_second"] for line in lines[2:])
    return {
        "strategy": name, "processes": len(notes), "device": notes[0]["device"],
        "images_per_second": speeds[len(speeds) // 2], "slowest": speeds[0], "fastest": speeds[-1],
        "memory_gb": max(note["memory"] for note in notes) / 1e9,
        "save_seconds": notes[0]["save"][-1], "load_seconds": notes[0]["load"],
        "checkpoint_gb": notes[0]["bytes"] / 1e9, "last_loss": lines[-1]["loss"],
    }  # fmt: skip


def main(words: list[str]) -> None:
    """Measure the strategies one after the other and print the table."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return
    options = {"processes": "2", "steps": "8", "only": ",".join(STRATEGIES), "json": ""}
    rest: list[str] = []
    for word in words:
        key, _, value = word.partition("=")
        if key in options:
            options[key] = value
        elif word != "--config":
            rest.append(word)
    unknown = set(options["only"].split(",")) - set(STRATEGIES)
    if unknown:
        raise SystemExit(f"only={options['only']}: allowed: {', '.join(STRATEGIES)}")
    recipe = [] if any(w.endswith(".yaml") for w in rest) else list(DEFAULT)
    recipe += [f"optim.epochs={options['steps']}steps", "run.log_every=1", "run.tensorboard=false", *rest]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options["only"].split(","):
            row = measure(name, int(options["processes"]), recipe, Path(folder))
            rows.append(row)
            ratio = row["images_per_second"] / rows[0]["images_per_second"]
            print(
                f"{name:<7}{row['processes']} x {row['device']:<5}{row['images_per_second']:>9.2f} images/s "
                f"({row['slowest']:.2f}-{row['fastest']:.2f}; {ratio:.2f} x)  {row['memory_gb']:.2f} GB a process  "
                f"save {row['save_seconds']:.2f} s  load {row['load_seconds']:.2f} s  {row['checkpoint_gb']:.2f} GB  "
                f"last loss {row['last_loss']:.6f}",
                flush=True,
            )
    if options["json"]:
        Path(options["json"]).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(*sys.argv[2:])
    else:
        main(sys.argv[1:])
