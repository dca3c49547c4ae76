import pytest
import torch
from torch import nn

from minildm.muon import Muon, orthogonalise, start_muon
from minildm.training import Budget, load_checkpoint, save_checkpoint, train


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def give_gradients(model, seed=0):
    for i, weight in enumerate(model.parameters()):
        weight.grad = random(*weight.shape, seed=seed + i)


@pytest.mark.parametrize("shape", [(4, 4), (4, 36), (16, 64)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_singular_values_go_through_the_quintic(shape, scale):
    m = scale * random(3, *shape).double()
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalise(m), u @ torch.diag_embed(s) @ vh, rtol=1e-6, atol=1e-6 / scale)


def test_singular_values_end_near_one():
    values = torch.linalg.svdvals(orthogonalise(random(8, 32, 96)))
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("momentum", [0.95, 0.9])
@pytest.mark.parametrize("out, into", [(16, 16), (8, 32), (48, 12)])
def test_matrices_step_as_in_torch(out, into, momentum):
    """torch.optim.Muon takes matrices only and iterates in bfloat16, whose 8 bits make about one percent of error."""
    ours, theirs = nn.Linear(into, out, bias=False), nn.Linear(into, out, bias=False)
    theirs.load_state_dict(ours.state_dict())
    before = ours.weight.detach().clone()
    muon = start_muon(ours, 0.1, seed=0, momentum=momentum).optimiser
    other = torch.optim.Muon(theirs.parameters(), 0.1, weight_decay=0.0, momentum=momentum)
    for seed in range(3):
        give_gradients(ours, seed)
        give_gradients(theirs, seed)
        muon.step()
        other.step()
    change, expected = ours.weight.detach() - before, theirs.weight.detach() - before
    assert (change - expected).norm() < 0.03 * expected.norm()


def test_kernels_step_as_matrices_of_their_rows():
    conv, linear = nn.Conv2d(6, 8, 3, bias=False), nn.Linear(54, 8, bias=False)
    linear.weight.data = conv.weight.detach().flatten(1).clone()
    for model in (conv.to(memory_format=torch.channels_last), linear):
        model.weight.grad = random(8, 54).view_as(model.weight)
        Muon(model, 0.1).step()
    torch.testing.assert_close(conv.weight.flatten(1), linear.weight, rtol=0, atol=1e-5)


def test_vectors_step_by_adam():
    ours, theirs = nn.GroupNorm(2, 8), nn.GroupNorm(2, 8)
    muon, adam = Muon(ours, 0.1), torch.optim.AdamW(theirs.parameters(), 0.1, (0.9, 0.99), weight_decay=0)
    for seed in range(3):
        give_gradients(ours, seed)
        give_gradients(theirs, seed)
        muon.step()
        adam.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_the_size_of_the_gradient_does_not_count():
    steps = []
    for scale in (1.0, 1000.0):
        model = nn.Linear(8, 4, bias=False)
        nn.init.zeros_(model.weight)
        model.weight.grad = scale * random(4, 8)
        Muon(model, 0.1).step()
        steps.append(model.weight.detach())
    torch.testing.assert_close(*steps)


def test_weights_without_a_gradient_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = model[1].weight.detach().clone()
    give_gradients(model[0])
    Muon(model, 0.1).step()
    assert torch.equal(model[1].weight, before)


def test_training_goes_on_bit_exactly_from_a_checkpoint(tmp_path):
    def start():
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 36, 4)
        return start_muon(nn.Sequential(*layers).to(memory_format=torch.channels_last), 0.02, seed=3)

    def loss_fn(model, generator):
        return model(torch.randn(2, 1, 8, 8, generator=generator)).square().mean()

    whole = start()
    for _ in train(whole, loss_fn, Budget(steps=8), 0.02):
        if whole.step == 5:
            save_checkpoint(whole, tmp_path / "half")
    resumed = start()
    load_checkpoint(resumed, tmp_path / "half")
    for _ in train(resumed, loss_fn, Budget(steps=8), 0.02):
        pass
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
