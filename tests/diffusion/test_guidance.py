"""Classifier guidance, inpainting and image-to-image, on Gaussian data where the answer is known, and on images."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen import random
from fastgen.diffusion.guidance import classifier_guidance, keep_known
from fastgen.diffusion.samplers import DDIM, DDPM, Heun, UniPC, resampled
from fastgen.diffusion.schedules import Discrete, betas
from tests.diffusion.test_iddpm import optimal


def gaussian_model():
    model = fastgen.create("ddpm", event_shape=(2,), timesteps=200, beta_end=0.06, width=8)
    both = optimal(model, 0.0)
    model.network.forward = lambda x, time, labels=None: both(x, time)[:, :2]
    return model


def test_classifier_guidance_samples_the_posterior():
    """Of x ~ N(mean, C) and an observation y ~ N(x_1, 0.2^2); p(y | x_t) is Gaussian too."""
    from tests.diffusion.gaussian import COVARIANCE, MEAN

    model, mean, covariance = gaussian_model(), MEAN.float(), COVARIANCE.float()
    y, noise = 1.3, 0.2

    def log_prob(x, time, labels):
        alpha, sigma = (v.float()[:, None] for v in model.schedule.at(time.double()))
        marginal = alpha[..., None] ** 2 * covariance + sigma[..., None] ** 2 * torch.eye(2)
        gain = torch.linalg.solve(marginal, (alpha * covariance[0])[..., None])[..., 0]
        expected = mean[0] + ((x - alpha * mean) * gain).sum(1)
        spread = covariance[0, 0] - (gain * (alpha * covariance[0])).sum(1) + noise**2
        return -0.5 * (y - expected).square() / spread

    n = 4096
    labels = torch.zeros(n, dtype=torch.int64)
    x = model.sample(n, key=random.key(0), steps=100, sampler="ddpm", adjust=classifier_guidance(log_prob, labels))
    share = covariance[:, 0] / (covariance[0, 0] + noise**2)
    posterior_mean, posterior = mean + share * (y - mean[0]), covariance - torch.outer(share, covariance[0])
    torch.testing.assert_close(x.mean(0), posterior_mean, rtol=0, atol=0.03)
    torch.testing.assert_close(x.T.cov(), posterior, rtol=0.1, atol=0.01)
    plain = model.sample(n, key=random.key(0), steps=100, sampler="ddpm")
    assert abs(plain.mean(0)[0] - posterior_mean[0]) > 0.2


def test_what_is_known_stays():
    model = gaussian_model()
    known, mask = torch.tensor([0.5, 0.0]).expand(64, 2), torch.tensor([True, False])
    key = random.key(3)
    x = model.sample(64, key=key, steps=50, sampler="ddpm", callback=keep_known(known, mask, key))
    assert torch.equal(x[:, 0], known[:, 0])
    assert x[:, 1].std() > 0.05
    # the known part pulls the unknown one, which correlates with it
    high = model.sample(64, key=key, steps=50, sampler="ddpm", callback=keep_known(known + 1, mask, key))
    assert high[:, 1].mean() > x[:, 1].mean()


def test_inpainting_samples_the_conditional_and_resampling_gets_nearer():
    """p(x_2 | x_1) of a Gaussian: pasting alone leaves the mean short of it, going through steps again far less so."""
    from tests.diffusion.gaussian import COVARIANCE, MEAN

    model, first = gaussian_model(), 1.6
    slope = float(COVARIANCE[0, 1] / COVARIANCE[0, 0])
    exact = float(MEAN[1]) + slope * (first - float(MEAN[0]))
    spread = float(COVARIANCE[1, 1]) - slope * float(COVARIANCE[0, 1])
    options = {"inpaint": torch.tensor([[first, 0.0]]), "mask": torch.tensor([0.0, 1.0]), "steps": 50, "sampler": "ddpm"}
    errors = {}
    for times in (1, 10):
        x = model.sample(4096, key=random.key(1), resample=times, jump=5, **options)
        assert bool((x[:, 0] == first).all())
        errors[times] = abs(float(x[:, 1].mean()) - exact)
    assert 2 * errors[10] < errors[1], errors
    assert errors[10] < 0.06
    assert float(x[:, 1].var()) == pytest.approx(spread, rel=0.3)


def test_resampled_plans_keep_the_marginals():
    """A step down and the noise back up compose to one row; without a mask the sampler's distribution stays what it was."""
    from tests.diffusion.gaussian import moments

    chain = Discrete(betas("linear"))
    for sampler in (DDPM(), DDIM(1.0)):
        plan = sampler.plan(chain.grid(100))
        again = resampled(plan, 3, 7)
        assert len(again.time) == 100 + 2 * 7 * (99 // 7)
        assert again.time[-8:].tolist() == plan.time[-8:].tolist()
        start = torch.zeros(2).double(), torch.eye(2).double()
        for a, b in zip(moments(chain, again, "epsilon", *start), moments(chain, plan, "epsilon", *start), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0.03)
    # one stretch by hand: from point 3 to 1, up again by q(x_1 | x_3), and down once more
    plan = DDPM().plan(chain.grid(4))
    again = resampled(plan, 2, 2)
    assert again.time.tolist() == [*plan.time.tolist()[:3], *plan.time.tolist()[1:]]
    factor = plan.alpha[1] / plan.alpha[3]
    more = plan.sigma[1].square() - (factor * plan.sigma[3]).square()
    torch.testing.assert_close(again.rows[2, :2], factor * plan.rows[2, :2])
    torch.testing.assert_close(again.rows[2, 2], ((factor * plan.rows[2, 2]).square() + more).sqrt())
    for sampler in (Heun(), UniPC(), DDPM("learned")):
        with pytest.raises(ValueError, match="resample needs a sampler of independent steps"):
            resampled(sampler.plan(chain.grid(10)), 2, 5)


def image_model(name="ddpm", **options):
    model = fastgen.create(name, event_shape=(1, 8, 8), widths=(8, 8), attention_levels=(), layers=1, **options)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("name", ["ddpm", "flow_matching", "score_sde", "edm", "iddpm"])
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m", "unipc"])
def test_inpainting_of_images_by_any_sampler(name, sampler):
    model = image_model(name)
    known, mask = torch.rand(3, 1, 8, 8), torch.zeros(8, 8)
    mask[2:6, 2:6] = 1
    options = {"steps": 4, "sampler": sampler, "inpaint": known, "mask": mask}
    x = fastgen.sample(model, 5, **options)
    assert torch.isfinite(x).all()
    keep = (mask == 0).expand(5, 1, 8, 8)
    torch.testing.assert_close(x[keep], known[[0, 1, 2, 0, 1]][keep], rtol=0, atol=2e-6)
    assert (x - known[[0, 1, 2, 0, 1]]).abs()[~keep].max() > 0.1
    assert not torch.equal(x[0], x[3])  # the same image, other noise


def test_parts_of_an_inpainting_run_can_be_redrawn():
    model = image_model()
    masks = (torch.rand(2, 1, 8, 8) > 0.5).float()
    options = {"steps": 6, "inpaint": torch.rand(3, 1, 8, 8), "mask": masks, "strength": 0.5}
    whole = fastgen.sample(model, 7, micro_batch=2, **options)
    assert torch.equal(fastgen.sample(model, ids=[5, 2], micro_batch=2, **options), whole[[5, 2]])
    torch.testing.assert_close(fastgen.sample(model, 7, batch_size=3, **options), whole, rtol=0, atol=2e-5)
    torch.testing.assert_close(fastgen.sample(model, ids=[6, 0], **options), whole[[6, 0]], rtol=0, atol=2e-5)


def test_a_callback_sees_what_is_known_in_its_place():
    model, known, seen = image_model(), torch.rand(1, 1, 8, 8), []
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    model.sample(2, steps=3, inpaint=known, mask=mask, callback=lambda s: seen.append(s.x.clone()))
    torch.testing.assert_close(seen[-1], (2 * known - 1).expand(2, 1, 8, 8), rtol=0, atol=1e-6)
    x = model.sample(2, steps=3, inpaint=known, mask=mask, callback=lambda s: torch.zeros_like(s.x))
    assert bool((x == 0.5).all())


def test_latents_of_images():
    """Latents laid out as images are completed, and what is known is put back pixel by pixel."""
    autoencoder = (("widths", (8, 8)), ("groups", 4), ("layers", 1), ("latent_channels", 2))
    options = {"autoencoder_options": autoencoder, "widths": (8, 8), "attention_levels": (), "layers": 1, "timesteps": 20}
    model = fastgen.create("latent_diffusion", event_shape=(1, 8, 8), autoencoder="autoencoder_kl", **options)
    known, mask = torch.rand(2, 1, 8, 8), torch.zeros(8, 8)
    mask[:, 4:] = 1
    x = fastgen.sample(model, 3, steps=3, inpaint=known, mask=mask)
    assert torch.equal(x[..., :4], known[[0, 1, 0]][..., :4])
    assert not torch.equal(x[0, ..., 4:], known[0, ..., 4:])
    near = fastgen.sample(model, 2, steps=20, init=known, strength=0.05)
    torch.testing.assert_close(near, model.decode(model.encode(known)), rtol=0, atol=0.2)


WHOLE = {"inpaint": torch.zeros(1, 1, 8, 8), "mask": torch.zeros(8, 8)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inpaint": torch.zeros(1, 1, 8, 8)}, "inpainting takes both"),
        ({"mask": torch.zeros(8, 8)}, "inpainting takes both"),
        ({"strength": 0.5}, "strength=0.5 needs something to start from"),
        ({"resample": 3}, "resample=3 is for inpainting"),
        ({"init": torch.zeros(1, 1, 8, 9)}, r"init must be \[m, 1, 8, 8\], got \[1, 1, 8, 9\]"),
        ({"init": -torch.ones(1, 1, 8, 8)}, r"init must hold images in \[0, 1\], its values run from -1 to -1"),
        ({**WHOLE, "mask": torch.zeros(3, 3)}, r"mask must fit samples of shape \(1, 8, 8\), got \[3, 3\]"),
        ({**WHOLE, "resample": 0}, "resample and jump must be at least 1"),
    ],
)  # fmt: skip
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        image_model().sample(2, steps=2, **options)


def test_latents_that_are_no_image_cannot_be_completed():
    model = fastgen.create(
        "latent_diffusion", event_shape=(1, 8, 8), autoencoder_options=(("latent", 4),), width=8, timesteps=5
    )
    with pytest.raises(ValueError, match=r"needs latents laid out as an image, those of 'vae' have shape \(4,\)"):
        model.sample(1, inpaint=torch.zeros(1, 1, 8, 8), mask=torch.zeros(8, 8))
    assert model.sample(2, init=torch.rand(1, 1, 8, 8), strength=0.5).shape == (2, 1, 8, 8)
