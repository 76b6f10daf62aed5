from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

from prefkit.objectives.divergence import reverse_kl
from prefkit.objectives.margin import Hinge, Ipo, Logistic
from prefkit.objectives.preference import dpo_loss, gap, hypo_kl, hypo_loss, nll, offline_kl_loss


def pairs(b: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    chosen, rejected, ref_chosen, ref_rejected = -20 * torch.rand(4, b, generator=draw, dtype=dtype)
    return [chosen.requires_grad_(), rejected.requires_grad_(), ref_chosen, ref_rejected]


def samples(b: int = 3, k: int = 2) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    own, ref_own = -20 * torch.rand(2, b, k, generator=draw, dtype=torch.float64)
    return [own.requires_grad_(), ref_own]


def gradients(loss: Tensor, of: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.sum(), of, retain_graph=True)


def test_the_start_is_log_2_and_reward_0_exactly():
    chosen, rejected = torch.tensor([-123.456, -7.0]), torch.tensor([-98.7, -300.1])
    assert gap(chosen, rejected, chosen, rejected).tolist() == [0.0, 0.0]
    loss = dpo_loss(chosen, rejected, chosen, rejected, beta=0.1)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)
    own = torch.tensor([[-3.0, -8.0], [-1.0, -2.0]])
    hypo = hypo_loss(chosen, rejected, chosen, rejected, own, own, beta=0.1, kl_weight=1.0)
    assert torch.equal(hypo, loss)
    assert hypo_kl(own, own).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", [Logistic(), Ipo(), Hinge()])
def test_kl_weight_0_is_dpo_bit_for_bit(kind):
    batch = pairs(dtype=torch.float32)
    dpo = dpo_loss(*batch, beta=0.1, kind=kind)
    for online in ((None, None), samples()):
        hypo = hypo_loss(*batch, *online, beta=0.1, kl_weight=0, kind=kind)
        assert torch.equal(hypo, dpo)
        assert all(map(torch.equal, gradients(hypo, batch[:2]), gradients(dpo, batch[:2])))


def test_hypo_is_dpo_plus_the_weighted_surrogate():
    batch, (own, ref_own) = pairs(), samples()
    loss = hypo_loss(*batch, own, ref_own, beta=0.1, kl_weight=0.3, label_smoothing=0.1)
    offline, online = dpo_loss(*batch, beta=0.1, label_smoothing=0.1), reverse_kl(own, ref_own)
    torch.testing.assert_close(loss, offline + 0.3 * online)
    (slope,) = gradients(loss, [own])
    torch.testing.assert_close(slope, 0.3 * gradients(online, [own])[0])


def test_hypo_takes_the_per_token_estimators():
    tokens = [x.detach().unsqueeze(-1).expand(3, 2, 4) / 4 for x in samples()]
    state_kl = torch.rand(3, 2, 4, dtype=torch.float64)
    for estimator, extra in (("rtg", None), ("rb", state_kl)):
        loss = hypo_loss(*pairs(), *tokens, beta=0.1, kl_weight=0.3, estimator=estimator, state_kl=extra)
        assert loss.shape == (3,)
    torch.testing.assert_close(hypo_kl(*tokens), hypo_kl(*samples()))


def test_dpo_gradient_is_the_published_one():
    """-β σ(-βd) for the chosen answer, its opposite for the rejected."""
    batch = pairs()
    chosen, rejected = gradients(dpo_loss(*batch, beta=0.2), batch[:2])
    weight = 0.2 * torch.sigmoid(-0.2 * gap(*batch)).detach()
    torch.testing.assert_close(chosen, -weight)
    torch.testing.assert_close(rejected, weight)


@pytest.mark.parametrize("kind", [Logistic(), Ipo(), Hinge()])
def test_gradcheck(kind):
    batch = [x.detach().requires_grad_() for x in pairs()]
    assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, beta=0.1, kind=kind), batch)


def test_offline_kl():
    batch, kl = pairs(), torch.rand(3, 2, 5, dtype=torch.float64, requires_grad=True)
    loss = offline_kl_loss(*batch, kl, beta=0.1, kl_weight=0.5)
    torch.testing.assert_close(loss, dpo_loss(*batch, beta=0.1) + 0.25 * kl.sum((1, 2)))
    torch.testing.assert_close(offline_kl_loss(*batch, kl.sum(-1), beta=0.1, kl_weight=0.5), loss)
    assert torch.equal(offline_kl_loss(*batch, kl, beta=0.1, kl_weight=0), dpo_loss(*batch, beta=0.1))
    with pytest.raises(ValueError, match=r"state_kl must be \(b, 2\)"):
        offline_kl_loss(*batch, kl.transpose(1, 2), beta=0.1, kl_weight=0.5)


def test_nll():
    log_prob, num_tokens = torch.tensor([-6.0, -1.0]), torch.tensor([4, 2])
    assert nll(log_prob).tolist() == [6.0, 1.0]
    assert nll(log_prob, num_tokens).tolist() == [1.5, 0.5]
    with pytest.raises(ValueError, match=r"must be \(b,\)"):
        nll(log_prob.unsqueeze(0))


@pytest.mark.parametrize("place", range(4))
def test_wrong_shapes_name_the_argument(place):
    batch = pairs()
    batch[place] = batch[place][:, None]
    name = ("chosen", "rejected", "ref_chosen", "ref_rejected")[place]
    with pytest.raises(ValueError, match=rf"^{name} is \(3, 1\)"):
        dpo_loss(*batch, beta=0.1)


@pytest.mark.parametrize(
    ("online", "options", "message"),
    [
        ((None, None), {}, "needs own and ref_own"),
        (samples(), {"kl_weight": -0.1}, "kl_weight must be 0 or more"),
        (samples(b=2), {}, "own has samples of 2 prompts beside 3 pairs"),
        (samples(k=1), {}, "needs 2 or more samples"),
        (samples(), {"estimator": "k3"}, "it is biased"),
    ],
)
def test_hypo_refusals(online, options, message):
    with pytest.raises(ValueError, match=message):
        hypo_loss(*pairs(), *online, **{"beta": 0.1, "kl_weight": 0.1, **options})


def test_hyperparameters_are_keywords():
    for function in (dpo_loss, hypo_loss, offline_kl_loss):
        kinds = {name: p.kind for name, p in inspect.signature(function).parameters.items()}
        assert kinds["beta"] == kinds["kind"] == inspect.Parameter.KEYWORD_ONLY
