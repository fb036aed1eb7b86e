"""Our samplers as a scheduler of diffusers: the same steps, bit for bit, one evaluation of the model at a time."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from selftrans.flow import PATHS, interpolate
from selftrans.sampling.samplers import EVALUATIONS, Noise, ode_times, sde_step, sde_times


class InterpolantScheduler(SchedulerMixin, ConfigMixin):
    """Euler, Heun or Euler-Maruyama from t = 1 (noise) to t = 0 (data), for models that predict the velocity of a path.

    `timesteps` are t itself, float64 on the CPU, so that reading them never waits for a GPU; Heun's method evaluates the model
    twice in each step, so it has two entries for each. On the linear path, Euler's method is diffusers'
    `FlowMatchEulerDiscreteScheduler` with equal steps, whose timesteps are 1000 t.

    Args:
        sampler: euler, heun (also called ode) or sde. path: linear or cosine.
        time_shift: see `flow.shifted`. last: t at which the last step of the SDE starts.
        num_train_timesteps: the largest timestep, 1.
    """

    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        sampler: str = "heun",
        path: str = "linear",
        time_shift: float = 1.0,
        last: float = 0.04,
        num_train_timesteps: int = 1,
    ) -> None:
        if sampler not in EVALUATIONS or path not in PATHS:
            raise ValueError(
                f"scheduler: sampler {sampler!r:.40} and path {path!r:.40}; choose from {', '.join(EVALUATIONS)}, and "
                f"{', '.join(PATHS)}"
            )
        self.order = EVALUATIONS[sampler]
        self.path, self.timesteps = PATHS[path], torch.empty(0, dtype=torch.float64)
        self._grid, self._at = self.timesteps, 0
        self._begun: tuple[Tensor, Tensor] | None = None  #: of Heun's method: z and v at the start of the step

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Begin a trajectory of this many steps. `device` is ignored. ValueError for too few steps."""
        settings: Any = self.config
        shift = settings.time_shift
        sde = settings.sampler == "sde"
        self._grid = (
            sde_times(num_inference_steps, settings.last, shift) if sde else ode_times(num_inference_steps, shift)
        )
        pairs = torch.stack([self._grid[:-1], self._grid[1:]], dim=1)  # (steps, 2): t, t_next
        self.timesteps = pairs[:, : self.order].flatten()
        self._at, self._begun = 0, None

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself, (N, C, *S)."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        noise: Noise | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """From sample (N, C, *S) and the velocity there to the next sample for which the model is evaluated.

        Steps are counted from `set_timesteps`; `timestep` is not read. `noise`: returns the next standard normal of the SDE;
        None: drawn with `generator`. ValueError after the last step.
        """
        number = self._at // self.order
        if number >= len(self._grid) - 1:
            raise ValueError("the trajectory is complete; call set_timesteps before the next one")
        t, t_next = self._grid[number], self._grid[number + 1]
        settings: Any = self.config
        if settings.sampler == "sde":
            draw = noise or (
                lambda: randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            )
            found = sde_step(sample, model_output, t, t_next, self.path, draw)
        elif self._begun is None:
            self._begun = (sample, model_output) if self.order == 2 else None
            found = sample + (t_next - t) * model_output
        else:
            (start, v), self._begun = self._begun, None
            found = start + (t_next - t) * (v + model_output) / 2
        self._at += 1
        return SchedulerOutput(prev_sample=found) if return_dict else (found,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The points on the path at t (N,) between data and noise, both (N, C, *S)."""
        t = timesteps.to(original_samples.device, original_samples.dtype)
        return interpolate(self.path, original_samples, noise, t)[0]

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])
