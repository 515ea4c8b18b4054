"""The machinery of recipes: YAML files and ``key=value`` overrides in, checked sections out.

Nothing here knows what a recipe contains (see :mod:`ssl_vit.recipe`) and nothing here imports torch.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, create_model
from yaml import YAMLError

EXIT_BAD_INPUT = 2
EXIT_RESUMABLE = 75


class InputError(ValueError):
    """A mistake of the user: the message says what, where, what is allowed and how to cure it. Exit code 2."""

    untouched = False
    """Whether even the status of the run's folder must stay as it is."""


class Section(BaseModel):
    """One section of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


SectionT = TypeVar("SectionT", bound=BaseModel)


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest allowed word, or an empty string."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


# --------------------------------------------------------------------------------------------- durations


class Duration:
    """A length of training: epochs (a number), or optimizer steps (``"500 steps"``).

    Args:
        value: the number of epochs or of steps.
        unit: ``"epochs"`` or ``"steps"``.
    """

    def __init__(self, value: float, unit: str) -> None:
        self.value, self.unit = value, unit

    @classmethod
    def parse(cls, value: Any) -> Duration:
        """Read ``3``, ``0.5``, ``"0.5 epochs"`` or ``"500 steps"``; ``ValueError`` otherwise."""
        if isinstance(value, Duration):
            return value
        match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(epochs?|steps?|)\s*", str(value))
        if isinstance(value, bool) or match is None:
            raise ValueError("should be a number of epochs, or steps written as '500 steps'")
        unit = "steps" if match[2].startswith("step") else "epochs"
        number = float(match[1])
        if unit == "steps" and number != int(number):
            raise ValueError("steps should be a whole number")
        return cls(number, unit)

    def steps(self, steps_per_epoch: float) -> int:
        """The one place where durations become optimizer steps."""
        return int(self.value) if self.unit == "steps" else round(self.value * steps_per_epoch)

    def due(self, step: int, steps_per_epoch: float) -> bool:
        """Whether a multiple of this length (above 0) ends with step number ``step``; epochs need not end on a step."""
        period = max(self.value * (1.0 if self.unit == "steps" else steps_per_epoch), 1.0)
        return step > 0 and math.floor(step / period) > math.floor((step - 1) / period)

    def __str__(self) -> str:
        return f"{int(self.value)} steps" if self.unit == "steps" else f"{self.value:g}"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Duration) and (self.value, self.unit) == (other.value, other.unit)

    def __hash__(self) -> int:
        return hash((self.value, self.unit))


def plain(value: Any) -> Any:
    """A value as YAML and JSON can hold it: models, durations, paths and tuples become plain types."""
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Duration):
        return (
            int(value.value)
            if value.unit == "epochs" and value.value == int(value.value)
            else (value.value if value.unit == "epochs" else str(value))
        )
    return str(value) if isinstance(value, Path) else value


def to_yaml(value: Any) -> str:
    """YAML text of a recipe or section, keys in the order of their declaration."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(value)))


# --------------------------------------------------------------------------------------------- reading


def load(files: Iterable[Path], overrides: Iterable[str]) -> dict[str, Any]:
    """Merge YAML files (later wins) and ``key=value`` words into one plain dict.

    Raises:
        InputError: a file is missing or is not YAML with keys, or a word is not ``key=value``.
    """
    merged = OmegaConf.create()
    for file in files:
        try:
            part = OmegaConf.load(file)
        except FileNotFoundError:
            raise InputError(f"--config {file}: no such file") from None
        except IsADirectoryError:
            raise InputError(f"--config {file}: is a folder, not a YAML file") from None
        except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            raise InputError(f"--config {file}: not valid YAML: {' '.join(str(error).split())}") from None
        if not OmegaConf.is_dict(part):
            raise InputError(f"--config {file}: should hold keys and values, e.g. 'seed: 0'")
        merged = OmegaConf.merge(merged, part)
    words = []
    for word in overrides:
        stripped = word.lstrip("-")
        key = stripped.partition("=")[0]
        if "=" not in stripped or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
            raise InputError(
                f"argument {word!r}: should be key=value, e.g. optim.batch_size=256; --help lists all keys"
            )
        words.append(stripped)
    try:
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(words))
        loaded = OmegaConf.to_container(merged, resolve=True)
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise InputError(f"cannot read {' '.join(words)}: {' '.join(str(error).split())}") from None
    return {str(key): value for key, value in loaded.items()} if isinstance(loaded, dict) else {}


def check(section: type[SectionT], values: Mapping[str, Any], where: str = "") -> SectionT:
    """Validate ``values`` as ``section``; all mistakes are named in one message.

    Raises:
        InputError: naming each key, its value, what is allowed and the nearest known key.
    """
    try:
        return section.model_validate(dict(values))
    except ValidationError as error:
        lines = [_explain(section, dict(item), where) for item in error.errors()]
        raise InputError("\n".join(lines)) from None


def _explain(section: type[BaseModel], item: dict[str, Any], where: str) -> str:
    path = [str(part) for part in item["loc"] if not str(part).startswith(("function-", "list[", "dict[", "tuple["))]
    key = ".".join(([where] if where else []) + path)
    if item["type"] == "extra_forbidden":
        known = _known_keys(section, path[:-1])
        hint = nearest(path[-1], known)
        return f"{key}={item['input']!r}: unknown key{hint}; allowed here: {', '.join(known) or 'no keys'}"
    if item["type"] == "missing":
        return f"{key}: is required; give it as {key}=..."
    message = item["msg"].removeprefix("Value error, ")
    return f"{key}={item['input']!r}: {message[0].lower()}{message[1:]}"


def _known_keys(section: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = section.model_fields.get(part)
        inner = field.annotation if field else None
        if not (inspect.isclass(inner) and issubclass(inner, BaseModel)):
            return []
        section = inner
    return list(section.model_fields)


# --------------------------------------------------------------------------------------------- open sections


def import_part(package: str, name: str, key: str, base: str) -> type:
    """The class derived from ``base`` in ``package``'s file ``name``: parts of a recipe are chosen by file name.

    Raises:
        InputError: there is no such file; the allowed names and the nearest are in the message.
    """
    names = part_names(package, base)
    if name not in names:
        raise InputError(f"{key}={name!r}: no such part{nearest(str(name), names)}; allowed: {', '.join(names)}")
    module = importlib.import_module(f"{package}.{name}")
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        and base in [ancestor.__name__ for ancestor in value.__mro__[1:]]
    ]
    assert len(classes) == 1, f"{package}.{name} should define one {base}, has {len(classes)}"
    return classes[0]


def part_names(package: str, base: str) -> list[str]:
    """The names a recipe can choose from: the files of ``package`` that define a class derived from ``base``."""
    files = [file for folder in importlib.import_module(package).__path__ for file in Path(folder).glob("*.py")]
    pattern = re.compile(rf"^class \w+\((\w+, )*{base}\b", re.MULTILINE)
    return sorted(file.stem for file in files if pattern.search(file.read_text(encoding="utf-8")))


def signature_section(cls: type, skip: Iterable[str] = ()) -> type[BaseModel]:
    """The recipe section that ``cls``'s constructor describes: names, types, defaults and documentation.

    Args:
        cls: a class with an annotated constructor and a Google style ``Args:`` list.
        skip: parameters that the program fills, not the recipe.
    """
    hints = inspect.get_annotations(cls.__init__, eval_str=True)
    texts = argument_texts(cls)
    fields: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(cls).parameters.items()):
        if name in skip or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[name] = (hints[name], Field(default, description=texts.get(name, "")))
    return create_model(cls.__name__, __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)


def argument_texts(cls: type) -> dict[str, str]:
    """``{argument: first line of its text}`` from the ``Args:`` list of a class docstring."""
    block = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", inspect.getdoc(cls) or "", re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", block[1] if block else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


# --------------------------------------------------------------------------------------------- help


def help_lines(section: type[BaseModel], prefix: str = "") -> list[str]:
    """One line per key of a section: name, type, default, meaning."""
    lines = []
    texts = argument_texts(section)
    for name, field in section.model_fields.items():
        inner = field.annotation
        if inspect.isclass(inner) and issubclass(inner, BaseModel):
            lines += help_lines(inner, f"{prefix}{name}.")
            continue
        default = (
            "required" if field.is_required() else f"default {plain(field.get_default(call_default_factory=True))!r}"
        )
        text = field.description or texts.get(name, "")
        lines.append(f"  {prefix}{name}  ({type_text(field.annotation)}; {default})  {text}")
    return lines


def type_text(annotation: Any) -> str:
    """A type as a person writes it: ``int``, ``float | None``, ``'cosine' | 'constant'``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(args[0])
    if annotation is Duration:
        return "epochs or 'N steps'"
    if annotation is type(None):
        return "None"
    if origin is not None and "Literal" in str(origin):
        return " | ".join(map(repr, args))
    if origin is not None and ("Union" in str(origin)):
        return " | ".join(type_text(a) for a in args)
    return str(annotation) if origin else getattr(annotation, "__name__", str(annotation))


DurationField = Annotated[Duration, PlainValidator(Duration.parse)]
"""The pydantic field type of a :class:`Duration`."""
