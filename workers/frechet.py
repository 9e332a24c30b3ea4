"""How far are two sets of images apart, by the features of a network? Frechet distance and kernel distance (KID).

Legend: n, m images; d features. All sums are in float64, over features [n, d] in a fixed order: sharding cannot change a number.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workers.contracts import InputError
from workers.files import replacing

SUBSETS, SUBSET_IMAGES = 100, 1000
"""KID is the mean over this many random subsets, of at most so many images of either side (Binkowski et al. 2018)."""
KEPT_FEATURES = 10_000
"""Reference statistics made from images keep the features of at most so many of them, for the kernel distance."""


@dataclass(frozen=True)
class Statistics:
    """What is kept of a set of images: ``mean`` [d] and ``cov`` [d, d] (float64) of ``n`` images; ``features`` [m, d] of some, or None."""

    mean: np.ndarray
    cov: np.ndarray
    n: int
    features: np.ndarray | None = None

    @classmethod
    def of(cls, features: np.ndarray) -> Statistics:
        """From features [n, d], n at least 2; the covariance is the unbiased one."""
        n, mean = len(features), features.mean(0, dtype=np.float64)
        blocks = (features[i : i + 1024] - mean for i in range(0, n, 1024))
        cov = sum((block.T @ block for block in blocks), np.zeros((len(mean), len(mean)))) / (n - 1)
        kept = np.random.default_rng(0).permutation(n)[:KEPT_FEATURES]
        return cls(mean, cov, n, features[np.sort(kept)])

    @property
    def digest(self) -> str:
        """sha256 (hex) of mean, covariance and number of images, all that the Frechet distance depends on."""
        return hashlib.sha256(b"".join(np.ascontiguousarray(x, "<f8").tobytes() for x in (self.mean, self.cov, self.n))).hexdigest()

    @property
    def features_digest(self) -> str:
        """sha256 (hex) of the features, all that the kernel distance depends on; empty without them."""
        return "" if self.features is None else hashlib.sha256(np.ascontiguousarray(self.features, "<f8").tobytes()).hexdigest()

    def save(self, path: Path) -> None:
        with replacing(path) as temporary:
            known: dict[str, Any] = {} if self.features is None else {"features": self.features}
            np.savez(temporary, mean=self.mean, cov=self.cov, n=np.array(self.n), **known)

    @classmethod
    def load(cls, path: Path, prefix: str = "", key: str = "evaluate.reference") -> Statistics:
        """From .npz with ``mean``, ``cov`` and ``n``, or with ``prefix_mean`` and so on, and perhaps ``features``.

        Raises: InputError naming the job's ``key`` and what is wrong.
        """
        name = f"{prefix}_" if prefix else ""
        if not path.is_file():
            raise InputError(f"{key}: no such file: {path}")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if missing := [name + key for key in ("mean", "cov", "n") if name + key not in arrays]:
                    raise InputError(f"{key}: {path} has no {', '.join(missing)}; it has {', '.join(arrays)}")
                mean, cov = (np.asarray(arrays[name + key], np.float64) for key in ("mean", "cov"))
                n = int(arrays[name + "n"])
                features = arrays.get(f"{name}features")
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{key}: {path} is not a readable .npz file: {error}") from None
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)) or n < 2 or not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise InputError(f"{key}: {path}: mean {mean.shape}, cov {cov.shape} and n {n} are no statistics of features")
        if features is not None and (features.ndim != 2 or features.shape[1] != len(mean)):
            raise InputError(f"{key}: {path}: features {features.shape} do not fit a mean of {len(mean)} numbers")
        return cls(mean, cov, n, features)


def is_statistics(reference: str) -> bool:
    """Whether this names statistics, ``FILE.npz`` or ``FILE.npz:PREFIX``; else it names images."""
    return reference.endswith(".npz") or ".npz:" in reference


def read_statistics(reference: str, key: str = "evaluate.reference") -> Statistics:
    """From ``FILE.npz`` or ``FILE.npz:PREFIX``. Raises: InputError naming the job's ``key``."""
    path, _, prefix = reference.partition(".npz")
    return Statistics.load(Path(f"{path}.npz"), prefix.removeprefix(":"), key)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, eq. 6), the squared distance of two Gaussians.

    The trace of the root is the sum of the roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric.
    """
    values, vectors = np.linalg.eigh(a.cov)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    crossed = np.sqrt(np.linalg.eigvalsh(root @ b.cov @ root).clip(min=0)).sum()
    return float(np.square(a.mean - b.mean).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * crossed)


def kernel_distance(a: np.ndarray, b: np.ndarray, subsets: int = SUBSETS) -> tuple[float, float]:
    """(mean, standard deviation) over random subsets of the unbiased squared MMD of features [n, d] and [m, d].

    Fewer than twice `SUBSET_IMAGES` images on a side: subsets of half of them, so that they differ.
    """
    size = min(SUBSET_IMAGES, len(a) // 2, len(b) // 2)
    if size < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(0)
    found = [squared_mmd(*(x[rng.choice(len(x), size, replace=False)] for x in (a, b))) for _ in range(subsets)]
    return float(np.mean(found)), float(np.std(found))


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate from features [n, d] and [m, d] under the kernel (x . y / d + 1)^3. May be below 0."""
    x, y = x.astype(np.float64), y.astype(np.float64)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        k = a @ b.T
        k /= a.shape[1]
        k += 1
        return k * k * k  # ** 3 is many times as slow

    def within(a: np.ndarray) -> float:
        k = kernel(a, a)
        return float((k.sum() - np.trace(k)) / (len(a) * (len(a) - 1)))

    return within(x) + within(y) - 2 * float(kernel(x, y).mean())
