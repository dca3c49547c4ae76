"""`python -m minildm experiment`: what it writes, that it goes on where it stopped, and what it refuses."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch

from minildm import experiments, pipeline, recipes
from minildm.__main__ import main
from minildm.data import DIGIT_NAMES, data_root, seeded, sha256, to_float
from minildm.diffusion import make_schedule
from minildm.experiments import EXPERIMENTS, common, first_stage, guidance, pixel_latent, reuse, scaling, steps
from minildm.pipeline import LatentDiffusion, SecondStage, weights_root

RESULTS = sorted((data_root() / "results").glob("*.json"))
FIGURES = {"samples", "accuracy", "thickness_accuracy", "slant_accuracy", "frechet_distance", "kid", "kid_error"}
FIGURES |= {"precision", "recall", "nearest_distance", "memorised", "seconds", "wall_clock"}
REAL = {"frechet_distance", "kid", "kid_error", "precision", "recall", "wall_clock"}


@pytest.fixture
def run(monkeypatch, tmp_path, tiny_folder):
    """Runs an experiment on a part of MNIST, with an untrained pipeline and few steps; the result, None if refused."""
    for module in (common, recipes):
        monkeypatch.setattr(module, "load_mnist", tiny.small_mnist)
    for module in (guidance, steps, scaling):
        model = type("Tiny", (), {"from_pretrained": lambda name: LatentDiffusion.from_pretrained(tiny_folder)})
        monkeypatch.setattr(module, "LatentDiffusion", model)
    for module in (first_stage, pixel_latent, scaling, reuse):
        monkeypatch.setattr(module, "draw", partial(common.draw, steps=2))
    out, read = tmp_path / "result.json", []
    read_model = pipeline.read_model
    monkeypatch.setattr(pipeline, "read_model", lambda name: read.append(Path(name)) or read_model(name))

    def call(name: str, *options):
        out.unlink(missing_ok=True)
        main(["experiment", name, *map(str, options), "--out", str(out), "--work", str(tmp_path / "work")])
        shipped = {path.name for path in read if not path.is_relative_to(tmp_path)}
        assert shipped <= set(EXPERIMENTS[name].weights)  # so that a change of any of them is found out
        return json.loads(out.read_text()) if out.exists() else None

    return call


@pytest.fixture
def nothing_again(monkeypatch):
    """A call makes every training, drawing and measurement of a first stage fail."""

    def fail(*args, **kwargs):
        raise AssertionError("a part that was done is done again")

    def forbid():
        for module, name in ((first_stage, "train_autoencoder"), (common, "train_with_snapshots")):
            monkeypatch.setattr(module, name, fail)
        for module in (guidance, steps):
            monkeypatch.setattr(module, "drawn_figures", fail)

    return forbid


def check_about(result, name, options):
    """What every result says of how it was made."""
    about = result["about"]
    assert about["command"] == f"python -m minildm experiment {name} {options}"
    assert about["threads"] == torch.get_num_threads()
    assert about["seed"] == 0
    assert about["wall_clock"] >= 0
    assert {"experiment", "machine", "torch"} <= about.keys()


def check_curve(curve, points):
    """A learning curve has as many values of everything, at rising seconds."""
    for name in ("steps", "seconds"):
        assert curve[name] == sorted(curve[name])
    assert curve["parameters"] > 0
    lists = {name: len(values) for name, values in curve.items() if isinstance(values, list)}
    assert set(lists.values()) == {points}


# the experiments


def test_first_stage(run, monkeypatch, nothing_again, capsys):
    monkeypatch.setattr(first_stage, "FACTORS", (1, 4))
    result = run("first-stage", "--seconds", 0.5, "--samples", 40)
    assert [(row["factor"], row["kind"]) for row in result["rows"]] == [(1, "kl"), (1, "vq"), (4, "kl"), (4, "vq")]
    for row in result["rows"]:
        assert row["train_steps"] >= 1
        assert row["parameters"] > 0
        assert 0 < row["psnr"] < 60
        assert -1 <= row["ssim"] <= 1
        assert row["rfid"] >= 0
        assert (row["nats_per_latent"] is None) == (row["kind"] == "vq") == (row["code_use"] is not None)
    for curve in result["second_stage"]:
        check_curve(curve, 3)
        assert {"frechet", "accuracy"} <= curve.keys()
        assert curve["seconds"][-1] >= 1  # twice the first stage's
        assert curve["samples"] == 10
    check_about(result, "first-stage", "--seconds 0.5 --samples 40")
    nothing_again()
    assert run("first-stage", "--seconds", 0.5, "--samples", 40) == result
    capsys.readouterr()
    assert run("first-stage", "--seconds", 2, "--samples", 40) is None
    assert "other settings or weights" in capsys.readouterr().err


def test_guidance(run, monkeypatch, nothing_again, capsys):
    monkeypatch.setattr(guidance, "SCALES", (0.0, 2.0))
    early = {"guidance_interval": (600, 1000)}
    monkeypatch.setattr(guidance, "VARIANTS", {"early": early, "mild": early | {"guidance_rescale": 1.0}})
    monkeypatch.setattr(guidance, "VARIANT_SCALES", (3.0,))
    monkeypatch.setattr(guidance, "SAMPLING", {"sampler": "dpm++", "steps": 2})
    result = run("guidance", "--samples", 40)
    assert [row["guidance_scale"] for row in result["rows"]] == [0.0, 2.0]
    for row in result["rows"]:
        assert row.keys() == FIGURES | {"guidance_scale", "sampler", "steps"}
        assert row["samples"] == 40
    (early,), (mild,) = result["early_rows"], result["mild_rows"]
    assert early.keys() == FIGURES | {"guidance_scale", "guidance_interval", "sampler", "steps"}
    assert mild.keys() == early.keys() | {"guidance_rescale"}
    for row in (early, mild):
        assert row["guidance_interval"] == [600, 1000] and row["guidance_scale"] == 3.0
    assert len({row["frechet_distance"] for row in (*result["rows"], early, mild)}) == 4
    assert result["real"].keys() == REAL
    assert result["real"]["frechet_distance"] < result["rows"][0]["frechet_distance"]
    check_about(result, "guidance", "--samples 40")
    nothing_again()
    assert run("guidance", "--samples", 40) == result
    other = replace(EXPERIMENTS["guidance"], weights=("mnist-kl-f4", "mnist-classifier"))
    monkeypatch.setitem(EXPERIMENTS, "guidance", other)
    for samples in (40, 50):
        assert run("guidance", "--samples", samples) is None
        assert "other settings or weights" in capsys.readouterr().err


def test_steps(run, monkeypatch, nothing_again):
    monkeypatch.setattr(steps, "STEPS", (2, 3))
    result = run("steps", "--samples", 24)
    assert [(row["sampler"], row["steps"]) for row in result["rows"]] == [
        (s, n) for s in steps.SAMPLERS for n in (2, 3)
    ]
    assert {"ddpm", "ddim", "ddim eta 1", "dpm++"} < steps.SAMPLERS.keys()
    for row in result["rows"]:
        assert row.keys() == FIGURES | {"guidance_scale", "sampler", "steps"}
    distance = {(row["sampler"], row["steps"]): row["frechet_distance"] for row in result["rows"]}
    assert distance["ddpm", 3] == pytest.approx(distance["ddim eta 1", 3], abs=1e-3)  # one and the same (DDIM eq. 16)
    others = [distance[name, 3] for name in ("ddpm", "ddim", "ddpm large variance", "dpm++")]
    assert Counter(round(value, 3) for value in others).most_common(1)[0][1] == 1
    assert result["real"].keys() == REAL
    check_about(result, "steps", "--samples 24")
    nothing_again()
    assert run("steps", "--samples", 24) == result


def test_pixel_latent(run, nothing_again):
    result = run("pixel-latent", "--seconds", 0.5, "--samples", 24)
    pixels, latents = result["rows"]
    assert (pixels["factor"], latents["factor"]) == (1, 4)
    assert pixels["parameters"] == pytest.approx(latents["parameters"], rel=0.1)
    for row in result["rows"]:
        check_curve(row, 3)
        assert {"frechet", "accuracy", "real_frechet"} <= row.keys()
        rates = [n / s for n, s in zip(row["steps"], row["seconds"], strict=True)]
        assert row["samples"] == 24
        assert row["steps_per_second"] == pytest.approx(rates, abs=1e-3)
        assert row["trained_per_second"] == pytest.approx([common.BATCH * rate for rate in rates], abs=1e-2)
    assert latents["sampled_per_second"][-1] > pixels["sampled_per_second"][-1] > 0
    check_about(result, "pixel-latent", "--seconds 0.5 --samples 24")
    nothing_again()
    assert run("pixel-latent", "--seconds", 0.5, "--samples", 24)["rows"] == result["rows"]


def test_scaling(run, monkeypatch, nothing_again):
    monkeypatch.setattr(scaling, "CHANNELS", (8, 16))
    monkeypatch.setattr(scaling, "IMAGES", (60, 60_000))
    asked = []

    def spy(config, latents, captions, seconds, *args, **kwargs):
        asked.append(seconds)
        return common.learning_curve(config, latents, captions, seconds, *args, **kwargs)

    monkeypatch.setattr(scaling, "learning_curve", spy)
    result = run("scaling", "--seconds", 1, "--samples", 24)
    assert [row["channels"] for row in result["sizes"]] == [8, 16]
    assert result["sizes"][0]["parameters"] < result["sizes"][1]["parameters"]
    assert [row["images"] for row in result["data"]] == [60, 600]  # as many as there are
    for row in result["sizes"]:
        check_curve(row, 4)
        assert {"frechet", "accuracy", "test_loss", "real_frechet"} <= row.keys()
    for row in result["data"]:
        check_curve(row, 3)
        assert {"train_loss", "test_loss"} <= row.keys()
    assert asked == [1, 1, 0.5, 0.5]  # not what the clock said: a step that is held up takes longer
    check_about(result, "scaling", "--seconds 1 --samples 24")
    nothing_again()
    assert run("scaling", "--seconds", 1, "--samples", 24) == result


def test_reuse(run, monkeypatch, nothing_again):
    trained = []

    def spy(config, latents, captions, *args, **kwargs):
        trained.append((latents, captions))
        return common.learning_curve(config, latents, captions, *args, **kwargs)

    monkeypatch.setattr(reuse, "learning_curve", spy)
    result = run("reuse", "--seconds", 0.5, "--samples", 24)
    assert [row["name"] for row in result["rows"]] == list(reuse.STAGES)
    assert result["first_stage"].keys() == {"name", "train_seconds", "encode_seconds"}
    labels = tiny.small_mnist().y_train
    assert [row["images"] for row in result["rows"]] == [600, 600, 600, (labels % 2 == 0).sum().item()]
    (z, nothing), (_, digits), (_, whole), (z_even, even) = trained
    assert set(nothing) == {""}
    assert digits == [DIGIT_NAMES[y] for y in labels.tolist()] == [caption.split()[-1] for caption in whole]
    assert len(set(whole)) > 50
    assert torch.equal(z_even, z[labels % 2 == 0])
    assert even == [caption for caption, y in zip(whole, labels.tolist(), strict=True) if y % 2 == 0]
    for row in result["rows"]:
        assert (row["accuracy"] is None) == (row["name"] == "unconditional")
        assert {"frechet", "real_frechet", "steps", "seconds", "samples", "parameters"} <= row.keys()
    check_about(result, "reuse", "--seconds 0.5 --samples 24")
    nothing_again()
    assert run("reuse", "--seconds", 0.5, "--samples", 24)["rows"] == result["rows"]


# their parts


def test_pixels_are_their_own_latents():
    images = tiny.small_mnist().x_train[:50]
    latents, back = common.space(1, images, None)
    assert abs(latents.mean()) < 1e-5
    assert abs(latents.std() - 1) < 1e-5
    torch.testing.assert_close(back(latents), to_float(images))


@pytest.mark.parametrize("factor", first_stage.FACTORS)
def test_each_unet_ends_at_four_by_four(factor):
    config = first_stage.unet_config(factor, 3)
    assert 32 // factor // 2 ** (len(config.multipliers) - 1) == 4
    assert config.attention[-1]
    assert not any(config.attention[:-1])


def test_held_out_images_are_those_of_the_digits(monkeypatch):
    monkeypatch.setattr(common, "load_mnist", tiny.small_mnist)
    test, data = common.held_out(30, (0, 4)), tiny.small_mnist()
    wanted = [i for i, y in enumerate(data.y_test.tolist()) if y in (0, 4)][:30]
    assert test.labels.tolist() == data.y_test[wanted].tolist()
    assert [prompt.split()[-1] for prompt in test.prompts] == [("zero", "four")[y // 4] for y in test.labels.tolist()]
    names = [prompt.split()[-1] for prompt in test.prompts]
    assert set(names) == {"zero", "four"} and len(names) == len(test.real) == len(wanted)
    perfect = common.figures(to_float(data.x_test[wanted]), test)
    assert (perfect["precision"], perfect["recall"]) == (1, 1)
    assert perfect["thickness_accuracy"] == perfect["slant_accuracy"] == 1
    assert perfect["accuracy"] > 0.9
    assert abs(perfect["frechet_distance"]) < 1e-3
    assert common.quality(to_float(data.x_test[wanted]), test) == {"frechet": 0, "accuracy": perfect["accuracy"]}
    assert common.quality(to_float(data.x_test[wanted]).flip(0), test)["accuracy"] < 0.8
    assert common.real_frechet(test) == pytest.approx(common.real_figures(test)["frechet_distance"], abs=1e-3)


def test_drawing_without_guidance_is_what_the_pipeline_samples_at_scale_one(tiny_model):
    prompts, parts = ["a one", "7"] * 2, (tiny_model.second_stage, tiny_model.config)
    config = replace(tiny_model.config, schedule="linear")
    images = common.draw(parts[0], config, prompts, tiny_model.latent_shape, tiny_model.decode, steps=4)
    torch.testing.assert_close(images, tiny_model.sample(prompts, steps=4, guidance_scale=1.0, seed=0))
    walk = partial(common.sample, sampler="dpm++")
    images = common.draw(parts[0], config, prompts, tiny_model.latent_shape, tiny_model.decode, steps=4, walk=walk)
    torch.testing.assert_close(images, tiny_model.sample(prompts, 4, 1.0, seed=0, sampler="dpm++"))


def test_the_fixed_loss_is_the_mean_over_ten_steps_of_the_squared_error(tiny_model):
    z, prompts = torch.randn(6, *tiny_model.latent_shape, generator=seeded(1)), ["a one", "", "7"] * 2
    config = replace(tiny_model.config, target="v", schedule="cosine")
    schedule, eps = make_schedule("cosine"), torch.randn(z.shape, generator=seeded(0))
    tokens, errors = tiny_model.tokenizer.encode(prompts), []
    with torch.no_grad():
        for t in (50, 150, 250, 350, 450, 550, 650, 750, 850, 950):
            signal, noise = schedule.alpha_bar[t].sqrt().float(), (1 - schedule.alpha_bar[t]).sqrt().float()
            v = tiny_model.second_stage(signal * z + noise * eps, torch.tensor([t] * 6), tokens)
            errors.append((v - (signal * eps - noise * z)).square().mean())
    expected = torch.stack(errors).mean().item()
    assert scaling.fixed_loss(tiny_model.second_stage, config, z, prompts) == pytest.approx(expected, abs=2e-5)


def test_snapshots_are_taken_after_each_share_and_keep_their_weights(tiny_model, monkeypatch):
    torch.manual_seed(0)
    model, z = SecondStage(tiny_model.config), torch.randn(20, *tiny_model.latent_shape, generator=seeded(0))
    clock = iter(range(10_000))
    monkeypatch.setattr("minildm.training.time.perf_counter", lambda: next(clock))  # a second a look
    snapshots = common.train_with_snapshots(model, z, ["a one"] * 20, tiny_model.config, 8, (1 / 4, 1))
    assert [(elapsed, step) for elapsed, step, _ in snapshots] == [(2, 2), (8, 8)]
    weights = [snapshot.unet.conv_in.weight for _, _, snapshot in snapshots]
    assert not torch.equal(*weights)


def test_second_stages_are_trained_as_the_recipe_says(tiny_model, monkeypatch):
    recipe = recipes.RECIPES["mnist-text"]
    monkeypatch.setitem(recipes.RECIPES, "mnist-text", replace(recipe, logit_normal=(3.0, 0.1)))
    seen, model = [], SecondStage(tiny_model.config)
    model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    z = torch.randn(20, *tiny_model.latent_shape, generator=seeded(0))
    common.train_with_snapshots(model, z, ["a one"] * 20, tiny_model.config, 0.01, (1,))
    assert seen[0].min() > 900


# what they refuse, and what was measured


def test_without_a_name_the_experiments_are_listed(capsys):
    assert main(["experiment"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(EXPERIMENTS)


def test_bad_arguments_are_refused(refused):
    assert f"choose one of {', '.join(EXPERIMENTS)}" in refused("experiment", "last-stage")
    for name, experiment in EXPERIMENTS.items():
        if experiment.samples is not None:
            assert "20 to 10,000" in refused("experiment", name, "--samples", 19)
            assert "20 to 10,000" in refused("experiment", name, "--samples", 10_001)
    assert "takes no seconds: leave --seconds out" in refused("experiment", "guidance", "--seconds", 3)


def test_defaults_are_taken_where_nothing_is_given():
    experiment = experiments.Experiment(lambda work: {}, (), seconds=3, samples=30)
    assert experiment.options("x", {"seconds": None, "samples": 40}) == {"seconds": 3, "samples": 40}
    assert experiments.Experiment(lambda work: {}, ()).options("x", {"seconds": None, "samples": None}) == {}


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_each_result_names_the_command_that_makes_it(path):
    about = json.loads(path.read_text())["about"]
    command = about["command"].split()
    assert command[:4] == ["python", "-m", "minildm", "experiment"]
    name, given = command[4], dict(zip(command[5::2], command[6::2], strict=True))
    assert path.stem == name.replace("-", "_")
    options = {key.removeprefix("--"): float(value) for key, value in given.items()}
    assert options == {key: about[key] for key in ("seconds", "samples") if key in about}
    assert EXPERIMENTS[name].options(name, {"seconds": None, "samples": None} | options) == options
    assert about["experiment"] == name
    assert about["wall_clock"] > 0


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "first-stage"])  # its file names none
def test_what_was_measured_was_measured_with_the_weights_that_are_shipped(name):
    about = json.loads((data_root() / "results" / f"{name.replace('-', '_')}.json").read_text())["about"]
    assert about["weights"] == {
        shipped: sha256(weights_root() / shipped / "model.safetensors") for shipped in EXPERIMENTS[name].weights
    }
