"""What steers the sampling of a trained model: the gradient of a classifier, and parts of the result that are known.

Each is made for an argument of ``model.sample``: ``adjust`` changes the estimate of the data before a step uses it,
``callback`` the state after a step. Three things have arguments of their own: classifier-free guidance is ``guidance=``,
image-to-image ``init=``, and inpainting ``inpaint=`` and ``mask=``, which :func:`keep_known` serves.

Sources: Dhariwal and Nichol (2021), "Diffusion models beat GANs on image synthesis", algorithm 2 in the form for any sampler;
Lugmayr et al. (2022), "RePaint: inpainting using denoising diffusion probabilistic models", equation 8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastgen import ops, random
from fastgen.diffusion.loop import Step
from fastgen.random import Stream

__all__ = ["classifier_guidance", "keep_known"]


def classifier_guidance(
    log_prob: Callable[[Tensor, Tensor, Tensor], Tensor], labels: Tensor, scale: float = 1.0
) -> Callable[[Step], Tensor]:
    """An ``adjust`` that follows the gradient of a classifier of noisy samples.

    With score = -eps / sigma, adding ``scale`` times the gradient of log p(y | x_t) to the score moves the estimate of the data
    by scale sigma^2 / alpha times it.

    Args:
        log_prob: (x_t [N, ...], time [N], labels [N]) -> log p(labels | x_t) in nats, [N]; x_t in the range inside the model,
            the time as its network is told it.
        labels: [N].
        scale: strength; 1 samples the posterior.
    """

    def adjust(step: Step) -> Tensor:
        assert step.x0 is not None
        with torch.enable_grad():
            x = step.x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_prob(x, step.time, labels).sum(), x)
        return step.x0 + (scale * step.sigma.square() / step.alpha) * gradient

    return adjust


def keep_known(known: Tensor, where: Tensor, key: Tensor) -> Callable[[Step], Tensor]:
    """A ``callback`` for inpainting: after each step what is known takes the place of what was sampled, noised as the state is.

    Args:
        known: [N, ...] in the range inside the model.
        where: broadcast against ``known``: 1 (or True) where it is known.
        key: of the noise that the known part gets, drawn at its stream ``DIFFUSE``.
    """
    where = where.to(device=known.device, dtype=torch.bool)

    def callback(step: Step) -> Tensor:
        zero = torch.zeros_like(step.alpha)
        row = torch.stack([step.alpha, step.sigma, zero, zero])
        place = random.at(key, stream=Stream.DIFFUSE, step=step.step)
        return torch.where(where, ops.diffuse(known, row, place, target=False).x_t, step.x)

    return callback
