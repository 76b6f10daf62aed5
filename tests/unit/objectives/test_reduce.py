from __future__ import annotations

import pytest
import torch

from prefkit.objectives.reduce import mean_tokens, sum_tokens, token_log_probs


def test_token_log_probs_equal_log_softmax():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, generator=draw, dtype=torch.float64)
    tokens = torch.randint(7, (2, 3), generator=draw)
    expected = torch.distributions.Categorical(logits=logits).log_prob(tokens)
    torch.testing.assert_close(token_log_probs(logits, tokens), expected)


def test_half_precision_logits_are_normalised_in_float32():
    logits = torch.full((1, 4096), 10.0, dtype=torch.bfloat16)
    value = token_log_probs(logits, torch.tensor([0]))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(-torch.tensor(4096.0).log().item(), rel=1e-6)


def test_padding_enters_neither_value_nor_gradient():
    values = torch.tensor([[1.0, 2.0, float("nan")], [3.0, float("inf"), 9.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    total = sum_tokens(values, mask)
    assert total.tolist() == [3.0, 3.0]
    assert mean_tokens(values, mask).tolist() == [1.5, 3.0]
    assert torch.autograd.grad(total.sum(), values)[0].tolist() == [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


def test_refusals():
    with pytest.raises(ValueError, match="one shape"):
        sum_tokens(torch.zeros(2, 3), torch.ones(2, 2))
    with pytest.raises(ValueError, match="no token"):
        mean_tokens(torch.zeros(2, 3), torch.tensor([[1, 0, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="one row for each"):
        token_log_probs(torch.zeros(2, 3, 7), torch.zeros(2, dtype=torch.long))
