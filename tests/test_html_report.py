"""One page a run: whole, self-contained, true to the run's numbers, safe against names from the outside."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import run_python, tiny_recipe
from test_trainer import train

from ssl_vit.config import InputError
from ssl_vit.html_report import write_report


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
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
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
