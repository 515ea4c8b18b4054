"""The command line of exporting: any run, checkpoint or encoder file in, files for other libraries out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from ssl_vit.config import InputError, Section
from ssl_vit.data.commands import command
from ssl_vit.data.formats import say
from ssl_vit.data.loader import IMAGENET_MEAN, IMAGENET_STD


class ExportOptions(Section):
    """The settings of exporting."""

    format: Literal["timm", "state_dict"] = Field(
        "timm", description="timm: a folder for timm and transformers; state_dict: safetensors under timm's names"
    )


def export(source: Path, out: Path, options: ExportOptions) -> None:
    """Write the encoder of a run, a checkpoint of any strategy, or an export.

    Args:
        source: what ``encoder.init`` takes, with its architecture stated beside the weights.
        out: the folder or file to write; it must not exist.
        options: the format.

    Raises:
        InputError: the source cannot be read, its weights are empty or not finite, or ``out`` is in the way.
    """
    from ssl_vit.encoders.base import create_encoder
    from ssl_vit.encoders.weights import encoder_config, fill_encoder
    from ssl_vit.export.timm_folder import export_timm

    if out.exists():
        raise InputError(f"{out}: is there already; give another name, or delete it first")
    config = encoder_config(source)
    data = config.pop("data", {})
    encoder = create_encoder(**config).eval()
    say(str(fill_encoder(encoder, source)))
    out.parent.mkdir(parents=True, exist_ok=True)
    if options.format == "state_dict":
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in encoder.model.state_dict().items()}, out)
        say(f"{out}: {sum(t.numel() for t in encoder.model.state_dict().values()):,} numbers under timm's names")
        return
    usual = (IMAGENET_MEAN, IMAGENET_STD) if encoder.in_chans == 3 else ((0.5,) * encoder.in_chans,) * 2
    difference = export_timm(
        encoder, out, mean=data.get("mean") or usual[0], std=data.get("std") or usual[1],
        crop_pct=data.get("crop_pct") or 0.875, interpolation=data.get("interpolation") or "bicubic",
        metadata={"source": source.name},
    )  # fmt: skip
    say(f"{out}: reloaded in timm, features differ by at most {difference:.1e}")
    say(f"load it with:\n  import timm\n  encoder = timm.create_model('local-dir:{out.resolve()}', pretrained=True)")


def export_main(argv: Sequence[str] | None = None) -> None:
    """``export.py RUN OUT [key=value ...]``."""

    def run(words: list[str], options: ExportOptions) -> None:
        export(Path(words[0]).expanduser(), Path(words[1]).expanduser(), options)

    text = "Export the encoder of a run, a checkpoint (RUN/checkpoints/step_XXXXXXXX) or an export."
    command("export.py", text, ["RUN", "OUT"], ExportOptions, run, argv)
