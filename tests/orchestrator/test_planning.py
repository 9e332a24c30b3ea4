"""What a job is said to need, against what it really takes."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from orchestrator import planning
from orchestrator.config import load_job
from workers import families
from workers.contracts import ElasticSettings, TrainSettings
from workers.cost import activation_bytes
from workers.diffusion import NoiseSchedule
from workers.elastic import ElasticDenoiser
from workers.trainer import Batch, Trainer


@pytest.mark.parametrize(("precision", "optimizer"), [("no", "adamw"), ("bf16", "adamw"), ("no", "muon")])
def test_a_trainers_state_takes_what_the_plan_says(emoji, precision, optimizer):
    AcceleratorState._reset_state()
    teacher = families.family("unet2d").tiny()
    model = copy.deepcopy(teacher)
    branches = families.family("unet2d").sites(model, ElasticSettings(4, depth=True, importance="magnitude"))
    settings = TrainSettings(1, 2, 1e-4, 0, 0.0, 0.9, 1.0, precision, 1, 0.0, 1.0, 1.0, 1.0, optimizer=optimizer)
    schedule = NoiseSchedule(families.load_scheduler_config(emoji))
    names = families.family("unet2d").features(model)
    trainer = Trainer.of(Accelerator(cpu=True), ElasticDenoiser(model, branches), teacher, names, schedule, settings)
    clean, noise = torch.randn(2, 2, 3, 16, 16)
    trainer.step(0, Batch(clean, torch.tensor([5, 900]), noise, {}), [None])
    held: dict[int, int] = {}
    for module in (trainer.model, trainer.running, trainer.averaged, trainer.teacher):
        for parameter in module.parameters():
            held |= {t.data_ptr(): t.nbytes for t in (parameter, parameter.grad) if t is not None}
    moments = sum(moment.nbytes for moment in trainer.optimizer.tensors().values() if moment.dim())
    parameters = sum(parameter.numel() for parameter in teacher.parameters())
    assert sum(held.values()) == planning.BYTES_TRAINED_PER_PARAMETER[precision] * parameters
    assert moments == pytest.approx(planning.BYTES_OF_MOMENTS[optimizer] * parameters, rel=0.1 if optimizer == "muon" else 0)
    at_work = moments + sum(direction.nbytes for direction in trainer.optimizer._directions)
    assert at_work == pytest.approx(planning.BYTES_OF_OPTIMIZER * parameters, rel=0.01)


def test_memory_of_a_trainer_grows_by_activations_which_graphs_keep():
    def needed(*changes: str) -> int:
        prepared = planning.prepare(load_job("quickstart", ["specialize.batch_size=8", *changes]))
        return planning.describe(prepared)["trainer_bytes"]

    job = planning.prepare(load_job("quickstart", []))
    kept, params = 8 * activation_bytes(families.load_config(job.job.model.path)), job.table.dense.params
    assert needed("resources.device=cpu") == 24 * params + kept
    assert needed("resources.device=cuda") == 24 * params + 2 * kept
    assert needed("resources.device=cuda", "specialize.cuda_graphs=false") == 24 * params + kept
    assert needed("resources.device=cuda", "specialize.mixed_precision=bf16") == 26 * params + kept
