"""The worked examples of docs/handing_over.md, run as they stand on a run of this machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, in_process, tiny_recipe

from ssl_vit.config import check
from ssl_vit.export.command import ExportOptions, export
from ssl_vit.recipe import Recipe, check_recipe
from ssl_vit.run import run

DOCUMENT = (ROOT / "docs" / "handing_over.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", DOCUMENT, re.DOTALL))


@pytest.fixture(scope="module")
def place(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``runs/mine``, ``images`` and ``exported``."""
    folder = tmp_path_factory.mktemp("handing_over")
    run(check_recipe(check(Recipe, tiny_recipe(images, folder / "runs" / "mine", evals={}))))
    (folder / "images").symlink_to(images)
    export(folder / "runs/mine", folder / "exported", ExportOptions(format="transformers"), fresh=False)
    return folder


def test_there_is_an_example_of_each_kind() -> None:
    assert list(EXAMPLES) == ["Fine-tune it in plain timm", "A backbone for segmentation", "In transformers"]
    assert not any("ssl_vit" in code for code in EXAMPLES.values()), "nothing of this package is needed"


@pytest.mark.parametrize("title", EXAMPLES)
def test_the_example_runs(title: str, place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLES[title]], cwd=place, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout
    if "timm" in title:
        losses = [float(number) for number in re.findall(r"loss ([\d.]+)", said)]
        assert losses[-1] < losses[0]
    elif "segmentation" in title:
        losses = [float(number) for number in re.findall(r"loss ([\d.]+)", said)]
        assert losses[-1] < losses[0]
        assert int(re.findall(r"(\d+)% of", said)[-1]) > 60
    else:
        assert said.strip() == "ViTModel (1, 17, 48)"


def test_its_commands_are_real() -> None:
    """The forms of the table are those that export.py knows."""
    help_text = in_process("pipelines/export.py", "--help").stdout
    formats = re.findall(r"format=(\w+)", DOCUMENT)
    assert len(formats) == 5
    for name in formats:
        assert f"{name}:" in help_text, name
