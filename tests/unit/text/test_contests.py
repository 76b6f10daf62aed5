"""Where a batch's answers stand in its one forward pass, and what the losses get of them."""

from __future__ import annotations

import torch

from prefkit.domains.text.contests import Answer, Contest, Origin, Plan
from prefkit.objectives.optimism import selm_loss
from prefkit.records import Match

OWN = (3, 4, 5, 2)


def contest(chosen: int, rejected: int, *answers: tuple[int, ...], position: int = 0) -> Contest:
    """Candidates of the given tokens: own, chosen, rejected."""
    origins: tuple[Origin, ...] = ("own", "chosen", "rejected")
    return Contest(
        position=position,
        row=position,
        answers=tuple(
            Answer(text=str(tokens), tokens=tokens, origin=origin)
            for tokens, origin in zip(answers, origins, strict=True)
        ),
        matches=(Match(chosen=chosen, rejected=rejected),),
    )


def test_the_own_answer_stands_behind_the_prompt_of_its_pair_and_once() -> None:
    """Neither chosen nor rejected: three answers in one group. In the pair, or equal to one of it: two."""
    middle = contest(1, 2, OWN, (6, 2), (7, 8, 2))
    best = contest(0, 2, OWN, (6, 2), (7, 8, 2), position=1)
    same_tokens = contest(1, 2, OWN, OWN, (7, 8, 2), position=2)
    plan = Plan([middle, best, same_tokens], [(9,), (9, 9), (9, 9, 9)], own=[0, 0, 0])
    assert [tuple(group.prompt) for group in plan.groups] == [(9,), (9, 9), (9, 9, 9)]
    assert [list(group.answers) for group in plan.groups] == [
        [(6, 2), (7, 8, 2), OWN],
        [OWN, (7, 8, 2)],
        [OWN, (7, 8, 2)],
    ]
    values = torch.arange(7.0)
    scores = plan.scores(values, -values)
    assert scores.own is not None and scores.ref_own is not None and scores.num_own_tokens is not None
    assert (scores.chosen.tolist(), scores.rejected.tolist(), scores.own.tolist()) == ([0, 3, 5], [1, 4, 6], [2, 3, 5])
    assert torch.equal(scores.ref_own, -scores.own) and scores.num_own_tokens.tolist() == [4, 4, 4]


def test_a_reused_score_has_the_loss_and_the_gradient_of_a_third_forward_pass() -> None:
    plan = Plan([contest(0, 2, OWN, (6, 2), (7, 8, 2))], [(9,)], own=[0])
    values, reference = torch.tensor([-9.0, -20.0], requires_grad=True), torch.tensor([-11.0, -15.0])
    found = plan.scores(values, reference)
    six = (found.chosen, found.rejected, found.own, found.ref_chosen, found.ref_rejected, found.ref_own)
    loss = selm_loss(*six, beta=0.1, alpha=0.3)
    (slope,) = torch.autograd.grad(loss.sum(), values)
    third = torch.tensor([-9.0, -20.0, -9.0], requires_grad=True)
    apart = selm_loss(
        third[:1], third[1:2], third[2:], *(found.ref_chosen, found.ref_rejected), found.ref_own, beta=0.1, alpha=0.3
    )
    (each,) = torch.autograd.grad(apart.sum(), third)
    assert torch.equal(loss, apart)
    torch.testing.assert_close(slope, torch.stack([each[0] + each[2], each[1]]))


def test_without_an_own_answer_the_pair_alone_is_scored() -> None:
    plan = Plan([contest(1, 2, OWN, (6, 2), (7, 8, 2))], [(9,)], own=[])
    assert [list(group.answers) for group in plan.groups] == [[(6, 2), (7, 8, 2)]]
    assert plan.scores(torch.zeros(2), torch.zeros(2)).own is None


def test_a_longer_own_answer_leaves_the_pair_where_it_is() -> None:
    short, long = (contest(1, 2, own, (6, 2), (7, 8, 2)) for own in (OWN, OWN[:-1] * 20))
    one, two = (Plan([found], [(9,)], own=[0]) for found in (short, long))
    assert (one.chosen, one.rejected) == (two.chosen, two.rejected)
    assert list(one.groups[0].answers)[:2] == list(two.groups[0].answers)[:2]
