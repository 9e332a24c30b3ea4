"""What is handed to a worker for one row of the table of an evaluation, and for what all rows are compared with. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from workers.contracts import EvaluateTask, ExtractorRef, ImageTask, Protocol, Record


@dataclass(frozen=True)
class ReferenceTask(Record):
    """Statistics of the features of all images that ``images`` names, decoded as for training, go to ``images.out`` (npz)."""

    images: ImageTask
    extractor: ExtractorRef
    batch_size: int
    stage: str = "publish"


@dataclass(frozen=True)
class RowTask(Record):
    """One row from its shards: metrics to ``out`` (JSON), the samples beside it (npz)."""

    shards: tuple[EvaluateTask, ...]
    protocol: Protocol
    out: str
    dense: str | None = None
    """``out`` of the dense model under the job's sampler, which comes first; None: this is it."""
    known_from: str | None = None
    """``out`` of a row before it that is the same denoiser under another sampler: the denoising loss is known, and for dense what a step
    costs; a mixture's depends on how many steps each expert serves."""
    reference: str | None = None
    """The statistics (npz) that features are compared with, perhaps followed by ``:PREFIX``."""
    kid_reference: str | None = None
    """The same, with features, for the kernel distance; None: it is not measured."""
    lpips: str | None = None
    commit: str | None = None
    """Of the code that measures."""
    drawn_at_once: int = 1
    """Shards that were drawn at the same time at most: images/s are those of one among so many."""

    @property
    def is_dense(self) -> bool:
        return self.dense is None or self.known_from == self.dense

    @property
    def label(self) -> str:
        return self.shards[0].denoiser.label
