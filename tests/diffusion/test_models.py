"""ddpm and flow_matching: losses by hand, gradients, overfitting, saving, sampling from Python and the command line."""

import numpy as np
import pytest
import torch

import fastgen
from fastgen import ops, random
from fastgen.diffusion.flow_matching import transport_order
from fastgen.diffusion.schedules import target_rows
from fastgen.random import Stream

MODELS = ("ddpm", "flow_matching")
SMALL = {"widths": (8, 16), "width": 32, "layers": 1}


def make(name, event_shape=(2,), **options):
    torch.manual_seed(0)
    return fastgen.create(name, event_shape=event_shape, **{**SMALL, **options})


def awake(model):
    """Layers that start at zero, and hide what lies behind them, moved off it."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("target", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("weight", ["simple", "min_snr", "vlb"])
def test_ddpm_loss_by_hand(target, weight):
    model, x, key = awake(make("ddpm", (3,), target=target, weight=weight)), torch.randn(9, 3), random.key(4, sample=10)
    t = (ops.uniform((9, 2), random.at(key, stream=Stream.TIMESTEP))[:, 0] * 1000).long()
    eps = ops.normal((9, 3), random.at(key, stream=Stream.DIFFUSE))
    a, b, c, d = target_rows(target, *model.schedule.at(t)).float().unbind(1)
    out = model.network(a[:, None] * x + b[:, None] * eps, t.float())
    error = (out - (c[:, None] * x + d[:, None] * eps)).square().mean(1) * model.weight_table[t]
    torch.testing.assert_close(model.loss(x, key=key).loss, error.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
def test_flow_matching_loss_by_hand(times):
    model, x, key = awake(make("flow_matching", (3,), times=times)), torch.randn(9, 3), random.key(4)
    place = random.at(key, stream=Stream.TIMESTEP)
    t = ops.uniform((9, 2), place)[:, 0] if times == "uniform" else ops.normal((9, 2), place)[:, 0].sigmoid()
    eps = ops.normal((9, 3), random.at(key, stream=Stream.DIFFUSE))
    out = model.network((1 - t[:, None]) * x + t[:, None] * eps, 1000 * t)
    torch.testing.assert_close(model.loss(x, key=key).loss, (out - (eps - x)).square().mean(), rtol=1e-4, atol=1e-5)
    again = model.loss((x, eps), key=key).loss  # noise that comes with the batch
    torch.testing.assert_close(again, model.loss(x, key=key).loss, rtol=1e-4, atol=1e-5)


def test_images_are_centred():
    model = make("ddpm", (1, 8, 8))
    x, key = torch.rand(4, 1, 8, 8), random.key(0)
    seen = []
    model.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.loss(x, key=key)
    t = (ops.uniform((4, 2), random.at(key, stream=Stream.TIMESTEP))[:, 0] * 1000).long()
    expected = ops.diffuse(2 * x - 1, model.row_table[t], random.at(key, stream=Stream.DIFFUSE)).x_t
    torch.testing.assert_close(seen[0], expected)
    sample = model.sample(3, steps=2)
    assert sample.min() >= 0
    assert sample.max() <= 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("network", "shape"), [("mlp", (5,)), ("unet", (1, 8, 8)), ("dit", (1, 8, 8)), ("mlp", (1, 4, 4))])
def test_gradients_reach_every_parameter(name, network, shape):
    model = awake(make(name, shape, network=network, num_classes=3))
    model.loss((torch.rand(16, *shape), torch.arange(16) % 3), key=random.key(0)).loss.backward()
    for label, parameter in model.named_parameters():
        assert parameter.grad is not None, label
        assert parameter.grad.abs().sum() > 0, label


def test_labels_in_training():
    model = make("ddpm", num_classes=3, label_dropout=0.25)
    labels = model.training_labels(torch.arange(10_000) % 3, ops.uniform((10_000,), random.key(0)))
    assert abs(float((labels == 3).float().mean()) - 0.25) < 0.02
    assert torch.equal(labels[labels < 3], (torch.arange(10_000) % 3)[labels < 3])
    with pytest.raises(ValueError, match="num_classes=3 needs batches"):
        model.loss(torch.randn(4, 2))
    unconditional = make("ddpm")
    assert torch.equal(
        *[unconditional.loss(b, key=random.key(0)).loss for b in (torch.ones(4, 2), [torch.ones(4, 2), labels[:4]])]
    )


def test_labels_in_sampling():
    model = make("ddpm", num_classes=4)
    key = random.key(0, sample=6)
    assert model.sampling_labels(None, 5, key).tolist() == [2, 3, 0, 1, 2]
    assert model.sampling_labels(1, 3, key).tolist() == [1, 1, 1]
    assert model.sampling_labels((0, 4, 2), 4, key).tolist() == [0, 4, 2, 0]
    assert model.sampling_labels(torch.tensor([3, 1]), 2, random.key([7, 8], sample=1)).tolist() == [1, 1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun", "dpmpp_2m_sde", "unipc"])
def test_batches_do_not_matter(name, sampler):
    model = awake(make(name, (1, 8, 8), num_classes=3))
    options = {"steps": 4, "sampler": sampler, "guidance": 2.0, "labels": (0, 2)}
    whole = fastgen.sample(model, 5, seed=3, batch_size=5, **options)
    torch.testing.assert_close(fastgen.sample(model, 5, seed=3, batch_size=2, **options), whole, rtol=0, atol=2e-5)
    torch.testing.assert_close(fastgen.sample(model, ids=[4, 1], seed=3, **options), whole[[4, 1]], rtol=0, atol=2e-5)


def test_guidance_is_classifier_free_guidance():
    model = awake(make("flow_matching", (2,), num_classes=3))
    key = random.key(0)
    one = model.sample(6, key=key, steps=1, labels=1, guidance=3.0)
    z = ops.normal((6, 2), random.at(key, stream=Stream.LATENT))
    time, null, label = torch.full((6,), 1000.0), torch.full((6,), 3), torch.full((6,), 1)
    u, c = model.network(z, time, labels=null), model.network(z, time, labels=label)
    torch.testing.assert_close(one, z - (u + 3 * (c - u)), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.sample(6, key=key, steps=3, labels=1, guidance=1.0), model.sample(6, key=key, steps=3, labels=1))


def test_image_to_image():
    model = awake(make("ddpm", (1, 8, 8)))
    init, key, seen = torch.rand(2, 1, 8, 8), random.key(1), []
    model.sample(3, key=key, steps=10, init=init, strength=0.4, adjust=lambda s: seen.append((s.total, s.x.clone())) or s.x0)
    assert seen[0][0] == 4
    alpha, sigma = model.schedule.at(model.schedule.grid(10).time[6:7])
    z = ops.normal((3, 1, 8, 8), random.at(key, stream=Stream.LATENT))
    torch.testing.assert_close(seen[0][1], float(alpha) * (2 * init[[0, 1, 0]] - 1) + float(sigma) * z, rtol=1e-4, atol=1e-5)


def test_short_chains_take_the_steps_that_they_have():
    model, times = awake(make("ddpm", timesteps=20)), []
    assert model.config.sampling_steps == 50
    model.sample(1, callback=lambda step: times.append(float(step.time)))
    assert times == list(range(19, -1, -1))


def test_changed_options_change_the_steps():
    model, times = awake(make("ddpm")), []

    def steps_of(**options):
        times.clear()
        model.sample(1, callback=lambda step: times.append(float(step.time)), **options)
        return list(times)

    assert steps_of(steps=2) == [999, 499]
    assert steps_of(steps=2, spacing="leading") == [500, 0]
    assert steps_of(steps=4) == [999, 749, 499, 249]
    assert steps_of(steps=4, init=torch.zeros(1, 2), strength=0.5) == [499, 249]
    assert steps_of(steps=2) == [999, 499]


def test_thresholding():
    model = awake(make("ddpm", (1, 8, 8)))
    x = model.sample(2, key=random.key(0), steps=1, threshold=0.9, clamp=None)
    z = ops.normal((2, 1, 8, 8), random.key(0, stream=Stream.LATENT))
    a, b, _, _ = model.row_table[999]
    x0 = (z - b * model.network(z, torch.full((2,), 999.0))) / a
    torch.testing.assert_close(x, 0.5 + 0.5 * ops.dynamic_threshold(x0, 0.9, 1e4), rtol=1e-3, atol=1e-3)


def test_compat_lays_out_upstream_steps():
    model, times = make("ddpm"), []
    model.sample(1, steps=30, compat="diffusers", callback=lambda step: times.append(float(step.time)))
    assert times == list(range(29 * 33, -1, -33))
    times.clear()
    model.sample(1, steps=(800, 20), callback=lambda step: times.append(float(step.time)))
    assert times == [800, 20]


def test_transport_pairs_are_the_nearest():
    x, noise = torch.tensor([[0.0], [5.0], [10.0]]), torch.tensor([[9.0], [1.0], [4.0]])
    assert noise[transport_order(x, noise)].flatten().tolist() == [1, 4, 9]
    labels = torch.tensor([0, 1, 0])
    assert noise[transport_order(x, noise, labels)].flatten().tolist() == [4, 1, 9]
    model = make("ot_flow_matching", (2,), num_classes=2)
    assert model.config.coupling == "transport"
    data, key = torch.randn(8, 2), random.key(0)
    eps = ops.normal((8, 2), random.at(key, stream=Stream.DIFFUSE))
    y = torch.arange(8) % 2
    paired = model.loss((data, y, eps[transport_order(data, eps, y)]), key=key).loss
    torch.testing.assert_close(model.loss((data, y), key=key).loss, paired)


def test_rectified_pairs():
    model = awake(make("flow_matching", (2,)))
    x, noise = model.pairs(5, key=random.key(2), steps=3)
    assert torch.equal(x, model.sample(5, key=random.key(2), steps=3))
    assert torch.equal(noise, ops.normal((5, 2), random.key(2, stream=Stream.LATENT)))
    fastgen.fit(model, (x, noise), steps=2, batch_size=4, progress=False)


@pytest.mark.parametrize(("name", "sampler"), [("ddpm", "ddim"), ("ddpm", "ddpm"), ("flow_matching", "heun")])
def test_overfits_and_loads(name, sampler, tmp_path):
    """Two points: samples land on them, half on each, and the command line and the loaded model give the same."""
    points = torch.tensor([[2.0, 1.0], [-1.0, -2.0]])
    model = make(name, (2,), width=64, layers=2, learning_rate=3e-3)
    fastgen.fit(model, points.repeat(64, 1), steps=400, batch_size=128, out=tmp_path / "run", sample_every=0, progress=False)
    x = fastgen.sample(model, 200, batch_size=200, sampler=sampler, steps=30)
    distance = torch.cdist(x, points).min(1)
    assert float(distance.values.median()) < 0.25
    assert 0.3 < float(distance.indices.float().mean()) < 0.7
    loaded = fastgen.load(tmp_path / "run")
    assert torch.equal(loaded.sample(3, key=random.key(1)), model.sample(3, key=random.key(1)))


def test_command_line(tmp_path):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from fastgen.cli.app import app

    model = make("ddpm", (1, 8, 8), num_classes=2)
    images = torch.rand(16, 1, 8, 8), torch.arange(16) % 2
    fastgen.fit(model, images, steps=1, batch_size=4, out=tmp_path / "run", sample_every=0, progress=False)
    out = tmp_path / "x.safetensors"
    settings = ["sampler=ddim", "steps=3", "guidance=2", "eta=0.5", "labels=0,1", "spacing=linspace", "threshold=0.99"]
    arguments = ["sample", str(tmp_path / "run"), "-n", "3", "--out", str(out), *(f"--set={s}" for s in settings)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    from safetensors.torch import load_file

    expected = fastgen.sample(
        tmp_path / "run", 3, sampler="ddim", steps=3, guidance=2.0, eta=0.5, labels=(0, 1), spacing="linspace", threshold=0.99
    )
    assert torch.equal(load_file(out)["x"], expected)


def test_images_from_the_command_line(tmp_path):
    """Inpainting and image-to-image: a result for each image of a folder unless told, what is known pixel by pixel."""
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from fastgen.cli.app import app
    from fastgen.sampling.images import save_png

    model = make("ddpm", (1, 8, 8), sampling_steps=3)
    fastgen.fit(model, torch.rand(16, 1, 8, 8), steps=1, batch_size=4, out=tmp_path / "run", sample_every=0, progress=False)
    known, mask = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8), torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    for i in range(3):
        save_png(known[i : i + 1], tmp_path / "known" / f"{i}.png", padding=0)
    save_png(mask, tmp_path / "mask.png", padding=0)
    known = known.float() / 255
    out = tmp_path / "x.npz"

    def command(*arguments):
        result = CliRunner().invoke(app, ["sample", str(tmp_path / "run"), "--out", str(out), *map(str, arguments)])
        if result.exception is None:
            return torch.from_numpy(np.load(out)["x"])
        return str(result.exception)

    x = command("--inpaint", tmp_path / "known", "--mask", tmp_path / "mask.png")
    torch.testing.assert_close(x[..., :4], known[..., :4], rtol=0, atol=1e-6)
    assert not torch.allclose(x[..., 4:], known[..., 4:], atol=0.1)
    near = command("--from", tmp_path / "known" / "1.png", "--strength", 0.3, "-n", 5)
    assert torch.equal(near, fastgen.sample(tmp_path / "run", 5, init=known[1:2], strength=0.3))
    assert len(command("--from", tmp_path / "known")) == 3
    assert "inpainting takes --inpaint IMAGE" in command("--inpaint", tmp_path / "known")
    assert "inpainting takes --inpaint IMAGE" in command("--mask", tmp_path / "mask.png")
    assert "--strength needs --from" in command("--strength", 0.5)
    assert "strength must be in (0, 1], got 1.5" in command("--from", tmp_path / "known", "--strength", 1.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddpm", {"target": "score"}, "target must be 'epsilon', 'x0' or 'v', got 'score'"),
        ("ddpm", {"weight": "flat"}, "weight must be one of simple, vlb"),
        ("ddpm", {"schedule": "square"}, "schedule must be one of linear"),
        ("ddpm", {"zero_snr": True}, "take target='v'"),
        ("ddpm", {"network": "rnn"}, "network must be 'auto', 'mlp', 'unet' or 'dit', got 'rnn'"),
        ("ddpm", {"network": "unet"}, r"needs images \(C, H, W\), got event_shape \(2,\)"),
        ("ddpm", {"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ("ddpm", {"label_dropout": 2.0}, "label_dropout must be in 0 .. 1, got 2.0"),
        ("ddpm", {"sampler": "dimm"}, "unknown sampler 'dimm'; did you mean ddim"),
        ("ddpm", {"sampling_steps": 0}, "sampling_steps must be at least 1, got 0"),
        ("flow_matching", {"coupling": "best"}, "coupling must be 'independent' or 'transport'"),
        ("flow_matching", {"times": "cosine"}, "times must be 'uniform' or 'logit_normal'"),
        ("flow_matching", {"logit_std": 0.0}, "logit_std must be positive"),
        ("flow_matching", {"shift": -1.0}, "shift must be positive"),
    ],
)
def test_config_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 2.0}, "guidance needs a model with num_classes"),
        ({"labels": 1}, "labels were given to a model without classes"),
        ({"sampler": "ddim", "churn": 3.0}, "sampler 'ddim' has no option 'churn'"),
        ({"sampler": "lms", "clamp": True}, "LMS combines slopes"),
        ({"compat": "edm"}, "compat must be None or 'diffusers', got 'edm'"),
        ({"init": torch.zeros(1, 3)}, r"init must be \[m, 2\], got \[1, 3\]"),
        ({"init": torch.zeros(1, 2), "strength": 0.0}, r"strength must be in \(0, 1\]"),
        ({"steps": 2000}, "at most the 1000 of the schedule"),
    ],
)
def test_sampling_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make("ddpm").sample(2, **options)
    with pytest.raises(ValueError, match=r"labels must be in 0 \.\. 3, where 3 is no class, got 4"):
        make("ddpm", num_classes=3).sample(2, labels=4)


@pytest.mark.parametrize(("inference", "largest"), [("packed", 1e-4), ("bfloat16", 0.02)])
def test_copies_for_inference(inference, largest):
    """They are near, follow the weights, and draw what the network draws but for their error."""
    model = fastgen.create("ddpm", event_shape=(1, 12, 12), widths=(32, 32), attention_levels=(), layers=1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    assert 0 < model.inference_error(inference) < largest
    before = model.evaluator(inference)
    assert model.evaluator(inference) is before
    key = random.key(0)
    plain = model.sample(2, key=key, steps=3)
    torch.testing.assert_close(model.sample(2, key=key, steps=3, inference=inference), plain, rtol=0, atol=5 * largest)
    with torch.no_grad():
        next(model.parameters()).add_(0.5)
    assert model.evaluator(inference) is not before
    assert model.inference_error(inference) < largest
    with pytest.raises(ValueError, match="inference must be one of plain, packed, bfloat16, compiled, got 'int8'"):
        model.sample(1, inference="int8")


def test_progress_counts_evaluations(capsys):
    model = make("ddpm", (2,))
    fastgen.sample(model, 6, batch_size=3, steps=4, progress=True)
    assert model.evaluations == 8
    assert "evaluations/s" in capsys.readouterr().err
