"""The door of ``pipelines/plan.py``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from ssl_vit.cli import Arguments, find_recipe, help_text, refuse
from ssl_vit.config import InputError, check, help_lines, load, to_yaml
from ssl_vit.preflight.memory import measured
from ssl_vit.preflight.table import PlanSection, make_plan, show
from ssl_vit.recipe import Recipe, check_recipe


def main(doc: str | None, pipeline: str, default: str) -> None:
    """The door of ``pipelines/plan.py``: the recipe's keys, and those of :class:`PlanSection`."""
    configs = Path(pipeline).resolve().parents[1] / "configs"
    try:
        arguments = Arguments.parse(sys.argv[1:])
        own = set(PlanSection.model_fields)
        short = {"--measure": "measure=true", "--json": "json_output=true"}
        arguments.words = [short.get(word, word) for word in arguments.words]
        machine_words = [w for w in arguments.words if w.lstrip("-").partition("=")[0] in own]
        words = [w for w in arguments.words if w not in machine_words]
        files = [find_recipe(file, configs) for file in arguments.files] or [configs / default]
        machine = check(PlanSection, load([], machine_words), "plan")
        values = load(files, words)
        if arguments.help:
            print(help_text(doc, Recipe, values))
            print("\n".join(["", "the machine:", *help_lines(PlanSection)]))
            return
        train = (values.get("data") or {}).get("train")
        values["data"] = {**(values.get("data") or {}), "train": train or "unset"}
        recipe = check_recipe(check(Recipe, values))
        recipe.data.train = train
        if arguments.print_config:
            print(to_yaml(recipe), end="")
            return
        report = make_plan(recipe, machine, files[-1].name)
        print(json.dumps(asdict(report)) if machine.json_output else show(report, machine))
        if machine.measure:
            print(measured(recipe, report.micro_batch_size))
    except InputError as error:
        refuse(error)
