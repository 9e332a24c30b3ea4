"""Every type that crosses a process or the disk: frozen, checked when built, JSON both ways.

Standard library only, so that the driver can plan without torch. Legend for the whole project:
T = num_timesteps of training (1000), T' = points of the similarity grid, K = experts.
Ranges are half-open: an interval [start, stop) owns start, and stop belongs to the next, noisier expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from workers.errors import BudgetUnreachable as BudgetUnreachable
from workers.errors import InputError as InputError
from workers.errors import RunFailed as RunFailed
from workers.errors import VerificationError as VerificationError
from workers.protocol import ExtractorRef as ExtractorRef
from workers.protocol import Protocol as Protocol
from workers.protocol import SamplerRef as SamplerRef
from workers.protocol import Timing as Timing
from workers.records import Record as Record
from workers.timesteps import Interval as Interval
from workers.timesteps import Partition as Partition
from workers.timesteps import SimilarityMatrix as SimilarityMatrix
from workers.timesteps import derive_seed as derive_seed
from workers.timesteps import digest_of as digest_of
from workers.timesteps import interval_index as interval_index

# --- architectures --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ElasticSite(Record):
    """One residual branch whose inner width can shrink. ``choices``: units kept, ascending, the last one dense; 0 drops the branch."""

    name: str
    choices: tuple[int, ...]
    unit: str

    def __post_init__(self) -> None:
        if not self.choices or list(self.choices) != sorted(set(self.choices)) or self.choices[0] < 0 or self.dense == 0:
            raise InputError(f"site {self.name}: choices {self.choices} must ascend from 0 or more to a dense width above 0")

    @property
    def dense(self) -> int:
        return self.choices[-1]

    @property
    def narrowest(self) -> int:
        """The smallest choice that keeps the branch."""
        return next(choice for choice in self.choices if choice > 0)


@dataclass(frozen=True)
class ArchitectureSpec(Record):
    """One sub-network: how many units each site keeps."""

    choices: dict[str, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return digest_of(self.choices)[:12]

    def __getitem__(self, site: str) -> int:
        return self.choices[site]

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.choices.items())))

    def replace(self, site: str, choice: int) -> ArchitectureSpec:
        return ArchitectureSpec({**self.choices, site: choice})


@dataclass(frozen=True)
class SearchSpace(Record):
    """Every legal sub-network of one denoiser."""

    sites: tuple[ElasticSite, ...]

    @property
    def dense(self) -> ArchitectureSpec:
        return ArchitectureSpec({site.name: site.dense for site in self.sites})

    @property
    def smallest(self) -> ArchitectureSpec:
        return ArchitectureSpec({site.name: site.choices[0] for site in self.sites})

    @property
    def narrowest(self) -> ArchitectureSpec:
        """Every branch kept at its smallest width: the small end of the sandwich rule."""
        return ArchitectureSpec({site.name: site.narrowest for site in self.sites})

    def check(self, spec: ArchitectureSpec) -> None:
        """Raises: InputError if a site is missing or unknown, or a choice is not legal."""
        names = {site.name for site in self.sites}
        if names != set(spec.choices):
            odd = sorted(names ^ set(spec.choices))
            raise InputError(f"architecture does not fit the search space: {odd[0]} is in only one of the two")
        for site in self.sites:
            if spec[site.name] not in site.choices:
                raise InputError(f"site {site.name}: {spec[site.name]} is not one of {site.choices}")


@dataclass(frozen=True)
class Cost(Record):
    """What one forward pass of one image takes.

    ``macs`` counts multiply-accumulates, those of the two attention products (``attention_macs``) included; papers often leave them out.
    ``latency_ms`` is of a whole batch, by the latency table of the job, if it has one.
    """

    macs: int
    params: int
    attention_macs: int = 0
    latency_ms: float | None = None

    @property
    def macs_without_attention(self) -> int:
        return self.macs - self.attention_macs

    def of(self, metric: str) -> float:
        """The figure that a budget of ``metric`` limits."""
        value = self.macs if metric == "macs" else self.latency_ms
        assert value is not None, metric
        return value


METRICS = {"macs": "MACs", "latency": "time"}
"""What a budget may limit -> its name in sentences."""
REWRITES = ("fold_context", "merge_one_head", "fuse_qkv", "transpose_upsample")
"""Exact rewrites of a published expert; `workers.rewrites` defines one function for each."""


@dataclass(frozen=True)
class Budget(Record):
    """A target: the mixture's schedule-weighted cost is at most ``ratio`` of the dense model's."""

    metric: str
    ratio: float
    scheduler: str
    steps: int

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InputError(f"budget metric {self.metric!r} is not one of {', '.join(METRICS)}")
        if not (math.isfinite(self.ratio) and 0 < self.ratio <= 1):
            raise InputError(f"budget ratio {self.ratio} is not in (0, 1]")

    @property
    def name(self) -> str:
        return f"{self.metric}-{self.ratio:.2f}"

    @property
    def quantity(self) -> str:
        """What is limited, in words: ``ratio`` is a part of the dense model's MACs, or of its time."""
        return METRICS[self.metric]


@dataclass(frozen=True)
class SiteReason(Record):
    """Why one site of one expert is as it is. For a site kept whole, what losing it would do; else what its cut does."""

    site: str
    choice: int
    dense: int
    rise: float
    """Rise of the expert's normalised loss when only this site is reduced."""
    saves: float
    """Cost of the difference, as a part of the dense model's."""


@dataclass(frozen=True)
class MixturePlan(Record):
    """Who gets which sub-network: one architecture per interval, within one budget."""

    budget: Budget
    agent: str
    seed: int
    partition: Partition
    experts: tuple[ArchitectureSpec, ...]
    shares: tuple[float, ...]
    """Part of the sampler's steps that each expert serves; sums to 1."""
    expert_costs: tuple[Cost, ...]
    dense_cost: Cost
    loss: float
    """Search loss on the calibration images: normalised, schedule-weighted; lower is better."""
    search_seconds: float = 0.0
    gain: float = 0.0
    """How much lower the loss is than that of the uniform plan."""
    gain_error: float = 0.0
    """Standard error of ``gain`` over the calibration images."""
    reasons: tuple[tuple[SiteReason, ...], ...] = ()
    """Per expert, the sites that tell most about the choice."""
    distance: float | None = None
    """How far its experts are from dense after a little fine-tuning (`tasks_route.proxy_distance`); None if there was none."""

    def __post_init__(self) -> None:
        if not len(self.experts) == len(self.shares) == len(self.expert_costs) == len(self.partition):
            raise InputError(f"a plan for {len(self.partition)} intervals needs as many experts, shares and costs")

    @property
    def rank(self) -> tuple[float, float]:
        """The lower, the better a plan of its budget: those that were tried come first, by their distance; the others by search loss."""
        return math.inf if self.distance is None else self.distance, self.loss

    def cost(self, metric: str) -> float:
        """Schedule-weighted cost of one denoising step."""
        return sum(share * cost.of(metric) for share, cost in zip(self.shares, self.expert_costs, strict=True))

    @property
    def macs(self) -> float:
        return self.cost("macs")

    @property
    def macs_ratio(self) -> float:
        return self.macs / self.dense_cost.macs

    @property
    def cost_ratio(self) -> float:
        """What the budget limits, as a part of dense."""
        return self.cost(self.budget.metric) / self.dense_cost.of(self.budget.metric)


# --- work that is handed to a worker --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertCheckpoint(Record):
    """A pointer to one expert's weights, never the weights. ``started`` and ``ended`` are seconds since the epoch of the last attempt;
    ``seconds`` is the time that one of its workers trained, over all attempts as far as they were saved."""

    interval: Interval
    path: str
    step: int
    loss: float
    started: float = 0.0
    ended: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class ImageTask(Record):
    """Decode a folder or Parquet into the memory-mapped image cache. ``channels`` and ``size`` are the denoiser's."""

    path: str
    channels: int
    size: int
    resize: bool
    on_error: str
    out: str


@dataclass(frozen=True)
class SimilarityTask(Record):
    """Embed some timesteps of the grid, for every minibatch, under one measure."""

    measure: str
    model: str
    images: str
    rows: tuple[int, ...] = field(repr=False)
    """Which images of the cache to use, in order; minibatch b is rows[b * batch_size : (b + 1) * batch_size]."""
    timesteps: tuple[int, ...]
    batch_size: int
    buckets: int
    seed: int
    device: str
    out: str


@dataclass(frozen=True)
class ElasticSettings(Record):
    """Which sub-networks are legal: widths are multiples of ``width_multiple`` channels; ``depth`` allows dropping whole branches.

    ``unit`` says what a ResBlock loses: whole GroupNorm groups (``group``) or as many channels of every group (``channel_per_group``).
    ``most_widths``: how many widths a site has at most, spread evenly over the legal ones.
    """

    width_multiple: int
    depth: bool
    importance: str
    unit: str = "group"
    most_widths: int = 1 << 20


@dataclass(frozen=True)
class LatencyTask(Record):
    """Measure a denoiser's latency table on the worker's device, unless ``folder`` holds it."""

    model: str
    elastic: ElasticSettings
    timing: Timing
    folder: str


@dataclass(frozen=True)
class TrainSettings(Record):
    """One expert's training, as ``specialize`` and ``finetune`` of a job file say it. ``relative_errors``: one counts as a part of the
    teacher's at its timestep."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    ema_decay: float
    max_grad_norm: float
    mixed_precision: str
    checkpoint_every: int
    outside_fraction: float
    output_weight: float
    feature_weight: float
    denoising_weight: float
    cuda_graphs: bool = True
    relative_errors: bool = False
    optimizer: str = "muon"


@dataclass(frozen=True)
class ExpertTask(Record):
    """Train one expert. ``source`` and ``spec`` set: fine-tune that extracted sub-network; not set: train the elastic copy."""

    stage: str
    model: str
    images: str
    rows: tuple[int, ...] = field(repr=False)  # Ray Train shows its dashboard what a trainer was told, a million numbers and all
    interval: Interval
    elastic: ElasticSettings
    train: TrainSettings
    random_networks: int
    importance_images: int
    seed: int
    flip: bool
    class_dropout: float = 0.0
    """Part of the labels that become the null class in training."""
    source: str | None = None
    spec: ArchitectureSpec | None = None
    label: str = ""
    """Put before the interval's name in progress lines."""
    network_pool: int = 0
    network_costs: tuple[float, float] = (0.2, 1.0)
    """How many random sub-networks there are in all; 0: new ones in every step."""

    @property
    def unit(self) -> str:
        """Its name in progress lines."""
        return f"{self.label} {self.interval.name}".strip()


@dataclass(frozen=True)
class RouteSettings(Record):
    """How much each agent may search; meanings and bounds are those of the job file's ``router`` section."""

    images: int
    era_steps: int
    era_batch: int
    era_learning_rate: float
    cost_weight: float
    temperature: float
    trials: int = 100


@dataclass(frozen=True)
class RouteTask(Record):
    """Search one plan: one budget, one agent, one seed. ``sensitivity`` points to the tables measured once per expert."""

    model: str
    images: str
    rows: tuple[int, ...] = field(repr=False)
    partition: Partition
    elastic: ElasticSettings
    experts: tuple[ExpertCheckpoint, ...]
    budget: Budget
    agent: str
    seed: int
    settings: RouteSettings
    device: str
    search_seed: int = 0
    """Seed of the agent; ``seed`` alone decides the calibration images' noise, so that all trials see the same."""
    sensitivity: tuple[str, ...] = ()
    influence: str | None = None
    """Where it is written how much an error of each expert counts in the samples; None: the same for all."""
    latency: str | None = None
    """The latency table of a latency budget."""
    stage: str = "route"
    """Under what progress is told: the stage, or a sweep."""
    mixed_precision: str = "no"
    """As the experts were trained: ``bf16`` also runs their calibration under autocast on a GPU."""


@dataclass(frozen=True)
class DenoiserRef(Record):
    """A denoiser to evaluate: without a plan, the dense one; else the mixture of ``experts``, small fine-tuned checkpoints.

    ``cut_only``: the plan is cut from the pretrained weights, untrained, in the channel order of the elastic ``experts``. ``folder``: a
    published mixture, which needs no experts; its weights predict noise that is divided by ``epsilon_scale`` already.
    """

    label: str
    plan: MixturePlan | None = None
    experts: tuple[ExpertCheckpoint, ...] = ()
    cut_only: bool = False
    unit: str = "group"
    folder: str | None = None
    epsilon_scale: float = 1.0


@dataclass(frozen=True)
class EvaluateTask(Record):
    """Measure one denoiser on one shard of held-out images and one shard of fixed noise."""

    denoiser: DenoiserRef
    model: str
    images: str
    rows: tuple[int, ...] = field(repr=False)
    noise_seeds: tuple[int, ...]
    """One seed per generated sample, so that neither batch size nor sharding changes a sample."""
    partition: Partition
    sampler: SamplerRef
    batch_size: int
    timesteps: tuple[int, ...]
    seed: int
    device: str
    out: str
    timing: Timing
    guidance_scale: float = 1.0
    dtype: str = "float32"
    compiled: bool = False
    """Sampling runs with compiled blocks."""
    frechet_seeds: tuple[int, ...] = ()
    """One seed per image that only its features are kept of."""
    extractor: ExtractorRef | None = None
    stage: str = "publish"
    """Under which progress is told."""


# --- what is published ----------------------------------------------------------------------------------------------

GOLDEN = "golden/samples.safetensors"
"""In a version: a few images that it drew when it was published."""


@dataclass(frozen=True)
class Provenance(Record):
    """Where a mixture comes from. Holds no clock, so that the same run publishes the same bytes."""

    job: str
    fingerprint: str
    model: str
    model_digest: str
    data: str
    data_digest: str
    seed: int
    versions: dict[str, str]


@dataclass(frozen=True)
class MixtureManifest(Record):
    """The first page of a published version: what it is, how it was made, how good it is, and the hash of every file."""

    name: str
    family: str
    plan: MixturePlan
    metrics: dict[str, Any]
    config: dict[str, Any]
    provenance: Provenance
    files: dict[str, str]
    """Relative POSIX path -> sha256 of every file of the version but the manifest itself."""

    @property
    def epsilon_scale(self) -> float:
        """By which the noise that its weights predict is divided."""
        return self.config.get("sampler", {}).get("epsilon_scale", 1.0)


@dataclass(frozen=True)
class Progress(Record):
    """One line of a run's progress, sent by a worker to the driver."""

    stage: str
    unit: str
    step: int
    steps: int
    loss: float | None = None
    images_per_s: float | None = None
    seconds: float = 0.0
    """Time spent on this unit so far, in this attempt."""
    first_step: int = 0
    """Where this attempt started, so that an estimate of the rest counts only what it did itself."""
    note: str = ""

    @property
    def eta_s(self) -> float | None:
        """Seconds until the unit is done, from the steps it has made in this attempt."""
        made = self.step - self.first_step
        return self.seconds / made * (self.steps - self.step) if made > 0 and self.step < self.steps else None
