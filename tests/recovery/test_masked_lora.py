"""Adapters under the mask."""

import torch
from recovery_cases import prune, small_model

from sinkprune_plugin.models.decoder_blocks import block_linears
from sinkprune_plugin.recovery.masked_lora import add_adapters, merge_adapters


def test_merging_changes_no_prediction_and_fills_no_zero():
    model = prune(small_model(vocab_size=40))
    before = {name: module.weight.detach().clone() for name, module in block_linears(model).items()}
    ids = torch.randint(3, 40, (2, 8))
    plain = model(input_ids=ids).logits
    adapted = add_adapters(model, rank=4, seed=0)
    # B begins with zeros, so nothing has changed yet.
    assert torch.equal(adapted(input_ids=ids).logits, plain)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(before)
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(input_ids=ids).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        moved = adapted(input_ids=ids).logits
        assert not torch.allclose(moved, plain)
        merged = merge_adapters(adapted)
        # The same products in the same order: only the sum W + ΔW is made once instead of each time.
        assert torch.allclose(merged(input_ids=ids).logits, moved, atol=1e-5)
    for name, module in block_linears(merged).items():
        zero = before[name] == 0
        assert bool(zero.any())
        assert not module.weight[zero].any(), name
        assert not torch.equal(module.weight, before[name])


def test_adapters_depend_on_the_seed_alone():
    def initial(seed, disturb):
        torch.manual_seed(disturb)
        adapted = add_adapters(prune(small_model(vocab_size=40)), rank=4, seed=seed)
        return next(p for n, p in adapted.named_parameters() if "lora_A" in n)

    assert torch.equal(initial(3, 1), initial(3, 2))
    assert not torch.equal(initial(3, 1), initial(4, 1))
