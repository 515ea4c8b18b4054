"""A run on one page: results, curves, pictures, recipe and environment in a file that opens without a network."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ssl_vit.compare import Record, figure, read_run
from ssl_vit.config import Section
from ssl_vit.data.commands import command
from ssl_vit.data.formats import say

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222; }
h1 { margin-bottom: 0; } h2 { margin-top: 2em; border-bottom: 1px solid #ccc; } small { color: #666; }
table { border-collapse: collapse; } td, th { padding: 0.2em 0.9em; text-align: left; border-bottom: 1px solid #eee; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } img { max-width: 100%; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 13px; } figure { margin: 1em 0; }
"""


def write_report(folder: Path) -> Path:
    """Write ``RUN/report.html``; the run may still be going on.

    Args:
        folder: of the run.

    Raises:
        InputError: it is no run.
    """
    record = read_run(folder)
    environment = _json(folder / "environment.json")
    body = [
        f"<h1>{escape(record.name)}</h1>",
        f"<small>{escape(record.objective or 'measurement')}, {escape(record.state)}</small>",
        "<h2>Results</h2>",
        _facts(record, _json(folder / "result.json")),
        _results(record),
    ]
    measures = [name for name in _names(record) if name.endswith("/top1") or name == "rank/effective_rank"]
    if len(record.measured) > 1 or record.losses:
        file = io.BytesIO()
        figure([record], measures[:4], file)
        body += ["<h2>Curves</h2>", _image(file.getvalue(), "curves")]
    body += _pictures(folder / "pictures")
    body += ["<h2>Recipe</h2>", f"<pre>{escape((folder / 'recipe.yaml').read_text(encoding='utf-8'))}</pre>"]
    body += ["<h2>Environment</h2>", f"<pre>{escape(json.dumps(environment, indent=1))}</pre>"]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(record.name)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
    temporary = folder / f".report.{os.getpid()}.html"  # a run and who watches it may both be writing
    temporary.write_text(page, encoding="utf-8")
    return temporary.replace(folder / "report.html")


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _facts(record: Record, result: dict[str, Any]) -> str:
    facts = {
        "images seen": f"{record.images:,}" if record.images else "",
        "images/s": f"{record.images_per_second:.0f}" if record.images else "",
        "minutes of training": f"{record.minutes:.1f}" if record.images else "",
        "probes": result.get("probe", ""),
        "bad samples": result.get("bad_samples", ""),
        "largest feature difference of the export": result.get("export_difference", ""),
    }
    rows = [f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in facts.items() if v != ""]
    return f"<table>{''.join(rows)}</table>"


def _names(record: Record) -> list[str]:
    names = (name for _, numbers in record.measured for name in numbers)
    return [name for name in dict.fromkeys(names) if "/" in name and not name.endswith(("/seconds", "/standard_error"))]


def _results(record: Record) -> str:
    rows = ["<tr><th>measure</th><th>at the start</th><th>now</th><th>standard error</th></tr>"]
    for name in _names(record):
        first, last, error = record.change(name) or (float("nan"), float("nan"), None)
        error = error if name.endswith("/top1") else None
        form = ".4f" if min(abs(first), abs(last)) >= 1e-3 or "top1" in name else ".3g"
        cells = [f"{first:{form}}", f"{last:{form}}", "" if error is None else f"{error:.4f}"]
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows.append(f"<tr><td>{escape(name)}</td>{numbers}</tr>")
    return f"<table>{''.join(rows)}</table>" if len(rows) > 1 else "<p>nothing measured yet</p>"


def _pictures(folder: Path) -> list[str]:
    """The last sheet of each kind, and the first one where it is another."""
    kinds: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*_*.png")):
        kinds.setdefault(file.stem.rpartition("_")[0], []).append(file)
    parts = ["<h2>Pictures</h2>"] if kinds else []
    for kind, files in kinds.items():
        for file in dict.fromkeys([files[-1], files[0]]):
            step = int(file.stem.rpartition("_")[2])
            parts.append(_image(file.read_bytes(), f"{kind}, after {step:,} steps"))
    return parts


def _image(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


class ReportOptions(Section):
    """A report has no settings."""


def report_main(argv: Sequence[str] | None = None) -> None:
    """``report.py RUN...``."""

    def run(words: list[str], options: ReportOptions) -> None:
        for word in words:
            say(str(write_report(Path(word).expanduser())))

    command("report.py", "Write RUN/report.html, as the run stands.", ["RUN..."], ReportOptions, run, argv)
