"""The losses in a loop of your own: HyPO beside DPO on a policy of five answers, where everything can be counted.

Answer 0 is preferred to answer 1; answers 2 to 4 stand in no pair. DPO empties or fills them as a side effect; the KL
on own samples holds the whole policy near the reference, at the price of a smaller margin.
"""

from __future__ import annotations

import torch

from prefkit.objectives.preference import dpo_loss, hypo_kl, hypo_loss

PROMPTS, SAMPLES, STEPS = 64, 4, 200
torch.manual_seed(0)
features = torch.randn(5, 3)  # shared features: what is learned on the pair reaches the other answers
reference = torch.log_softmax(torch.tensor([-3.0, 0.0, -1.0, -1.0, -1.0]), -1)


def train(kl_weight: float) -> torch.Tensor:
    """Log-probabilities of the five answers after training."""
    weights = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.05)
    for _ in range(STEPS):
        policy = torch.log_softmax(reference + features @ weights, -1)
        pairs = [scores[i].expand(PROMPTS) for scores in (policy, reference) for i in (0, 1)]
        if kl_weight:
            drawn = torch.multinomial(policy.detach().exp(), PROMPTS * SAMPLES, replacement=True)
            own, ref_own = policy[drawn].view(PROMPTS, SAMPLES), reference[drawn].view(PROMPTS, SAMPLES)
            losses = hypo_loss(*pairs, own, ref_own, beta=0.1, kl_weight=kl_weight)
        else:
            losses = dpo_loss(*pairs, beta=0.1)
        optimizer.zero_grad()
        losses.mean().backward()  # losses are per example: (PROMPTS,)
        optimizer.step()
    return torch.log_softmax(reference + features @ weights, -1).detach()


print(f"reference: mass in no pair {reference[2:].exp().sum().item():.3f}")
for name, kl_weight in (("DPO", 0.0), ("HyPO", 0.2)):
    final = train(kl_weight)
    drawn = torch.multinomial(final.exp(), 1000, replacement=True)
    kl = hypo_kl(final[drawn][None], reference[drawn][None]).item()
    margin = 0.1 * ((final - reference)[0] - (final - reference)[1]).item()
    unpaired = final[2:].exp().sum().item()
    print(f"{name:5} margin {margin:.2f}   KL to the reference {kl:.2f} nats   mass in no pair {unpaired:.3f}")
