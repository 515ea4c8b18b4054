"""The model card of an exported encoder: what it is, how it was made, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TITLES = {"encoder": "Encoder", "data": "Data and preprocessing", "recipe": "Recipe", "results": "Results"}


def write_card(folder: str | Path, facts: Mapping[str, Any]) -> Path:
    """Write ``README.md`` into a folder.

    Args:
        folder: a timm folder, or a run folder whose ``encoder/`` is one.
        facts: ``name`` (the title), ``license`` and ``path`` (the timm folder, default: ``folder``) are optional;
            ``encoder``, ``data``, ``recipe`` and ``results`` (mappings or text) become sections in this order, any
            other key one after them. A recipe given as text is shown as YAML.

    Returns:
        The path of the card.
    """
    folder = Path(folder)
    facts = dict(facts)
    title = facts.pop("name", None) or folder.resolve().name
    license_name = facts.pop("license", None)
    path = facts.pop("path", folder)
    head = ["---", "library_name: timm", "tags: [image-feature-extraction, timm]"]
    head += [f"license: {license_name}"] if license_name else []
    lines = [*head, "---", "", f"# {title}", "", "An image encoder trained by ssl_vit with the recipe below.", ""]
    lines += [*loading_lines("timm", str(path)), ""]
    order = [key for key in TITLES if key in facts] + [key for key in facts if key not in TITLES]
    for key in order:
        lines += [f"## {TITLES.get(key, key.replace('_', ' ').capitalize())}", "", *_section(facts[key]), ""]
    card = folder / "README.md"
    card.write_text("\n".join(lines), encoding="utf-8")
    return card


def loading_lines(kind: str, path: str, hub: bool = False) -> list[str]:
    """A code block that loads a folder.

    Args:
        kind: ``timm``, ``transformers`` or ``vit_mae``.
        path: of the folder, or its name on the Hugging Face Hub.
        hub: whether it is there.
    """
    where = "hf-hub" if hub else "local-dir"
    code = {
        "timm": ["import timm", f'encoder = timm.create_model("{where}:{path}", pretrained=True).eval()'],
        "transformers": [
            "from transformers import AutoModel",
            f'encoder = AutoModel.from_pretrained("{path}", add_pooling_layer=False).eval()',
        ],
        "vit_mae": [
            "from transformers import ViTMAEForPreTraining",
            f'mae = ViTMAEForPreTraining.from_pretrained("{path}").eval()',
        ],
    }
    return ["```python", *code[kind], "```"]


def _section(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return ["| | |", "|---|---|", *(f"| {key} | {_cell(item)} |" for key, item in value.items())]
    text = str(value).strip()
    return ["```yaml", text, "```"] if "\n" in text else [text]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping | list | tuple):
        return f"`{json.dumps(value, default=str)}`"
    return str(value).replace("|", "\\|").replace("\n", " ")
