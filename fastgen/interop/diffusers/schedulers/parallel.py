"""DDPM and DDIM with many steps in a batch, for Shih et al. (2023), "Parallel sampling of diffusion models"."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastgen import ops
from fastgen.diffusion.schedules import Grid
from fastgen.interop.diffusers.schedulers.chain import DDIMScheduler, DDPMScheduler, WholeChain

__all__ = ["DDIMParallelScheduler", "DDPMParallelScheduler"]


class _Chain(NamedTuple):
    """Rows of the steps from all times of the chain, from 0 on, without their noise."""

    rows: Tensor
    estimating: Tensor
    quiet: Tensor
    """Key of steps without noise."""


class _Parallel(WholeChain):
    """Steps of a batch, each from its own time back by ``num_train_timesteps // num_inference_steps``; as upstream the data is
    before time 0, whatever ``set_alpha_to_one`` says."""

    def _whole(self, like: Tensor, options: tuple[Any, ...]) -> _Chain:
        key = options, like.device, like.dtype is torch.float64
        chain = self._chains.get(key)
        if chain is None:
            time = torch.arange(len(self), dtype=torch.float64)
            back = time - len(self) // (self.num_inference_steps or len(self))
            alpha, sigma = self._schedule.at(back.clamp(min=0))
            before = torch.where(back < 0, 1.0, alpha), torch.where(back < 0, 0.0, sigma)
            table = self._tabulated(
                Grid(self._schedule, time, *self._schedule.at(time), back, *before), like.device, like.dtype, options
            )
            rows = torch.stack(table.rows)
            rows[:, 4] = 0
            chain = self._chains[key] = _Chain(rows, torch.stack(table.estimating), table.quiet)
        return chain

    def _visit(self, grid: Grid) -> None:
        super()._visit(grid)
        self._chains: dict[tuple[Any, ...], _Chain] = {}

    def _batch_step(
        self,
        model_output: Tensor,
        timesteps: Tensor,
        sample: Tensor,
        options: tuple[Any, ...] = (),
        beside: Tensor | None = None,
    ) -> Tensor:
        sample = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        chain, clamp = self._whole(sample, options), self._clamp()
        times = timesteps.to(sample.device)
        if self._thresholds:
            model_output, clamp = self._thresholded(sample, model_output, chain.quiet, chain.estimating[times]), None
        history = None if beside is None else beside[None]
        return ops.denoise(
            sample, model_output, chain.rows[times], chain.quiet, history=history, clamp=clamp, return_x0=False
        ).x_next


class DDPMParallelScheduler(_Parallel, DDPMScheduler):
    """Ancestral sampling, of many steps at once."""

    _is_ode_scheduler: ClassVar[bool] = False

    def _get_variance(self, timestep: int | Tensor) -> Tensor:
        """Of the noise of the step from ``timestep``, where it is not learned."""
        row = self._rows(self.alphas_cumprod, ()).rows[self.index_for_timestep(timestep)]
        return row[4].square()

    def batch_step_no_noise(self, model_output: Tensor, timesteps: Tensor, sample: Tensor) -> Tensor:
        """The mean of the step from each of ``timesteps`` [N], any of the chain's."""
        if model_output.shape[1] == 2 * sample.shape[1] and self._arguments["variance_type"].startswith("learned"):
            model_output = model_output[:, : sample.shape[1]]
        return self._batch_step(model_output, timesteps, sample)


class DDIMParallelScheduler(_Parallel, DDIMScheduler):
    """Implicit sampling, of many steps at once."""

    _is_ode_scheduler: ClassVar[bool] = True

    def _get_variance(self, timestep: int | Tensor, prev_timestep: int | Tensor | None = None) -> Tensor:
        """Of the noise that a step between the two times has with an eta of 1."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps first")
        here = int(timestep)
        there = here - len(self) // self.num_inference_steps if prev_timestep is None else int(prev_timestep)
        kept, after = self.alphas_cumprod[here], self.alphas_cumprod[there] if there >= 0 else self.final_alpha_cumprod
        return (1 - after) / (1 - kept) * (1 - kept / after)

    def batch_step_no_noise(
        self,
        model_output: Tensor,
        timesteps: Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
    ) -> Tensor:
        """The step from each of ``timesteps`` [N], any of the chain's; ``eta`` can only be 0."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before batch_step_no_noise")
        if eta:
            raise ValueError(f"eta must be 0 in steps without noise, got {eta}")
        unclipped = (self._clamp() is not None or self._thresholds) and not use_clipped_model_output
        beside = model_output if unclipped else None
        return self._batch_step(model_output, timesteps, sample, (0.0, unclipped), beside)
