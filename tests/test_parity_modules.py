"""UNet and autoencoder against diffusers: outputs and gradients in float64, and weights carried there and back."""

import json
import random
from dataclasses import replace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import save_file

from minildm import interop
from minildm.autoencoder import AutoencoderConfig, AutoencoderKL, AutoencoderVQ, make_autoencoder
from minildm.data import DataError, seeded
from minildm.interop import from_compvis, from_diffusers, to_compvis, to_diffusers
from minildm.pipeline import LatentDiffusion, LDMConfig
from minildm.sampling import timesteps
from minildm.unet import UNet, UNetConfig

pytestmark = pytest.mark.parity
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def first_weights():
    """Models start from the same weights whatever ran before: `filled` adds to them."""
    torch.manual_seed(0)


def filled(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model in float64 with random weights everywhere: no branch is silent, no norm trivial."""
    generator = seeded(seed)
    for parameter in model.double().parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator).double())
    return model


# random configurations

SIZES = {1: [(5, 3), (4, 7)], 2: [(3, 2), (3, 3)], 3: [(1, 3), (2, 1)], 4: [(1, 2), (3, 1)]}  # of the lowest level


def unet_case(seed: int) -> tuple[UNetConfig, dict]:
    """A configuration of a UNet and inputs for it."""
    draw = random.Random(seed)
    levels = 1 + seed % 4
    multipliers = (1, *(draw.choice([1, 2, 3]) for _ in range(levels - 1)))
    groups = draw.choice([2, 4])
    head_size = draw.choice([None, None, 2, 4])
    config = UNetConfig(
        in_channels=draw.randint(1, 5),
        out_channels=draw.randint(1, 5),
        channels=draw.choice([8, 16]),
        multipliers=multipliers,
        res_blocks=draw.randint(1, 2),
        attention=tuple(draw.random() < 0.5 for _ in range(levels)),
        heads=(1, 2, 4)[seed % 3],
        context_dim=None if seed % 5 == 4 else draw.randint(3, 12),
        depth=draw.choice([1, 1, 2]),
        ff_multiplier=draw.choice([1, 2, 4, 4]),
        groups=groups,
        head_size=head_size,
        scale_shift=seed % 2 == 1,
        pooled=seed % 5 != 4 and seed % 3 == 1,
    )
    batch = draw.choice([1, 3, 5])
    height, width = (side * 2 ** (levels - 1) for side in draw.choice(SIZES[levels]))
    generator = seeded(seed)
    inputs = {"x": torch.randn(batch, config.in_channels, height, width, generator=generator).double()}
    inputs["t"] = torch.randint(1000, (batch,), generator=generator)
    if config.context_dim is not None:
        tokens = draw.choice([1, 2, 8, 76, 77])
        inputs["context"] = torch.randn(batch, tokens, config.context_dim, generator=generator).double()
        if draw.random() < 0.5:  # each prompt has its own length
            lengths = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
            inputs["mask"] = torch.arange(tokens) < lengths
    return config, inputs


def autoencoder_case(seed: int, **options) -> tuple[AutoencoderConfig, torch.Tensor]:
    """A configuration of an autoencoder and images for it."""
    draw = random.Random(seed)
    levels = 1 + seed % 4
    config = AutoencoderConfig(
        in_channels=draw.choice([1, 3]),
        latent_channels=draw.randint(1, 6),
        channels=(channels := draw.choice([4, 8])),
        multipliers=(1, *(draw.choice([1, 2, 3]) for _ in range(levels - 1))),
        res_blocks=draw.randint(1, 2),
        attention=draw.random() < 0.6,
        groups=channels // draw.choice([2, 4]),  # a channel alone in its group would be deaf to biases
        **options,
    )
    height, width = (side * config.factor for side in draw.choice(SIZES[levels]))
    x = torch.randn(draw.choice([1, 3]), config.in_channels, height, width, generator=seeded(seed)).double()
    return config, x


SEEDS = range(24)


def test_the_random_configurations_reach_what_they_should():
    configs, inputs = zip(*(unet_case(seed) for seed in SEEDS), strict=True)
    assert {len(config.multipliers) for config in configs} == {1, 2, 3, 4}
    assert {config.res_blocks for config in configs} == {1, 2} and {config.depth for config in configs} == {1, 2}
    assert {config.heads for config in configs if config.head_size is None} == {1, 2, 4}
    assert {config.head_size for config in configs} == {None, 2, 4}
    assert any(len(set(config.attention)) == 2 for config in configs)  # at some levels only
    assert len({(config.scale_shift, config.pooled) for config in configs}) == 4
    assert {None} < {config.context_dim for config in configs}
    tokens = {case["context"].shape[1] for case in inputs if "context" in case}
    assert {1, 77} <= tokens and any("mask" in case for case in inputs)
    shapes = [case["x"].shape for case in inputs]
    assert any(h != w for _, _, h, w in shapes) and {b for b, *_ in shapes} == {1, 3, 5}
    configs = [autoencoder_case(seed)[0] for seed in SEEDS]
    assert {config.attention for config in configs} == {False, True}
    assert {len(config.multipliers) for config in configs} == {1, 2, 3, 4}


# outputs and gradients


def kind_of(model: torch.nn.Module) -> type:
    """The class of diffusers that a model corresponds to."""
    if isinstance(model, UNet):
        return UNet2DConditionModel
    return diffusers.VQModel if isinstance(model, AutoencoderVQ) else diffusers.AutoencoderKL


def diffusers_twin(model: torch.nn.Module) -> torch.nn.Module:
    """The model of diffusers with the same configuration and weights; every key must be there, and no other."""
    weights = interop.to_diffusers_weights(model)
    if not isinstance(model, UNet):
        values = interop.autoencoder_config_to_diffusers(model.config)
        twin = kind_of(model).from_config(values)
    elif model.config.context_dim is not None:
        twin = UNet2DConditionModel.from_config(interop.unet_config_to_diffusers(model.config))
    else:
        twin = without_cross_attention(model.config)
    twin.double().load_state_dict(weights, strict=True)
    return twin


def without_cross_attention(config: UNetConfig) -> UNet2DConditionModel:
    """diffusers' class demands cross-attention, though its blocks can do without: it is taken out again."""
    values = interop.unet_config_to_diffusers(UNetConfig(**{**config.__dict__, "context_dim": 1}))
    twin = UNet2DConditionModel.from_config(values)
    for module in twin.modules():
        if hasattr(module, "attn2"):
            module.attn2 = module.norm2 = None
    return twin


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module, run_ours, run_theirs, x: torch.Tensor):
    """Both outputs, and the gradients of a scalar with respect to the input and to every weight."""
    names, results = interop.diffusers_names(ours), []
    for run, module in ((run_ours, ours), (run_theirs, theirs)):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        (torch.randn(out.shape, generator=seeded(1)).double() * out).sum().backward()
        results.append((out, leaf.grad, {key: parameter.grad for key, parameter in module.named_parameters()}))
    (out, grad, weights), (other_out, other_grad, other_weights) = results
    torch.testing.assert_close(out, other_out, **CLOSE)
    torch.testing.assert_close(grad, other_grad, **CLOSE)
    if isinstance(ours, UNet):
        factor = ours.config.ff_multiplier / 4
        other_weights = {k: interop.resize_feed_forward(k, v, factor) for k, v in other_weights.items()}
    for key, gradient in weights.items():
        torch.testing.assert_close(gradient, other_weights[names[key]], **CLOSE)
    assert out.std() > 1e-3 and grad.abs().max() > 1e-3  # there is something to compare,
    assert sum(g.abs().max().item() > 1e-6 for g in weights.values()) > 0.8 * len(weights)  # in most weights too


def first_token(config: UNetConfig, context: torch.Tensor | None) -> torch.Tensor | None:
    """What diffusers' UNet wants as class labels where ours pools the context."""
    return context[:, 0] if config.pooled else None


@pytest.mark.parametrize("seed", SEEDS)
def test_unets_agree(seed):
    config, inputs = unet_case(seed)
    ours = filled(UNet(config), seed)
    theirs = diffusers_twin(ours)
    t, context, mask = inputs["t"], inputs.get("context"), inputs.get("mask")
    assert_same(
        ours,
        theirs,
        lambda x: ours(x, t, context, mask),
        lambda x: theirs(x, t, context, first_token(config, context), encoder_attention_mask=mask).sample,
        inputs["x"],
    )


def folded(x: torch.Tensor, config: AutoencoderConfig) -> torch.Tensor:
    """Images (B, C, H, W) as diffusers' model wants them: patches in channels (B, C·p², H/p, W/p)."""
    return F.pixel_unshuffle(x, config.patch)


def unfolded(x: torch.Tensor, config: AutoencoderConfig) -> torch.Tensor:
    """The way back."""
    return F.pixel_shuffle(x, config.patch)


@pytest.mark.parametrize("patch, seed", [(1, seed) for seed in SEEDS] + [(2, seed) for seed in range(4)] + [(3, 1)])
def test_autoencoders_agree(patch, seed):
    config, x = autoencoder_case(seed, patch=patch)
    ours = filled(AutoencoderKL(config), seed)
    theirs = diffusers_twin(ours)
    posterior, other = ours.encode(x), theirs.encode(folded(x, config)).latent_dist
    torch.testing.assert_close(posterior.mean, other.mean, **CLOSE)
    torch.testing.assert_close(posterior.std, other.std, **CLOSE)

    def through(encode, decode, std):  # a draw with the same noise, and the decoder behind it
        def run(x):
            q = encode(x)
            return decode(q.mean + std(q) * torch.randn(q.mean.shape, generator=seeded(2)).double())

        return run

    assert_same(
        ours,
        theirs,
        through(ours.encode, ours.decode, lambda q: q.std),
        through(
            lambda x: theirs.encode(folded(x, config)).latent_dist,
            lambda z: unfolded(theirs.decode(z).sample, config),
            lambda q: q.std,
        ),
        x,
    )


@pytest.mark.parametrize("patch, seed", [(1, seed) for seed in SEEDS] + [(2, seed) for seed in range(4)])
def test_vq_autoencoders_agree(patch, seed):
    config, x = autoencoder_case(seed, codes=(2, 7, 64)[seed % 3], patch=patch)
    ours = filled(AutoencoderVQ(config), seed)
    with torch.no_grad():  # a code beside every latent, so that many are used whatever the random weights are
        z = ours.encode(x)
        vectors = z.permute(0, 2, 3, 1).reshape(-1, config.latent_channels)
        codes = vectors[torch.arange(config.codes) % len(vectors)]
        ours.quantiser.codebook.copy_(codes + 1e-3 * torch.randn(codes.shape, generator=seeded(1)))
    theirs = diffusers_twin(ours)
    quantised, other = ours.quantiser(z), theirs.quantize(theirs.encode(folded(x, config)).latents)
    assert torch.equal(quantised.indices.flatten(), other[2][2])
    torch.testing.assert_close(quantised.z, other[0], **CLOSE)
    assert len(vectors) == 1 or quantised.indices.unique().numel() > 1
    assert_same(
        ours,
        theirs,
        lambda x: ours.decode(ours.encode(x)),
        lambda x: unfolded(theirs.decode(theirs.encode(folded(x, config)).latents).sample, config),
        x,
    )


# names and files


def same_model(model: torch.nn.Module, twin: torch.nn.Module) -> bool:
    """Whether two models have the same configuration and weights, to the last bit."""
    ours, theirs = model.state_dict(), twin.state_dict()
    return model.config == twin.config and all(torch.equal(v, theirs[k]) for k, v in ours.items())


PARTS = [
    "unet",
    "one level",
    "attention above",
    "narrow unet",
    "sized heads",
    "scale and shift",
    "pooled",
    "autoencoder",
    "vq",
    "patches",
    "vq patches",
]


@pytest.fixture(params=PARTS)
def model(request):
    config = {
        "unet": UNetConfig(3, 2, 8, (1, 2), 2, (False, True), 2, 5, 2, groups=4),
        "narrow unet": UNetConfig(3, 3, 8, (1, 2), 1, (True, True), 2, 5, ff_multiplier=2, groups=4),
        "one level": UNetConfig(3, 3, 8, (1,), 1, (True,), 2, 5, ff_multiplier=2, groups=4),
        "attention above": UNetConfig(3, 3, 8, (1, 1), 1, (True, False), 2, 5, groups=4),
        "sized heads": UNetConfig(3, 3, 8, (1, 2, 3), 1, (True, False, True), context_dim=5, groups=4, head_size=4),
        "scale and shift": UNetConfig(3, 3, 8, (1, 2), 1, (False, True), 2, 5, groups=4, scale_shift=True),
        "pooled": UNetConfig(3, 3, 8, (1, 2), 1, (False, True), 2, 5, groups=4, pooled=True),
        "autoencoder": AutoencoderConfig(
            3, 4, 8, (1, 2, 2), 2, True, 4, latent_shift=(1.0, 2, 3, 4), latent_scale=(0.5, 1, 2, 4)
        ),
        "vq": AutoencoderConfig(3, 2, 8, (1, 2), 1, False, 4, 20, latent_shift=(0.0, 0.0), latent_scale=(0.5, 0.5)),
        "patches": AutoencoderConfig(
            3, 2, 8, (1, 2), 2, True, 4, patch=2, latent_shift=(1.0, 2), latent_scale=(0.5, 1)
        ),
        "vq patches": AutoencoderConfig(3, 2, 8, (1, 2), 1, False, 4, 20, patch=2),
    }[request.param]
    model = filled(UNet(config) if isinstance(config, UNetConfig) else make_autoencoder(config)).eval()
    if isinstance(model, AutoencoderVQ):
        model.quantiser.counts.fill_(1)
        model.quantiser.sums.copy_(model.quantiser.codebook)
    return model


def run(model: torch.nn.Module) -> torch.Tensor:
    """An output of a model from either side."""
    x, patch = torch.randn(2, 3, 8, 8, generator=seeded(4)).double(), 1
    if isinstance(model, diffusers.AutoencoderKL | diffusers.VQModel):
        patch = model.config.get("patch", 1)
        x = F.pixel_unshuffle(x, patch)
    if isinstance(model, AutoencoderKL | diffusers.AutoencoderKL):
        q = model.encode(x)
        decoded = model.decode(getattr(q, "latent_dist", q).mean)
    elif isinstance(model, AutoencoderVQ | diffusers.VQModel):
        q = model.encode(x)
        decoded = model.decode(getattr(q, "latents", q))
    else:
        context = torch.randn(2, 6, 5, generator=seeded(5)).double()
        pooled = isinstance(model, UNet2DConditionModel) and model.config.class_embed_type
        extra = {"class_labels": context[:, 0]} if pooled else {}
        decoded = model(x, torch.tensor([7, 800]), context, **extra)
    return F.pixel_shuffle(getattr(decoded, "sample", decoded), patch)


with_compvis_names = pytest.mark.parametrize("model", [part for part in PARTS if part != "pooled"], indirect=True)


def test_a_unet_that_pools_has_no_names_of_compvis():
    with pytest.raises(ValueError, match="only one without `pooled` has names"):
        to_compvis(UNet(UNetConfig(3, 3, 8, (1, 2), 1, (False, True), 2, 5, groups=4, pooled=True)))


def test_a_saved_model_loads_in_diffusers_and_comes_back(model, tmp_path):
    to_diffusers(model, tmp_path / "model")
    theirs = kind_of(model).from_pretrained(tmp_path / "model", torch_dtype=torch.float64)
    torch.testing.assert_close(run(theirs), run(model), **CLOSE)
    assert same_model(from_diffusers(tmp_path / "model"), model)
    theirs.save_pretrained(tmp_path / "theirs")  # and so does what diffusers writes
    assert torch.equal(run(from_diffusers(tmp_path / "theirs")), run(model))


def test_a_state_dict_and_a_config_are_enough(model):
    weights = interop.to_diffusers_weights(model)
    assert same_model(from_diffusers(weights, model.config), model)
    with pytest.raises(ValueError, match="give the config too"):
        from_diffusers(weights)


@with_compvis_names
def test_compvis_names_are_those_that_diffusers_converts(model):
    compvis, config = to_compvis(model), {"layers_per_block": model.config.res_blocks}
    if isinstance(model, UNet):
        config |= {"class_embed_type": None, "addition_embed_type": None}
        converted = convert_ldm_unet_checkpoint(dict(compvis), config)
    else:
        values = interop.autoencoder_config_to_diffusers(model.config)
        converted = convert_ldm_vae_checkpoint(dict(compvis), values)
    names = interop.diffusers_names(model)
    expected = {theirs: model.state_dict()[ours] for ours, theirs in names.items()}
    if "quantize.embedding.weight" in expected:  # which that function leaves out, and CompVis calls the same
        assert torch.equal(compvis["first_stage_model.quantize.embedding.weight"], model.quantiser.codebook)
        del expected["quantize.embedding.weight"]
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[k], v) for k, v in expected.items())


@with_compvis_names
def test_a_compvis_checkpoint_comes_back(model):
    other = {"cond_stage_model.x": torch.ones(1), "betas": torch.ones(3)}
    assert same_model(from_compvis(to_compvis(model) | other, model.config), model)


def test_autoencoders_from_before_diffusers_renamed_its_attention_load():
    model = filled(AutoencoderKL(AutoencoderConfig(3, 4, 8, (1, 2), 1, True, 4)))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = interop.to_diffusers_weights(model)
    model_keys = weights.keys()
    for new, before in old.items():
        weights = {k.replace(f"attentions.0.{new}.", f"attentions.0.{before}."): v for k, v in weights.items()}
    assert any("proj_attn" in k for k in weights)
    assert diffusers_twin(model)._fix_state_dict_keys_on_load(dict(weights)).keys() == model_keys
    assert same_model(from_diffusers(weights, model.config), model)


def break_weights(weights: dict, how: str) -> str:
    """Damage one entry; returns its key."""
    key = sorted(k for k in weights if k.endswith("resnets.0.conv1.weight") or k.endswith("block_1.conv1.weight"))[0]
    if how == "missing":
        del weights[key]
    elif how == "extra":
        weights[key := key + "s"] = torch.zeros(1)
    else:
        weights[key] = weights[key][:-1].clone()
    return key


@pytest.mark.parametrize("how, says", [("missing", "missing"), ("extra", "extra"), ("misshapen", "has shape")])
def test_wrong_keys_are_named(model, how, says, tmp_path):
    weights = interop.to_diffusers_weights(model)
    key = break_weights(weights, how)
    with pytest.raises(DataError, match=rf"\(1 keys: {key} {says}"):
        from_diffusers(weights, model.config)
    to_diffusers(model, tmp_path)
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(DataError, match=rf"diffusion_pytorch_model.safetensors .*{key} {says}"):
        from_diffusers(tmp_path)
    if getattr(model.config, "pooled", False):  # which has no names of CompVis
        return
    weights = to_compvis(model)
    key = next(iter(weights)) if how != "extra" else f"{next(iter(weights))}s"
    weights[key] = torch.zeros(1, 2, 3)
    if how == "missing":
        del weights[key]
    with pytest.raises(DataError, match=rf"\(1 keys: {key} {says}"):
        from_compvis(weights, model.config)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"use_linear_projection": True}, "use_linear_projection is True"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos is False"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06"),
        ({"resnet_time_scale_shift": "ada_group"}, "resnet_time_scale_shift is 'ada_group'"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        (
            {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 6},
            "of another width than that of the context's tokens",
        ),
        ({"attention_head_dim": [1, 8]}, "one number or one size of heads"),
        ({"block_out_channels": [8, 12]}, "a multiple of the first level's 8"),
        ({"norm_num_groups": 3}, "cannot be split into 3 groups"),
        ({"norm_num_groups": None}, "describes no model of minildm"),
        ({"transformer_layers_per_block": [1, 2]}, "one number of layers"),
        (
            {"_class_name": "UNet2DModel"},
            "holds a UNet2DModel: minildm reads UNet2DCond.*, AutoencoderKL, VQModel",
        ),
        ({"cross_attention_dim": ...}, "describes no model of minildm: 'cross_attention_dim'"),
    ],
)
def test_foreign_configurations_are_refused(change, says, tmp_path):
    to_diffusers(UNet(UNetConfig(3, 3, 8, (1, 2), heads=2, context_dim=5, groups=4)), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    with pytest.raises(DataError, match=says):
        from_diffusers(tmp_path)


def test_layers_listed_for_each_level_are_read(tmp_path):
    unet = UNet(UNetConfig(3, 3, 8, (1, 2), heads=2, context_dim=5, groups=4, depth=2))
    to_diffusers(unet, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"transformer_layers_per_block": [2, 2]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert from_diffusers(tmp_path).config == unet.config


@pytest.mark.parametrize("patch", [0, 3])
def test_a_note_of_patches_that_do_not_fit_the_channels_is_refused(patch, tmp_path):
    to_diffusers(AutoencoderKL(AutoencoderConfig(1, 2, 8, (1, 2), groups=4, patch=2)), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["in_channels"], values["out_channels"], values["sample_size"], values["patch"]) == (4, 4, 16, 2)
    (tmp_path / "config.json").write_text(json.dumps(values | {"patch": patch}))
    with pytest.raises(DataError, match=f"patch is {patch}: in_channels = 4 must be a multiple of patch²"):
        from_diffusers(tmp_path)


def test_without_the_note_a_patched_autoencoder_is_one_that_works_on_folded_images(tmp_path):
    ours = filled(AutoencoderKL(AutoencoderConfig(1, 2, 8, (1, 2), groups=4, patch=2)))
    to_diffusers(ours, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k != "patch"}))
    plain, x = from_diffusers(tmp_path), torch.randn(2, 1, 16, 16, generator=seeded(6)).double()
    assert plain.config == replace(ours.config, in_channels=4, patch=1)
    torch.testing.assert_close(plain.encode(F.pixel_unshuffle(x, 2)).mean, ours.encode(x).mean, **CLOSE)


def test_what_cannot_be_written_or_read_is_refused(tmp_path, tiny_model):
    with pytest.raises(ValueError, match="without cross-attention"):
        to_diffusers(UNet(UNetConfig(3, 3, 8, (1, 2), heads=2, groups=4)), tmp_path / "plain")
    wide = UNet(UNetConfig(3, 3, 8, (1, 2), heads=2, context_dim=5, ff_multiplier=8, groups=4))
    with pytest.raises(ValueError, match="no feed-forward layers wider than 4·dim"):
        to_diffusers(wide, tmp_path / "wide")
    usual = UNet(replace(wide.config, ff_multiplier=4))
    with pytest.raises(DataError, match=r"ff.net.* in the state dict has weights beyond a feed-forward layer of 2·dim"):
        from_diffusers(interop.to_diffusers_weights(usual), replace(wide.config, ff_multiplier=2))
    with pytest.raises(DataError, match="config.json is missing"):
        from_diffusers(tmp_path / "nothing")
    to_diffusers(tiny_model, tmp_path / "pipe")
    (tmp_path / "pipe" / "unet" / "config.json").write_text("{")
    with pytest.raises(DataError, match="config.json is damaged"):
        from_diffusers(tmp_path / "pipe")
    to_diffusers(tiny_model, tmp_path / "pipe")
    (tmp_path / "pipe" / "scheduler" / "scheduler_config.json").write_text('{"beta_schedule": "sigmoid"}')
    with pytest.raises(DataError, match="has no counterpart in minildm: 'sigmoid'"):
        from_diffusers(tmp_path / "pipe")
    (tmp_path / "pipe" / "text_encoder" / "config.json").write_text('{"_class_name": "CLIPTextModel"}')
    with pytest.raises(DataError, match="the text encoder in .* is not minildm's"):
        from_diffusers(tmp_path / "pipe")
    for part, key in (("text_encoder", "words"), ("vae", "sample_size")):
        to_diffusers(tiny_model, tmp_path / "pipe")
        config = tmp_path / "pipe" / part / "config.json"
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != key}))
        with pytest.raises(DataError, match="do not describe a pipeline of minildm"):
            from_diffusers(tmp_path / "pipe")


# whole pipelines


def test_a_whole_pipeline_comes_back_with_every_field_of_its_config(tmp_path):
    torch.manual_seed(0)
    config = LDMConfig(
        AutoencoderConfig(3, 2, 4, (1, 2), 2, True, 2, patch=2, latent_shift=(0.5, 1.0), latent_scale=(2.0, 0.25)),
        UNetConfig(2, 2, 8, (1, 2), 2, (True, False), 2, 8, 2, 2, 4),
        ("red", "blue"),
        1,
        "scaled_linear",
        1e-3,
        0.05,
        "v",
        16,
    )
    assert all(value != getattr(LDMConfig(), field) for field, value in config.__dict__.items())
    model = LatentDiffusion(config)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    to_diffusers(model, tmp_path)
    twin = from_diffusers(tmp_path)
    assert twin.config == config and twin.training is False
    assert same_model(model, twin)
    assert not any(p.requires_grad for p in twin.parameters())
    assert torch.equal(twin.sample(["red"], steps=2), model.sample(["red"], steps=2))


def diffusers_sample(folder, model: LatentDiffusion, prompts: list[str], steps: int) -> torch.Tensor:
    """What diffusers' own loop draws with guidance 1; only the prompt's context comes from minildm."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    conditioning = model.conditioning(prompts)
    z = torch.randn(len(prompts), *model.latent_shape, generator=seeded(0))
    for t in scheduler.timesteps:
        context, mask = conditioning["context"], conditioning["mask"]
        prediction = unet(z, t, context, class_labels=context[:, 0], encoder_attention_mask=mask).sample
        z = scheduler.step(prediction, t, z).prev_sample
    mean, std = (torch.tensor(vae.config[key]).view(-1, 1, 1) for key in ("latents_mean", "latents_std"))
    images = vae.decode(z * std / vae.config.scaling_factor + mean).sample
    return F.pixel_shuffle(images, vae.config.get("patch", 1)).clamp(-1, 1)


@torch.no_grad()
def test_the_shipped_model_draws_the_same_digits_in_diffusers(tmp_path):
    model = LatentDiffusion.from_pretrained("mnist-text")
    to_diffusers(model, tmp_path)
    prompts = ["a thick slanted seven", "a thin 3", ""]
    ours = model.sample(prompts, steps=10, guidance_scale=1.0, seed=0)
    assert timesteps(model.schedule, 10)[0] == 999
    # float32 on both sides, and diffusers' schedule is a float32 product of a thousand factors
    torch.testing.assert_close(diffusers_sample(tmp_path, model, prompts, 10), ours, rtol=0, atol=2e-3)
    assert torch.equal(from_diffusers(tmp_path).sample(prompts, steps=10, guidance_scale=1.0, seed=0), ours)
