"""Imports go one way, files and functions stay small, and the contract of names holds."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [
    {"config", "distributed"}, {"data", "encoders"}, {"modules"}, {"objectives"}, {"evaluation"}, {"training"},
    {"export"}, {"recipe"}, {"splits"}, {"build"}, {"cost"}, {"compare"}, {"html_report"}, {"report"}, {"run"},
    {"watch", "embed", "transfer"}, {"cli"}, {"preflight"},
]  # fmt: skip
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted((ROOT / "ssl_vit").rglob("*.py"))
PIPELINES = sorted((ROOT / "pipelines").glob("*.py"))
FILE_LINES = {"objectives": 150}
RAISED_FILES = {
    # the machinery of recipes is one idea: reading, checking, signatures, help
    "ssl_vit/config.py": 290,
    # the run on one screen, with the small pieces only it uses
    "ssl_vit/run.py": 310,
    # the loop, with everything that may end or undo a step
    "ssl_vit/training/trainer.py": 300,
    # what is written, found, set aside and deleted, and nothing of it half
    "ssl_vit/training/checkpoint.py": 255,
    # one door for every pipeline: words, help, status and exit codes
    "ssl_vit/cli.py": 350,
    # every section of a recipe with its documentation, and the checks between them
    "ssl_vit/recipe.py": 375,
    # the whole order is one function of the position, and what it reads next is found the same way
    "ssl_vit/data/order.py": 260,
    # every promise of an objective, said where it is made
    "ssl_vit/objectives/base.py": 180,
    # the published method reads in the order it computes
    "ssl_vit/objectives/mae.py": 160,
    # a hundred lines are its 30 published settings, each a documented argument
    "ssl_vit/objectives/ibot.py": 235,
    # two tokenizers that share encoder, view and hand-over; half of it is documentation of arguments
    "ssl_vit/objectives/tokenizer_training.py": 180,
    # both versions of the method, whose masks and paths are most of its arguments
    "ssl_vit/objectives/beit.py": 190,
    "ssl_vit/encoders/vit.py": 285,
    # every promise of an encoder, said where it is made
    "ssl_vit/encoders/base.py": 265,
}
RAISED_FUNCTIONS = {
    # 31 lines are its signature
    ("ssl_vit/objectives/ibot.py", "__init__"): 75,
    # 18 lines are its signature
    ("ssl_vit/objectives/beit.py", "__init__"): 65,
    # the two functions that are meant to be read from top to bottom in one piece
    ("ssl_vit/training/trainer.py", "_steps"): 75,
    ("ssl_vit/run.py", "run"): 105,
}


def imports(file: Path) -> set[str]:
    """Dotted names that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(file: Path) -> str:
    return file.relative_to(ROOT / "ssl_vit").parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_left(file: Path) -> None:
    here = layer(file)
    if here == "__init__":
        assert not imports(file)
        return
    for name in imports(file):
        parts = name.split(".")
        if parts[0] != "ssl_vit" or parts[1] == here:
            continue
        if parts[1] == "__version__":
            continue
        there = parts[1]
        assert LEVEL[there] < LEVEL[here], f"{here} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_libraries_stay_in_their_place(file: Path) -> None:
    here, names = layer(file), {name.split(".")[0] for name in imports(file)}
    if "accelerate" in names:
        assert here in {"training", "run"}
    if "timm" in names and here not in {"encoders", "export"}:
        assert not [n for n in imports(file) if n.startswith("timm.models")], "timm internals belong to encoders/"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_sizes(file: Path) -> None:
    name = str(file.relative_to(ROOT))
    text = file.read_text(encoding="utf-8")
    cap = RAISED_FILES.get(name, FILE_LINES.get(layer(file), 250))
    assert text.count("\n") <= cap, f"{name} has {text.count(chr(10))} lines, cap {cap}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            allowed = RAISED_FUNCTIONS.get((name, node.name), 60)
            assert lines <= allowed, f"{name}: {node.name} has {lines} lines, cap {allowed}"


@pytest.mark.parametrize("file", PIPELINES, ids=lambda f: f.name)
def test_pipelines_are_doors(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 25
    assert ast.get_docstring(ast.parse(text))


def test_no_shelf_for_odds_and_ends() -> None:
    names = {file.stem for file in FILES}
    assert not names & {"utils", "helpers", "common", "misc", "util", "tools"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_unsafe_reading(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"\beval\(\s*[\"'\w]|shell=True|os\.system|pickle\.load|allow_pickle=True", text)
    for call in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", text):
        assert "weights_only=True" in call
