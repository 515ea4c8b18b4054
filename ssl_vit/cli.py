"""The door of every pipeline: arguments in, a checked recipe run, and one clear message with an exit code out."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ssl_vit.config import (
    EXIT_BAD_INPUT,
    EXIT_RESUMABLE,
    InputError,
    Section,
    check,
    help_lines,
    load,
    part_names,
    signature_section,
    to_yaml,
)

USAGE = """options:
  --config FILE       a recipe; repeatable, later files win
  --watch RUN         (evaluations) measure every checkpoint of a run while it is trained, on its data, each once
  --print-config      print the complete, checked recipe and stop
  --resume auto|never|PATH
                      go on with the run in run.dir (auto), refuse a folder in use (never), or a checkpoint's path
  --help              this text
  key=value           any key below, e.g. optim.batch_size=256; leading dashes are accepted"""


EXAMPLES = {"--config": "FILE", "--resume": "auto", "--watch": "runs/mae"}
"""Options with a value, and one."""


@dataclass
class Arguments:
    """A command line, taken apart.

    Args:
        files: recipes.
        words: ``key=value``.
        resume: ``"auto"``, ``"never"`` or a path.
        watch: a run whose checkpoints are measured as they come.
        print_config: only print the recipe.
        help: only print the keys.
    """

    files: list[Path] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    resume: str = "auto"
    watch: Path | None = None
    print_config: bool = False
    help: bool = False

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Arguments:
        """Take ``argv`` apart; ``--option=value`` and ``--option value`` are the same."""
        found, rest = cls(), list(argv)
        while rest:
            word = rest.pop(0)
            option, equals, value = word.partition("=")
            if option in EXAMPLES:
                if not equals and not rest:
                    raise InputError(f"{option}: needs a value, e.g. {option} {EXAMPLES[option]}")
                value = value if equals else rest.pop(0)
                if option == "--config":
                    found.files.append(Path(value))
                elif option == "--watch":
                    found.watch = Path(value)
                else:
                    found.resume = value
            elif word in ("-h", "--help"):
                found.help = True
            elif word == "--print-config":
                found.print_config = True
            else:
                found.words.append(word)
        return found


def pretrain(
    doc: str | None, pipeline: str, objective: str, default: str, images: str, also: tuple[str, ...] = ()
) -> None:
    """The door of ``pretrain_*.py``.

    Args:
        doc: the pipeline's docstring, the head of its help.
        pipeline: the pipeline's ``__file__``.
        objective: the ``objective.name`` it is for.
        default: recipe below ``configs/`` if neither a recipe nor ``data.train`` is given.
        images: recipe below ``configs/`` if ``data.train`` is given without a recipe.
        also: other values of ``objective.name`` that it accepts.
    """
    from ssl_vit.recipe import Recipe

    def defaults(words: list[str]) -> str:
        return images if any(word.lstrip("-").startswith("data.train=") for word in words) else default

    def start(recipe: Recipe, arguments: Arguments) -> None:
        from ssl_vit.run import run

        run(recipe, arguments.resume)

    def guard(values: dict[str, Any]) -> None:
        name = (values.get("objective") or {}).get("name")
        if name not in (objective, *also):
            raise InputError(f"objective.name={name!r}: this pipeline trains {objective!r}; {_door_of(name, pipeline)}")

    _door(doc, pipeline, lambda values: Recipe, defaults, guard, start)


def _door_of(objective: str | None, pipeline: str) -> str:
    """Which pipeline trains an objective: the one beside ``pipeline`` whose call of :func:`pretrain` names it."""
    call = re.compile(r"""cli\.(?:pretrain\(\s*__doc__,\s*__file__,|evaluate\(.*trains=)\s*["'](\w+)["']""")
    files = sorted(Path(pipeline).resolve().parent.glob("*.py"))
    doors = {found[1]: f"pipelines/{file.name}" for file in files if (found := call.search(file.read_text()))}
    return f"use {doors[objective]}" if objective in doors else f"there are {', '.join(doors.values())}"


def evaluate(doc: str | None, pipeline: str, default: str, trains: str | None = None) -> None:
    """The door of the pipelines that measure an encoder as it is.

    Args:
        doc: the pipeline's docstring, the head of its help.
        pipeline: the pipeline's ``__file__``.
        default: recipe below ``configs/`` if none is given.
        trains: ``objective.name`` of recipes that train something on the encoder before they measure it.
    """
    from ssl_vit.recipe import EvaluationRecipe, Recipe

    def start(recipe: EvaluationRecipe | Recipe, arguments: Arguments) -> None:
        from ssl_vit import run, watch

        if isinstance(recipe, Recipe):
            run.run(recipe, arguments.resume)
        elif arguments.watch:
            watch.watch(recipe, arguments.watch)
        else:
            run.evaluate(recipe, arguments.resume)

    def guard(values: dict[str, Any]) -> None:
        name = (values.get("objective") or {}).get("name")
        if name != trains:
            takes = f"objective.name={trains!r} or no objective" if trains else "no objective: it only measures"
            raise InputError(f"objective.name={name!r}: this pipeline takes {takes}; {_door_of(name, pipeline)}")

    def section(values: dict[str, Any]) -> type[Section]:
        return Recipe if "objective" in values else EvaluationRecipe

    _door(doc, pipeline, section, lambda words: default, lambda v: guard(v) if "objective" in v else None, start)


def embed(doc: str | None, pipeline: str, default: str) -> None:
    """The door of ``embed.py``; arguments as for :func:`evaluate`."""
    from ssl_vit.recipe import EmbeddingRecipe

    def start(recipe: EmbeddingRecipe, arguments: Arguments) -> None:
        from ssl_vit import embed

        embed.embed(recipe, arguments.resume)

    _door(doc, pipeline, lambda values: EmbeddingRecipe, lambda words: default, lambda values: None, start)


def transfer(doc: str | None, pipeline: str, default: str) -> None:
    """The door of ``transfer.py``; arguments as for :func:`evaluate`."""
    from ssl_vit.recipe import TransferRecipe

    def start(recipe: TransferRecipe, arguments: Arguments) -> None:
        from ssl_vit import transfer

        transfer.transfer(recipe, arguments.resume)

    _door(doc, pipeline, lambda values: TransferRecipe, lambda words: default, lambda values: None, start)


def refuse(error: InputError) -> NoReturn:
    """End with the one clear message of bad input."""
    print(f"error: {'; '.join(str(error).splitlines())}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


def _door(
    doc: str | None,
    pipeline: str,
    section_of: Callable[[dict[str, Any]], Any],
    defaults: Callable[[list[str]], str],
    guard: Callable[[dict[str, Any]], None],
    start: Callable[[Any, Arguments], None],
) -> None:
    configs = Path(pipeline).resolve().parents[1] / "configs"
    values: dict[str, Any] = {}
    try:
        arguments = Arguments.parse(sys.argv[1:])
        files = [find_recipe(file, configs) for file in arguments.files] or [configs / defaults(arguments.words)]
        values = load(files, arguments.words)
        section = section_of(values)
        if arguments.watch:
            _watched(values, arguments.watch, section)
        if arguments.help:
            print(help_text(doc, section, values))
            return
        from ssl_vit.recipe import check_recipe

        guard(values)
        recipe = check_recipe(check(section, values))
        if arguments.print_config:
            print(to_yaml(recipe), end="")
            return
        _prepare()
        if not arguments.files:
            logging.getLogger("ssl_vit").info("no --config: %s", files[0])
        _start(start, recipe, arguments)
    except InputError as error:
        if not error.untouched:
            _failed(values, EXIT_BAD_INPUT, str(error))
        refuse(error)
    except Exception as error:
        _failed(values, 1, f"{type(error).__name__}: {error}")
        raise


def _start(start: Callable[[Any, Arguments], None], recipe: Any, arguments: Arguments) -> None:
    from ssl_vit import distributed
    from ssl_vit.data.remote import ReadError
    from ssl_vit.data.workers import LoaderFailed
    from ssl_vit.training.run_folder import RunFolder
    from ssl_vit.training.signals import Preempted

    try:
        start(recipe, arguments)
        distributed.barrier()  # a process that leaves early takes down those that still talk to it
    except Preempted as stop:
        _preempted(recipe.run.dir, stop)
    except (ReadError, LoaderFailed) as error:
        # outside the training loop there is nothing new to save
        step = RunFolder(recipe.run.dir).read_status().get("step", 0)
        _preempted(recipe.run.dir, Preempted(step, None, str(error), together=False, kept="what was saved before"))
    finally:
        distributed.shutdown()


def _watched(values: dict[str, Any], run: Path, section: Any) -> None:
    """What ``--watch`` makes of a recipe: the run's encoder, and its data where nothing else is given."""
    from ssl_vit.recipe import EvaluationRecipe
    from ssl_vit.watch import check_watched

    if section is not EvaluationRecipe:
        raise InputError(f"--watch {run}: measures checkpoints of a run; allowed in evaluations without an objective")
    of_run = load([check_watched(run).path / "recipe.yaml"], [])["data"]
    given = {key: value for key, value in (values.get("data") or {}).items() if value is not None}
    values["data"] = {**of_run, **given}
    values["encoder"] = {"init": str(run)}
    values["run"] = {**(values.get("run") or {}), "dir": str(run / "watch")}


def find_recipe(file: Path, configs: Path) -> Path:
    """A recipe's path is looked up from the working folder, then from the folder that holds ``configs/``."""
    beside = configs.parent / file
    return beside if not file.exists() and beside.is_file() else file


def _prepare() -> None:
    from ssl_vit.training.environment import check_libraries, log_to_stderr

    check_libraries()
    log_to_stderr()


def _failed(values: dict[str, Any], exit_code: int, message: str) -> None:
    """Leave the failure in RUN/status.json, unless the folder holds a run that this start did not touch."""
    from ssl_vit.training.run_folder import RunFolder

    run = values.get("run")
    folder = run.get("dir") if isinstance(run, dict) else None
    if not isinstance(folder, str):
        return
    target = RunFolder(folder)
    if not target.writable():
        return
    if target.belongs_to_no_run() or target.read_status().get("state") == "running":
        target.status("failed", target.read_status().get("step", 0), exit_code, message)


def _preempted(folder: str, stop: Any) -> NoReturn:
    from ssl_vit import distributed
    from ssl_vit.training.run_folder import RunFolder

    if distributed.is_main():
        RunFolder(folder).status("preempted", stop.step, EXIT_RESUMABLE, str(stop))
        print(stop, file=sys.stderr)
    if stop.together:
        # a launcher kills the other processes as soon as one ends: only when the status is written
        distributed.barrier()
    sys.exit(EXIT_RESUMABLE)


def help_text(doc: str | None, section: type[Section], values: dict[str, Any]) -> str:
    """Every key with type, default and one line, the open sections from the constructors they name."""
    from ssl_vit.recipe import FILLED, Recipe, evaluation_class, objective_class

    lines = [(doc or "").strip(), "", USAGE, "", "keys:", *help_lines(section)]
    from ssl_vit.encoders.base import encoder_class_of

    name = str((values.get("encoder") or {}).get("name") or "vit_base_patch16_224")
    lines += ["", "encoder, as built by its name:"]
    lines += help_lines(signature_section(encoder_class_of(name)), "encoder.")
    if section is Recipe:
        cls = objective_class(check(Recipe, values))
        lines += ["", f"objective {values['objective']['name']}:"]
        lines += help_lines(signature_section(cls, FILLED), "objective.")
    for part in part_names("ssl_vit.evaluation", "Evaluation") if "evals" in section.model_fields else ():
        cls = evaluation_class(part)
        lines += ["", f"evaluation {part}:"]
        if section is Recipe:
            lines.append(f"  evals.{part}.every  (epochs or 'N steps'; default None)  also during training, this often")
        lines += help_lines(signature_section(cls), f"evals.{part}.")
    return "\n".join(lines)
