"""What each metric is called, means, and is compared with. `docs/metrics.md` lists the same names."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Metric:
    """`neutral` is the value that means 'nothing learned', where there is one; `better` is the good
    direction.
    """

    label: str
    meaning: str
    better: str = ""
    neutral: float | None = None


METRICS: dict[str, Metric] = {
    "loss": Metric(
        "Loss",
        "training objective: nats per answer token for SFT, a surrogate whose value is not the KL for HyPO",
        "lower",
    ),
    "grad_norm": Metric("Gradient norm", "global norm of the gradient before clipping"),
    "learning_rate": Metric("Learning rate", "learning rate of the step"),
    "epoch": Metric("Epoch", "passes over the training data so far"),
    "num_tokens": Metric("Tokens", "training tokens seen so far"),
    "rewards/accuracies": Metric(
        "Preference accuracy",
        "share of pairs whose chosen answer has the higher reward, a tie counting 0.5",
        "higher",
        0.5,
    ),
    "rewards/margins": Metric("Reward margin", "mean of chosen minus rejected reward", "higher", 0.0),
    "rewards/chosen": Metric(
        "Reward of chosen", "mean reward of the chosen answers (β times the log-ratio for a policy)"
    ),
    "rewards/rejected": Metric(
        "Reward of rejected", "mean reward of the rejected answers (β times the log-ratio for a policy)"
    ),
    "order_agreement": Metric(
        "Agreement between orders", "share of pairs judged alike whichever answer is shown first", "higher"
    ),
    "logps/chosen": Metric("Log-prob of chosen", "mean summed log-probability of the chosen answers, in nats"),
    "logps/rejected": Metric("Log-prob of rejected", "mean summed log-probability of the rejected answers, in nats"),
    "logps/completion": Metric("Log-prob of answers", "mean summed log-probability of the training answers, in nats"),
    "objective/kl": Metric(
        "KL to the reference", "mean log-ratio of whole own answers to the reference, nats per answer", "lower"
    ),
    "objective/scores": Metric("Reward-model score", "mean score of own answers by the reward model", "higher"),
    "gold": Metric("Gold reward", "mean gold reward of own answers", "higher"),
    "win_rate_over_start": Metric(
        "Win rate over the start",
        "share of prompts whose answer beats the start model's by this judge, a tie counting 0.5",
        "higher",
        0.5,
    ),
    "win_rate_over_data": Metric(
        "Win rate over the data's answers",
        "share of prompts whose answer beats the data set's own by this judge, a tie counting 0.5",
        "higher",
        0.5,
    ),
    "strength": Metric("Strength", "mean probability, by the judge, that the chosen answer is the better one"),
    "optimism/loss": Metric("Optimism term", "the part of the loss that pushes an answer down; it may be negative"),
    "optimism/gradient_share": Metric(
        "Optimism's share of the gradient",
        "norm of the optimism term's gradient over the sum of both terms' norms, in the last trained layer",
    ),
    "optimism/log_ratio": Metric(
        "Log-ratio of the optimism answer",
        "mean log-ratio to the reference of the answer that optimism lowers, in nats",
    ),
    "optimism/log_ratio_per_token": Metric(
        "Log-ratio per token of the optimism answer", "the same per token, which the divergence detector watches"
    ),
    "rounds/round": Metric("Round", "the round that a step belongs to"),
    "rounds/matches": Metric("Pairs of the round", "pairs of answers that the round trains on"),
    "rounds/dropped": Metric("Dropped prompts", "prompts of the round that gave no pair"),
    "rounds/comparisons": Metric("Comparisons asked", "comparisons the judge was asked for so far, over all rounds"),
    "rounds/judge_calls": Metric("Calls of the judge", "requests or forward passes of the judge so far"),
    "rounds/judge_tokens": Metric("Tokens of the judge", "tokens read and written by the judge so far"),
    "rounds/order_agreement": Metric(
        "Agreement between orders, in the round",
        "share of comparisons asked in both orders in which both say the same",
    ),
    "rounds/tie_rate": Metric("Ties", "share of the round's comparisons that tie"),
    "rounds/mean_length": Metric("Length of drawn answers", "mean tokens of the answers drawn in the round"),
    "rounds/answers_finished": Metric(
        "Finished drawn answers", "share of the answers drawn in the round that ended before the token limit"
    ),
    "judge/prefers_longer": Metric(
        "Judge prefers the longer", "share of the round's preferences that go to the answer of more tokens"
    ),
    "judge/gold_accuracy": Metric(
        "Judge agrees with gold", "share of the round's preferences that the gold reward has, too", "higher"
    ),
    "judge/gold_calibration_error": Metric(
        "Calibration error of the judge", "of its probabilities, with the gold reward's preferences as labels", "lower"
    ),
    "judge/gold_pairs": Metric("Pairs with a gold preference", "comparisons the judge's agreement with gold rests on"),
    "objective/entropy": Metric(
        "Entropy of own tokens", "mean entropy of the distributions that chosen tokens come from"
    ),
    "objective/rlhf_reward": Metric("Reward less KL", "mean score after penalties less kl_coef times the KL", "higher"),
    "objective/kl_coef": Metric("KL coefficient", "weight of the KL in the batch of episodes"),
    "loss/policy": Metric("Policy loss", "clipped surrogate per chosen token (per answer for RLOO)"),
    "loss/value": Metric("Value loss", "half the squared error of the value function per counted position, clipped"),
    "loss/kl": Metric("KL loss", "estimate of the KL to the reference where it is a term of the loss"),
    "policy/ratio": Metric(
        "Probability ratio", "mean of policy over rollout policy; 1 in a batch's first step", "", 1.0
    ),
    "policy/approx_kl": Metric("KL to the rollout policy", "mean of ratio - 1 - log ratio, in nats"),
    "policy/clip_fraction": Metric("Clip fraction", "share of tokens whose gradient the clip takes away"),
    "value/explained_variance": Metric(
        "Explained variance", "share of the returns' variance that the value function explains", "higher", 0.0
    ),
    "rollout/episodes": Metric("Episodes", "answers drawn for training so far"),
    "rollout/sampled_tokens": Metric(
        "Sampled tokens", "tokens the policy wrote for training so far, without forced ones"
    ),
    "rollout/reset_share": Metric("Reset share", "share of the batch's rollouts that began with forced tokens"),
    "entropy": Metric("Entropy", "mean entropy of the next-token distributions along the stored answers, in nats"),
    "mean_token_accuracy": Metric("Token accuracy", "share of stored answer tokens that are the likeliest", "higher"),
    "completions/mean_length": Metric("Answer length", "mean tokens of own answers"),
    "val/contain_eos_token": Metric("Finished answers", "share of own answers that ended before the token limit"),
}
"""names as in metrics.jsonl; evaluation puts `eval_` before them, and a judge's name may follow after a slash"""

HEADLINE = (
    "rewards/accuracies",
    "rewards/margins",
    "win_rate_over_start",
    "gold",
    "objective/scores",
    "win_rate_over_data",
    "objective/kl",
    "loss",
)
"""metrics that can lead the report, most telling first"""

UNIMPORTANT = ("epoch", "num_tokens", "learning_rate", "grad_norm", "seconds", "step")


def rank(name: str) -> int:
    """Place of a metric in reading order; what is not in HEADLINE comes after it."""
    name = plain(name)
    known = [place for place, lead in enumerate(HEADLINE) if name == lead or name.startswith(f"{lead}/")]
    return known[0] if known else len(HEADLINE)


def plain(name: str) -> str:
    """The metric's name without the prefix `eval_`, which says where it was measured."""
    return name.removeprefix("eval_")


def metric(name: str) -> Metric:
    """The glossary entry of a name such as `eval_rewards/margins` or `win_rate_over_start/gold`.

    What follows a known name after a slash is the judge. An unknown name labels itself.
    """
    name = plain(name)
    if name in METRICS:
        return METRICS[name]
    family, _, judge = name.rpartition("/")
    if family in METRICS:
        return replace(METRICS[family], label=f"{METRICS[family].label}, by {judge.replace('_', ' ')}")
    return Metric(name.replace("_", " ").replace("/", " / "), "")


def number(value: float | int | None, *, digits: int = 3) -> str:
    """A number for people: fixed digits in the middle range, scientific at the ends, a true minus sign."""
    if value is None:
        return "–"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):,}".replace("-", "−")
    size = abs(value)
    if size == 0 or 10**-digits <= size < 1000:
        text = f"{value:.{digits if size < 100 else 1}f}"
    elif size >= 1000 and size < 1e6:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.2e}"
    if text.startswith("-") and not text.strip("-0."):
        text = text.removeprefix("-")
    return text.replace("-", "−")


def signed(value: float, *, digits: int = 3) -> str:
    """A difference: like `number`, with its sign always shown."""
    text = number(value, digits=digits)
    return text if text.startswith("−") or not value else f"+{text}"


def duration(seconds: float) -> str:
    """Seconds as '8 min 20 s'."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
