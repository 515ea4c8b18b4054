"""What a finished run hands over: the exported encoder, result.json, the model card, and the words that say so."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from ssl_vit.config import to_yaml
from ssl_vit.data.decode import RULES
from ssl_vit.data.loader import Pixels
from ssl_vit.encoders.base import Encoder
from ssl_vit.evaluation.base import Evaluation, Subset
from ssl_vit.export.card import write_card
from ssl_vit.export.timm_folder import export_timm
from ssl_vit.html_report import write_report
from ssl_vit.modules.target_cache import state_hash
from ssl_vit.objectives.base import Objective
from ssl_vit.recipe import EvaluationRecipe, Recipe
from ssl_vit.splits import Sets
from ssl_vit.training.environment import library_versions
from ssl_vit.training.metrics import read_metrics
from ssl_vit.training.plan import Plan
from ssl_vit.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


def measurement(
    recipe: Recipe | EvaluationRecipe, sets: Sets, encoder: Encoder, evaluations: Mapping[str, Evaluation], bad: int
) -> dict[str, Any]:
    """What decides the numbers of evaluations, for result.json: protocols, splits, data, encoder, seeds, versions."""
    parts: dict[str, Subset | None] = {"probe": sets.probe, "val": sets.val}
    designs = {n: e.design(sets.probe, recipe.seed) for n, e in evaluations.items()} if sets.probe is not None else {}
    return {
        "protocols": {name: evaluation.protocol for name, evaluation in evaluations.items() if evaluation.protocol},
        "designs": {name: design for name, design in designs.items() if design},
        "probe": sets.rule,
        "data": {
            "train": [{"images": len(index), "sha256": index.fingerprint} for index in sets.train],
            **{
                name: {
                    "images": len(part.samples),
                    "classes": len(np.unique(part.labels)),
                    "of": len(part.index),
                    "sha256": part.index.fingerprint,
                }
                for name, part in parts.items()
                if part is not None
            },
        },
        "encoder": {"name": encoder.name, "init": recipe.encoder.get("init"), "sha256": state_hash(encoder.model)},
        "seed": recipe.seed,
        "bad_samples": bad,
        "versions": library_versions(),
    }


def finish(
    recipe: Recipe, folder: RunFolder, objective: Objective, pixels: Pixels, plan: Plan, facts: dict[str, Any]
) -> None:
    """Export the encoder with its check, write result.json and the card, say where everything is.

    Args:
        recipe: of the run.
        folder: of the run.
        objective: trained.
        pixels: preprocessing, which the export states.
        plan: steps.
        facts: of :func:`measurement`.
    """
    exported = export_timm(
        objective.encoder, folder.path / "encoder", mean=pixels.mean, std=pixels.std, crop_pct=pixels.crop_pct,
        interpolation=pixels.interpolation, metadata={"objective": recipe.objective["name"], "step": plan.total_steps},
    )  # fmt: skip
    handed_over = objective.hand_over(folder.path)
    lines = [line for line in read_metrics(folder.path / "metrics.jsonl") if "loss" not in line]
    initial = {k: v for line in lines if line["step"] == 0 for k, v in line.items()}
    final = {k: v for line in lines if line["step"] == plan.total_steps for k, v in line.items()}
    result = {
        "objective": recipe.objective["name"], "steps": plan.total_steps,
        "evaluations": {"initial": initial, "final": final}, "export_difference": exported.difference,
        **handed_over, **facts,
    }  # fmt: skip
    folder.write_json("result.json", result)
    write_card(folder.path, card_facts(recipe, folder, plan, result, pixels))
    folder.status("finished", plan.total_steps, exit_code=0)
    write_report(folder.path)
    report(folder)


def card_facts(recipe: Recipe, folder: RunFolder, plan: Plan, result: dict[str, Any], pixels: Pixels) -> dict[str, Any]:
    """What the model card says."""
    initial, final = result["evaluations"]["initial"], result["evaluations"]["final"]
    shown = [name for name in final if name.endswith(("/top1", "/effective_rank"))]
    encoder = {key: value for key, value in recipe.encoder.items() if value is not None}
    data = {
        "train": recipe.data.train,
        "val": recipe.data.val,
        "images seen": plan.total_steps * recipe.optim.batch_size,
    }
    return {
        "path": folder.path / "encoder",
        "encoder": encoder,
        "data": {
            **data,
            "mean": pixels.mean,
            "std": pixels.std,
            "crop_pct": pixels.crop_pct,
            "interpolation": pixels.interpolation,
            "image files": RULES,
        },
        "results": {"scored": result["probe"]}
        | {n: f"{initial.get(n, float('nan')):.4f} -> {final[n]:.4f}" for n in shown},
        "recipe": to_yaml(recipe),
    }


def report(folder: RunFolder) -> None:
    """Say what a finished run found and where its parts are."""
    result = folder.read_json("result.json")
    initial, final = result["evaluations"].get("initial", {}), result["evaluations"]["final"]
    for name, value in final.items():
        if name.endswith("/top1") or name == "rank/effective_rank":
            error = final.get(name.replace("/top1", "/standard_error")) if name.endswith("/top1") else None
            before = f"{initial[name]:.4f} -> " if name in initial else ""
            logger.info("%-20s %s%.4f%s", name, before, value, f"  (standard error {error:.4f})" if error else "")
    if (folder.path / "report.html").is_file():
        logger.info("report: %s", folder.path / "report.html")
    if (folder.path / "pictures").is_dir():
        logger.info("pictures: %s", folder.path / "pictures")
    if "tokenizer" in result:
        path, digest = (folder.path / "tokenizer").resolve(), result["tokenizer"]["sha256"]
        logger.info("tokenizer: objective.tokenizer.path=%s objective.tokenizer.sha256=%s", path, digest)
    if (folder.path / "encoder").is_dir():
        encoder, difference = (folder.path / "encoder").resolve(), result["export_difference"]
        logger.info("encoder: %s  (reloaded in timm, features differ by at most %.1e)", encoder, difference)
        logger.info(
            "load it with:\n  import timm\n  encoder = timm.create_model('local-dir:%s', pretrained=True)", encoder
        )
