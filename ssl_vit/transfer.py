"""One encoder on many labelled sets, one table (after VTAB, arXiv 1910.04867)."""

from __future__ import annotations

import logging
import os
from statistics import fmean
from typing import Any

from ssl_vit import distributed, splits
from ssl_vit.config import InputError, plain
from ssl_vit.recipe import EvaluationRecipe, SetSection, TransferRecipe, check_recipe, completer
from ssl_vit.run import evaluate
from ssl_vit.training.checkpoint import sync_write
from ssl_vit.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

ALL = "all"


def transfer(recipe: TransferRecipe, resume: str = "auto") -> None:
    """Measure an encoder on every set of a recipe; each set is a run of its own in ``RUN/sets/NAME``.

    Sets that are finished are not measured again, so what was stopped goes on with the same command.

    Args:
        recipe: encoder, sets and evaluations.
        resume: as for a training.

    Raises:
        InputError: a set is not at hand and ``missing`` is stop, or none is.
    """
    folder = RunFolder(recipe.run.dir)
    folder.check_resume(plain(recipe), resume, completer(recipe))
    absent = {row.name: reason for row in recipe.sets if (reason := _why_absent(recipe, row))}
    if absent and (recipe.missing == "stop" or len(absent) == len(recipe.sets)):
        first = next(iter(absent))
        raise InputError(
            f"sets.{first}: {absent[first]}"
            + (f" (and {len(absent) - 1} more sets)" if len(absent) > 1 else "")
            + ("; missing=skip leaves out what is not at hand" if recipe.missing == "stop" else "")
        )
    folder.lock()
    if os.environ.get("RANK", "0") == "0":  # before the first set: only a folder with a recipe can be gone on with
        folder.open(recipe, {})
        folder.status("running")
    rows = []
    for row in recipe.sets:
        if row.name in absent:
            logger.warning("%s: left out, not at hand: %s", row.name, absent[row.name])
            rows.append({"name": row.name, "group": row.group, "absent": absent[row.name]})
            continue
        logger.info("%s: %s -> %s", row.name, row.train, row.val)
        of_set = _recipe_of(recipe, row)
        evaluate(of_set, resume)
        distributed.barrier()
        rows.append({"name": row.name, "group": row.group, **RunFolder(of_set.run.dir).read_json("result.json")})
    if distributed.is_main():
        results = _summary(rows)
        folder.write_json("result.json", results)
        sync_write(folder.path / "transfer.md", table(results))
        folder.status("finished", exit_code=0)
        logger.info("%s:\n%s", folder.path / "transfer.md", table(results))


def _recipe_of(recipe: TransferRecipe, row: SetSection) -> EvaluationRecipe:
    data = recipe.data.model_copy(
        update={"train": None, "probe": row.train, "val": row.val, "probe_images": recipe.train_images}
    )
    run = recipe.run.model_copy(update={"dir": f"{recipe.run.dir}/sets/{row.name}"})
    return check_recipe(
        EvaluationRecipe(
            seed=recipe.seed,
            mixed_precision=recipe.mixed_precision,
            encoder=dict(recipe.encoder),
            data=data,
            evals={name: dict(values or {}) for name, values in recipe.evals.items()},
            run=run,
        )
    )


def _why_absent(recipe: TransferRecipe, row: SetSection) -> str | None:
    """Why a set cannot be measured, None if it can."""
    try:
        for spec in (row.train, row.val):
            index = splits.open_data(recipe.data, spec)
            if not index.labelled:
                return f"{spec}: has no labels"
    except InputError as error:
        return f"{error}; it is {row.hf} on the Hugging Face Hub" if row.hf else str(error)
    return None


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Every set, and the mean of each number over groups and all sets that were measured."""
    measured = [row for row in rows if "evaluations" in row]
    sets = {}
    for row in rows:
        final = row.get("evaluations", {}).get("final", {})
        kept = {key: value for key, value in final.items() if key.endswith(("/top1", "/standard_error", "/seconds"))}
        facts = {key: row[key] for key in ("group", "absent", "data", "protocols", "designs") if key in row}
        sets[row["name"]] = {**facts, "numbers": kept}
    names = sorted({key for row in measured for key in row["evaluations"]["final"] if key.endswith("/top1")})
    groups = {ALL: measured}
    for row in measured:
        groups.setdefault(row["group"], []).append(row)
    means = {
        group: {"sets": len(members)}
        | {name: fmean(member["evaluations"]["final"][name] for member in members) for name in names}
        for group, members in groups.items()
    }
    return {"sets": sets, "means": means, "encoder": measured[0]["encoder"], "versions": measured[0]["versions"]}


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    names = [name for name in results["means"][ALL] if name != "sets"]
    lines = [
        "| set | group | training images | images | " + " | ".join(names) + " |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for name, row in results["sets"].items():
        if "absent" in row:
            lines.append(f"| {name} | {row['group']} | not at hand, not verified | | " + " | " * len(names))
            continue
        numbers = [
            f"{row['numbers'][key]:.3f} ± {row['numbers'].get(key.replace('top1', 'standard_error'), 0):.3f}"
            for key in names
        ]
        data = row["data"]
        lines.append(
            f"| {name} | {row['group']} | {data['probe']['images']} | {data['val']['images']} | "
            + " | ".join(numbers)
            + " |"
        )
    for group, row in results["means"].items():
        numbers = " | ".join(f"{row[key]:.3f}" for key in names)
        lines.append(f"| **mean of {row['sets']}** | {group} | | | {numbers} |")
    return "\n".join(lines) + "\n"
