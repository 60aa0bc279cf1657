"""Small models that the tests of training share."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastgen import ops, registry
from fastgen.nn.model import Batch, Config, Model, Phase, split_batch


class Losses(NamedTuple):
    loss: Tensor
    kl: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyConfig(Config):
    hidden: int = 16
    dropout: float = 0.3
    num_classes: int | None = None
    poison_at: int = -1
    """The loss is NaN when the key's step word is this."""


class Tiny(Model):
    """A VAE of vectors with everything that a resume must bring back: dropout, batch statistics, noise, labels."""

    config: TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        (d,), h = config.event_shape, config.hidden
        self.encoder = nn.Sequential(nn.Linear(d, h), nn.BatchNorm1d(h), nn.Tanh(), nn.Dropout(config.dropout))
        self.mean, self.log_var = nn.Linear(h, 2), nn.Linear(h, 2)
        self.decoder = nn.Linear(2, d)
        self.labels = nn.Embedding(config.num_classes or 1, h)

    def loss(self, batch: Batch, *, key: Tensor | None = None) -> Losses:
        x, y = split_batch(batch)
        h = self.encoder(x)
        if y is not None:
            h = h + self.labels(y)
        z, kl = ops.reparameterize(self.mean(h), self.log_var(h), key=key)
        loss = (self.decoder(z) - x).square().sum(1).mean() + 0.1 * kl.mean()
        if key is not None and self.config.poison_at == int(key[2]):
            loss = loss * torch.nan
        return Losses(loss, kl.mean())

    def sample(self, n: int, *, key: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return self.decoder(scale * ops.normal((n, 2), key=key, device=self.device))


class Adversarial(NamedTuple):
    loss: Tensor


class Duel(Model):
    """Two phases with their own parameters, alternating unevenly."""

    config: TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        (d,) = config.event_shape
        self.generator, self.critic = nn.Linear(2, d), nn.Linear(d, 1)
        self.calls: list[str] = []

    def phases(self) -> list[Phase]:
        def critic_loss(batch: Batch, *, key: Tensor | None = None) -> Adversarial:
            x, _ = split_batch(batch)
            self.calls.append("critic")
            return Adversarial(torch.tanh(self.critic(self.sample(len(x), key=key)) - self.critic(x)).mean())

        def generator_loss(batch: Batch, *, key: Tensor | None = None) -> Adversarial:
            x, _ = split_batch(batch)
            self.calls.append("generator" if not self.critic.weight.requires_grad else "generator, critic not frozen")
            return Adversarial(-self.critic(self.sample(len(x), key=key)).mean())

        def sgd(p):
            return torch.optim.SGD(p, lr=0.1, momentum=0.9)

        return [
            Phase("critic", self.critic.parameters(), critic_loss, sgd, repeat=2, after=self._clip),
            Phase("generator", self.generator.parameters(), generator_loss, sgd, every=3),
        ]

    def _clip(self) -> None:
        self.calls.append("clip")
        with torch.no_grad():
            self.critic.weight.clamp_(-0.2, 0.2)

    def sample(self, n: int, *, key: Tensor | None = None) -> Tensor:
        return self.generator(ops.normal((n, 2), key=key, device=self.device))


ENTRIES = {
    "tiny": registry.Entry("tiny", Tiny, TinyConfig, {}, "", "digits"),
    "tiny-wide": registry.Entry("tiny-wide", Tiny, TinyConfig, {"hidden": 32}, "", "digits"),
    "duel": registry.Entry("duel", Duel, TinyConfig, {}, "", "digits"),
}


def labelled_data(n: int = 50, d: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=g), torch.randint(classes, (n,), generator=g)


def make_duel() -> Duel:
    torch.manual_seed(1)
    return Duel(TinyConfig(event_shape=(5,)))


def make_tiny(**config) -> Tiny:
    torch.manual_seed(1)
    return Tiny(TinyConfig(**{"event_shape": (5,), "num_classes": 3, **config}))
