"""One page a run: whole, self-contained, true to the run's numbers, safe against names from the outside."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import run_python, tiny_recipe
from PIL import Image
from test_trainer import train

from ssl_vit.config import InputError, check
from ssl_vit.html_report import write_report
from ssl_vit.recipe import EvaluationRecipe, check_recipe
from ssl_vit.run import evaluate


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe"), "nothing is fetched or run"
        for key, value in attrs:
            if key in ("src", "href"):
                self.sources.append(value or "")
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_page_of_a_run(images: Path, tmp_path: Path) -> None:
    evals = {"knn": {"k": [5], "every": "4 steps"}, "rank": {}, "pictures": {"count": 2}}
    folder = train(tiny_recipe(images, tmp_path / "a<b>&run", evals=evals))
    page = Page()
    page.feed((folder / "report.html").read_text())
    assert not page.open, "every element is closed"
    assert len(page.sources) == 3, "the curves, and the first and last pictures"
    for source in page.sources:
        kind, data = source.split(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            picture.load()  # every byte of it decodes
            assert min(picture.size) >= 32
    text = " ".join(page.text)
    assert "a<b>&run" in text
    result = json.loads((folder / "result.json").read_text())["evaluations"]
    for when in ("initial", "final"):
        assert f"{result[when]['knn/top1']:.4f}" in text
    assert "mask_ratio: 0.75" in text
    environment = json.loads((folder / "environment.json").read_text())
    assert f'"torch": "{environment["versions"]["torch"]}"' in text

    (folder / "result.json").unlink()
    (folder / "report.html").unlink()
    done = run_python("pipelines/report.py", str(folder))
    assert done.stdout.strip() == str(folder / "report.html"), "also of a run that is not finished"
    with pytest.raises(InputError, match="no run"):
        write_report(images)


def test_the_page_of_a_measurement_and_of_what_watching_found(images: Path, tmp_path: Path) -> None:
    run = train(tiny_recipe(images, tmp_path / "run", optim__epochs="2 steps", optim__warmup_epochs=0))
    values = {
        "encoder": {"init": str(run)}, "data": {"val": f"folder:{images}"}, "evals": {"knn": {"k": [5]}},
        "run": {"dir": str(tmp_path / "judged"), "workers": 0, "tensorboard": False},
    }  # fmt: skip
    evaluate(check_recipe(check(EvaluationRecipe, values)))
    text = (tmp_path / "judged" / "report.html").read_text()
    result = json.loads((tmp_path / "judged" / "result.json").read_text())["evaluations"]["final"]
    assert f"{result['knn/top1']:.4f}" in text
    assert "images seen" not in text, "nothing was trained"
    (run / "watch").mkdir()
    lines = [{"step": step, "linear/top1": 0.1234 + step / 10} for step in (0, 2)]
    (run / "watch" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_report(run).read_text()
    assert "<td>watch/linear/top1</td>" in text
    assert "0.1234" in text
    assert "0.3234" in text


def test_the_page_in_a_browser_without_a_network(images: Path, tmp_path: Path) -> None:
    """Headless Chromium draws every picture of the page, asks for nothing and has no error to log."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    folder = train(tiny_recipe(images, tmp_path / "run", evals={"knn": {}, "pictures": {}}))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--dump-dom",
         "--virtual-time-budget=2000", f"file://{folder / 'report.html'}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<img") == (folder / "report.html").read_text().count("<img") > 1
    assert "CONSOLE" not in done.stderr
    assert not re.search(r'(src|href)="(?!data:)', done.stdout)
