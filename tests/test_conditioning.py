"""Lesson 05: prompts to tokens to context, and both kinds of guidance."""

import math

import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from hypothesis import given
from hypothesis import strategies as st
from reference import SCHEDULES, ideal_denoise

from minildm.conditioning import (
    CAPTION_WORDS,
    ClassEmbedding,
    PromptError,
    TextEncoder,
    Tokenizer,
    classifier_guided,
    guided,
)
from minildm.data import seeded
from minildm.toy import GaussianMixture

# prompts


@given(st.lists(st.sampled_from(CAPTION_WORDS), max_size=7))
def test_tokens_say_the_prompt(words):
    tokenizer = Tokenizer()
    (row,) = tokenizer.encode([" ".join(words)]).tolist()
    assert len(row) == 8 and row[0] == 1
    assert [CAPTION_WORDS[i - 2] for i in row[1 : len(words) + 1]] == words
    assert set(row[len(words) + 1 :]) <= {0}
    assert max(row) < len(tokenizer) == len(CAPTION_WORDS) + 2


def test_case_and_blanks_do_not_matter():
    tokenizer = Tokenizer()
    tokens = tokenizer.encode(["a thick slanted seven", "  A THICK\tslanted   Seven "])
    assert tokens.dtype == torch.int64 and torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize(
    "prompts, says",
    [
        ([], "give a list of at least one prompt"),
        ("a seven", "give a list of at least one prompt"),
        (["a seven", "a purple seven"], 'unknown word "purple" in "a purple seven": use only a, an, thin.*nine, 0'),
        (["a " * 8], "has 8 words: use at most 7"),
    ],
)
def test_bad_prompts_are_refused(prompts, says):
    with pytest.raises(PromptError, match=says):
        Tokenizer().encode(prompts)
    assert issubclass(PromptError, ValueError)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return TextEncoder(len(Tokenizer()), dim=8, depth=2, heads=2).requires_grad_(False)


def test_context_has_a_token_for_each_word_and_a_mask_over_the_padding(encoder):
    context, mask = encoder(Tokenizer().encode(["", "a seven", "a thick slanted seven"]))
    assert context.shape == (3, 8, 8)
    assert mask.sum(1).tolist() == [1, 3, 5]
    assert all(row.tolist() == sorted(row.tolist(), reverse=True) for row in mask)  # tokens first, then padding


def test_words_do_not_see_the_padding(encoder):
    tokens = Tokenizer().encode(["a thick seven"])
    padded, _ = encoder(tokens)
    bare, _ = encoder(tokens[:, :4])
    torch.testing.assert_close(padded[:, :4], bare)


def test_words_see_each_other_and_their_order(encoder):
    context, _ = encoder(Tokenizer().encode(["a thick seven", "a thin seven", "thick a seven"]))
    for other in (1, 2):
        assert (context[0, 3] - context[other, 3]).abs().max() > 1e-3  # the third word is "seven" in all


def test_every_label_has_its_own_token_and_no_class_another():
    embedding = ClassEmbedding(3, 5)
    context = embedding(torch.tensor([0, 1, 2, 3]))
    assert context.shape == (4, 1, 5)
    assert torch.equal(context[:, 0], embedding.embedding.weight)


# classifier-free guidance


def toy_network(x, t, context):
    """A network with an answer that anyone can compute."""
    return torch.sin(x) * context[:, :, None, None] + t.view(-1, 1, 1, 1)


def branches(n: int = 2):
    x = torch.randn(n, 3, 2, 2, generator=seeded(0))
    conditional, unconditional = (torch.randn(n, 3, generator=seeded(i)) for i in (1, 2))
    return x, torch.arange(n) * 10, {"context": conditional}, {"context": unconditional}


@given(st.floats(0, 20))
def test_guidance_is_a_line_through_both_predictions(w):
    x, t, conditional, unconditional = branches()
    cond, uncond = toy_network(x, t, **conditional), toy_network(x, t, **unconditional)
    ours = guided(toy_network, conditional, unconditional, w)(x, t)
    torch.testing.assert_close(ours, (1 - w) * uncond + w * cond, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("w, batches", [(0, [2]), (1, [2]), (2.5, [4])])
def test_both_branches_run_in_one_batch_and_only_when_both_are_needed(w, batches):
    x, t, conditional, unconditional = branches()
    seen = []

    def counting(x, t, context):
        seen.append(len(x))
        return toy_network(x, t, context)

    guided(counting, conditional, unconditional, w)(x, t)
    assert seen == batches


@pytest.mark.parametrize("w", [-0.1, math.nan, math.inf, -math.inf])
def test_impossible_guidance_is_refused(w):
    with pytest.raises(ValueError, match="guidance_scale must be a number of at least 0"):
        guided(toy_network, {}, {}, w)


@given(w=st.floats(0, 20), step=st.integers(0, 999), low=st.integers(0, 998), width=st.integers(1, 500))
def test_guidance_in_an_interval_is_guidance_there_and_the_conditional_model_elsewhere(w, step, low, width):
    x, _, conditional, unconditional = branches()
    t = torch.full((len(x),), step)
    cond, uncond = toy_network(x, t, **conditional), toy_network(x, t, **unconditional)
    ours = guided(toy_network, conditional, unconditional, w, (low, low + width))(x, t)
    expected = (1 - w) * uncond + w * cond if step in range(low, low + width) else cond
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_unconditional_branch_runs_only_in_the_interval():
    x, _, conditional, unconditional = branches()
    seen = []

    def counting(x, t, context):
        seen.append((len(x), int(t[0])))
        return toy_network(x, t, context)

    model = guided(counting, conditional, unconditional, 2.5, (200, 600))
    for step in (600, 599, 200, 199):
        model(x, torch.full((2,), step))
    assert seen == [(2, 600), (4, 599), (4, 200), (2, 199)]


@pytest.mark.parametrize("interval", [(-1, 500), (500, 500), (600, 500), (math.nan, 500), (0, math.nan)])
def test_an_impossible_interval_is_refused(interval):
    with pytest.raises(ValueError, match="guidance_interval must be two steps"):
        guided(toy_network, {}, {}, 2.0, interval)


@given(w=st.floats(0.1, 20), phi=st.floats(0, 1))
def test_rescaled_guidance_is_diffusers_own(w, phi):
    if w == 1:  # needs no second branch, and has nothing to give back
        return
    x, t, conditional, unconditional = branches()
    cond, uncond = toy_network(x, t, **conditional), toy_network(x, t, **unconditional)
    ours = guided(toy_network, conditional, unconditional, w, guidance_rescale=phi)(x, t)
    expected = rescale_noise_cfg(uncond + w * (cond - uncond), cond, guidance_rescale=phi)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_full_rescaling_gives_each_image_the_deviation_of_its_conditional_prediction():
    x, t, conditional, unconditional = branches()
    x[1] *= 0.1
    found = guided(toy_network, conditional, unconditional, 7.0, guidance_rescale=1)(x, t)
    cond = toy_network(x, t, **conditional)
    torch.testing.assert_close(found.std((1, 2, 3)), cond.std((1, 2, 3)))
    assert not torch.allclose(found[0].std(), found[1].std(), rtol=0.5)  # each its own


def test_a_prediction_of_nothing_can_be_rescaled():
    x, t, conditional, unconditional = branches()
    found = guided(lambda x, t, context: 0 * x, conditional, unconditional, 3.0, guidance_rescale=1)(x, t)
    assert torch.equal(found, torch.zeros_like(x))


@pytest.mark.parametrize("phi", [-0.1, 1.1, math.nan])
def test_an_impossible_rescaling_is_refused(phi):
    with pytest.raises(ValueError, match="guidance_rescale must be between 0 and 1"):
        guided(toy_network, {}, {}, 2.0, guidance_rescale=phi)


# classifier guidance


@pytest.mark.parametrize("component", [0, 1, 2])
def test_classifier_guidance_by_the_true_classifier_is_bayes_rule(component):
    schedule = SCHEDULES["linear"]
    data = GaussianMixture(torch.tensor([[-1.0, 0], [1, 0.5], [0, 2]]).double(), 0.4)
    alone = GaussianMixture(data.means[component : component + 1], data.std)
    x = torch.randn(6, 2, generator=seeded(0)).double()

    def log_prob(x, t):  # log p(component | x_t)
        a = schedule.alpha_bar[t[0]]
        distance = ((x[:, None] - a.sqrt() * data.means) ** 2).sum(-1)
        return (-distance / (2 * (a * data.std**2 + 1 - a))).log_softmax(1)[:, component]

    def eps_of(mixture):
        return lambda x, t: ideal_denoise(mixture, schedule)(x, int(t[0]))[1]

    guided_eps = classifier_guided(eps_of(data), log_prob, schedule.at, 1.0)
    for t in (20, 300, 800):
        steps = torch.full((6,), t)
        torch.testing.assert_close(guided_eps(x, steps), eps_of(alone)(x, steps))
        half = classifier_guided(eps_of(data), log_prob, schedule.at, 0.5)(x, steps)
        torch.testing.assert_close(half, (eps_of(data)(x, steps) + guided_eps(x, steps)) / 2)


def test_classifier_guidance_works_where_gradients_are_off():
    with torch.no_grad():
        push = classifier_guided(lambda x, t: 0 * x, lambda x, t: x.sum(1), SCHEDULES["linear"].at, 1.0)
        eps = push(torch.zeros(1, 2), torch.tensor([500]))
    expected = -math.sqrt(1 - SCHEDULES["linear"].alpha_bar[500].item())
    assert eps.flatten().tolist() == pytest.approx([expected] * 2)
    assert not eps.requires_grad
