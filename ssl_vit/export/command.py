"""The command line of exporting: any run, checkpoint or encoder file in, files for other libraries out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ssl_vit.config import InputError, Section
from ssl_vit.data.commands import command
from ssl_vit.data.decode import RULES
from ssl_vit.data.formats import say
from ssl_vit.export.card import card_text, loading_code, sections

if TYPE_CHECKING:
    from ssl_vit.encoders.base import Encoder
    from ssl_vit.export.reading import Reading


LIBRARIES = {
    "timm": "timm", "transformers": "transformers", "vit_mae": "transformers", "onnx": "onnx", "state_dict": "timm",
    "official": "timm",
}  # fmt: skip
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
    license: str = Field(
        "", description="licence of the weights, as the Hugging Face Hub names it, e.g. cc-by-4.0; default: none stated"
    )
    push: str = Field(
        "",
        description="also upload the folder to this repository of the Hugging Face Hub, OWNER/NAME, made private if "
        "it is new; nothing is uploaded unless this is given",
    )


def export(source: Path, out: Path, options: ExportOptions, fresh: bool = True) -> None:
    """Write the encoder of a run, a checkpoint of any strategy, or an export; or all that a run trained.

    Args:
        source: what ``encoder.init`` takes, with its architecture stated beside the weights.
        out: the folder or file to write; it must not exist.
        options: format, licence, upload.
        fresh: load it again in a process of its own, in which ssl_vit cannot be imported; else in this one.

    Raises:
        InputError: the source cannot be read, its weights are empty or not finite, the format has no place for it, or
            ``out`` is in the way.
    """
    from ssl_vit.encoders.base import create_encoder
    from ssl_vit.encoders.timm_models import DATA_KEYS, usual_pixels
    from ssl_vit.encoders.weights import encoder_config

    card = out / "README.md" if options.format in FOLDERS else out.with_name(f"{out.name}.md")
    _check(options, out, card)
    config = encoder_config(source)
    stated = config.pop("data", {})
    encoder = create_encoder(**config).eval()
    usual = usual_pixels(encoder.name, encoder.in_chans)
    data = {key: stated.get(key) or usual[key] for key in DATA_KEYS}
    facts = {"license": options.license} if options.license else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = options.format in ("vit_mae", "official")
    try:
        found = (_whole if whole else _encoder)(source, out, options.format, encoder, data, facts, fresh)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None
    say("\n  ".join([f"{out}:", *(f"{key}: {value}" for key, value in found.facts().items())]))
    path = options.push or str(out.resolve())
    code = loading_code(options.format, path, bool(options.push), encoder.timm_config())
    body = _about(source, config, data) + sections({"export": {"format": options.format, **found.facts()}})
    title = out.resolve().name
    card.write_text(card_text(title, LIBRARIES[options.format], code, body, options.license), encoding="utf-8")
    say("\n  ".join(["load it with:", *code]))
    if options.push:
        _push(out, options.push)


def _about(source: Path, encoder: dict[str, Any], data: dict[str, Any]) -> str:
    """Sections of the model card: those of the run's, or what is known without a run."""
    run = _run_of(source)
    if run is None or not (run / "README.md").is_file():
        return sections({"encoder": encoder, "data": {**data, "image files": RULES}})
    text = (run / "README.md").read_text(encoding="utf-8")
    text = text[text.index("\n## ") + 1 :]
    if source.name.startswith("step_"):  # the figures are of the run's last step
        text = re.sub(
            r"## Results\n.*?(?=## |\Z)", f"Of {source.name}, before the end of its run.\n\n", text, flags=re.DOTALL
        )
    return text


def _check(options: ExportOptions, out: Path, card: Path) -> None:
    for path in (out, card):
        if path.exists():
            raise InputError(f"{path}: is there already; give another name, or delete it first")
    if not re.fullmatch(r"[\w.+-]*", options.license):
        raise InputError(f"license={options.license!r}: should be the Hugging Face Hub's name of one, e.g. cc-by-4.0")
    if not options.push:
        return
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


def _encoder(
    source: Path, out: Path, kind: str, encoder: Encoder, data: dict[str, Any], facts: dict[str, Any], fresh: bool
) -> Reading:
    from ssl_vit.encoders.weights import fill_encoder

    say(str(fill_encoder(encoder, source)))
    if kind == "state_dict":
        from ssl_vit.export.weights_file import export_file

        return export_file(encoder, out, data, facts, fresh=fresh)
    if kind == "onnx":
        from ssl_vit.export.onnx_file import export_onnx

        return export_onnx(encoder, out, data, facts, fresh)
    if kind == "transformers":
        from ssl_vit.export.transformers_folder import export_transformers

        return export_transformers(encoder, out, data, facts, fresh)
    from ssl_vit.export.timm_folder import export_timm

    return export_timm(encoder, out, **data, metadata={"source": source.name, **facts}, fresh=fresh)


def _whole(
    source: Path, out: Path, kind: str, encoder: Encoder, data: dict[str, Any], facts: dict[str, Any], fresh: bool
) -> Reading:
    """All that a run trained, its decoder or head included."""
    from ssl_vit.encoders.weights import fill_objective, load_state

    section = _objective_section(source)
    name = section.pop("name", None)
    allowed = ("mae",) if kind == "vit_mae" else ("mae", "beit")
    if name not in allowed:
        raise InputError(f"{source}: format={kind}: objective.name={name!r}; allowed: runs of {', '.join(allowed)}")
    if kind == "official":
        from ssl_vit.encoders.release_names import OWN_PREFIX, released_names
        from ssl_vit.export.weights_file import export_file

        state = load_state(source, whole=True)
        own = {name: tensor for name, tensor in state.items() if name.startswith(OWN_PREFIX)}
        encoder.model.load_state_dict(released_names(own))
        beside = released_names({name: tensor for name, tensor in state.items() if name not in own})
        computed = {n: buffer for n, buffer in encoder.model.named_buffers() if n.endswith("relative_position_index")}
        return export_file(encoder, out, data, facts, beside | computed, fresh)
    from ssl_vit.export.transformers_folder import export_mae
    from ssl_vit.objectives.mae import MAE

    mae = MAE(encoder, **{key: value for key, value in section.items() if key != "init"})
    say(str(fill_objective(mae, source)))
    return export_mae(mae, out, data, facts, fresh)


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


def export_main(argv: Sequence[str] | None = None) -> None:
    """``export.py RUN OUT [key=value ...]``."""

    def run(words: list[str], options: ExportOptions) -> None:
        export(Path(words[0]).expanduser(), Path(words[1]).expanduser(), options)

    text = "Export the encoder of a run, a checkpoint (RUN/checkpoints/step_XXXXXXXX) or an export."
    command("export.py", text, ["RUN", "OUT"], ExportOptions, run, argv)
