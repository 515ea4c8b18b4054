"""Exports as others read them: with timm, transformers or onnxruntime, and nothing of ssl_vit.

As a script, ``python -P readers.py FORMAT PATH CASES``, it runs where ssl_vit cannot be imported and prints what
:func:`read` returns as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

Cases = dict[str, Tensor]
Run = Callable[[Cases], Cases]
PIXELS = ("mean", "std", "interpolation", "crop_pct")


def read(kind: str, path: Path, cases: Cases) -> dict[str, Any]:
    """Load an export and compare what it gives.

    Args:
        kind: format of the export.
        path: of the folder or file.
        cases: ``image`` (B, C, H, W), normalised; for ``vit_mae`` ``noise`` (B, N), whose smallest values are visible;
            and under the names of outputs what they should be. Batches of 1 and of B - 1 are run.

    Returns:
        ``reader``: class and library; ``differences``: by output, the largest one relative to its largest value;
        ``names`` of its tensors, ``missing`` and ``unexpected`` ones; ``pixels``: the preprocessing that it states.
    """
    run, facts = READERS[kind](path)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        batches = [run({name: tensor[part] for name, tensor in cases.items()}) for part in (slice(1), slice(1, None))]
    differences = {}
    for name in batches[0]:
        found, expected = torch.cat([batch[name] for batch in batches]), cases[name]
        comparable = found.shape == expected.shape and bool(found.isfinite().all())
        differences[name] = float((found - expected).abs().max() / expected.abs().max()) if comparable else float("inf")
    return {**facts, "differences": differences}


def _timm(folder: Path) -> tuple[Run, dict[str, Any]]:
    timm = importlib.import_module("timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    return _forward(model), _facts(
        model, timm, load_file(folder / "model.safetensors"), model.state_dict(), {**data, "size": data["input_size"]}
    )


def _state_dict(file: Path) -> tuple[Run, dict[str, Any]]:
    timm = importlib.import_module("timm")
    with safe_open(file, "pt") as content:
        config = json.loads(content.metadata()["config"])
    model, state = timm.create_model(config["architecture"], **config["model_args"]).eval(), load_file(file)
    model.load_state_dict(state, strict=False)  # what does not match is named
    data = config["pretrained_cfg"]
    return _forward(model), _facts(model, timm, state, model.state_dict(), {**data, "size": data["input_size"]})


def _forward(model: Any) -> Run:
    def run(cases: Cases) -> Cases:
        tokens = model.forward_features(cases["image"])  # (B, T, D); Swin: (B, h, w, D); ResNet: (B, D, h, w)
        outputs = {"features": model.forward_head(tokens)}
        return outputs | ({"tokens": tokens.flatten(1, -2)} if hasattr(model, "patch_embed") else {})

    return run


def _transformers(folder: Path) -> tuple[Run, dict[str, Any]]:
    transformers = importlib.import_module("transformers")
    model, found = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    model.eval()
    return lambda cases: {"tokens": model(cases["image"]).last_hidden_state}, _of_transformers(folder, model, found)


def _vit_mae(folder: Path) -> tuple[Run, dict[str, Any]]:
    transformers = importlib.import_module("transformers")
    model, found = transformers.ViTMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
    model.eval()

    def run(cases: Cases) -> Cases:
        return {"predicted patches": model(cases["image"], noise=cases["noise"]).logits}

    return run, _of_transformers(folder, model, found)


def _of_transformers(folder: Path, model: Any, found: dict[str, Any]) -> dict[str, Any]:
    transformers = importlib.import_module("transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    crop = processor.crop_size
    state = load_file(folder / "model.safetensors")
    pixels = {
        "mean": processor.image_mean,
        "std": processor.image_std,
        "interpolation": {2: "bilinear", 3: "bicubic"}[int(processor.resample)],
        "crop_pct": min(crop["height"], crop["width"]) / processor.size["shortest_edge"],
        "size": [model.config.num_channels, crop["height"], crop["width"]],
    }
    facts = _facts(model, transformers, state, state, pixels)
    unfit = [str(name) for name in (*found["missing_keys"], *found["mismatched_keys"])]
    return {**facts, "missing": unfit, "unexpected": sorted(found["unexpected_keys"])}


def _onnx(file: Path) -> tuple[Run, dict[str, Any]]:
    onnx, onnxruntime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(cases: Cases) -> Cases:
        found = session.run(None, {"image": cases["image"].numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}

    weights = [weight.name for weight in onnx.load(str(file)).graph.initializer]
    stated = session.get_modelmeta().custom_metadata_map
    pixels = {key: stated[key] if key == "interpolation" else json.loads(stated[key]) for key in PIXELS}
    facts = {"reader": f"onnxruntime {onnxruntime.__version__}", "names": weights, "missing": [], "unexpected": []}
    return run, {**facts, "pixels": {**pixels, "size": session.get_inputs()[0].shape[1:]}}


def _facts(model: Any, library: Any, state: Any, own: Any, pixels: dict[str, Any]) -> dict[str, Any]:
    return {
        "reader": f"{type(model).__name__} of {library.__name__} {library.__version__}",
        "names": list(state),
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "pixels": {key: pixels[key] for key in (*PIXELS, "size")},
    }


READERS = {
    "timm": _timm, "transformers": _transformers, "vit_mae": _vit_mae, "onnx": _onnx, "state_dict": _state_dict,
    "official": _state_dict,
}  # fmt: skip


if __name__ == "__main__":
    sys.modules["ssl_vit"] = None  # pyright: ignore[reportArgumentType]
    print(json.dumps(read(sys.argv[1], Path(sys.argv[2]), load_file(sys.argv[3]))))
