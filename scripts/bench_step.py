#!/usr/bin/env python
"""One training step side by side: forward, backward, optimizer, on the same images, batch, precision and optimizer.

    python scripts/bench_step.py sizes=base,large device=cuda batch=256 precision=bf16
    python scripts/bench_step.py sizes=tiny device=cpu batch=16 precision=no
    python scripts/bench_step.py objectives=simmim_vit_base_patch16_in1k,ibot_vit_base_patch16_in1k device=cuda batch=64

MAE contenders: ours, ours with compiled blocks, transformers' ViTMAEForPreTraining, the official model restated
(with today's fused attention, and with the attention of timm 0.3.2 that it was released with), lightly's MAE if it is
installed. Rounds are interleaved; a row has the median and quartiles of the rounds, images/s, peak memory, and MFU:
the FLOPs that the method needs (ours, counted) over the matrix rate measured in the same process. ``objectives`` are
recipes of configs/pretrain, by name; key=value with a dot go to them (``objective.teacher.weights=runs/teacher``).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ssl_vit import build
from ssl_vit.config import InputError, check, load
from ssl_vit.cost import blank_batch, dense_peak, flops
from ssl_vit.objectives.base import Progress
from ssl_vit.recipe import Recipe, check_recipe

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "tiny": {"patch": 16, "width": 192, "depth": 12, "heads": 3, "decoder": (192, 4, 3)},
    "base": {"patch": 16, "width": 768, "depth": 12, "heads": 12, "decoder": (512, 8, 16)},
    "large": {"patch": 16, "width": 1024, "depth": 24, "heads": 16, "decoder": (512, 8, 16)},
    "huge": {"patch": 14, "width": 1280, "depth": 32, "heads": 16, "decoder": (512, 8, 16)},
}
MASK_RATIO, PIXELS = 0.75, 224


class OfficialMAE(nn.Module):
    """What the released MAE model computes (arXiv 2111.06377): all patches embedded and predicted, noise sorted twice.

    Args:
        size: of :data:`SIZES`.
        fused: timm's fused attention, else softmax(q k^T) v written out.
    """

    def __init__(self, size: dict[str, Any], fused: bool) -> None:
        super().__init__()
        from timm.layers.patch_embed import PatchEmbed
        from timm.models.vision_transformer import Block

        width, (dec_width, dec_depth, dec_heads) = size["width"], size["decoder"]
        self.patch_embed = PatchEmbed(PIXELS, size["patch"], 3, width)
        count = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, count + 1, width) * 0.02, requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, size["heads"], 4, qkv_bias=True) for _ in range(size["depth"]))
        self.norm = nn.LayerNorm(width)
        self.decoder_embed = nn.Linear(width, dec_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dec_width))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, count + 1, dec_width) * 0.02, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(dec_width, dec_heads, 4, qkv_bias=True) for _ in range(dec_depth))
        self.decoder_norm = nn.LayerNorm(dec_width)
        self.decoder_pred = nn.Linear(dec_width, size["patch"] ** 2 * 3)
        self.patch = size["patch"]
        for block in (*self.blocks, *self.decoder_blocks):
            setattr(block.attn, "fused_attn", fused)  # noqa: B010

    def forward(self, image: Tensor) -> Tensor:
        """The loss of a batch (B, 3, H, W)."""
        tokens = self.patch_embed(image) + self.pos_embed[:, 1:]
        batch, count, width = tokens.shape
        kept = int(count * (1 - MASK_RATIO))
        shuffle = torch.rand(batch, count, device=image.device).argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        visible = tokens.gather(1, shuffle[:, :kept, None].expand(-1, -1, width))
        mask = torch.ones(batch, count, device=image.device)
        mask[:, :kept] = 0
        mask = mask.gather(1, restore)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        x = torch.cat([first, visible], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        filled = torch.cat([x[:, 1:], self.mask_token.expand(batch, count - kept, -1)], dim=1)
        filled = filled.gather(1, restore[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], filled], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        prediction = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        p, side = self.patch, PIXELS // self.patch
        target = image.reshape(batch, 3, side, p, side, p).permute(0, 2, 4, 3, 5, 1).reshape(batch, count, -1)
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        loss = (prediction - target).square().mean(dim=-1)
        return (loss * mask).sum() / mask.sum()


def ours(size: dict[str, Any], compiled: bool) -> nn.Module:
    """Our MAE as pretrain_mae.py builds it, the mask being part of its batch."""
    from ssl_vit.encoders.base import create_encoder
    from ssl_vit.objectives.mae import MAE

    width, depth, heads = size["decoder"]
    encoder = create_encoder(
        name="vit_base_patch16_224", img_size=PIXELS, patch_size=size["patch"], embed_dim=size["width"],
        depth=size["depth"], num_heads=size["heads"],
    )  # fmt: skip
    objective = MAE(encoder, decoder_embed_dim=width, decoder_depth=depth, decoder_num_heads=heads)
    if compiled:
        for block in (*encoder.model.blocks, *objective.decoder_blocks):
            block.compile(dynamic=False)
    return objective


def transformers_mae(size: dict[str, Any]) -> nn.Module:
    """ViTMAEForPreTraining at the same size, its attention fused."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    width, depth, heads = size["decoder"]
    config = ViTMAEConfig(
        hidden_size=size["width"], num_hidden_layers=size["depth"], num_attention_heads=size["heads"],
        intermediate_size=4 * size["width"], image_size=PIXELS, patch_size=size["patch"], mask_ratio=MASK_RATIO,
        norm_pix_loss=True, decoder_hidden_size=width, decoder_num_hidden_layers=depth,
        decoder_num_attention_heads=heads, decoder_intermediate_size=4 * width,
    )  # fmt: skip
    return ViTMAEForPreTraining(config)


def lightly_mae(size: dict[str, Any]) -> nn.Module:
    """lightly's MAE as its examples put it together."""
    # By name: lightly is optional, and a type checker of a machine without it must not stumble over it.
    utils = importlib.import_module("lightly.models.utils")
    modules = importlib.import_module("lightly.models.modules")
    from timm.models.vision_transformer import VisionTransformer

    width, depth, heads = size["decoder"]

    class Lightly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vit = VisionTransformer(
                img_size=PIXELS, patch_size=size["patch"], embed_dim=size["width"], depth=size["depth"],
                num_heads=size["heads"], num_classes=0,
            )  # fmt: skip
            self.backbone = modules.MaskedVisionTransformerTIMM(vit=vit)
            self.decoder = modules.MAEDecoderTIMM(
                num_patches=vit.patch_embed.num_patches, patch_size=size["patch"], embed_dim=size["width"],
                decoder_embed_dim=width, decoder_depth=depth, decoder_num_heads=heads, mlp_ratio=4.0,
            )  # fmt: skip
            self.length = self.backbone.sequence_length

        def forward(self, image: Tensor) -> Tensor:
            shape = (len(image), self.length)
            keep, masked = utils.random_token_mask(size=shape, mask_ratio=MASK_RATIO, device=image.device)
            encoded = self.backbone.encode(images=image, idx_keep=keep)
            embedded = self.decoder.embed(encoded)
            tokens = utils.repeat_token(self.decoder.mask_token, shape)
            tokens = utils.set_at_index(tokens, keep, embedded.type_as(tokens))
            prediction = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), masked))
            target = utils.get_at_index(utils.patchify(image, size["patch"]), masked - 1)
            target = utils.normalize_mean_var(target, dim=-1)
            return nn.functional.mse_loss(prediction.float(), target)

    return Lightly()


class Contender:
    """One model with its optimizer, and its steps.

    Args:
        build: makes the model.
        loss: of the model and a batch of images with masks.
        options: of the command line.
    """

    def __init__(self, build: Callable[[], nn.Module], loss: Callable[[nn.Module, Any], Tensor], options: Any) -> None:
        torch.manual_seed(0)
        self.options, self.loss = options, loss
        self.model = build().to(options.device).train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step(self, batch: Any) -> None:
        """Forward, backward, optimizer."""
        bf16 = (
            torch.autocast(self.options.device, torch.bfloat16) if self.options.precision == "bf16" else nullcontext()
        )
        with bf16:
            loss = self.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def timed(self, batch: Any, steps: int) -> float:
        """Seconds a step."""
        wait(self.options.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.step(batch)
        wait(self.options.device)
        return (time.perf_counter() - start) / steps


def wait(device: str) -> None:
    """Until the device has done everything."""
    if device == "cuda":
        torch.cuda.synchronize()


def contenders(size: dict[str, Any]) -> dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Any], Tensor]]]:
    """Name -> (how it is built, how its loss is called)."""
    found: dict[str, Any] = {
        "ours": (lambda: ours(size, False), lambda m, b: m(b)[0]),
        "ours, compiled blocks": (lambda: ours(size, True), lambda m, b: m(b)[0]),
        "transformers": (lambda: transformers_mae(size), lambda m, b: m(b["image"]).loss),
        "official, fused attention": (lambda: OfficialMAE(size, True), lambda m, b: m(b["image"])),
        "official, as released": (lambda: OfficialMAE(size, False), lambda m, b: m(b["image"])),
    }
    if importlib.util.find_spec("lightly"):
        found["lightly"] = (lambda: lightly_mae(size), lambda m, b: m(b["image"]))
    else:
        print("lightly is not installed: left out", file=sys.stderr)
    return found


def images(options: Any, size: dict[str, Any]) -> dict[str, Tensor]:
    """A batch of random pictures and masks, on the device."""
    generator = torch.Generator().manual_seed(0)
    count = (PIXELS // size["patch"]) ** 2
    masked = count - int(count * (1 - MASK_RATIO))
    mask = torch.rand(options.batch, count, generator=generator).argsort(dim=1) < masked
    image = torch.randn(options.batch, 3, PIXELS, PIXELS, generator=generator)
    return {"image": image.to(options.device), "mask": mask.to(options.device)}


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, measured."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        wait(device)
        start = time.perf_counter()
        for _ in range(4):
            torch.mm(a, b)
        wait(device)
        times.append((time.perf_counter() - start) / 4)
    return 2 * side**3 / statistics.median(times)


def needed_flops(size: dict[str, Any]) -> float:
    """FLOPs of a training step a picture: matrix products and attention of our MAE, counted without memory."""
    width, depth, heads = size["decoder"]
    words = [
        f"encoder.img_size={PIXELS}", f"encoder.patch_size={size['patch']}", f"encoder.embed_dim={size['width']}",
        f"encoder.depth={size['depth']}", f"encoder.num_heads={size['heads']}", f"objective.mask_ratio={MASK_RATIO}",
        f"objective.decoder_embed_dim={width}", f"objective.decoder_depth={depth}",
        f"objective.decoder_num_heads={heads}",
    ]  # fmt: skip
    return flops(recipe_of("mae_vit_base_patch16_in1k", argparse.Namespace(words=words)))


def ready(make: Callable[[], tuple[Contender, Any]], word: str, options: Any) -> tuple[Contender, Any, list[float]]:
    """A contender after its first steps, its batch, and two numbers of bytes.

    The first is its peak memory: on CUDA what the allocator gave out, else the resident memory of a process that does
    only this, libraries included. The second is what torch gives out for the steps, on top of the model.

    Args:
        make: gives contender and batch.
        word: what says to that process which it is, ``objectives=...`` or ``sizes=... only=...``.
        options: of the command line.
    """
    cuda = options.device == "cuda"
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    contender, batch = make()
    start = time.perf_counter()
    contender.timed(batch, options.warmup)
    print(f"{word}: ready after {time.perf_counter() - start:.1f} s", file=sys.stderr)
    if cuda:
        peak, standing = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contender.timed(batch, 1)
        return contender, batch, [peak - before, torch.cuda.max_memory_allocated() - standing]
    words = [*word.split(" ", 1), f"batch={options.batch}", f"precision={options.precision}", *options.words]
    command = [sys.executable, __file__, *words, "alone=1", "device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return contender, batch, [float(number) for number in done.stdout.split()[-2:]]


def check_that_nobody_waits(contender: Contender, batch: Any) -> None:
    """A step of ours never waits for the device: torch raises where one does."""
    if contender.options.device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        contender.step(batch)
        torch.cuda.set_sync_debug_mode("default")


def alone(contender: Contender, batch: Any) -> None:
    """Three steps: the bytes of this process at its peak, and those that torch gives out in a step at its peak."""
    contender.timed(batch, 3)
    # not getrusage: what a process had before exec counts there
    resident: Any = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        contender.step(batch)
    held, most = 0, 0
    profiler: Any = seen.profiler
    for event in profiler.kineto_results.events():
        held += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, held)
    print(1024 * int(resident[1]), most)


def bench_mae(size_name: str, options: Any, rate: float) -> list[dict[str, Any]]:
    """Rows of the table for one size."""
    size = SIZES[size_name]
    needed, batch = needed_flops(size), images(options, size)
    found, rows = contenders(size), []
    if options.device == "cpu" and not shutil.which("g++"):
        print("no g++: compiled blocks are left out", file=sys.stderr)
        found.pop("ours, compiled blocks")
    chosen = [name for name in found if not options.contenders or name.split(",")[0] in options.contenders]
    running: dict[str, Contender] = {}
    memory: dict[str, list[float]] = {}
    for name in chosen:
        word = f"sizes={size_name} only={name}"
        running[name], _, memory[name] = ready(lambda n=name: (Contender(*found[n], options), batch), word, options)
    if "ours" in running:
        check_that_nobody_waits(running["ours"], batch)
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(options.rounds):
        for name in chosen:
            times[name].append(running[name].timed(batch, options.steps))
    reference = "official, as released" if "official, as released" in times else chosen[0]
    for name in chosen:
        low, middle, high = statistics.quantiles(times[name], n=4, method="inclusive")
        speed = options.batch / middle
        rows.append({
            "size": size_name, "model": name, "batch": options.batch, "precision": options.precision,
            "ms": middle * 1e3, "ms_quartiles": [low * 1e3, high * 1e3], "images_per_second": speed,
            "peak_gb": memory[name][0] / 1e9, "steps_gb": memory[name][1] / 1e9,
            "mfu": speed * needed / rate, "tflops": speed * needed / 1e12,
            "relative": statistics.median(times[reference]) / middle,
        })  # fmt: skip
    return rows


def recipe_of(name: str, options: Any) -> Recipe:
    """A recipe of configs/pretrain with the words of the command line."""
    file = ROOT / "configs" / "pretrain" / f"{name}.yaml"
    words = ["data.train=builtin:digits-train"] + ["objective.num_classes=1000"] * ("num_classes" in file.read_text())
    return check_recipe(check(Recipe, load([file], [*words, *options.words])))


def recipe_contender(recipe: Recipe, options: Any) -> tuple[Contender, Any]:
    """The objective of a recipe, and a batch of its views of black images."""
    objective = build.build_objective(recipe)
    contender = Contender(lambda: objective, lambda m, b: m(b)[0], options)
    objective.before_step(Progress(10, 100, 0.1, 1.0, 0.1))
    return contender, blank_batch(objective, recipe, options.batch, options.device)


def bench_objective(name: str, options: Any, rate: float) -> dict[str, Any]:
    """The row of a recipe."""
    recipe = recipe_of(name, options)
    contender, batch, memory = ready(lambda: recipe_contender(recipe, options), f"objectives={name}", options)
    check_that_nobody_waits(contender, batch)
    times = [contender.timed(batch, options.steps) for _ in range(options.rounds)]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    speed, needed = options.batch / middle, flops(recipe)
    return {
        "size": name, "model": "ours", "batch": options.batch, "precision": options.precision, "ms": middle * 1e3,
        "ms_quartiles": [low * 1e3, high * 1e3], "images_per_second": speed, "peak_gb": memory[0] / 1e9,
        "steps_gb": memory[1] / 1e9, "mfu": speed * needed / rate, "gflops_an_image": needed / 1e9,
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| size | model | batch | ms a step (quartiles) | images/s | peak GB | of it steps | MFU | times official |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        low, high = row["ms_quartiles"]
        relative = f"{row['relative']:.2f}" if "relative" in row else ""
        lines.append(
            f"| {row['size']} | {row['model']} | {row['batch']} | {row['ms']:.1f} ({low:.1f} to {high:.1f}) | "
            f"{row['images_per_second']:{'.0f' if row['images_per_second'] >= 100 else '.3g'}} | "
            f"{row['peak_gb']:.2f} | {row['steps_gb']:.2f} | {row['mfu']:.1%} | {relative} |"
        )
    return "\n".join(lines)


def parse(words: list[str]) -> argparse.Namespace:
    """``key=value`` words; those with a dot go to the recipes of ``objectives``."""
    options = argparse.Namespace(
        sizes="tiny", objectives="", device="cuda" if torch.cuda.is_available() else "cpu", batch=16, precision="no",
        rounds=5, steps=5, warmup=3, contenders="", only="", alone=0, json="", words=[],
    )  # fmt: skip
    for word in words:
        key, equals, value = word.lstrip("-").partition("=")
        if "." in key:
            options.words.append(word)
        elif not equals or not hasattr(options, key):
            sys.exit(f"{word}: allowed: {', '.join(f'{k}=...' for k in vars(options) if k != 'words')}")
        else:
            setattr(options, key, int(value) if isinstance(getattr(options, key), int) else value)
    if options.rounds < 2:
        sys.exit(f"rounds={options.rounds}: allowed: whole numbers from 2, a spread needs them")
    for key in ("sizes", "objectives", "contenders"):
        setattr(options, key, [part for part in getattr(options, key).split(",") if part])
    return options


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    options = parse(sys.argv[1:])
    if options.alone and options.objectives:
        return alone(*recipe_contender(recipe_of(options.objectives[0], options), options))
    if options.alone:
        size = SIZES[options.sizes[0]]
        return alone(Contender(*contenders(size)[options.only], options), images(options, size))
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rate = matrix_rate(options.device, torch.bfloat16 if options.precision == "bf16" else torch.float32)
    peak = dense_peak(device)
    note = (
        f" ({rate / peak:.0%} of the dense peak, {peak / 1e12:g} TFLOP/s)"
        if peak and options.precision == "bf16"
        else ""
    )
    print(f"{device}, torch {torch.__version__}, {options.precision}: matrix product {rate / 1e12:.2f} TFLOP/s{note}")
    rows: list[dict[str, Any]] = []
    for size_name in options.sizes if not options.objectives else ():
        rows += bench_mae(size_name, options, rate)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    for name in options.objectives:
        rows.append(bench_objective(name, options, rate))
    print(show(rows))
    if options.json:
        facts = {"device": device, "torch": torch.__version__, "matrix_flops": rate, "date": time.strftime("%Y-%m-%d")}
        Path(options.json).write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
