"""The end of packing: the finished shards of all parts become one folder with an index."""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path

import numpy as np

from ssl_vit.config import InputError
from ssl_vit.data.index import Shard, write_index
from ssl_vit.data.staging import Staging
from ssl_vit.data.tally import Tally

REFUSED = "refused.jsonl"


def check_refused(tally: Tally, staging: Staging, source: str, max_refused: float) -> None:
    """Fail if nothing or too little was packed, after listing what was refused beside the target.

    Raises:
        InputError: naming the first refused images and the list.
    """
    found, refused = tally.packed + len(tally.refused), len(tally.refused)
    if tally.packed and refused <= max_refused * found:
        return
    kept = staging.out.parent / f"{staging.out.name}.{REFUSED}"
    _write_refused(kept, tally)
    first = "; ".join(f"{name} {reason}" for name, reason in tally.refused[:3])
    what = f"{source}: {refused} of {found} images refused ({first}); all are listed in {kept}; "
    more = f", or allow more with max_refused={ceil(100 * refused / found) / 100}" if tally.packed else ""
    if staging.plan["parts"] == 1:
        staging.remove()
        raise InputError(f"{what}repair or remove them{more}")
    raise InputError(f"{what}repair them, remove {staging.folder} and pack all parts anew{more}, which keeps the parts")


def publish(tally: Tally, staging: Staging, classes: list[str] | None) -> None:
    """Number the shards of all parts, write their index, and let them take the target's place.

    Begun again after a kill, it does the same again, and leaves what is done.
    """
    for half_written in staging.shards.glob(".*"):
        half_written.unlink()
    shards: list[Shard] = []
    samples: list[np.ndarray] = []
    for part in range(1, staging.plan["parts"] + 1):
        for number, record in enumerate(staging.finished(part)):
            if not record.filesize:
                continue
            url, file = f"shard-{len(shards):06d}.tar", staging.tar(part, number)
            if file.exists():
                file.rename(staging.shards / url)
            samples.append(staging.samples(part, number))
            shards.append(Shard(url, len(samples[-1]), record.filesize, record.sha256))
    assert sum(map(len, samples)) == tally.packed, "as many samples as images that were not refused"
    _write_refused(staging.shards / REFUSED, tally)
    write_index(staging.shards, shards, np.concatenate(samples), classes)
    staging.publish()


def _write_refused(file: Path, tally: Tally) -> None:
    lines = [json.dumps({"path": name, "refused": reason}) for name, reason in tally.refused]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
