"""What a run stands on: library versions, machine, threads; and where its log lines go."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tqdm import tqdm

from ssl_vit import __version__
from ssl_vit.config import InputError

LIBRARIES = ("torch", "torchvision", "timm", "accelerate", "webdataset", "numpy", "simplejpeg", "pillow", "deepspeed")
FORMATTER = logging.Formatter("%(asctime)s  %(message)s", datefmt="%Y-%m-%d %H:%M:%S")


class BesideBar(logging.Handler):
    """Lines on stderr that do not tear a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, above the bar if there is one."""
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_stderr() -> None:
    """Show the package's log on stderr, beside a progress bar if there is one."""
    logger = logging.getLogger("ssl_vit")
    if not logger.handlers:
        handler = BesideBar()
        handler.setFormatter(FORMATTER)
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def library_versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries that decide its numbers; what is not installed is left out."""
    versions = {"python": platform.python_version(), "ssl_vit": __version__}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def check_libraries() -> None:
    """Import the pair that most often does not match, so that a mismatch is named before it breaks timm.

    Raises:
        InputError: torchvision does not load with this torch.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(
            f"torch {version('torch')} and torchvision {version('torchvision')} do not match "
            f"({' '.join(str(error).split())}); cure: pip install -c constraints.txt torch torchvision"
        ) from None


def environment() -> dict[str, Any]:
    """Versions, machine and threads: what bit-for-bit equality depends on."""
    import torch

    return {
        "versions": library_versions(),
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cpu_threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": sys.argv,
        "started": timestamp(),
    }


def timestamp() -> str:
    """Local time with its zone, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
