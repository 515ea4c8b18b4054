"""Images of a Hugging Face dataset: a folder saved by ``save_to_disk``, a folder of parquet, or a name on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssl_vit.config import InputError, nearest


class HubImages:
    """The image column of one split, bytes as stored.

    Args:
        spec: ``NAME_OR_PATH`` or ``NAME_OR_PATH:SPLIT``; without a split: ``train``, or the only one.
        labels: ``"auto"``: the label column, if there is one; ``"none"``: no labels.
        image_column: which column holds the images; needed if several are of type Image, or none is.
        label_column: which column holds the labels; needed if several are of type ClassLabel, or for whole numbers.
    """

    def __init__(self, spec: str, labels: str = "auto", image_column: str = "", label_column: str = "") -> None:
        import datasets

        self._spec = f"hf:{spec}"
        rows = _load(self._spec, spec)
        features = rows.features
        column = _choose(self._spec, features, image_column, datasets.Image, "image")
        if column is None:
            raise InputError(
                f"{self._spec}: no column of type Image; choose one of bytes or paths with image_column=...; "
                f"columns: {', '.join(features)}"
            )
        label = None if labels == "none" else _choose(self._spec, features, label_column, datasets.ClassLabel, "label")
        self.classes, self.labels = _labels(self._spec, rows, label)
        self._column = column
        self._fingerprint = f"{rows._fingerprint} {column} {label}"
        # decode=False hands the file's bytes over; without it every image would be decoded and lost.
        self._rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.skipped: list[str] = []
        self.ignored: list[str] = []
        self.repeated: list[str] = []

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, i: int) -> str:
        """The dataset and the row."""
        return f"{self._spec}#{i}"

    def read(self, i: int) -> bytes:
        """The bytes in row ``i``; ``ValueError`` if it holds no image."""
        value = self._rows[i][self._column]
        if value is None or (value.get("bytes") is None and not value.get("path")):
            raise ValueError("the row holds no image")
        return value["bytes"] if value.get("bytes") is not None else Path(value["path"]).read_bytes()

    def fingerprint(self) -> str:
        """The fingerprint that ``datasets`` keeps, with the columns."""
        return self._fingerprint


def _load(shown: str, spec: str) -> Any:
    import datasets

    name, split = spec, ""
    if not Path(spec).exists() and ":" in spec:
        name, _, split = spec.rpartition(":")
    path = Path(name).expanduser()
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = datasets.load_from_disk(str(path))
        elif path.is_absolute() and not path.exists():
            raise InputError(f"{shown}: no such folder")
        else:
            loaded = datasets.load_dataset(str(path) if path.exists() else name)
    except InputError:
        raise
    except Exception as error:  # datasets and its file systems raise many kinds
        text = " ".join(str(error).split())[:300]
        raise InputError(f"{shown}: cannot be loaded: {type(error).__name__}: {text}") from None
    if isinstance(loaded, datasets.Dataset):
        return loaded
    splits = [str(split) for split in loaded]
    chosen = split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else "")
    if chosen not in splits:
        what = f"no split {split!r}{nearest(split, splits)}" if split else "several splits"
        raise InputError(f"{shown}: {what}; write hf:{name}:SPLIT with one of: {', '.join(splits)}")
    return loaded[chosen]


def _choose(shown: str, features: Any, wanted: str, kind: type, word: str) -> str | None:
    """The wanted column, or the only one of a type."""
    if wanted:
        if wanted not in features:
            raise InputError(
                f"{shown}: {word}_column={wanted!r}: no such column{nearest(wanted, features)}; "
                f"allowed: {', '.join(features)}"
            )
        return wanted
    candidates = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(candidates) > 1:
        none = ", or labels=none" if word == "label" else ""
        raise InputError(
            f"{shown}: {len(candidates)} {word} columns: {', '.join(candidates)}; pack it with "
            f"pipelines/pack.py and {word}_column=...{none}, and give the packed folder"
        )
    return candidates[0] if candidates else None


def _labels(shown: str, rows: Any, column: str | None) -> tuple[list[str] | None, list[int]]:
    if column is None:
        return None, [-1] * len(rows)
    values = list(rows.select_columns([column])[:][column])
    if not all(isinstance(value, int) and value >= -1 for value in values):
        raise InputError(f"{shown}: label_column={column!r}: allowed: whole numbers from 0 (-1: unlabelled)")
    if max(values, default=-1) < 0:  # the test splits of competitions
        return None, values
    names = getattr(rows.features[column], "names", None)
    return list(names) if names else [str(i) for i in range(max(values) + 1)], values
