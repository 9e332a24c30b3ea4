"""What a choice of every site costs in time on one device: the table, whose it is, and where it is kept. Standard library only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.contracts import InputError, Record, digest_of
from workers.files import replacing


@dataclass(frozen=True)
class LatencyIdentity(Record):
    """What a latency table holds for: every field must agree before one of its numbers may be used."""

    device: str
    """The name of the GPU; of the processor and how many of its threads are used."""
    dtype: str
    batch: int
    sample_size: int
    compiled: bool
    """Whether the repeated blocks were compiled (workers.regional)."""
    architecture: str
    """Digest of the dense denoiser's config and of the choices of its sites."""
    torch: str
    diffusers: str
    cuda: str | None
    rewrites: tuple[str, ...] = ()
    """Exact rewrites that all networks had."""
    cuda_graphs: bool = False
    """Whether the networks were replayed as CUDA graphs (workers.graphs)."""
    fused_kernels: bool = False
    """Whether norms and biases were this project's kernels (workers.fused)."""

    @property
    def digest(self) -> str:
        return digest_of(self.to_json())[:12]


@dataclass(frozen=True)
class LatencyValidation(Record):
    """Relative errors |predicted - measured| / measured over random whole sub-networks that the table was not made from."""

    networks: int
    median_error: float
    p95_error: float


@dataclass(frozen=True)
class LatencyTable(Record):
    """Milliseconds of one forward pass of a batch: ``rest_ms`` for what every sub-network has, and what each site's choice adds.

    None is negative: a search would take a site that gives time back.
    """

    identity: LatencyIdentity
    rest_ms: float
    sites: dict[str, dict[str, float]]
    """Site -> choice, as text because of JSON -> ms."""
    dense_ms: float
    """Of the whole dense denoiser, measured; ``predict`` of the dense choices is within the prediction error of it."""
    validation: LatencyValidation

    def __post_init__(self) -> None:
        for ms in (self.rest_ms, self.dense_ms, *(ms for row in self.sites.values() for ms in row.values())):
            if not (math.isfinite(ms) and ms >= 0):
                raise InputError(f"a latency table holds a time of {ms} ms, which is not a finite number of 0 or more: measure it again")

    @property
    def by_choice(self) -> dict[str, dict[int, float]]:
        """Site -> choice -> ms."""
        return {site: {int(choice): ms for choice, ms in row.items()} for site, row in self.sites.items()}

    def predict(self, choices: Mapping[str, int]) -> float:
        """Milliseconds of the sub-network that keeps ``choices``. Raises: InputError for a site or a choice that was not measured."""
        for site in sorted(self.sites.keys() ^ choices.keys()):
            raise InputError(f"latency table: site {site} is in only one of the table and the architecture")
        for site, choice in choices.items():
            if str(choice) not in self.sites[site]:
                raise InputError(f"latency table: site {site} was measured for {', '.join(self.sites[site])}, not for {choice}")
        return self.rest_ms + sum(self.sites[site][str(choice)] for site, choice in choices.items())

    @property
    def fastest(self) -> dict[str, int]:
        """The choices of the fastest sub-network, which need not be the narrowest."""
        return {site: min(row, key=lambda choice, row=row: row[choice]) for site, row in self.by_choice.items()}  # type: ignore[misc]

    def save(self, path: Path) -> None:
        """Atomically; the folder is made if need be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, expected: LatencyIdentity | None = None) -> LatencyTable:
        """Raises: InputError if there is no readable table, or one of another identity: every field that differs is named."""
        try:
            data: Any = json.loads(path.read_text())
        except OSError as error:
            raise InputError(f"latency table {path} cannot be read: {error.strerror}") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"latency table {path} is damaged ({error}): delete it to have it measured again") from None
        try:
            table = cls.from_json(data)
        except InputError as error:
            raise InputError(f"latency table {path}: {error}") from None
        odd = [] if expected is None else table.identity.differences(expected)
        if odd:
            raise InputError(f"latency table {path} was measured elsewhere: {'; '.join(odd)}: measure here with `diffpruning profile`")
        return table


def table_path(folder: Path, identity: LatencyIdentity) -> Path:
    return folder / f"latency-{identity.digest}.json"


def find(folder: Path, identity: LatencyIdentity) -> LatencyTable | None:
    """The table of this identity in ``folder``, or None if it is still to be measured. Raises: InputError if its file is another's."""
    path = table_path(folder, identity)
    return LatencyTable.load(path, identity) if path.exists() else None
