"""Gaussian data, for which everything about sampling has a closed form: the optimal denoiser is linear, so what a sampler makes
of it is a linear map of its noise, read off exactly by feeding one unit of noise at a time."""

from __future__ import annotations

import torch

from fastgen import random
from fastgen.diffusion.loop import run, tabulate
from fastgen.diffusion.schedules import estimate_rows, target_rows

MEAN = torch.tensor([0.6, -1.1], dtype=torch.float64)
FACTOR = torch.tensor([[0.7, 0.0], [0.35, 0.25]], dtype=torch.float64)
COVARIANCE = FACTOR @ FACTOR.T


def optimal_network(plan, target, mean=MEAN, covariance=COVARIANCE):
    """E[target | x] at each evaluation of the plan, as the loop calls it."""
    levels = list(zip(plan.alpha[:-1].tolist(), plan.sigma[:-1].tolist(), strict=True))
    calls = iter(range(len(levels)))
    eye = torch.eye(len(mean), dtype=torch.float64)

    def network(x, time):
        alpha, sigma = levels[next(calls)]
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * eye)
        x0 = mean + (x - alpha * mean) @ gain.T
        p, q = estimate_rows(target_rows(target, torch.tensor(alpha).double(), torch.tensor(sigma).double()))
        return (x0 - p * x) / q

    return network


def linear_map(schedule, plan, target):
    """x at the end = start @ of_start + sum_i z_i @ of_noise[i] + constant, as (constant, of_start, of_noise)."""
    table = tabulate(plan, lambda alpha, sigma: target_rows(target, alpha, sigma), schedule, dtype=torch.float64)
    evaluations = len(plan.time)
    n = 3 + 2 * evaluations
    start = torch.zeros(n, 2, dtype=torch.float64)
    start[1:3] = torch.eye(2, dtype=torch.float64)

    def noise(i):
        z = torch.zeros(n, 2, dtype=torch.float64)
        z[3 + 2 * i : 5 + 2 * i] = torch.eye(2, dtype=torch.float64)
        return z

    end = run(optimal_network(plan, target), start, table, random.key(0), noise=noise)
    moved = end[1:] - end[0]
    return end[0], moved[:2], moved[2:].reshape(evaluations, 2, 2)


def moments(schedule, plan, target, start_mean, start_covariance):
    """Mean and covariance at the end of what starts as a Gaussian."""
    constant, of_start, of_noise = linear_map(schedule, plan, target)
    covariance = of_start.T @ start_covariance @ of_start + torch.einsum("kij,kil->jl", of_noise, of_noise)
    return constant + start_mean @ of_start, covariance
