"""From class labels to images: the diffusers pipeline of class-conditional latent diffusion, around a dense denoiser or a mixture."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, SchedulerMixin, VQModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from workers.conditioning import ClassEmbedder, Conditioner
from workers.contracts import InputError
from workers.first_stage import DECODE_IMAGES
from workers.travelling import pass_on

OUTPUT_TYPES = ("pil", "np", "pt")
Generators = torch.Generator | list[torch.Generator] | None


class ClassConditionalLDMPipeline(DiffusionPipeline):
    """Latent diffusion of images of given classes, with classifier-free guidance (the LDM for ImageNet).

    diffusers has no such class, and takes classes from nowhere but itself and the modules that were imported before: import this one,
    which also brings what a folder names besides (`workers.conditioning`). `DiffusionPipeline.from_pretrained` ends with
    `module diffusers has no attribute ClassConditionalLDMPipeline`, whatever was imported.

    >>> from workers.ldm_pipeline import ClassConditionalLDMPipeline
    >>> from workers.mixture import MixtureDenoiser
    >>> dense = ClassConditionalLDMPipeline.from_pretrained("path/to/dense")
    >>> unet = MixtureDenoiser.from_pretrained("registry/imagenet/1")
    >>> pipeline = ClassConditionalLDMPipeline.from_pretrained("path/to/dense", unet=unet)
    >>> images = pipeline([207, 360], guidance_scale=1.5).images

    Args:
        vqvae: the first stage, VQ or KL; latents are divided by its config's ``scaling_factor`` before it decodes them.
        unet: any denoiser that takes (sample, timestep, encoder_hidden_states): a UNet2DConditionModel or a MixtureDenoiser.
        class_embedder: makes the context of a label, and knows which class is the null class.
        scheduler: a sampler on the training timesteps, such as DDIMScheduler.
    """

    model_cpu_offload_seq: Any = "class_embedder->unet->vqvae"
    code: ClassVar[str | None] = None
    """As in `workers.travelling`."""

    def __init__(self, vqvae: VQModel | AutoencoderKL, unet: ModelMixin, class_embedder: ClassEmbedder, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(vqvae=vqvae, unet=unet, class_embedder=class_embedder, scheduler=scheduler)

    @functools.wraps(DiffusionPipeline.save_pretrained)
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.code is not None:
            pass_on(self, save_directory)
            index = Path(save_directory) / "model_index.json"
            module = type(self).__module__
            index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": [module, type(self).__name__]}, indent=2) + "\n")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One image for each of the ``class_labels``.

        Args:
            class_labels: a label, or n of them: whole numbers in [0, classes), the null class excluded.
            num_inference_steps: calls of the denoiser.
            guidance_scale: 1 is without guidance; any other value takes a denoiser batch of 2n (``without + scale * (given - without)``).
            eta: DDIM's eta, between 0 (deterministic) and 1; other samplers do not look at it.
            generator: one for the batch, or one for each image, which makes an image independent of its batch.
            latents: the noise to start from, [n, C, H, W] with deviation 1; by default drawn from ``generator``.
            output_type: ``pil`` (a list), ``np`` (float32 [n, H, W, C] in [0, 1]) or ``pt`` (a tensor [n, C, H, W] in [0, 1]).
            return_dict: whether to return an ImagePipelineOutput instead of a tuple of the images.

        Raises: InputError in one line for a label that the model does not have, guidance without a null class, or arguments that do not
        fit each other.
        """
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type is {output_type!r}: known are {', '.join(OUTPUT_TYPES)}")
        conditioner = Conditioner(self.class_embedder.classes, self.class_embedder)
        labels = _labels(class_labels)
        conditioner.classes.check(labels, "class_labels")
        predict = conditioner.guide(self.unet, torch.from_numpy(labels).to(self._execution_device), guidance_scale)
        self.scheduler.set_timesteps(num_inference_steps)  # on the CPU, where a mixture can choose its expert without waiting
        x = self._noise(len(labels), generator, latents) * self.scheduler.init_noise_sigma
        offered = {"eta": eta, "generator": generator}
        taken = {name: value for name, value in offered.items() if name in inspect.signature(self.scheduler.step).parameters}
        for t in self.progress_bar(self.scheduler.timesteps):
            x = self.scheduler.step(predict(self.scheduler.scale_model_input(x, t), t), t, x, **taken).prev_sample
        images = self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(self, count: int, generator: Generators, latents: Tensor | None) -> Tensor:
        """Standard normal latents [count, C, H, W] on the denoiser's device, or those given. Raises: InputError if the numbers differ."""
        config = self.unet.config
        shape = count, config.in_channels, config.sample_size, config.sample_size
        if isinstance(generator, list) and len(generator) != count:
            raise InputError(f"{len(generator)} generators do not fit {count} class labels: give one, or one for each")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        if tuple(latents.shape) != shape:
            raise InputError(f"latents are of shape {list(latents.shape)}, for {count} class labels they must be {list(shape)}")
        return latents.to(self._execution_device, self.unet.dtype)

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        """Latents in the denoiser's scale -> images. A VQ first stage makes each vector its nearest code first."""
        parts = (latents.to(self.vqvae.dtype) / self.vqvae.config.scaling_factor).split(DECODE_IMAGES)
        images = (torch.cat([self.vqvae.decode(part).sample for part in parts]) / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).float().cpu().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array


def _labels(given: int | Sequence[int] | Tensor) -> np.ndarray:
    """int64 [n]. Raises: InputError if they are no whole numbers, or none at all."""
    labels = np.atleast_1d(given.cpu().numpy() if isinstance(given, Tensor) else np.asarray(given))
    if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"class_labels: {' '.join(str(given).split())[:60]} is neither a label nor a list of labels: give whole numbers")
    return labels.astype(np.int64)
