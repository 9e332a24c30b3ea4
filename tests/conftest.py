"""What tests share: one thread, and the quickstart's bundled model and images."""

from pathlib import Path

import pytest
import torch

QUICKSTART = Path(__file__).parents[1] / "jobs" / "quickstart"

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def emoji() -> Path:
    """The bundled DDPM, a diffusers pipeline folder."""
    return QUICKSTART / "ddpm-emoji32"


@pytest.fixture(scope="session")
def emoji_images() -> Path:
    """The bundled images, a Parquet file."""
    return QUICKSTART / "noto-emoji-32.parquet"
