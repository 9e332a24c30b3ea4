"""What a job may say: typed, bounded, documented. YAML + ``extends`` + ``--set a.b=c``; unknown keys are errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from orchestrator.explain import explain
from orchestrator.job_file import RUNS, find_job, read_job
from orchestrator.place import Place
from workers.contracts import REWRITES, Budget, ElasticSettings, InputError, RouteSettings, Timing, TrainSettings

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's on, yes and true would count as 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false are not among its values")
        return value


class Storage(Section):
    path: str = Field(
        str(RUNS),
        min_length=1,
        description="Folder of run folders, relative to the current folder, or s3:// or gs://bucket/prefix; a run lives in PATH/NAME.",
    )
    scratch: str | None = Field(
        None,
        min_length=1,
        description="For s3:// and gs:// alone: folder on the disk of every node, for what it works on. Default: below ~/.cache.",
    )


class RegistryConfig(Section):
    path: str = Field(
        "registry",
        min_length=1,
        description="Folder of the model registry, relative to the current folder, or s3:// or gs://bucket/prefix.",
    )


class Model(Section):
    path: str = Field(min_length=1, description="Diffusers pipeline folder or Hub id. In a job file relative to that file.")
    family: str = Field("auto", description="Model family, a file of workers/families; auto: by the class in the model's config.")
    random_init: bool = Field(False, description="Random weights for a folder that holds configs alone: to plan, time and try out.")


class Data(Section):
    path: str = Field(
        min_length=1, description="Image folder, Parquet (column image), or hf://datasets/ORG/NAME. In a job file relative to that file."
    )
    on_error: Literal["refuse", "skip"] = Field(
        "refuse", description="What to do with an unreadable image: stop, or leave it out and count it."
    )
    resize: bool = Field(False, description="Centre-crop and resize images that have another size than the model.")
    holdout: Count = Field(256, description="Images kept out of training, for evaluation.")
    flip: bool = Field(False, description="Random horizontal flips in training.")
    class_dropout: Fraction = Field(0.1, description="Class-conditional: part of the labels that become the null class in training.")
    latent_dtype: Literal["float16", "float32"] = Field("float16", description="Latent diffusion: how the latent cache stores numbers.")
    encode_math: Literal["float32", "tf32"] = Field(
        "float32", description="Latent diffusion: arithmetic of the first stage; tf32 is several times as fast on GPUs, with 0.6% error."
    )
    encode_batch: Count = Field(16, description="Latent diffusion: images that the first stage encodes at once.")


class Similarity(Section):
    measure: str = Field("gradient", description="How timesteps are compared: a file of workers/similarity.")
    timesteps: int = Field(64, ge=1, description="Points of the timestep grid.")
    images: int = Field(256, ge=2, description="Training images the comparison looks at; more make it more reliable.")
    batch_size: Count = Field(8, description="Images per minibatch; reliability and bootstrap resample minibatches.")
    buckets: int = Field(16384, ge=64, description="Size of the gradient sketch; its relative error is about 1/sqrt(buckets).")
    bootstrap: int = Field(100, ge=1, description="Resamplings behind the frequency of each boundary.")


class PartitionConfig(Section):
    experts: Literal["auto"] | Count | list[Count] = Field(
        "auto", description="auto, a number of experts, or the inner boundaries as a list of timesteps."
    )
    method: Literal["learned", "uniform in t", "uniform in log-SNR"] = Field(
        "learned",
        description="Cut where similarity says, or as a baseline does: into equal parts of the timesteps, or of the log-SNR as far as "
        "min_timesteps allows.",
    )
    penalty: float = Field(0.05, ge=0, description="auto: what one more expert must save, as a part of the cost of a single interval.")
    max_experts: int = Field(6, ge=2, description="auto: the most experts to choose.")
    min_timesteps: Count = Field(40, description="Shortest interval in training timesteps; 40 gives two steps of a 50-step sampler.")


class Elastic(Section):
    width_multiple: Count = Field(8, description="Legal inner widths are multiples of this many channels; hardware likes 8, 32 or 64.")
    unit: Literal["group", "channel_per_group"] = Field(
        "group", description="What a ResBlock loses: whole norm groups, or as many channels of every group."
    )
    most_widths: Count = Field(8, description="Widths of a site at most, spread evenly over the legal ones; 1: branches are whole or gone.")
    depth: bool = Field(True, description="Whole residual branches may be dropped.")
    importance: Literal["taylor", "magnitude"] = Field(
        "taylor", description="Order of channels: Taylor on the interval's loss, or weight norm."
    )

    @field_validator("depth")
    @classmethod
    def _leaves_a_choice(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and info.data.get("most_widths") == 1:
            raise ValueError("must be true where elastic.most_widths is 1: nothing else could be cut")
        return value


class Training(Section):
    steps: int = Field(ge=1, description="Optimiser steps per expert.")
    batch_size: Count = Field(16, description="Images per step, over all workers of the expert.")
    optimizer: Literal["muon", "adamw"] = Field(
        "muon", description="Muon for convolutions and linear layers, AdamW for the rest; or for all."
    )
    learning_rate: float = Field(gt=0, description="Peak of the schedule: linear warm-up, then a cosine to zero.")
    warmup_steps: int = Field(0, ge=0, description="Steps of the warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="Decay of the weight average that is kept; warms up with the step.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping.")
    mixed_precision: Literal["no", "bf16"] = Field("no", description="Arithmetic of the training step; weights are kept in float32.")
    cuda_graphs: bool = Field(
        True, description="On GPUs, replay what is the same in every step: small networks train faster, memory grows."
    )
    checkpoint_every: Count = Field(500, description="Steps between checkpoints; a crash costs at most about that many.")
    outside_fraction: Fraction = Field(0.2, description="Part of the timesteps drawn from just outside the interval.")
    output_weight: float = Field(1.0, ge=0, description="Weight of output distillation from the dense model.")
    feature_weight: float = Field(0.5, ge=0, description="Weight of block-feature distillation.")
    denoising_weight: float = Field(0.1, ge=0, description="Weight of the denoising loss.")
    relative_errors: bool = Field(
        True, description="Errors of the output count as parts of the dense model's at the same timestep, not as they are."
    )

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        """YAML reads a bare no as false."""
        return "no" if value is False else value

    def settings(self) -> TrainSettings:
        return TrainSettings(**self.model_dump(include=set(Training.model_fields)))


class Specialize(Training):
    steps: int = Field(2000, ge=0, description="Optimiser steps per elastic expert; 0: sub-networks are cut from the pretrained weights.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak of the schedule: linear warm-up, then a cosine to zero.")
    random_networks: int = Field(2, ge=0, description="Random sub-networks per step, beside a small one and the largest, which take turns.")
    costs: tuple[Fraction, Fraction] = Field(
        (0.2, 1.0),
        description="What random sub-networks cost at least and at most, as parts of dense's MACs: about what experts will be given.",
    )
    network_pool: int = Field(0, ge=0, description="Draw them from so many, which GPUs replay as CUDA graphs; 0: new ones in every step.")
    importance_images: Count = Field(64, description="Images behind the channel importance.")

    @field_validator("costs")
    @classmethod
    def _ascend_from_above_zero(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] < value[1]:
            raise ValueError("must be two parts of dense, the smaller first and above 0")
        return value


class Finetune(Training):
    steps: int = Field(2000, ge=1, description="Optimiser steps per small expert.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak of the schedule: linear warm-up, then a cosine to zero.")
    compare: list[str] = Field(["uniform"], description="Agents whose plans are fine-tuned too, each as a row beside the mixture's.")


class Router(Section):
    agents: list[str] = Field(
        ["uniform", "greedy", "era", "era_even"], min_length=1, description="Agents that search each budget: files of workers/routers."
    )
    seeds: list[int] = Field([0], min_length=1, description="Seeds each agent searches with.")
    images: int = Field(64, ge=4, description="Calibration images; half are searched on, half score the plans.")
    trials: Count = Field(100, description="Plans that random_search and evolution try; era refines its plan with as many forward passes.")
    era_steps: Count = Field(200, description="Training steps of the routing agent.")
    era_batch: Count = Field(16, description="Calibration images per agent step and expert.")
    era_learning_rate: float = Field(2e-3, gt=0, description="Learning rate of the routing agent.")
    influence_samples: int = Field(
        256, ge=0, description="Samples drawn to measure how much an error of each expert counts in them; 0: all count the same."
    )
    proxy_steps: int = Field(
        50,
        ge=0,
        description="Fine-tuning steps that each agent's plan gets before the one is chosen whose experts are closest to dense; at most "
        "a quarter of finetune.steps. 0: the plan of lowest search loss is chosen.",
    )
    cost_weight: float = Field(4.0, ge=0, description="Weight of |log(cost / budget)| against log(expert loss).")
    temperature: float = Field(0.4, gt=0, description="Gumbel temperature.")

    def settings(self) -> RouteSettings:
        return RouteSettings(**self.model_dump(exclude={"agents", "seeds", "influence_samples", "proxy_steps"}))


class BudgetConfig(Section):
    metric: Literal["macs", "latency"] = Field(
        "macs", description="What is limited, schedule-weighted per denoising step: multiply-accumulates, or time measured on the device."
    )
    ratio: float = Field(gt=0, le=1, description="The mixture's cost as a part of the dense model's.")


LEAST_SCALE, MOST_SCALE = 0.9, 1.1
"""Of predicted noise. Further away, nothing is drawn any more."""


class Sampler(Section):
    scheduler: str = Field(
        "ddim",
        description="Sampler whose steps weigh the cost: ddpm, ddim, ddim-unclipped, dpmpp, dpmpp-trailing, dpmpp-karras, unipc, euler.",
    )
    steps: Count = Field(50, description="Sampling steps.")
    eta: float = Field(0.0, ge=0, le=1, description="Noise that DDIM adds to the samples: none at 0, as much as DDPM at 1.")
    epsilon_scale: float = Field(
        1.0,
        ge=LEAST_SCALE,
        le=MOST_SCALE,
        description="Predicted noise is divided by it, dense's and the mixtures' alike; a published mixture has it in its weights (epsilon "
        "scaling, arXiv 2308.15321; compare 0.998 to 1.005). For models that predict noise.",
    )
    guidance_scale: float = Field(1.0, ge=0, description="Classifier-free guidance of class-conditional samples; 1 is none.")


class Latency(Section):
    """Under what time is measured: that of latency budgets, and that of the published models."""

    batch: Count = Field(16, description="Images per forward pass.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Weights and activations.")
    compile: bool = Field(False, description="Residual blocks compiled with torch.compile, as diffusers' compile_repeated_blocks does.")
    cuda_graphs: bool = Field(False, description="Networks replayed as CUDA graphs: what small batches take when no host is in the way.")
    fused_kernels: bool = Field(False, description="Norms and biases by this project's GPU kernels, as after workers.fused.fuse.")


class Export(Section):
    rewrites: list[str] = Field(
        list(REWRITES), description="Exact rewrites of the published experts: same output, fewer operations. [] leaves them as they are."
    )


class Evaluate(Section):
    """What the table of results holds. Every row is measured once; distances and paired errors come with the id of their protocol."""

    images: Count = Field(64, description="Held-out images for the denoising loss.")
    samples: int = Field(64, ge=1, description="Samples drawn from fixed noise, for the paired error against dense.")
    timesteps: Count = Field(10, description="Timesteps of the denoising loss, evenly spaced.")
    cut_only: bool = Field(True, description="A row per budget for the pretrained model cut uniformly, untrained.")
    batch_size: Count = Field(16, description="Images per forward pass; changes numbers by rounding only.")
    shards: Count = Field(1, description="Workers that share the evaluation of one model, batch by batch; changes no number.")
    dense: list[str] = Field(
        [],
        description="More rows of the dense model: SCHEDULER:STEPS, e.g. ddim:25 or dpmpp:10; what fewer steps give for the same cost. "
        "SCHEDULER:STEPS:EPSILON_SCALE divides the noise that it predicts, else it is as it is.",
    )
    mixtures: list[str] = Field([], description="The same for more rows of every mixture, which stays as it was planned.")
    frechet_samples: int = Field(0, ge=0, description="Generated images behind the Frechet and kernel distances; 0 leaves them out.")
    extractor: str | None = Field(
        None, min_length=1, description="Whose features are compared: a file of workers/extractors, or package.module:function."
    )
    extractor_weights: str | None = Field(None, min_length=1, description="The extractor's weights file. In a job file relative to it.")
    reference: str | None = Field(
        None,
        min_length=1,
        description="Distances are measured from these: images as data.path names them, or statistics, FILE.npz or FILE.npz:PREFIX. "
        "Default: all images of data.path.",
    )
    kid_reference: str | None = Field(
        None,
        min_length=1,
        description="The kernel distance is measured from these: images, or statistics that hold features as well. Default: those of "
        "reference; where it is statistics without features, no kernel distance is measured.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Weights and activations while sampling.")
    compile: bool = Field(False, description="Sampling runs with compiled blocks.")
    lpips: str | None = Field(
        None,
        min_length=1,
        description="Perceptual distance to dense: a TorchScript file, or package.module:function, of two batches of images in [-1, 1].",
    )


class ResourcesConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where workers compute; auto: cuda if the cluster has GPUs.")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs of every worker.")
    gpus_per_worker: float = Field(1, gt=0, description="GPUs of every worker when the device is cuda; a fraction lets experts share one.")
    custom: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="Further Ray resources that every worker holds, e.g. {slot: 1} or {'accelerator_type:H100': 0.001}."
    )
    workers_per_expert: Count = Field(1, description="Data-parallel workers per expert.")
    local_cpus: int | None = Field(None, ge=1, description="CPUs of a local Ray; default: all of this machine.")
    autoscale_to: int | None = Field(
        None, ge=1, description="Workers to which an autoscaled cluster may grow; default: those that fit on the nodes that are there."
    )
    timeout_s: float = Field(600, gt=0, description="How long an expert may wait for its workers to start.")
    hang_timeout_s: float = Field(1800, gt=0, description="A worker that makes no training step for so long is ended and started again.")
    max_failures: int = Field(2, ge=0, description="Restarts of an expert after a lost worker.")

    @field_validator("gpus_per_worker")
    @classmethod
    def _a_fraction_or_whole(cls, value: float) -> float:
        if value > 1 and value % 1:
            raise ValueError("must be whole, or a fraction of one GPU")
        return value

    @field_validator("custom")
    @classmethod
    def _not_what_has_a_key(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name in ("CPU", "GPU", "memory", "object_store_memory"):
                raise ValueError(f"{name} is no custom resource: see cpus_per_worker and gpus_per_worker")
        return value


class JobConfig(Section):
    """One job: what to compress, with what, how small."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="Name of the run folder and of the model in the registry.")
    seed: int = Field(0, ge=0, description="Root of all randomness.")
    storage: Storage = Storage()
    registry: RegistryConfig = RegistryConfig()
    model: Model
    data: Data
    similarity: Similarity = Similarity()
    partition: PartitionConfig = PartitionConfig()
    elastic: Elastic = Elastic()
    specialize: Specialize = Specialize()
    router: Router = Router()
    budgets: list[BudgetConfig] = Field(min_length=1, description="One mixture is published for each.")
    sampler: Sampler = Sampler()
    latency: Latency = Latency()
    finetune: Finetune = Finetune()
    export: Export = Export()
    evaluate: Evaluate = Evaluate()
    resources: ResourcesConfig = ResourcesConfig()

    def budget(self, index: int) -> Budget:
        chosen = self.budgets[index]
        return Budget(chosen.metric, chosen.ratio, self.sampler.scheduler, self.sampler.steps)

    @property
    def proxy_steps(self) -> int:
        """Of fine-tuning, before a plan is chosen."""
        return min(self.router.proxy_steps, self.finetune.steps // 4)

    def elastic_settings(self) -> ElasticSettings:
        return ElasticSettings(**self.elastic.model_dump())

    def timing(self) -> Timing:
        latency = self.latency
        return Timing(
            latency.batch, latency.dtype, latency.compile, tuple(self.export.rewrites), latency.cuda_graphs, latency.fused_kernels
        )

    @property
    def place(self) -> Place:
        """Where the run lives. Raises: InputError."""
        return Place.of(self.storage.path, self.name, self.storage.scratch)

    @property
    def run_folder(self) -> Path:
        """On this machine: where the run lives, or its mirror."""
        return self.place.folder


def load_job(job: str, overrides: Sequence[str] = ()) -> JobConfig:
    """Read, extend, override and check a job. Raises: InputError, one line that names the key."""
    try:
        config = JobConfig.model_validate(read_job(job, overrides))
    except ValidationError as error:
        raise InputError(f"{find_job(job).name}: {explain(error, JobConfig)}") from None
    _check_names(config)
    _ = config.place  # refuses what is no storage
    return config


def job_schema() -> dict[str, Any]:
    """JSON schema of a job file: a file that ``extends`` another one need not say everything."""
    schema = JobConfig.model_json_schema()
    schema["properties"]["extends"] = {"type": "string", "description": "Job file that this one is laid over, relative to it."}
    schema["anyOf"] = [{"required": schema.pop("required")}, {"required": ["extends"]}]
    return schema


def _check_names(config: JobConfig) -> None:
    """Names of files that extend the project, checked without loading any of them."""
    from workers import names_in

    for key, value, folder in (
        ("model.family", config.model.family, "families"),
        ("similarity.measure", config.similarity.measure, "similarity"),
        *(("router.agents", agent, "routers") for agent in config.router.agents),
        *(("finetune.compare", agent, "routers") for agent in config.finetune.compare),
    ):
        if value not in names_in(folder) and (key, value) != ("model.family", "auto"):
            raise InputError(f"{key} {value!r} is unknown: known are {', '.join(names_in(folder))}")
    extractor = config.evaluate.extractor
    if extractor is not None and ":" not in extractor and extractor not in names_in("extractors"):
        known = ", ".join(names_in("extractors"))
        raise InputError(f"evaluate.extractor {extractor!r} is unknown: known are {known} and package.module:function")
    if config.partition.method != "learned" and isinstance(config.partition.experts, list):
        raise InputError(f"partition.method is {config.partition.method!r}: partition.experts must be auto or a number, not boundaries")
    for rewrite in config.export.rewrites:
        if rewrite not in REWRITES:
            raise InputError(f"export.rewrites {rewrite!r} is unknown: known are {', '.join(REWRITES)}")
    lists: dict[str, Sequence[object]] = {
        "router.agents": config.router.agents,
        "router.seeds": config.router.seeds,
        "finetune.compare": config.finetune.compare,
        "evaluate.dense": config.evaluate.dense,
        "evaluate.mixtures": config.evaluate.mixtures,
    }
    for name, values in lists.items():
        if len(set(values)) != len(values):
            raise InputError(f"{name} {values} names one twice")
    budgets = [config.budget(i).name for i in range(len(config.budgets))]
    if len(set(budgets)) != len(budgets):
        raise InputError(f"budgets: {', '.join(budgets)}: two have the same name; ratios must differ in their first two decimals")
