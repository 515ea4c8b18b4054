"""The model card of an exported encoder: what it is, how it was made, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TITLES = {"encoder": "Encoder", "data": "Data and preprocessing", "recipe": "Recipe", "results": "Results"}


def write_card(folder: str | Path, facts: Mapping[str, Any]) -> Path:
    """Write ``README.md`` of a timm folder, or of a run folder whose ``encoder/`` is one.

    Args:
        folder: where it goes.
        facts: ``name`` (the title), ``license`` and ``path`` (the timm folder, default: ``folder``) are optional;
            the others see :func:`sections`.

    Returns:
        The path of the card.
    """
    folder = Path(folder)
    about = {key: value for key, value in facts.items() if key not in ("name", "license", "path")}
    title = facts.get("name") or folder.resolve().name
    code = loading_code("timm", str(facts.get("path", folder)))
    card = folder / "README.md"
    card.write_text(card_text(title, "timm", code, sections(about), facts.get("license")), encoding="utf-8")
    return card


def card_text(title: str, library: str, code: Sequence[str], body: str, license_name: str | None = None) -> str:
    """A card: the head that the Hugging Face Hub reads, the title, how to load it, and sections."""
    head = ["---", f"library_name: {library}", f"tags: [image-feature-extraction, {library}]"]
    head += [f"license: {license_name}"] if license_name else []
    lines = [*head, "---", "", f"# {title}", "", "An image encoder, written by ssl_vit.", ""]
    return "\n".join([*lines, "```python", *code, "```", "", body])


def sections(facts: Mapping[str, Any]) -> str:
    """Facts as sections: ``encoder``, ``data``, ``recipe`` and ``results`` in this order, any other key after them.

    Each is a mapping or text; a recipe given as text is shown as YAML.
    """
    order = [key for key in TITLES if key in facts] + [key for key in facts if key not in TITLES]
    lines = []
    for key in order:
        lines += [f"## {TITLES.get(key, key.replace('_', ' ').capitalize())}", "", *_section(facts[key]), ""]
    return "\n".join(lines)


def loading_code(kind: str, path: str, hub: bool = False, build: tuple[str, Mapping[str, Any]] = ("", {})) -> list[str]:
    """Lines of Python that load an export.

    Args:
        kind: its format.
        path: of the folder or file, or the folder's name on the Hugging Face Hub.
        hub: whether it is there.
        build: architecture and arguments of ``timm.create_model``, for files that timm fills.
    """
    where = "hf-hub" if hub else "local-dir"
    filled = [
        "import timm",
        "from safetensors.torch import load_file",
        f"encoder = timm.create_model({build[0]!r}, **{dict(build[1])!r}).eval()",
    ]
    return {
        "timm": ["import timm", f'encoder = timm.create_model("{where}:{path}", pretrained=True).eval()'],
        "transformers": [
            "from transformers import AutoModel",
            f'encoder = AutoModel.from_pretrained("{path}", add_pooling_layer=False).eval()',
        ],
        "vit_mae": [
            "from transformers import ViTMAEForPreTraining",
            f'mae = ViTMAEForPreTraining.from_pretrained("{path}").eval()',
        ],
        "onnx": [
            "import onnxruntime",
            f'session = onnxruntime.InferenceSession("{path}")',
            'features, tokens = session.run(None, {"image": image})  # float32 (B, C, H, W), normalised',
        ],
        "state_dict": [*filled, f'encoder.load_state_dict(load_file("{path}"))'],
        "official": [*filled, f'encoder.load_state_dict(load_file("{path}"), strict=False)  # the encoder of it'],
    }[kind]


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
