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
