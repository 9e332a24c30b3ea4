"""What tests share: one thread, the quickstart's bundled model and images, and children that can be interrupted."""

import signal
from collections.abc import Iterator
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


@pytest.fixture
def heard() -> Iterator[None]:
    """Children hear SIGINT even where the tests are a shell's background job, which ignores it and hands that on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def s3_server():
    """A real S3 server on 127.0.0.1."""
    from tests.s3 import Server

    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def gcs_server():
    """A server on 127.0.0.1 that speaks the API of Google Cloud Storage."""
    from tests.gcs import Server

    server = Server()
    yield server
    server.close()


@pytest.fixture
def gcs(gcs_server, monkeypatch):
    """The server, which needs no credentials."""
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    gcs_server.quiet()
    yield gcs_server
    gcs_server.quiet()


@pytest.fixture(params=["s3", "gs"])
def server(request):
    """An object store of either kind."""
    return request.getfixturevalue({"s3": "s3", "gs": "gcs"}[request.param])


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The server, and its credentials in the environment."""
    from tests.s3 import ENVIRONMENT

    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    s3_server.quiet()
    yield s3_server
    s3_server.quiet()
