"""Features of a whole set of shards as files: one part a shard, with the key and label of each sample.

Each process takes every R-th shard and needs no other; a part has its name only when it is whole, so a job that was
stopped goes on with the shards that are left.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_vit import build, distributed, splits
from ssl_vit.config import InputError, plain
from ssl_vit.data.bad_samples import BadReport
from ssl_vit.data.index import Index
from ssl_vit.data.loader import EvalBatches, Pixels, iterate
from ssl_vit.data.views import CentreView
from ssl_vit.encoders.base import number_of
from ssl_vit.modules.pools import OWN, check_pools, side_by_side
from ssl_vit.modules.target_cache import state_hash
from ssl_vit.objectives.base import Objective
from ssl_vit.recipe import EmbeddingRecipe, completer
from ssl_vit.training.checkpoint import sync_write
from ssl_vit.training.environment import library_versions
from ssl_vit.training.launch import Launch
from ssl_vit.training.run_folder import RunFolder
from ssl_vit.training.signals import Interrupted, Preempted, StopRequest
from ssl_vit.training.strategies import forward_in_precision

logger = logging.getLogger(__name__)


def embed(recipe: EmbeddingRecipe, resume: str = "auto") -> None:
    """Write the features of every image of ``data.train`` into ``RUN/features/``.

    Args:
        recipe: encoder, data and form of the features.
        resume: as for a training.

    Raises:
        InputError: what a user can have got wrong, or parts are there of another encoder or other data.
    """
    with StopRequest() as stop:
        launch = Launch.asked_for().replicated()
        folder = RunFolder(recipe.run.dir)
        pixels = build.resolve_pixels(recipe.data, recipe.encoder)
        precision = build.resolve_precision(recipe)
        folder.check_resume(plain(recipe), resume, completer(recipe))
        if folder.finished():
            logger.info("run.dir=%s: these features are finished; nothing to do", folder.path)
            return
        objective = build.build_frozen(recipe)
        features = build.constructed("embed", lambda: Features(objective, recipe.embed.stages, recipe.embed.pool))
        indexes = [splits.open_data(recipe.data, spec) for spec in splits.train_specs(recipe.data)]
        if not indexes:
            raise InputError("data.train: is required; give the images as data.train=folder:/my/images or shards")
        facts = _facts(recipe, objective, indexes, pixels)
        _compare(folder.path / "features.json", facts)
        folder.lock()
        accelerator = launch.open(precision, recipe.run.deterministic)
        if accelerator.is_main_process:
            folder.open(recipe, launch.facts())
            folder.log_to_file()
            folder.status("running")
            (folder.path / "features").mkdir(exist_ok=True)
            sync_write(folder.path / "features.json", json.dumps(facts, indent=1) + "\n")
        distributed.barrier()
        objective.to(accelerator.device)
        forward_in_precision(objective, accelerator)
        shards = [(index, number) for index in indexes for number in range(len(index.shards))]
        parts = [Part(folder.path / "features", i, recipe.embed.format) for i in range(len(shards))]
        stop.waits = True
        with torch.inference_mode():
            for place in range(distributed.rank(), len(shards), distributed.world_size()):
                if not parts[place].done():
                    index, number = shards[place]
                    found = _of_shard(index, number, features, pixels, recipe, accelerator.device, stop)
                    if found is None:  # asked to stop
                        break
                    parts[place].write(*found)
                    url, count = index.shards[number].url, len(found[0])
                    logger.info("part %d of %d: %s, %d images", place + 1, len(shards), url, count)
        try:
            stop.check(accelerator.device)  # every process comes here, whether it was stopped or is through
        except Interrupted:
            raise Preempted(0, None, stop.name(), kept="the parts that are whole") from None
        if accelerator.is_main_process:
            _finish(recipe, folder, parts, facts, features.width)


class Features:
    """What is written of an image.

    Args:
        objective: around the encoder.
        stages: blocks whose features stand side by side, see :meth:`ssl_vit.encoders.base.Encoder.intermediates`.
        pool: ``pool`` for the encoder's own feature, else of :data:`ssl_vit.modules.pools.POOLS`.
    """

    def __init__(self, objective: Objective, stages: list[int], pool: str) -> None:
        check_pools([pool], (OWN, "token", "avg", "both"))
        encoder = objective.encoder
        last = len(encoder.stages)
        if pool == OWN and [number_of(stage, last, encoder.name) for stage in stages] != [last]:
            raise ValueError(f"stages={stages} with pool={OWN!r}: the encoder's own feature is that of its last block")
        self.objective, self.stages, self.pool = objective, stages, pool
        self.width = self({"image": torch.zeros(1, encoder.in_chans, *encoder.img_size)}).shape[1]

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, D)."""
        if self.pool == OWN:
            return self.objective.encoder.pool(self.objective(batch, call="encode"))
        tokens = self.objective(batch, call="intermediates", stages=self.stages)
        return side_by_side(tokens, self.pool)


class Part:
    """The file of one shard's features.

    Args:
        folder: of all parts.
        number: of the shard over all sources.
        format: ``parquet`` (key, label, feature), or ``npy`` with a ``.jsonl`` of keys and labels beside it.
    """

    def __init__(self, folder: Path, number: int, format: str) -> None:
        self.format, self.stem = format, folder / f"part-{number:06d}"
        self.file = self.stem.with_suffix(f".{format}")

    def done(self) -> bool:
        """Whether the part is whole."""
        return self.file.is_file()

    def write(self, features: np.ndarray, keys: list[str], labels: list[int], bad: list[BadReport]) -> None:
        """Write features float32 (n, D) of the samples that decode, and name those that do not."""
        temporary = self.stem.with_name(f".{self.stem.name}.{os.getpid()}")
        lines = "".join(json.dumps(asdict(report)) + "\n" for report in bad)
        if bad:
            sync_write(self.stem.with_suffix(".bad.jsonl"), lines)
        if self.format == "npy":
            rows = (json.dumps({"key": key, "label": label}) for key, label in zip(keys, labels, strict=True))
            sync_write(self.stem.with_suffix(".jsonl"), "".join(f"{row}\n" for row in rows))
            with open(temporary, "wb") as file:
                np.save(file, features)
        else:
            import pyarrow as pa
            from pyarrow import parquet

            values = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
            known = pa.array([label if label >= 0 else None for label in labels], pa.int64())
            table = pa.table({"key": pa.array(keys, pa.string()), "label": known, "feature": values})
            parquet.write_table(table, temporary)
        os.replace(temporary, self.file)

    def counts(self) -> tuple[int, int]:
        """Images in it, and samples of its shard that did not decode."""
        if self.format == "npy":
            images = len(np.load(self.file, mmap_mode="r"))
        else:
            from pyarrow import parquet

            images = parquet.read_metadata(self.file).num_rows
        bad = self.stem.with_suffix(".bad.jsonl")
        return images, len(bad.read_text(encoding="utf-8").splitlines()) if bad.is_file() else 0


def _of_shard(
    index: Index,
    shard: int,
    features: Features,
    pixels: Pixels,
    recipe: EmbeddingRecipe,
    device: torch.device,
    stop: StopRequest,
) -> tuple[np.ndarray, list[str], list[int], list[BadReport]] | None:
    """Features, keys and labels of a shard's good samples in their order, and its bad ones; None: asked to stop."""
    samples = np.arange(index.starts[shard], index.starts[shard + 1])
    view = CentreView(features.objective.encoder.img_size, pixels.crop_pct, pixels.interpolation)
    batches = EvalBatches(index, samples, view, pixels, recipe.run.eval_batch_size)
    found, bad = [np.zeros((0, features.width), np.float32)], []
    good = np.zeros(len(samples), dtype=bool)
    workers, stall_timeout = build.loader_workers(recipe.run), recipe.run.stall_timeout
    for batch, reports in iterate(batches, range(len(batches)), workers, stall_timeout=stall_timeout):
        if stop.number:
            return None
        bad += reports
        if batch:
            good[batch["index"].numpy()] = True
            found.append(features(pixels.to_device(batch, device)).float().cpu().numpy())
    chosen = samples[good]
    labels = index.samples["label"][chosen].astype(np.int64).tolist()
    return np.concatenate(found), [index.key(int(sample)) for sample in chosen], labels, bad


def _facts(recipe: EmbeddingRecipe, objective: Objective, indexes: list[Index], pixels: Pixels) -> dict[str, Any]:
    """What the numbers of every part depend on."""
    return {
        "encoder": state_hash(objective.encoder.model),
        "data": [index.fingerprint for index in indexes],
        "pixels": plain(asdict(pixels)),
        "form": plain(recipe.embed),
    }


def _compare(file: Path, facts: dict[str, Any]) -> None:
    """Refuse to go on where parts are of another encoder, other data or another form."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else facts
    changed = [key for key in facts if before.get(key) != facts[key]]
    if changed:
        raise InputError(f"{file}: the parts beside it have another {' and '.join(changed)}; give another run.dir")


def _finish(recipe: EmbeddingRecipe, folder: RunFolder, parts: list[Part], facts: dict[str, Any], width: int) -> None:
    counts = [part.counts() for part in parts]
    images, bad = (sum(column) for column in zip(*counts, strict=True))
    folder.write_json("result.json", {
        "images": images, "bad_samples": bad, "width": width, "parts": len(parts), "format": recipe.embed.format,
        **facts, "versions": library_versions(),
    })  # fmt: skip
    folder.status("finished", exit_code=0)
    path = folder.path / "features"
    logger.info("features: %s, %d images x %d in %d parts; %d did not decode", path, images, width, len(parts), bad)
    folder.close_log()
