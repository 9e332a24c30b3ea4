"""How far does an error of one interval move the samples? One interval at a time is served by a narrow, untrained sub-network.

    python tests/bench_influence.py MODEL IMAGES [--weights RESNET56] [--cuts 150,350,650] [--samples 192] [--device cuda]

MODEL: a DDPM pipeline folder; IMAGES: as data.path. Prints per interval the squared error of the sub-network's output against dense's, how
far the samples move from dense's of the same noise, and the ratio of the two per timestep, relative to the cleanest interval, plain and as
a part of dense's error. Distances: Frechet in dense's own features and, with weights, in those of a ResNet-56, as parts of the variance.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from workers import conditioning, data, extractors, families
from workers.contracts import ElasticSettings, ExtractorRef, ImageTask, Partition
from workers.diffusion import NoiseSchedule, generator
from workers.elastic import ElasticDenoiser, extract, importance_order, reorder
from workers.influence import Probe, moved
from workers.routers.uniform import at_level
from workers.samples import open_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("images")
    parser.add_argument("--weights")
    parser.add_argument("--cuts", default="150,350,650")
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--level", type=float, default=1.85, help="of the sub-network: 2 is dense, 1 the narrowest")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    config, scheduler = families.load_config(options.model), families.load_scheduler_config(options.model)
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "images.arrow")
        data.build_cache(ImageTask(options.images, config["in_channels"], config["sample_size"], False, "refuse", out))
        images = open_samples(out).clean(range(128), options.device)
    family, schedule = families.family_of_config(config), NoiseSchedule(scheduler)
    settings = ElasticSettings(width_multiple=1, depth=True, importance="taylor", unit="group")
    dense = families.load_denoiser(options.model).to(options.device)
    partition = Partition.from_boundaries([int(cut) for cut in options.cuts.split(",")], schedule.num_timesteps)
    noise = torch.stack([torch.randn(images.shape[1:], generator=generator("cpu", "bench", i)) for i in range(options.samples)])
    probe = Probe(
        dense=dense,
        levels=family.features(dense),
        conditioner=conditioning.load(options.model, options.device),
        config=scheduler,
        partition=partition,
        sampler="ddim-unclipped",
        steps=options.steps,
        guidance_scale=1.0,
        noise=noise.to(options.device),
        labels=None,
        batch=options.batch,
    )
    drawn = probe.draw_dense()
    resnet = extractors.load(ExtractorRef("resnet56", options.weights), options.device) if options.weights else None
    print(f"{'interval':<12}{'error':>10}{'of dense':>10}{'moved':>10}{'plain':>9}{'relative':>10}" + "   in ResNet-56" * bool(resnet))
    first: list[tuple[float, float]] = []
    for k, interval in enumerate(partition.intervals):
        model = families.load_denoiser(options.model).to(options.device)
        branches = family.sites(model, settings)

        def losses(interval=interval, model=model):
            for i in range(0, 64, 16):
                gen = generator(options.device, "importance", i)
                t = torch.randint(interval.start, interval.stop, (16,), generator=gen, device=options.device)
                eps = torch.randn(images[:16].shape, generator=gen, device=options.device)
                clean = images[i : i + 16]
                yield F.mse_loss(model(schedule.noised(clean, eps, t), t).sample, schedule.target(clean, eps, t))

        reorder(model, branches, importance_order(model, branches, losses, "taylor"))
        small = extract(model, branches, at_level(ElasticDenoiser(model, branches).space, options.level)).eval()
        with torch.no_grad():
            clean, gen = images[64:], generator(options.device, "error", k)
            t = interval.start + torch.arange(len(clean), device=options.device) * interval.length // len(clean)
            eps = torch.randn(clean.shape, generator=gen, device=options.device)
            noisy, target = schedule.noised(clean, eps, t), schedule.target(clean, eps, t)
            taught = dense(noisy, t).sample
            error, of_dense = float(F.mse_loss(small(noisy, t).sample, taught)), float(F.mse_loss(taught, target))
        samples = probe.draw({k: small}, drawn)
        assert samples is not None, f"no step falls into {interval.name}: raise --steps"
        distances = [probe.distance({k: small}, drawn)]
        if resnet is not None:
            views = [resnet(torch.as_tensor(x, device=options.device)).cpu().numpy() for x in (samples, drawn["samples"])]
            distances.append(moved(views[:1], views[1:]))
        told = []
        for i, distance in enumerate(distances):
            plain = distance / error / interval.length
            first += [(plain, plain * of_dense)] if k == 0 else []
            told.append(f"{distance:>10.4f}{plain / first[i][0]:>9.3g}{plain * of_dense / first[i][1]:>10.3g}")
        print(f"{interval.name:<12}{error:>10.2g}{of_dense:>10.2g}" + "  ".join(told), flush=True)


if __name__ == "__main__":
    main()
