"""Lesson 07: the model behind its door, its files, a whole run, and the weights that ship."""

import hashlib
import json
import shutil
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny
import torch

from minildm import metrics, pipeline, recipes
from minildm.conditioning import PromptError
from minildm.data import DIGIT_NAMES, MNIST_SHA256, DataError, drop_words, seeded, to_float, to_uint8
from minildm.diffusion import diffusion_loss
from minildm.judge import predict
from minildm.pipeline import LatentDiffusion, LDMConfig, encode_all, second_stage_loss_fn, weights_root
from minildm.sampling import SAMPLERS
from minildm.training import Budget, batch_indices, read_safetensors

PROMPTS = ["a thick slanted seven", "a thin 3", ""]


def image(value: float = 0.0, n: int = 1) -> torch.Tensor:
    return torch.full((n, 1, 32, 32), value)


# sampling


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_image_for_each_prompt_in_range(tiny_model, sampler):
    images = tiny_model.sample(PROMPTS, steps=3, sampler=sampler)
    assert images.shape == (3, 1, 32, 32) and images.dtype == torch.float32
    assert images.abs().max() <= 1 and images.std() > 0


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"sampler": "ddpm"}, {"init": image(), "strength": 1.0}])
def test_the_same_seed_gives_the_same_images_and_another_seed_others(tiny_model, options):
    first = tiny_model.sample(PROMPTS, steps=3, seed=1, **options)
    torch.manual_seed(9)  # the global state has no say
    assert torch.equal(first, tiny_model.sample(PROMPTS, steps=3, seed=1, **options))
    assert not torch.allclose(first, tiny_model.sample(PROMPTS, steps=3, seed=2, **options), atol=0.01)


def test_the_first_image_does_not_depend_on_how_many_follow(tiny_model):
    batch = tiny_model.sample(["a seven"] * 4, steps=4, seed=3)
    alone = tiny_model.sample(["a seven"], steps=4, seed=3)
    torch.testing.assert_close(batch[:1], alone, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(batch[1], batch[0], atol=0.01)


def test_prompt_and_guidance_steer(tiny_model):
    def draw(prompt, scale):
        return tiny_model.sample([prompt], steps=4, guidance_scale=scale)

    assert not torch.allclose(draw("a seven", 1.0), draw("an eight", 1.0), atol=1e-3)
    assert torch.equal(draw("a seven", 0.0), draw("an eight", 0.0))
    assert not torch.allclose(draw("a seven", 1.0), draw("a seven", 4.0), atol=1e-3)
    torch.testing.assert_close(draw("", 5.0), draw("", 1.0), rtol=1e-3, atol=1e-3)  # both branches are the same


def test_the_interval_is_where_guidance_changes_the_image(tiny_model):
    def draw(scale, *interval):
        return tiny_model.sample(["a seven"], steps=4, guidance_scale=scale, guidance_interval=interval)

    everywhere, nowhere = tiny_model.sample(["a seven"], steps=4, guidance_scale=4.0), draw(1.0, 0, 1000)
    assert torch.equal(draw(4.0, 0, 1000), everywhere)
    assert torch.equal(draw(4.0, 1000, 1001), nowhere)  # there is no step 1000
    for other in (everywhere, nowhere):
        assert not torch.allclose(draw(4.0, 400, 800), other, atol=1e-3)


def test_rescaling_changes_guided_images_only(tiny_model):
    def draw(scale, share):
        return tiny_model.sample(["a seven"], steps=4, guidance_scale=scale, guidance_rescale=share)

    assert torch.equal(draw(1.0, 1), draw(1.0, 0))
    assert not torch.allclose(draw(6.0, 1), draw(6.0, 0), atol=1e-3)


def test_guidance_is_that_of_the_noise_predictions(tiny_model):
    z, t = torch.randn(2, 4, 8, 8, generator=seeded(0)), 600
    steps = torch.full((2,), t)
    uncond, cond = (tiny_model.second_stage(z, steps, tiny_model.tokenizer.encode(p)) for p in (["", ""], PROMPTS[:2]))
    x0, eps = tiny_model.denoiser(PROMPTS[:2], 2.5)(z, t)
    expected = uncond + 2.5 * (cond - uncond)
    expected_x0, expected_eps = tiny_model.schedule.x0_and_eps(tiny_model.config.target, expected, z, t)
    torch.testing.assert_close(eps, expected_eps, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(x0, expected_x0, rtol=1e-3, atol=1e-3)


def test_image_to_image_changes_more_with_more_strength(tiny_model):
    init = to_float(tiny.whole_mnist().x_test[:1])
    start = tiny_model.decode(tiny_model.encode(init))
    changes = [
        (tiny_model.sample(["a seven"], steps=50, init=init, strength=s) - start).abs().mean() for s in (0.02, 0.3, 1.0)
    ]
    assert changes[0] < changes[1] < changes[2]


def test_image_to_image_denoises_only_the_share_it_noised(tiny_model, monkeypatch):
    seen = []
    make = tiny_model.denoiser

    def counting(*arguments):
        denoise = make(*arguments)
        return lambda x, t: seen.append(t) or denoise(x, t)

    monkeypatch.setattr(tiny_model, "denoiser", counting)
    tiny_model.sample(["a seven", "a one"], steps=10, init=image(), strength=0.6)
    assert seen == [599, 499, 399, 299, 199, 99]


def test_encode_and_decode_are_the_autoencoder_s_scaled_latents(tiny_model):
    x = to_float(tiny.whole_mnist().x_test[:3])
    assert torch.equal(tiny_model.encode(x), tiny_model.autoencoder.to_latents(x))
    z = 3 * torch.randn(3, *tiny_model.latent_shape, generator=seeded(0))
    assert torch.equal(tiny_model.decode(z), tiny_model.autoencoder.from_latents(z).clamp(-1, 1))


def test_images_of_another_float_type_are_taken(tiny_model):
    torch.testing.assert_close(tiny_model.encode(image(0.5).double()), tiny_model.encode(image(0.5)))


@pytest.mark.parametrize(
    "prompts, options, says",
    [
        ([], {}, "give a list of at least one prompt"),
        ("a seven", {}, "give a list of at least one prompt"),
        (["a purple seven"], {}, 'unknown word "purple" .* use only a, an, thin'),
        (["a seven"], {"steps": 0}, "steps must be between 1 and 1000, not 0"),
        (["a seven"], {"steps": 1001}, "steps must be between 1 and 1000, not 1001"),
        (["a seven"], {"guidance_scale": float("nan")}, "guidance_scale must be a number of at least 0, not nan"),
        (["a seven"], {"guidance_scale": -1.0}, "guidance_scale must be a number of at least 0, not -1"),
        (["a seven"], {"guidance_scale": float("inf")}, "guidance_scale must be a number of at least 0, not inf"),
        (["a seven"], {"eta": -0.1}, "eta must be between 0"),
        (["a seven"], {"eta": float("nan")}, "eta must be between 0"),
        (["a seven"], {"sampler": "euler"}, "choose one of ddim, ddpm"),
        (["a seven"], {"init": image(), "strength": 0.0}, "strength must be above 0 and at most 1, not 0"),
        (["a seven"], {"init": image(), "strength": 1.5}, "strength must be above 0 and at most 1, not 1.5"),
        (["a seven"], {"init": image(), "strength": float("nan")}, "strength must be above 0 and at most 1, not nan"),
        (["a seven"], {"init": image(n=2)}, "init must be one image"),
        (["a seven"] * 3, {"init": image(n=2)}, "init must be one image, or 3"),
        (["a seven"], {"init": torch.zeros(1, 1, 28, 28)}, r"images must be \(B, 1, 32, 32\), not \(1, 1, 28, 28\)"),
        (["a seven"], {"seed": 2**64}, "seed must be between"),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence(tiny_model, prompts, options, says):
    with pytest.raises(ValueError, match=says) as error:
        tiny_model.sample(prompts, **options)
    assert isinstance(error.value, PromptError) == ("prompt" in says or "word" in says)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "images, says",
    [
        (torch.zeros(1, 32, 32), "images must be"),
        (torch.zeros(0, 1, 32, 32), "images must be"),
        (torch.zeros(1, 3, 32, 32), "images must be"),
        (torch.zeros(1, 1, 32, 36), "images must be"),
        (image(1.1), "float in"),
        (image(255.0), "float in"),
        (image(float("nan")), "float in"),
        (image().to(torch.uint8), "turn uint8 images into them with minildm.data.to_float"),
        (image().long(), "float in"),
    ],
)
def test_images_of_wrong_shape_range_or_type_are_refused(tiny_model, images, says):
    with pytest.raises(ValueError, match=says):
        tiny_model.encode(images)


# training the second stage


@pytest.mark.parametrize("logit_normal", [None, (-0.4, 0.8)])
def test_the_second_stage_learns_noise_under_thinned_out_captions(tiny_model, logit_normal):
    latents, captions = torch.randn(20, 4, 8, 8, generator=seeded(1)), [f"a {name}" for name in DIGIT_NAMES * 2]
    loss = second_stage_loss_fn(tiny_model, latents, captions, 6, logit_normal)(tiny_model.second_stage, seeded(2))

    def expected(draw):
        generator = seeded(2)
        index = batch_indices(20, 6, generator)
        tokens = tiny_model.tokenizer.encode(drop_words([captions[i] for i in index], generator))
        model, schedule, target = tiny_model.second_stage, tiny_model.schedule, tiny_model.config.target
        return diffusion_loss(model, schedule, latents[index], generator, target, draw, tokens=tokens).item()

    assert loss.item() == expected(logit_normal)
    assert expected(None) != expected((-0.4, 0.8))


def test_columns_of_padding_alone_are_cut_off_and_change_nothing(tiny_model):
    x, t, seen = torch.randn(3, *tiny_model.latent_shape, generator=seeded(1)), torch.tensor([0, 500, 999]), []
    tokens = tiny_model.tokenizer.encode(["seven", "a thin seven", ""])
    handle = tiny_model.second_stage.text_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    prediction = tiny_model.second_stage(x, t, tokens)
    handle.remove()
    assert tokens.shape == (3, 8) and torch.equal(seen[0], tokens[:, :4])  # the start and three words
    context, mask = tiny_model.second_stage.text_encoder(tokens)
    torch.testing.assert_close(prediction, tiny_model.second_stage.unet(x, t, context, mask), rtol=1e-4, atol=1e-5)


def test_all_images_are_encoded_in_order(tiny_model):
    images = tiny.whole_mnist().x_test[:501]
    raw = encode_all(tiny_model.autoencoder, images)
    assert raw.shape == (501, 4, 8, 8)
    expected = tiny_model.autoencoder.encode(to_float(images[[0, 250, 500]])).mean
    torch.testing.assert_close(raw[[0, 250, 500]], expected, rtol=1e-3, atol=1e-4)


# files


def test_kernels_lie_with_the_channels_last_and_results_in_the_usual_order(tiny_model, tiny_folder):
    channels = tiny.CONFIG.autoencoder.latent_channels
    statistics = {"latent_shift": (0.0,) * channels, "latent_scale": (1.0,) * channels}
    colour = replace(tiny.CONFIG.autoencoder, in_channels=3, **statistics)
    coloured = LatentDiffusion(replace(tiny.CONFIG, autoencoder=colour))
    for model in (tiny_model, LatentDiffusion.from_pretrained(tiny_folder), coloured):
        kernels = [w for w in model.parameters() if w.ndim == 4]
        assert kernels and all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)
        images = model.decode(torch.randn(2, *model.latent_shape, generator=seeded(0)))
        assert images.is_contiguous() and model.encode(images).is_contiguous()
        assert encode_all(model.autoencoder, to_uint8(images)).is_contiguous()


def test_a_saved_model_comes_back_whole(tiny_model, tiny_folder):
    back = LatentDiffusion.from_pretrained(tiny_folder)
    assert back.config == replace(tiny_model.config, autoencoder=tiny_model.autoencoder.config)
    assert all(
        torch.equal(a, b) for a, b in zip(back.state_dict().values(), tiny_model.state_dict().values(), strict=True)
    )
    assert torch.equal(back.sample(PROMPTS, steps=3), tiny_model.sample(PROMPTS, steps=3))
    assert not back.training and not any(p.requires_grad for p in back.parameters())
    assert sorted(file.name for file in tiny_folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"target": "noise"}, 'target must be "eps", "x0" or "v", not "noise"'),
        ({"unet": replace(tiny.CONFIG.unet, context_dim=6)}, "context_dim must be a multiple of 4"),
        ({"unet": replace(tiny.CONFIG.unet, context_dim=None)}, "context_dim must be a multiple of 4"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused_at_construction(change, says):
    with pytest.raises(ValueError, match=says):
        replace(tiny.CONFIG, **change)


@pytest.mark.parametrize(
    "strength, steps, walked", [(0.28, 25, 7), (0.14, 50, 7), (0.6, 20, 12), (0.61, 20, 13), (1e-12, 5, 1), (1, 5, 5)]
)
def test_strength_is_the_share_of_the_steps_that_are_walked(tiny_model, monkeypatch, strength, steps, walked):
    orders = []

    def recorded(denoise, schedule, x, order, *others):
        orders.append(order)
        return iter([x])

    monkeypatch.setattr(pipeline, "sample", recorded)
    tiny_model.sample(["7"], steps=steps, init=torch.zeros(1, 1, 32, 32), strength=strength)
    assert [len(order) for order in orders] == [walked]


def test_a_config_survives_json():
    config = replace(tiny.CONFIG, target="v", schedule="cosine", words=("a", "b"))
    assert LDMConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


def damage_weights(change):
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def damage_config(change):
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(change(config) or config))

    return damage


NO_MODEL = "config.json does not describe a text-to-image model"
DAMAGE = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing: train first"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "there is no model .* give a folder with a config"),
    "empty weights": (damage_weights(lambda content: b""), "model.safetensors is damaged .* restore it or train again"),
    "truncated weights": (damage_weights(lambda content: content[:-100]), "is damaged .* restore it or train again"),
    "broken header": (damage_weights(lambda content: b"\xff" * 20 + content[20:]), "is damaged"),
    "altered weights": (
        damage_weights(lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]),
        "was altered .wrong checksum.: restore it or train again",
    ),
    "truncated config": (lambda folder: (folder / "config.json").write_text('{"unet": {'), "config.json is damaged"),
    "binary config": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is damaged"),
    "config is a number": (lambda folder: (folder / "config.json").write_text("3"), "config.json is damaged"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "was altered"),
    "no checksum": (damage_config(lambda config: config.pop("weights_sha256") and None), "was altered"),
    "a part is missing": (damage_config(lambda config: config.pop("unet") and None), NO_MODEL),
    "a part is a number": (damage_config(lambda config: config.update(unet=3)), NO_MODEL),
    "unknown setting": (damage_config(lambda config: config.update(colour=3)), NO_MODEL),
    "unknown schedule": (damage_config(lambda config: config.update(schedule="x")), NO_MODEL),
    "impossible width": (damage_config(lambda config: config["unet"].update(channels=7)), NO_MODEL),
    "another size": (damage_config(lambda config: config["unet"].update(channels=16)), "does not fit the model"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_models_are_refused(tiny_folder, damage, refused):
    break_it, says = DAMAGE[damage]
    break_it(tiny_folder)
    with pytest.raises(DataError, match=says) as error:
        LatentDiffusion.from_pretrained(tiny_folder)
    assert str(tiny_folder) in str(error.value)
    assert str(error.value) in refused("sample", "a seven", "--model", tiny_folder, "--out", tiny_folder / "x.png")


def test_an_unknown_name_lists_the_shipped_models():
    with pytest.raises(DataError, match='no model "mnist-txt": .* mnist-classifier, .*mnist-text'):
        LatentDiffusion.from_pretrained("mnist-txt")


def test_models_of_the_other_kind_are_refused(tiny_folder):
    with pytest.raises(DataError, match="does not describe a text-to-image model"):
        LatentDiffusion.from_pretrained("mnist-classifier")
    with pytest.raises(DataError, match="belongs to another model"):
        recipes.load_judge(tiny_folder)


def test_a_folder_with_the_judge_s_name_does_not_judge(tiny_folder, tmp_path, monkeypatch):
    for name, load in (("mnist-classifier", recipes.load_judge), ("mnist-features", recipes.load_features)):
        shutil.copytree(tiny_folder, tmp_path / name)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DataError):
            load(name)  # a name that is given finds the folder first
        load()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_float_type_samples(tiny_model, dtype):
    model = deepcopy(tiny_model).to(dtype)
    images = model.sample(PROMPTS, steps=3, init=torch.zeros(1, 1, 32, 32))
    assert images.dtype == model.sample(PROMPTS, steps=3).dtype == dtype
    difference = images.float() - tiny_model.sample(PROMPTS, steps=3, init=torch.zeros(1, 1, 32, 32))
    assert difference.abs().max() < (1e-3 if dtype == torch.float64 else 0.2)


# a whole run


def test_a_whole_tiny_run_from_raw_data_to_figures(tiny_recipe, tmp_path):
    out = recipes.train_recipe("tiny", tmp_path / "run", Budget(steps=10))
    model = LatentDiffusion.from_pretrained(out)
    assert model.sample(PROMPTS, steps=2).shape == (3, 1, 32, 32)
    latents = model.encode(to_float(tiny.small_mnist().x_train))
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), rtol=0, atol=1e-3)

    for part, file in ((model.autoencoder, "first_stage"), (model.second_stage, "second_stage")):
        checkpoint, _ = read_safetensors(out / f"{file}.safetensors")
        assert all(torch.equal(value, checkpoint[f"ema.{key}"]) for key, value in part.state_dict().items())

    figures = recipes.evaluate(model, tiny_recipe, n=20, steps=2)
    assert figures.keys() == tiny.figures(20) and figures["samples"] == 20
    assert all(isinstance(value, int | float) and value == value for value in figures.values())
    assert all(0 <= figures[f"{name}_accuracy"] <= 1 for name in ("prompt", "thickness", "slant"))

    card = json.loads((out / "card.json").read_text())
    assert (card["recipe"], card["seed"], card["steps"]) == ("tiny", 0, [4, 6])
    assert card["command"] == "python -m minildm train tiny --steps 10"
    assert card["data"]["sha256"] == MNIST_SHA256["train-images-idx3-ubyte"]
    assert not list(out.glob(".*"))  # no temporary file is left


def test_a_run_takes_the_recipe_s_draw(tiny_recipe, monkeypatch, tmp_path):
    seen, loss_fn = [], recipes.second_stage_loss_fn
    monkeypatch.setattr(recipes, "second_stage_loss_fn", lambda *a: seen.append(a[-1]) or loss_fn(*a))
    monkeypatch.setitem(recipes.RECIPES, "tiny", replace(tiny.RECIPE, logit_normal=(-0.3, 0.6)))
    recipes.train_recipe("tiny", tmp_path / "run", Budget(steps=3))
    assert seen == [(-0.3, 0.6)]


def test_a_classifier_run_writes_a_judge(tiny_recipe, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(recipes, "load_mnist", tiny.small_mnist)
    out = recipes.train_recipe("mnist-classifier", tmp_path / "judge", Budget(steps=2))
    images = to_float(tiny.small_mnist().x_test)
    read, _ = predict(recipes.load_judge(out), images)
    accuracy = (read == tiny.small_mnist().y_test).float().mean().item()
    assert json.loads((out / "card.json").read_text())["test_accuracy"] == pytest.approx(accuracy, abs=1e-4)


def test_a_budget_in_minutes_that_leaves_nothing_for_the_second_stage_is_refused(tiny_recipe, tmp_path):
    with pytest.raises(ValueError, match="minutes are too few: .* Start again in another folder with more"):
        recipes.train_recipe("tiny", tmp_path / "run", Budget(seconds=0.01))


@pytest.mark.parametrize("n", [0, 19, 10_001])
def test_evaluating_too_few_or_too_many_samples_is_refused(tiny_model, tiny_recipe, n):
    with pytest.raises(ValueError, match=f"evaluate on 20 to 10,000 samples, not {n}"):
        recipes.evaluate(tiny_model, tiny_recipe, n)


def test_figures_of_the_real_images_are_perfect(tiny_model, tiny_recipe, monkeypatch):
    """With the test images in place of samples, all that compares samples with them must be at its best."""
    images = to_float(tiny.small_mnist().x_test[:100])
    monkeypatch.setattr(recipes, "sample_many", lambda model, prompts, **_: images)
    for module in (recipes, metrics):
        monkeypatch.setattr(
            module, "predict", lambda judge, x: (tiny.small_mnist().y_test[: len(x)], x.flatten(1)[:, :200])
        )
    figures = recipes.evaluate(tiny_model, tiny_recipe, n=100)
    for name in ("prompt_accuracy", "thickness_accuracy", "slant_accuracy", "precision", "recall", "nearest_distance"):
        assert figures[name] == 1
    assert figures["frechet_distance_100"] == pytest.approx(0, abs=1e-6) and figures["real_frechet_distance_100"] > 0
    assert figures["memorised"] == 0.01  # one of a hundred lies below the lowest hundredth


def test_many_samples_come_in_batches_with_a_seed_each(tiny_model):
    together = recipes.sample_many(tiny_model, ["a one", "a two", "a 3"], batch_size=2, steps=2)
    first, second = tiny_model.sample(["a one", "a two"], 2, seed=0), tiny_model.sample(["a 3"], 2, seed=1)
    assert torch.equal(together, torch.cat([first, second]))


def test_an_unknown_recipe_lists_the_recipes():
    with pytest.raises(ValueError, match='no recipe "mnist-txt": choose one of mnist-text, mnist-classifier'):
        recipes.train_recipe("mnist-txt", "anywhere", Budget(steps=2))


# the shipped weights


@pytest.mark.parametrize("name", ["mnist-text", "mnist-classifier", "mnist-features", "mnist-kl-f4", "mnist-vq-f4"])
def test_shipped_weights_have_a_card_that_says_how_they_were_made(name):
    folder = weights_root() / name
    card, config = (json.loads((folder / file).read_text()) for file in ("card.json", "config.json"))
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == config["weights_sha256"]
    assert card["recipe"] == name and card["command"].startswith(f"python -m minildm train {name} --")
    assert card["data"]["sha256"] == MNIST_SHA256["train-images-idx3-ubyte"]
    assert card["seed"] == recipes.RECIPES[name].seed and card["machine"]
    assert torch.tensor([card["steps"], card["seconds"]]).min() > 0
    assert card["configuration"] == json.loads(json.dumps(asdict(recipes.RECIPES[name])))


def test_shipped_config_is_that_of_the_recipe(shipped):
    autoencoder = replace(shipped.config.autoencoder, latent_shift=(), latent_scale=())
    assert replace(shipped.config, autoencoder=autoencoder) == recipes.RECIPES["mnist-text"].config


def test_shipped_text_card_holds_all_figures():
    figures = json.loads((weights_root() / "mnist-text" / "card.json").read_text())["metrics"]
    assert figures.keys() >= tiny.figures(10_000)
    assert figures["samples"] == 10_000 and figures["prompt_accuracy"] >= 0.985


@pytest.fixture(scope="module")
def shipped():
    return LatentDiffusion.from_pretrained("mnist-text")


@pytest.fixture(scope="module")
def shipped_judge():
    return recipes.load_judge()


@pytest.mark.slow
def test_the_judge_reads_the_test_images(shipped_judge, mnist):
    read, _ = predict(shipped_judge, to_float(mnist.x_test))
    assert (read == mnist.y_test).float().mean() >= 0.99


@pytest.mark.slow
def test_shipped_samples_are_read_as_asked(shipped, shipped_judge):
    prompts = [
        f"{article}{name}" for name in DIGIT_NAMES for article in ("", "a thin ", "a thick slanted ", "an upright ")
    ]
    read, _ = predict(shipped_judge, recipes.sample_many(shipped, prompts * 5))
    asked = torch.arange(10).repeat_interleave(4).repeat(5)
    assert (read == asked).float().mean() >= 0.97


def test_shipped_autoencoder_reconstructs_and_its_latents_are_standard(shipped, mnist):
    x = to_float(mnist.x_test[:500])
    z = shipped.encode(x)
    assert recipes.psnr(shipped.decode(z), x).mean() > 26
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(z.shape[1]), rtol=0, atol=0.1)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(z.shape[1]), rtol=0.1, atol=0)
