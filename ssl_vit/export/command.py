"""The command line of exporting: any run, checkpoint or encoder file in, files for other libraries out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ssl_vit.config import InputError, Section
from ssl_vit.data.commands import command
from ssl_vit.data.decode import RULES
from ssl_vit.data.formats import say
from ssl_vit.data.loader import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from torch import Tensor

    from ssl_vit.encoders.base import Encoder


FOLDERS = ("timm", "transformers", "vit_mae")


class ExportOptions(Section):
    """The settings of exporting."""

    format: Literal["timm", "transformers", "onnx", "state_dict", "vit_mae", "official"] = Field(
        "timm",
        description="timm: a folder for timm and transformers' wrapper of it; transformers: a folder of its own class; "
        "onnx: a file with any batch size; "
        "state_dict: safetensors under timm's names; vit_mae: a whole MAE as ViTMAEForPreTraining; official: a whole "
        "MAE or BEiT as safetensors under the names of its release",
    )
    push: str = Field(
        "",
        description="also upload the folder to this repository of the Hugging Face Hub, OWNER/NAME, made private if "
        "it is new; nothing is uploaded unless this is given",
    )


def export(source: Path, out: Path, options: ExportOptions) -> None:
    """Write the encoder of a run, a checkpoint of any strategy, or an export; or all that a run trained.

    Args:
        source: what ``encoder.init`` takes, with its architecture stated beside the weights.
        out: the folder or file to write; it must not exist.
        options: the format.

    Raises:
        InputError: the source cannot be read, its weights are empty or not finite, the format has no place for it, or
            ``out`` is in the way.
    """
    from ssl_vit.encoders.base import create_encoder
    from ssl_vit.encoders.weights import encoder_config, fill_encoder

    if options.push:
        _check_push(options)
    if out.exists():
        raise InputError(f"{out}: is there already; give another name, or delete it first")
    config = encoder_config(source)
    data = config.pop("data", {})
    encoder = create_encoder(**config).eval()
    usual = (IMAGENET_MEAN, IMAGENET_STD) if encoder.in_chans == 3 else ((0.5,) * encoder.in_chans,) * 2
    data = {
        "mean": data.get("mean") or usual[0],
        "std": data.get("std") or usual[1],
        "crop_pct": data.get("crop_pct") or 0.875,
        "interpolation": data.get("interpolation") or "bicubic",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if options.format in ("vit_mae", "official"):
            _whole(source, out, options.format, encoder, data)
        else:
            say(str(fill_encoder(encoder, source)))
            _encoder(source, out, options.format, encoder, data)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None
    if options.format in FOLDERS:
        _card(source, out, options, config, data)
    if options.push:
        _push(out, options.push)


def _card(source: Path, out: Path, options: ExportOptions, encoder: dict[str, Any], data: dict[str, Any]) -> None:
    """The model card: that of the run with the lines that load this folder, or what is known without a run."""
    from ssl_vit.export.card import loading_lines, write_card

    run = _run_of(source)
    if run is not None and (run / "README.md").is_file():
        text = (run / "README.md").read_text(encoding="utf-8")
    else:
        text = write_card(out, {"encoder": encoder, "data": {**data, "image files": RULES}}).read_text(encoding="utf-8")
    kind = options.format
    library = "timm" if kind == "timm" else "transformers"
    if source.name.startswith("step_"):  # the figures are of the run's last step
        text = re.sub(
            r"## Results\n.*?(?=## |\Z)", f"Of {source.name}, before the end of its run.\n\n", text, flags=re.DOTALL
        )
    text = text.replace("library_name: timm", f"library_name: {library}", 1).replace(
        "extraction, timm]", f"extraction, {library}]", 1
    )
    text = re.sub(
        r"```python\n.*?```",
        lambda _: "\n".join(loading_lines(kind, options.push or str(out.resolve()), bool(options.push))),
        text,
        count=1,
        flags=re.DOTALL,
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def _check_push(options: ExportOptions) -> None:
    if options.format not in FOLDERS:
        raise InputError(f"push={options.push}: uploads folders; allowed with format={', '.join(FOLDERS)}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", options.push):
        raise InputError(f"push={options.push!r}: should be OWNER/NAME of a repository on the Hugging Face Hub")


def _push(folder: Path, repository: str) -> None:
    """Upload a folder that was checked; it stays where it is whatever happens.

    Raises:
        InputError: the Hub did not take it.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        commit = hub.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # network, login, permission: the library raises many kinds
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"push={repository}: not uploaded, {type(error).__name__}: {reason}; {folder} is whole: log in with "
            f"`hf auth login` and upload it with `hf upload {repository} {folder}`"
        ) from None
    say(f"uploaded: {commit}")


def _encoder(source: Path, out: Path, kind: str, encoder: Encoder, data: dict[str, Any]) -> None:
    if kind == "state_dict":
        _save(encoder.model.state_dict(), out)
        say(f"{out}: {sum(t.numel() for t in encoder.model.state_dict().values()):,} numbers under timm's names")
    elif kind == "onnx":
        from ssl_vit.export.onnx_file import export_onnx

        say(f"{out}: run in onnxruntime, features and tokens differ by at most {export_onnx(encoder, out, data):.1e}")
    elif kind == "transformers":
        from ssl_vit.export.transformers_folder import export_transformers

        difference = export_transformers(encoder, out, data)
        say(f"{out}: reloaded in transformers, tokens differ by at most {difference:.1e}")
        words = f"'{out.resolve()}', add_pooling_layer=False"
        _how_to_load(f"from transformers import AutoModel\nencoder = AutoModel.from_pretrained({words})")
    else:
        from ssl_vit.export.timm_folder import export_timm

        difference = export_timm(encoder, out, **data, metadata={"source": source.name})
        say(f"{out}: reloaded in timm, features differ by at most {difference:.1e}")
        _how_to_load(f"import timm\nencoder = timm.create_model('local-dir:{out.resolve()}', pretrained=True)")


def _whole(source: Path, out: Path, kind: str, encoder: Encoder, data: dict[str, Any]) -> None:
    """All that a run trained, its decoder or head included."""
    from ssl_vit.encoders.files import load_state

    section = _objective_section(source)
    name = section.pop("name", None)
    allowed = ("mae",) if kind == "vit_mae" else ("mae", "beit")
    if name not in allowed:
        raise InputError(f"{source}: format={kind}: objective.name={name!r}; allowed: runs of {', '.join(allowed)}")
    if kind == "official":
        state = {n.removeprefix("encoder.model."): tensor for n, tensor in load_state(source, whole=True).items()}
        state = {n.replace("head.", "lm_head.", 1) if n.startswith("head.") else n: t for n, t in state.items()}
        state = {n: tensor for n, tensor in state.items() if not n.startswith("tokenizer.")}
        _save(state, out)
        say(f"{out}: {sum(t.numel() for t in state.values()):,} numbers under the names of the release of {name}")
        return
    from ssl_vit.encoders.weights import fill_objective
    from ssl_vit.export.transformers_folder import export_mae
    from ssl_vit.objectives.mae import MAE

    mae = MAE(encoder, **{key: value for key, value in section.items() if key != "init"})
    say(str(fill_objective(mae, source)))
    difference = export_mae(mae, out, data)
    say(f"{out}: reloaded in transformers, the loss differs by {difference:.1e}")
    path = out.resolve()
    _how_to_load(f"from transformers import ViTMAEForPreTraining\nmae = ViTMAEForPreTraining.from_pretrained('{path}')")


def _how_to_load(lines: str) -> None:
    say("\n  ".join(["load it with:", *lines.splitlines()]))


def _run_of(source: Path) -> Path | None:
    """The run that ``source`` is, or is an export or checkpoint of."""
    return next((f for f in (source, *source.resolve().parents[:2]) if (f / "recipe.yaml").is_file()), None)


def _objective_section(source: Path) -> dict[str, Any]:
    """``objective`` of the recipe of a run, found from the run or one of its checkpoints."""
    from omegaconf import OmegaConf

    if (run := _run_of(source)) is not None:
        recipe: Any = OmegaConf.to_container(OmegaConf.load(run / "recipe.yaml"))
        return dict(recipe.get("objective") or {})
    raise InputError(f"{source}: no recipe.yaml tells what was trained; give a run, or RUN/checkpoints/step_XXXXXXXX")


def _save(state: Mapping[str, Tensor], out: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in state.items()}, out)


def export_main(argv: Sequence[str] | None = None) -> None:
    """``export.py RUN OUT [key=value ...]``."""

    def run(words: list[str], options: ExportOptions) -> None:
        export(Path(words[0]).expanduser(), Path(words[1]).expanduser(), options)

    text = "Export the encoder of a run, a checkpoint (RUN/checkpoints/step_XXXXXXXX) or an export."
    command("export.py", text, ["RUN", "OUT"], ExportOptions, run, argv)
