"""Token decision processes small enough to solve: tabular PPO and DR-PO with the library's losses, exact answers too.

A state is all that a policy sees before a token; tokens lead on without chance. Policies are tables of
log-probabilities (..., states, tokens), and a leading dimension of seeds is trained at once: Adam acts on each weight
alone, and each seed's losses are divided by its own number of actions.

    decoy_and_lock      token 0 enters a lock of six tokens that pays 1 at its end, all others end at once and pay 0.3
    every_answer        vocabulary of 3 with an end token, at most 4 tokens, a random score for each of 31 answers
    Chance              random processes with chance for the natural policy gradient, where everything is a sum
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prefkit.objectives.kl_penalty import kl_reward, last_action, token_rewards
from prefkit.objectives.policy_gradient import clipped_surrogate
from prefkit.objectives.reduce import sum_tokens
from prefkit.objectives.value import clipped_value_loss, gae, whiten

END = -1
LOCK, DECOY = 6, 0.3


@dataclass(frozen=True, kw_only=True)
class TokenMdp:
    """Starts in state 0 and ends by a token that leads to END or after `horizon` tokens."""

    next_state: Tensor
    """(states, tokens)"""
    reward: Tensor
    """(states, tokens), paid for the token"""
    log_reference: Tensor
    """(states, tokens)"""
    horizon: int

    def value(self, log_policy: Tensor, reward: Tensor | None = None) -> Tensor:
        """(..., states, tokens) -> (...): the exact expected sum of rewards from state 0."""
        reward, value = self.reward if reward is None else reward, log_policy.new_zeros(log_policy.shape[:-1])
        for _ in range(self.horizon):
            after = torch.where(self.next_state == END, 0.0, value[..., self.next_state.clamp(min=0)])
            value = (log_policy.exp() * (reward + after)).sum(-1)
        return value[..., 0]

    def regularised(self, log_policy: Tensor, coefficient: float) -> Tensor:
        """E r - coefficient · KL(π‖π_ref) over whole answers, exact."""
        return self.value(log_policy, self.reward - coefficient * (log_policy - self.log_reference))


@dataclass(frozen=True, kw_only=True)
class Paths:
    """(..., horizon) each; off the mask they hold 0."""

    states: Tensor
    tokens: Tensor
    mask: Tensor

    def per_token(self, table: Tensor) -> Tensor:
        """(states, tokens) -> the table's entry at each token."""
        return torch.where(self.mask, table[self.states, self.tokens], 0.0)


def every_path(mdp: TokenMdp) -> Paths:
    """All answers, (number, horizon)."""

    def walk(state: int, path: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        if state == END or len(path) == mdp.horizon:
            yield path
            return
        for token, after in enumerate(mdp.next_state[state].tolist()):
            yield from walk(after, [*path, (state, token)])

    paths = list(walk(0, []))
    filled = torch.tensor([path + [(0, 0)] * (mdp.horizon - len(path)) for path in paths])
    mask = torch.arange(mdp.horizon) < torch.tensor([len(path) for path in paths]).unsqueeze(-1)
    return Paths(states=filled[..., 0], tokens=filled[..., 1], mask=mask)


def decoy_and_lock(q: float) -> TokenMdp:
    """q: probability of the right token in the lock under π_ref. States: start, six of the lock, five dead ones."""
    num_states, dead = 2 * LOCK, LOCK + 1
    next_state = torch.full((num_states, 4), END)
    reward = torch.zeros(num_states, 4, dtype=torch.float64)
    reference = torch.full((num_states, 4), 0.25, dtype=torch.float64)
    next_state[0, 0] = 1
    reward[0, 1:] = DECOY
    reference[0] = torch.tensor([0.5, *[0.5 / 3] * 3], dtype=torch.float64)
    for place in range(1, LOCK + 1):
        reference[place] = torch.tensor([q, *[(1 - q) / 3] * 3], dtype=torch.float64)
        if place < LOCK:
            next_state[place, 0], next_state[place, 1:] = place + 1, dead + place - 1
    for place in range(dead, num_states - 1):
        next_state[place] = place + 1
    reward[LOCK, 0] = 1.0
    return TokenMdp(next_state=next_state, reward=reward, log_reference=reference.log(), horizon=LOCK + 1)


def every_answer(seed: int) -> TokenMdp:
    """Tokens 0 and 1 go on, 2 ends; states are the 15 beginnings of 0 to 3 tokens."""
    depth, draw = 4, torch.Generator().manual_seed(seed)
    num_states = 2**depth - 1
    next_state = torch.full((num_states, 3), END)
    inner = torch.arange(2 ** (depth - 1) - 1)
    next_state[inner, 0], next_state[inner, 1] = 2 * inner + 1, 2 * inner + 2
    reward = torch.where(next_state == END, torch.randn(num_states, 3, generator=draw, dtype=torch.float64), 0.0)
    reference = torch.randn(num_states, 3, generator=draw, dtype=torch.float64).log_softmax(-1)
    return TokenMdp(next_state=next_state, reward=reward, log_reference=reference, horizon=depth)


def roll_out(mdp: TokenMdp, log_policy: Tensor, forced: Tensor, cuts: Tensor, draws: torch.Generator) -> Paths:
    """One answer for each row of `forced` (s, b, horizon), whose first `cuts` (s, b) tokens are taken from there."""
    seeds = torch.arange(len(log_policy)).unsqueeze(-1)
    uniform = torch.rand(forced.shape, generator=draws, dtype=torch.float64)
    upper = log_policy.exp().cumsum(-1)[..., :-1]
    state = torch.zeros_like(cuts)
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    for t in range(mdp.horizon):
        alive = state != END
        here = state.clamp(min=0)
        own = (upper[seeds, here] < uniform[..., t, None]).sum(-1)
        token = torch.where(t < cuts, forced[..., t], own)
        columns.append((here, torch.where(alive, token, 0), alive))
        state = torch.where(alive, mdp.next_state[here, token], END)
    states, tokens, mask = (torch.stack(column, -1) for column in zip(*columns, strict=True))
    return Paths(states=states, tokens=tokens, mask=mask)


def draw_cuts(lengths: Tensor, reset_prob: float, k_min: int, draws: torch.Generator) -> Tensor:
    """k uniform in {k_min, .., length - 1} with `reset_prob`, else 0; answers of one token are never cut."""
    chance, place = torch.rand(2, *lengths.shape, generator=draws, dtype=torch.float64)
    k = k_min + (place * (lengths - k_min)).long()
    return torch.where((chance < reset_prob) & (lengths >= 2), k, 0)


@dataclass(frozen=True, kw_only=True)
class Training:
    """PPO, and DR-PO where `reset_prob` is above 0."""

    reset_prob: float = 0.0
    k_min: int = 1
    kl_coefficient: float = 0.02
    num_updates: int = 150
    num_episodes: int = 64
    num_epochs: int = 4
    lam: float = 0.95
    learning_rate: float = 0.05
    decay: bool = False
    """let the learning rate fall linearly to 0"""
    whitened: bool = False
    """Whiten the advantages of each seed. In the lock that costs DR-PO solved seeds (docs/methods/drpo.md)."""


def train(mdp: TokenMdp, setting: Training, *, num_seeds: int, seed: int = 0, log_data: Tensor | None = None) -> Tensor:
    """Log-policies (num_seeds, states, tokens) trained from π_ref; resets cut answers of `log_data`, or of π_ref."""
    draws = torch.Generator().manual_seed(seed)
    reference = mdp.log_reference.expand(num_seeds, -1, -1)
    data = reference if log_data is None else log_data.expand(num_seeds, -1, -1)
    logits = reference.clone().requires_grad_()
    critic = torch.zeros(reference.shape[:-1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, critic], lr=setting.learning_rate)
    for update in range(setting.num_updates):
        if setting.decay:
            optimizer.param_groups[0]["lr"] = setting.learning_rate * (1 - update / setting.num_updates)
        nothing = torch.zeros(num_seeds, setting.num_episodes, mdp.horizon, dtype=torch.long)
        stored = roll_out(mdp, data, nothing, nothing[..., 0], draws)
        cuts = draw_cuts(stored.mask.sum(-1), setting.reset_prob, setting.k_min, draws)
        paths = roll_out(mdp, logits.detach().log_softmax(-1), stored.tokens, cuts, draws)
        improve(mdp, setting, optimizer, paths, cuts, logits, critic)
    return logits.detach().log_softmax(-1)


def improve(
    mdp: TokenMdp,
    setting: Training,
    optimizer: torch.optim.Optimizer,
    paths: Paths,
    cuts: Tensor,
    logits: Tensor,
    critic: Tensor,
) -> None:
    """The epochs of one update on (s, b, horizon) paths, whose actions begin at `cuts`."""
    num_seeds = len(logits)
    seeds = torch.arange(num_seeds)[:, None, None]
    rows = paths.mask.shape[0] * paths.mask.shape[1], paths.mask.shape[2]
    act = (paths.mask & (torch.arange(mdp.horizon) >= cuts.unsqueeze(-1))).reshape(rows)

    def log_probs() -> Tensor:
        return logits.log_softmax(-1)[seeds, paths.states, paths.tokens].reshape(rows)

    def values() -> Tensor:
        return critic[seeds, paths.states].reshape(rows)

    old, old_values = log_probs().detach(), values().detach()
    reference = mdp.log_reference[paths.states, paths.tokens].reshape(rows)
    scores = sum_tokens(mdp.reward[paths.states, paths.tokens], paths.mask).reshape(-1)
    kl = kl_reward(old, reference, act, coefficient=setting.kl_coefficient)
    advantages, returns = gae(token_rewards(kl, scores, last_action(act), act), old_values, act, lam=setting.lam)
    if setting.whitened:
        pairs = zip(advantages.chunk(num_seeds), act.chunk(num_seeds), strict=True)
        advantages = torch.cat([whiten(of_seed, mask) for of_seed, mask in pairs])
    share = 1 / act.reshape(num_seeds, -1).sum(-1)
    for _ in range(setting.num_epochs):
        policy = clipped_surrogate(log_probs(), old, advantages, act)
        value = clipped_value_loss(values(), old_values, returns, act)
        loss = ((policy + value).reshape(num_seeds, -1).sum(-1) * share).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@dataclass(frozen=True, kw_only=True)
class Chance:
    """A batch m of processes with `horizon` steps, n states, a actions, and total reward in [0, 1]."""

    start: Tensor
    """(m, n)"""
    moves: Tensor
    """(m, n, a, n)"""
    reward: Tensor
    """(m, horizon, n, a), 0 or 1 / horizon"""
    log_reference: Tensor
    """(m, horizon, n, a), as is every policy"""

    @property
    def horizon(self) -> int:
        return self.reward.shape[1]

    def q(self, policy: Tensor | None) -> Tensor:
        """Q of a policy, or of the best one, (m, horizon, n, a)."""
        after, steps = self.reward.new_zeros(self.start.shape), []
        for h in reversed(range(self.horizon)):
            steps.append(self.reward[:, h] + (self.moves @ after[:, None, :, None]).squeeze(-1))
            after = steps[-1].amax(-1) if policy is None else (policy[:, h] * steps[-1]).sum(-1)
        return torch.stack(steps[::-1], 1)

    def value(self, policy: Tensor) -> Tensor:
        return (self.start * (policy[:, 0] * self.q(policy)[:, 0]).sum(-1)).sum(-1)

    def occupancy(self, policy: Tensor) -> Tensor:
        """Probability of each (state, action) at each step."""
        here, steps = self.start, []
        for h in range(self.horizon):
            steps.append(here.unsqueeze(-1) * policy[:, h])
            here = torch.einsum("mna,mnak->mk", steps[-1], self.moves)
        return torch.stack(steps, 1)


def chance(seed: int, *, num: int = 8, horizon: int = 2, num_states: int = 4, num_actions: int = 3) -> Chance:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    return Chance(
        start=normal(num, num_states).softmax(-1),
        moves=normal(num, num_states, num_actions, num_states).mul(2).softmax(-1),
        reward=(torch.rand(num, horizon, num_states, num_actions, generator=draw) < 0.4).double() / horizon,
        log_reference=normal(num, horizon, num_states, num_actions).log_softmax(-1),
    )


def npg_step(log_policy: Tensor, log_reference: Tensor, q: Tensor, *, lam: float, eta: float) -> Tensor:
    """argmin over p of -<q, p> + lam KL(p‖π_ref) + KL(p‖π)/eta in each state, as log-probabilities."""
    return ((eta * lam * log_reference + log_policy + eta * q) / (1 + eta * lam)).log_softmax(-1)


def npg_iterates(process: Chance, *, num: int, lam: float) -> Iterator[Tensor]:
    """π_1 = π_ref, .., π_num as log-probabilities, with exact Q and eta = 1/√num, total reward at most 1."""
    log_policy = process.log_reference
    for _ in range(num):
        yield log_policy
        q = process.q(log_policy.exp())
        log_policy = npg_step(log_policy, process.log_reference, q, lam=lam, eta=1 / math.sqrt(num))
