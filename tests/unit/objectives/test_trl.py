"""The same DPO as TRL's: one padded batch, one tiny Llama, TRL's loss and gradients beside ours.

TRL is no dependency of the tests; to run this, `pip install --no-deps trl`.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from prefkit.objectives.margin import Hinge, Ipo, Logistic
from prefkit.objectives.preference import dpo_loss, nll
from prefkit.objectives.reduce import sum_tokens, token_log_probs

pytest.importorskip("trl", reason="trl is not installed: the comparison with TRL's DPOTrainer is optional")

ROWS = [
    {"prompt": "what colour is the sky", "chosen": " blue", "rejected": " the sky is very very green"},
    {"prompt": "what is the colour of grass", "chosen": " the grass is green", "rejected": " red"},
    {"prompt": "sea", "chosen": " deep blue and deep green", "rejected": " red and red"},
]
WORDS = [
    "<pad>",
    "<eos>",
    "<unk>",
    *sorted({word for row in ROWS for text in row.values() for word in text.split()}),
]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="module")
def models():
    """A policy some way from its reference."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    reference = LlamaForCausalLM(config)
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return policy, reference


def trl_trainer(models, tokenizer, tmp_path, **options):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy, reference = copy.deepcopy(models[0]), copy.deepcopy(models[1])
    args = DPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(ROWS),
        bf16=False,
        use_cpu=True,
        report_to=[],
        **options,
    )
    return DPOTrainer(
        model=policy,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )


def answer_log_probs(model, batch) -> tuple[Tensor, Tensor]:
    """Summed over each answer: chosen (b,) and rejected (b,), the two halves of TRL's batch."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    per_token = token_log_probs(logits[:, :-1], batch["input_ids"][:, 1:])
    return sum_tokens(per_token, batch["completion_mask"][:, 1:]).chunk(2)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sigmoid", Logistic()), ("hinge", Hinge()), ("ipo", Ipo()), ("sigmoid+sft", Logistic())],
)
def test_loss_and_gradients_equal_trls(models, tokenizer, tmp_path, name, kind):
    losses = name.split("+")
    weights = {"loss_weights": [1.0, 0.3]} if len(losses) > 1 else {}
    trainer = trl_trainer(models, tokenizer, tmp_path, beta=0.3, loss_type=losses, **weights)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["attention_mask"].min() == 0, "the batch must hold padding"
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()

    policy, reference = copy.deepcopy(models[0]), models[1]
    chosen, rejected = answer_log_probs(policy, batch)
    with torch.no_grad():
        ref_chosen, ref_rejected = answer_log_probs(reference, batch)
    lengths = batch["completion_mask"].sum(-1).chunk(2)
    arguments = [chosen, rejected, ref_chosen, ref_rejected]
    if name == "ipo":  # TRL averages IPO's log-ratios over tokens; we follow the paper and sum
        arguments = [x / n for x, n in zip(arguments, (*lengths, *lengths), strict=True)]
    ours = dpo_loss(*arguments, beta=0.3, kind=kind).mean()
    if "sft" in losses:  # TRL's term is a mean over all chosen tokens of the batch
        ours = ours + 0.3 * nll(chosen).sum() / lengths[0].sum()
    ours.backward()

    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert abs(ours.item() - torch.tensor(2.0).log().item()) > 1e-3
    expected = dict(trainer.model.named_parameters())
    for parameter_name, parameter in policy.named_parameters():
        assert parameter.grad is not None and expected[parameter_name].grad is not None
        torch.testing.assert_close(parameter.grad, expected[parameter_name].grad, rtol=1e-4, atol=1e-6)
