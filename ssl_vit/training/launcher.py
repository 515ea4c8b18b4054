"""What the command line of the launcher above this process says; the environment alone does not tell."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def asked_processes() -> int | None:
    """``--num_processes`` of the launcher above this process, or of its ``--config_file``; None if it does not say."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    if not any(Path(word).name == "accelerate" or "accelerate.commands" in word for word in words[:4]):
        return None
    if not any(word.endswith(("launch", "launch.py")) for word in words[:5]):
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--config_file", "--config-file")
    script = next((i for i, word in enumerate(words) if i > 1 and word.endswith(".py") and "launch" not in word), None)
    given, _ = parser.parse_known_args(words[1:script])
    if given.num_processes is None and given.config_file and Path(given.config_file).is_file():
        from omegaconf import OmegaConf

        number = OmegaConf.to_container(OmegaConf.load(given.config_file)).get("num_processes")  # pyright: ignore
        return int(number) if number else None
    return given.num_processes
