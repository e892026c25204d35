"""Token log-probs from hidden states: the softmax's own, with temperature, bias and replayed kept sets, in chunks of any size."""

from __future__ import annotations

import importlib

import pytest
import torch

from rorqual.kernels import token_logprobs

module = importlib.import_module("rorqual.kernels.logprobs")


def draw(N, D, V, generator, dtype=torch.float64):
    hidden, head = (torch.randn(*s, dtype=dtype, generator=generator) for s in ((N, D), (V, D)))
    return hidden, head, torch.randint(0, V, (N,), generator=generator)


def kept_sets(N, V, targets, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged sets that hold their target; every third row keeps all (an empty set)."""
    rows = []
    for t, target in enumerate(targets.tolist()):
        some = torch.randperm(V, generator=generator)[: 1 + t % 5].tolist()
        rows.append([] if t % 3 == 0 else sorted({*some, max(target, 0)}))
    return torch.tensor([s for row in rows for s in row], dtype=torch.int32), torch.tensor([0, *map(len, rows)]).cumsum(0)


def distribution(hidden, head, temperature, kept=None, bias=None):
    """log softmax over the kept set, [N, V], row by row."""
    logits = hidden @ head.t() + (0 if bias is None else bias)
    logits = logits / torch.as_tensor(temperature).reshape(-1, 1)
    if kept is not None:
        for t in range(len(hidden)):
            ids = kept[0][kept[1][t] : kept[1][t + 1]].long()
            if len(ids):
                hidden_row = torch.full_like(logits[t], -torch.inf)
                logits = torch.cat([logits[:t], hidden_row.index_copy(0, ids, logits[t][ids])[None], logits[t + 1 :]])
    return logits.log_softmax(1)


@pytest.mark.parametrize("chunk", (1, 300, 1 << 22))
@pytest.mark.parametrize("with_kept", (False, True), ids=("all", "kept"))
def test_logprobs_entropy_and_each_gradient_equal_the_softmax(with_kept, chunk, generator, monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk)
    N, D, V = 53, 9, 31
    hidden, head, targets = draw(N, D, V, generator)
    kept = kept_sets(N, V, targets, generator) if with_kept else None
    temperature = torch.rand(N, dtype=torch.float64, generator=generator) + 0.5
    bias = torch.randn(V, dtype=torch.float64, generator=generator)
    hidden.requires_grad_(), head.requires_grad_()
    results = token_logprobs(hidden, head, targets, temperature, kept, bias, return_entropy=True)
    logs = distribution(hidden, head, temperature, kept, bias)
    finite = torch.where(logs.isfinite(), logs, 0)
    expected = logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * finite).sum(1)
    torch.testing.assert_close(results, expected, rtol=1e-11, atol=1e-11)
    ups = [torch.randn(N, dtype=torch.float64, generator=generator) for _ in range(2)]
    ours, theirs = (torch.autograd.grad(r, [hidden, head], ups) for r in (results, expected))
    for name, a, b in zip(("hidden", "head"), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_pass_finite_differences(generator) -> None:
    hidden, head, targets = draw(4, 3, 7, generator)
    hidden.requires_grad_(), head.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets, 0.7, return_entropy=True), (hidden, head))


def test_bfloat16_inputs_are_multiplied_in_float32_bitwise(generator) -> None:
    """As the model does where it samples: a rounded logit of 20 would be off by up to 0.06 nats."""
    hidden, head, targets = draw(37, 70, 90, generator, torch.float32)
    leaves = [hidden.bfloat16().requires_grad_(), head.bfloat16().requires_grad_()]
    wide = [x.detach().float().requires_grad_() for x in leaves]
    logprobs, expected = token_logprobs(*leaves, targets), token_logprobs(*wide, targets)
    assert logprobs.dtype == torch.float32 and torch.equal(logprobs, expected)
    grads, wanted = (torch.autograd.grad(r.sum(), x) for r, x in ((logprobs, leaves), (expected, wide)))
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(grads, wanted, strict=True))


def test_the_negative_mean_is_the_cross_entropy(generator) -> None:
    hidden, head, targets = draw(20, 8, 40, generator, torch.float32)
    expected = torch.nn.functional.cross_entropy(hidden @ head.t(), targets)
    torch.testing.assert_close(-token_logprobs(hidden, head, targets).mean(), expected, rtol=1e-5, atol=1e-5)


def test_padding_targets_give_zero_and_no_gradient_even_from_nan(generator) -> None:
    hidden, head, targets = draw(9, 4, 11, generator)
    targets[[2, 5]] = -1
    hidden[2] = torch.nan
    hidden.requires_grad_(), head.requires_grad_()
    logprobs = token_logprobs(hidden, head, targets)
    assert (logprobs[[2, 5]] == 0).all() and logprobs.isfinite().all()
    grads = torch.autograd.grad(logprobs.sum(), [hidden, head])
    assert (grads[0][[2, 5]] == 0).all() and grads[1].isfinite().all()


def test_a_target_outside_its_kept_set_has_minus_infinity_and_no_gradient(generator) -> None:
    hidden, head, targets = draw(2, 4, 11, generator)
    targets[:] = torch.tensor([3, 4])
    kept = torch.tensor([1, 2, 4, 5]), torch.tensor([0, 2, 4])
    hidden.requires_grad_(), head.requires_grad_()
    logprobs = token_logprobs(hidden, head, targets, kept=kept)
    assert logprobs[0] == -torch.inf and logprobs[1].isfinite()
    grads = torch.autograd.grad(logprobs, [hidden, head], torch.ones(2).double())
    assert (grads[0][0] == 0).all() and all(g.isfinite().all() for g in grads)


def test_a_kept_set_of_one_has_certainty(generator) -> None:
    hidden, head, targets = draw(3, 4, 11, generator, torch.float32)
    logprobs, entropy = token_logprobs(hidden, head, targets, kept=(targets, torch.arange(4)), return_entropy=True)
    assert (logprobs == 0).all() and (entropy == 0).all()


@pytest.mark.parametrize("V, D", ((2048, 128), (100, 1000), (8192, 64)))
def test_a_row_is_bitwise_the_same_in_any_batch_and_chunk(V, D, generator, monkeypatch) -> None:
    hidden, head, targets = draw(70, D, V, generator, torch.float32)
    kept = kept_sets(70, V, targets, generator)
    for sets in (None, kept):
        whole = token_logprobs(hidden, head, targets, 0.8, sets)
        for rows in (1, 3, 16, 33):
            for low in (0, 70 - rows):
                part = slice(low, low + rows)
                some = None if sets is None else (sets[0], sets[1][low : low + rows + 1])
                assert torch.equal(token_logprobs(hidden[part], head, targets[part], 0.8, some), whole[part]), rows
        for chunk in (1, V * 40):
            with monkeypatch.context() as patch:
                patch.setattr(module, "CHUNK_LOGITS", chunk)
                assert torch.equal(token_logprobs(hidden, head, targets, 0.8, sets), whole)


def test_bad_requests_say_what_was_expected(generator) -> None:
    hidden, head, targets = draw(3, 4, 11, generator)
    with pytest.raises(ValueError, match="temperature: expected above 0"):
        token_logprobs(hidden, head, targets, 0.0)
    with pytest.raises(ValueError, match=r"targets: expected .* below 11"):
        token_logprobs(hidden, head, targets + 11)
    assert token_logprobs(hidden[:0], head, targets[:0]).shape == (0,)
