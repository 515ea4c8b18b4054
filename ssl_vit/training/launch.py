"""What the launcher asked for, checked before a process group starts, and accelerate's view of it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, patch_environment

from ssl_vit import distributed
from ssl_vit.config import InputError
from ssl_vit.objectives.base import Objective
from ssl_vit.training.launcher import asked_processes
from ssl_vit.training.optim import OptimSection
from ssl_vit.training.strategies import FSDP2, Strategy
from ssl_vit.training.zero import Zero

TIMEOUT = timedelta(hours=2)
"""How long processes wait for each other: longer than the longest save or evaluation on one of them."""
KINDS = {"ddp": Strategy, "zero": Zero, "fsdp2": FSDP2}
NO_AFTER_STEP = Objective.after_step


@dataclass(frozen=True)
class Launch:
    """How this run is spread out.

    Args:
        kind: ``"ddp"`` (also one process), ``"zero"`` or ``"fsdp2"``.
        num_ranks: processes that the launcher started.
        stage: of ZeRO.
        config: DeepSpeed's, with ``"auto"`` where the recipe decides.
        source: where the configuration comes from, for messages.
    """

    kind: str
    num_ranks: int
    stage: int = 0
    config: dict[str, Any] | None = None
    source: str = ""

    @classmethod
    def asked_for(cls) -> Launch:
        """Read what accelerate's or torch's launcher left in the environment.

        Raises:
            InputError: it contradicts itself, or something that it needs is not installed.
        """
        num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
        _check_processes(num_ranks)
        deepspeed, fsdp = _on("ACCELERATE_USE_DEEPSPEED"), _on("ACCELERATE_USE_FSDP")
        if deepspeed and fsdp:
            raise InputError("the launcher asks for both DeepSpeed and FSDP; choose one of configs/accelerate/")
        if deepspeed:
            return cls._deepspeed(num_ranks)
        if fsdp and os.environ.get("FSDP_VERSION", "2") == "1":
            raise InputError("fsdp_version: 1 was asked for; allowed: 2 (configs/accelerate/fsdp2.yaml)")
        if fsdp and num_ranks == 1:
            raise InputError("FSDP2 was asked for, but there is one process; start several, or leave FSDP out")
        return cls("fsdp2" if fsdp else "ddp", num_ranks)

    @classmethod
    def _deepspeed(cls, num_ranks: int) -> Launch:
        for library in ("deepspeed", "transformers"):
            if find_spec(library) is None:
                raise InputError(
                    f"DeepSpeed was asked for, but {library} is not installed; cure: bash scripts/setup.sh deepspeed"
                )
        try:
            import deepspeed  # noqa: F401
        except Exception as error:
            raise InputError(
                f"DeepSpeed was asked for, but deepspeed cannot be imported ({' '.join(str(error).split())}); see "
                "https://www.deepspeed.ai/tutorials/advanced-install, or use DDP"
            ) from None
        if _on("ACCELERATE_USE_CPU"):
            raise InputError(
                "use_cpu together with DeepSpeed drops DeepSpeed without a word; leave use_cpu out and set "
                "DS_ACCELERATOR=cpu instead"
            )
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if file == "none":
            stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
            return cls("zero", num_ranks, stage, {"zero_optimization": {"stage": stage}}, "the launcher")
        config = _read_json(file)
        stage = config.get("zero_optimization", {}).get("stage")
        if stage not in (1, 2, 3):
            raise InputError(f"{file}: zero_optimization.stage is {stage!r}; allowed: 1, 2, 3")
        return cls("zero", num_ranks, int(stage), config, file)

    def check(self, objective: Objective, clip_mode: str = "norm", optimizer: str = "adamw") -> None:
        """What an objective or recipe needs of the strategy.

        Raises:
            InputError: it cannot be had.
        """
        name = self.name()
        if self.kind != "ddp" and clip_mode == "per_parameter":
            raise InputError(f"optim.clip_mode=per_parameter: gradients are in parts under {name}; use DDP")
        if self.kind == "fsdp2" and optimizer == "sgd":
            raise InputError(f"optim.name=sgd: torch has no fused SGD for the parts of {name}; use DDP or ZeRO")
        if self.kind != "ddp" and optimizer == "lars":
            raise InputError(f"optim.name=lars: scales each weight matrix by its norm, and {name} has parts; use DDP")
        if self.kind == "zero" and objective.resting:
            # the engine steps flat parts of many parameters at once, so none of them can be left out
            raise InputError(
                f"objective {type(objective).__name__}: some of its parameters rest at the start (objective."
                f"freeze_last_layer), and {name} moves all of them; use DDP"
            )
        moves = getattr(objective.after_step, "__func__", None) is not NO_AFTER_STEP
        if moves and (self.kind == "fsdp2" or self.stage == 3):
            raise InputError(
                f"objective {type(objective).__name__}: it changes weights after a step (EMA, centres), and under "
                f"{name} each process holds only parts of them; use DDP, ZeRO-1 or ZeRO-2"
            )

    def name(self) -> str:
        """As people call it."""
        return {"zero": f"ZeRO-{self.stage}", "fsdp2": "FSDP2"}.get(self.kind, "DDP" if self.num_ranks > 1 else "no")

    def replicated(self) -> Launch:
        """The same processes with whole weights: what only measures needs no parts."""
        return Launch("ddp", self.num_ranks)

    def facts(self) -> dict[str, Any]:
        """For environment.json."""
        return {"num_processes": self.num_ranks, "strategy": self.name()}

    def deepspeed_config(self, precision: str, optim: OptimSection, micro_batch_size: int) -> dict[str, Any]:
        """DeepSpeed's configuration with the recipe's values filled in.

        Raises:
            InputError: the file states something else than the recipe, or a part that cannot be kept.
        """
        config = json.loads(json.dumps(self.config))
        for key in ("optimizer", "scheduler"):
            if key in config:
                raise InputError(f"{self.source}: {key} is the recipe's (optim.*); take it out of the file")
        for key in ("offload_optimizer", "offload_param"):
            if config["zero_optimization"].get(key, {}).get("device", "none") != "none":
                raise InputError(f"{self.source}: zero_optimization.{key} is not supported; use a higher ZeRO stage")
        bf16 = precision == "bf16"
        accumulation = optim.batch_size // (micro_batch_size * self.num_ranks)
        decided: dict[str, Any] = {
            "train_batch_size": optim.batch_size,
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            # not left out: DeepSpeed would clip at 1.0
            "gradient_clipping": optim.clip_grad or 0.0,
            # weights stay float32, as under DDP
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
            "torch_autocast": {"enabled": bf16, **({"dtype": "bfloat16"} if bf16 else {})},
        }
        for key, value in decided.items():
            stated = config.get(key, "auto")
            stated = stated.get("enabled", "auto") if isinstance(stated, dict) else stated
            wanted = value["enabled"] if isinstance(value, dict) else value
            if stated != "auto" and stated != wanted:
                raise InputError(
                    f"{self.source}: {key} is {stated}, but the recipe makes it {wanted}; write 'auto' there"
                )
        return {**config, **decided}

    def open(self, precision: str, deterministic: bool, deepspeed: dict[str, Any] | None = None) -> Accelerator:
        """Join the process group.

        Raises:
            InputError: accelerate made something else of it than was asked for.
        """
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(deterministic)
        AcceleratorState._reset_state()  # what an earlier run of this process left, such as its precision
        common: dict[str, Any] = {
            "dataloader_config": DataLoaderConfiguration(dispatch_batches=False),
            "step_scheduler_with_optimizer": False,
            "kwargs_handlers": [InitProcessGroupKwargs(timeout=TIMEOUT)],
        }
        if deepspeed is not None:
            from accelerate.utils import DeepSpeedPlugin

            if not torch.accelerator.is_available():
                # accelerate counts one process on CPUs unless the state was made for them first
                PartialState(cpu=True, timeout=TIMEOUT)
            plugin = DeepSpeedPlugin(hf_ds_config=deepspeed, zero3_init_flag=False)
            # autocast is the engine's here: accelerate's bf16 would cast the weights
            accelerator = Accelerator(mixed_precision="no", deepspeed_plugin=plugin, **common)
        else:
            # without a GPU accelerate would count one process
            cpu = self.num_ranks > 1 and not torch.accelerator.is_available()
            # FSDP2 is torch's own here (accelerate has it on GPUs only), and what only measures needs no parts
            with patch_environment(ACCELERATE_USE_FSDP="false", ACCELERATE_USE_DEEPSPEED="false"):
                accelerator = Accelerator(mixed_precision=precision, cpu=cpu, **common)
        if accelerator.num_processes != self.num_ranks:
            raise InputError(
                f"the launcher started {self.num_ranks} processes, but each trains as one of "
                f"{accelerator.num_processes}; see configs/accelerate/"
            )
        found = accelerator.distributed_type.value
        if (found == "DEEPSPEED") != (self.kind == "zero"):
            raise InputError(f"{self.name()} was asked for, but accelerate made it {found}; see configs/accelerate/")
        distributed.barrier()  # nobody writes into the run's folder before all have looked at it
        return accelerator


def _on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")


def _read_json(file: str) -> dict[str, Any]:
    """DeepSpeed's file, looked up from the working folder, then beside the package's ``configs/``."""
    root = Path(__file__).resolve().parents[2]
    path = next((p for p in (Path(file), root / file) if p.is_file()), None)
    if path is None:
        raise InputError(f"deepspeed_config_file {file}: no such file; allowed: configs/deepspeed/zero{{1,2,3}}.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: should hold an object with zero_optimization")
    return config


def _check_processes(num_ranks: int) -> None:
    """Compare with the command line of ``accelerate launch``, which starts one process on CPUs whatever it says."""
    asked = asked_processes()
    if asked is not None and asked != num_ranks:
        raise InputError(
            f"accelerate launch was asked for {asked} processes but started {num_ranks}; on CPUs: "
            f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {asked} pipelines/..."
        )
