"""Lesson 04: attention against an explicit softmax, the time's and the prompt's way into the UNet, and its shapes."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from hypothesis import given, settings
from hypothesis import strategies as st

from minildm.data import seeded
from minildm.unet import (
    Attention,
    Conv,
    FeedForward,
    SpatialTransformer,
    TimeResBlock,
    TransformerBlock,
    UNet,
    UNetConfig,
    timestep_embedding,
    zero_init,
)

TOY = UNetConfig(3, 3, 8, (1, 2), 1, (True, True), heads=2, context_dim=6, groups=4)


def awake(module: torch.nn.Module) -> torch.nn.Module:
    """The module in eval mode with no weights left at zero: every branch counts."""
    generator = seeded(0)
    for parameter in module.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def toy():
    return awake(UNet(TOY))


def toy_inputs(tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (2, 3, 8, 8), t (2,), context (2, tokens, 6)."""
    generator = seeded(1)
    x, context = torch.randn(2, 3, 8, 8, generator=generator), torch.randn(2, tokens, 6, generator=generator)
    return x, torch.tensor([3, 700]), context


# convolutions


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("size", "sides"), [(1, (2, 2)), (1, (3, 5)), (3, (2, 2)), (3, (2, 3)), (3, (3, 2)), (3, (4, 4)), (3, (1, 1))]
)
@given(channels=st.tuples(st.integers(1, 6), st.integers(1, 6)), batch=st.integers(0, 3), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_a_convolution_and_its_gradients_are_those_of_torch(size, sides, memory_format, channels, batch, seed):
    torch.manual_seed(seed)
    layer = Conv(*channels, size).double().to(memory_format=memory_format)
    x = torch.randn(batch, channels[0], *sides).double().to(memory_format=memory_format).requires_grad_()
    plain = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=size // 2)
    toward = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, [x, *layer.parameters()], toward)
    found = torch.autograd.grad(layer(x), [x, *layer.parameters()], toward)
    torch.testing.assert_close(layer(x), plain)
    torch.testing.assert_close(found, wanted)


def test_on_the_smallest_map_and_with_the_smallest_kernel_no_convolution_is_called(monkeypatch):
    x = torch.randn(2, 5, 2, 2, generator=seeded(0)).to(memory_format=torch.channels_last)
    large = torch.randn(2, 5, 4, 4, generator=seeded(0)).to(memory_format=torch.channels_last)

    def refuse(*args):
        raise AssertionError("a convolution was called")

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", refuse)
    assert Conv(5, 3, 3)(x).shape == (2, 3, 2, 2)
    assert Conv(5, 3, 1)(large).is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(AssertionError):
        Conv(5, 3, 3)(large)


# attention


@given(
    heads=st.sampled_from([1, 2, 4]),
    n=st.integers(1, 6),
    m=st.integers(1, 5),
    context_dim=st.sampled_from([None, 3, 8]),
    seed=st.integers(0, 99),
)
def test_attention_is_an_explicit_softmax(heads, n, m, context_dim, seed):
    torch.manual_seed(seed)
    attention, x = Attention(8, heads, context_dim).double(), torch.randn(2, n, 8).double()
    context = None if context_dim is None else torch.randn(2, m, context_dim).double()
    source = x if context is None else context
    d, expected = 8 // heads, torch.zeros_like(x)
    for b in range(2):
        answers = []
        for head in range(heads):
            rows = slice(head * d, (head + 1) * d)
            q, k, v = (
                tokens @ layer.weight[rows].T
                for layer, tokens in (
                    (attention.to_q, x[b]),
                    (attention.to_k, source[b]),
                    (attention.to_v, source[b]),
                )
            )
            e = (q @ k.T / math.sqrt(d)).exp()
            answers.append(e / e.sum(1, keepdim=True) @ v)
        expected[b] = torch.cat(answers, 1) @ attention.to_out.weight.T + attention.to_out.bias
    torch.testing.assert_close(attention(x, context), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_weights_sum_to_1_and_make_the_answer(masked):
    torch.manual_seed(0)
    attention, x, context = Attention(8, 2, 6), torch.randn(2, 7, 8), torch.randn(2, 5, 6)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5]) if masked else None
    weights = attention.weights(x, context, mask)
    assert weights.shape == (2, 2, 7, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 7))
    assert not masked or not weights[0, :, :, 3:].any()
    values = attention.to_v(context).view(2, 5, 2, 4).transpose(1, 2)  # (B, heads, M, d)
    answer = attention.to_out((weights @ values).transpose(1, 2).reshape(2, 7, 8))
    torch.testing.assert_close(attention(x, context, mask), answer)


def test_a_single_token_makes_the_softmax_one():
    attention = Attention(8, 2, 6)
    assert (attention.weights(torch.randn(1, 4, 8), torch.randn(1, 1, 6)) == 1).all()


def test_a_block_with_context_adds_its_three_parts_in_order():
    torch.manual_seed(0)
    block = awake(TransformerBlock(8, 2, 6, 2))
    x, context = torch.randn(2, 4, 8), torch.randn(2, 3, 6)
    h = x + block.self_attention(block.norm1(x))
    h = h + block.cross_attention(block.norm2(h), context)
    torch.testing.assert_close(block(x, context), h + block.feed_forward(block.norm3(h)))


def test_geglu_by_hand():
    torch.manual_seed(0)
    layer = FeedForward(3, 2).double()
    x = [0.5, -1.0, 2.0]
    hidden = layer.to_gate(torch.tensor([[x]], dtype=torch.float64)).flatten().tolist()
    value, gate = hidden[:6], hidden[6:]
    products = [v * g * 0.5 * (1 + math.erf(g / math.sqrt(2))) for v, g in zip(value, gate, strict=True)]
    expected = layer.to_out(torch.tensor(products, dtype=torch.float64))
    torch.testing.assert_close(layer(torch.tensor([[x]], dtype=torch.float64))[0, 0], expected)


# time


@pytest.mark.parametrize("dim", [2, 8, 320])
def test_timestep_embedding_is_that_of_diffusers(dim):
    t = torch.tensor([0, 1, 17, 500, 999])
    theirs = get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(t, dim), theirs)


@given(st.integers(0, 999), st.integers(0, 999))
def test_timestep_embeddings_tell_steps_apart_and_turn_with_time(s, t):
    a, b = timestep_embedding(torch.tensor([s, t]), 32)
    frequencies = [10000 ** (-i / 16) for i in range(16)]
    assert (a @ b).item() == pytest.approx(sum(math.cos((s - t) * f) for f in frequencies), abs=1e-2)


def test_time_is_added_to_each_channel_between_the_convolutions():
    torch.manual_seed(0)
    block = awake(TimeResBlock(4, 6, 5, 2))
    x, emb = torch.randn(2, 4, 3, 3), torch.randn(2, 5)
    silu = torch.nn.functional.silu
    h = block.conv1(silu(block.norm1(x))) + block.time(silu(emb)).view(2, 6, 1, 1)
    torch.testing.assert_close(block(x, emb), block.shortcut(x) + block.conv2(silu(block.norm2(h))))


def test_time_scales_and_shifts_each_channel_behind_the_norm():
    torch.manual_seed(0)
    block = awake(TimeResBlock(4, 6, 5, 2, scale_shift=True))
    x, emb = torch.randn(2, 4, 3, 3), torch.randn(2, 5)
    silu = torch.nn.functional.silu
    scale, shift = block.time(silu(emb))[:, :6], block.time(silu(emb))[:, 6:]
    h = torch.einsum("bchw,bc->bchw", block.norm2(block.conv1(silu(block.norm1(x)))), 1 + scale)
    h = h + shift.view(2, 6, 1, 1)
    torch.testing.assert_close(block(x, emb), block.shortcut(x) + block.conv2(silu(h)))


def test_the_first_token_joins_the_time_embedding():
    torch.manual_seed(0)
    unet = awake(UNet(replace(TOY, pooled=True)))
    x, t, context = torch.randn(2, 3, 4, 4), torch.tensor([3, 700]), torch.randn(2, 3, 6)
    heard = []
    unet.middle[0].res.register_forward_pre_hook(lambda _, arguments: heard.append(arguments[1]))
    unet(x, t, context)
    time = unet.time_mlp(timestep_embedding(t, TOY.channels))
    torch.testing.assert_close(heard[0], time + context[:, 0] @ unet.pooled.weight.T + unet.pooled.bias)


def test_only_a_unet_with_a_context_can_pool():
    with pytest.raises(ValueError, match="pooled takes the first token of a context"):
        UNetConfig(pooled=True)


# the UNet


@settings(max_examples=20)
@given(
    channels=st.sampled_from([4, 8]),
    multipliers=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    res_blocks=st.integers(1, 2),
    attention=st.lists(st.booleans(), min_size=3, max_size=3),
    context_dim=st.sampled_from([None, 4]),
    in_out=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_output_has_the_input_s_size_and_is_zero_at_first(
    channels, multipliers, res_blocks, attention, context_dim, in_out, size
):
    levels = len(multipliers)
    config = UNetConfig(
        *in_out, channels, multipliers, res_blocks, tuple(attention[:levels]), 2, context_dim, 1, 2, groups=2
    )
    unet = UNet(config)
    x = torch.randn(2, in_out[0], *(side * 2 ** (levels - 1) for side in size))
    context = None if context_dim is None else torch.randn(2, 3, context_dim)
    out = unet(x, torch.tensor([0, 999]), context)
    assert out.shape == (2, in_out[1], *x.shape[2:])
    assert not out.any()
    torch.nn.init.normal_(unet.conv_out.weight)
    assert unet(x, torch.tensor([0, 999]), context).any()


def test_stable_diffusion_s_unet_has_its_parameter_count():
    with torch.device("meta"):
        unet = UNet(UNetConfig(4, 4, 320, (1, 2, 4, 4), 2, (True, True, True, False), 8, 768))
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


def test_every_residual_branch_starts_as_nothing():
    torch.manual_seed(0)
    for scale_shift in (False, True):
        block, x = TimeResBlock(4, 4, 5, 2, scale_shift), torch.randn(2, 4, 4, 4)
        assert torch.equal(block(x, torch.randn(2, 5)), x)
    transformer, x = SpatialTransformer(8, TOY), torch.randn(2, 8, 4, 4)
    assert torch.equal(transformer(x, torch.randn(2, 3, 6), None), x)
    assert not any(p.any() for p in zero_init(torch.nn.Linear(2, 2)).parameters())


def test_the_up_path_sees_each_output_of_the_down_path_last_first(toy):
    outputs, inputs = [], []
    down = [toy.conv_in, *(stage for level in toy.down for stage in level), *toy.downsample]
    hooks = [module.register_forward_hook(lambda _, args, out: outputs.append(out)) for module in down]
    up = [stage for level in toy.up for stage in level]
    hooks += [stage.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for stage in up]
    toy(*toy_inputs())
    for hook in hooks:
        hook.remove()
    assert len(outputs) == len(inputs) == 4
    for skip, x in zip(reversed(outputs), inputs, strict=True):
        assert torch.equal(x[:, -skip.shape[1] :], skip)


def test_time_image_and_prompt_each_matter(toy):
    x, t, context = toy_inputs()
    out = toy(x, t, context)
    for changed in (toy(x, t + 100, context), toy(x + 0.1, t, context), toy(x, t, context + 0.5)):
        assert (changed - out).abs().amax((1, 2, 3)).min() > 1e-3


def test_images_of_a_batch_do_not_mix(toy):
    x, t, context = toy_inputs()
    for i in range(2):
        alone = toy(x[i : i + 1], t[i : i + 1], context[i : i + 1])
        torch.testing.assert_close(alone, toy(x, t, context)[i : i + 1], rtol=1e-4, atol=1e-4)


def test_masked_tokens_do_not_matter(toy):
    x, t, context = toy_inputs()
    mask = torch.tensor([[True, True, True, False, False]]).expand(2, 5)
    out = toy(x, t, context, mask)
    garbage = torch.where(mask[..., None], context, 1000.0)
    torch.testing.assert_close(toy(x, t, garbage, mask), out)
    torch.testing.assert_close(toy(x, t, context[:, :3]), out)
    assert not torch.allclose(toy(x, t, context), out, atol=1e-3)


def test_the_order_of_context_tokens_does_not_matter_to_cross_attention(toy):
    x, t, context = toy_inputs()
    torch.testing.assert_close(toy(x, t, context.flip(1)), toy(x, t, context), rtol=1e-4, atol=1e-4)


def test_every_weight_gets_a_gradient():
    unet = awake(UNet(TOY)).requires_grad_(True)
    unet(*toy_inputs()).square().sum().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 3, 7, 8), (2, 3, 8, 9), (3, 8, 8)])
def test_inputs_that_do_not_fit_are_refused(toy, shape):
    _, t, context = toy_inputs()
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\) with H and W divisible by 2"):
        toy(torch.zeros(shape), t, context)


def test_a_context_is_wanted_exactly_when_there_is_cross_attention(toy):
    x, t, context = toy_inputs()
    plain = UNet(UNetConfig(3, 3, 8, (1, 2), heads=2, groups=4))
    for call in (lambda: toy(x, t), lambda: plain(x, t, context), lambda: toy(x, t, context[..., :4])):
        with pytest.raises(ValueError, match="this UNet .* context"):
            call()


@pytest.mark.parametrize(
    "values, says",
    [
        ({"attention": (True,)}, "must say yes or no for each"),
        ({"groups": 3}, "cannot be split into 3 groups"),
        ({"heads": 5}, "cannot be split into .* 5 heads"),
        ({"heads": 0}, "cannot have 0 heads"),
        ({"head_size": 0}, "cannot have heads of 0"),
        ({"groups": 0}, "groups must be at least 1, not 0"),
        ({"depth": -1}, "depth must be at least 1, not -1"),
        ({"multipliers": (), "attention": ()}, "multipliers must be numbers of at least 1"),
        ({"multipliers": (1, 0)}, "multipliers must be numbers of at least 1"),
    ],
)
def test_impossible_configurations_are_refused(values, says):
    with pytest.raises(ValueError, match=says):
        UNetConfig(**{"channels": 8, "groups": 4, "heads": 2, **values})
