"""Plain references for the removal of experts."""

import torch

__all__ = ["aimer", "plain_sums", "without"]


def aimer(tensors, layer, expert):
    names = (f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight" for name in ("gate", "up", "down"))
    weights = torch.cat([tensors[name].double().flatten() for name in names])
    return float(weights.abs().mean() / weights.square().mean().sqrt())


def without(tensors, kept):
    """The checkpoint's tensors without the other experts; layer → numbers that stay."""
    result = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else None
        if "experts" in parts:
            number = int(parts[5])
            if number in kept[layer]:
                parts[5] = str(kept[layer].index(number))
                result[".".join(parts)] = tensor
        elif name.endswith("mlp.gate.weight"):
            result[name] = tensor[kept[layer]]
        else:
            result[name] = tensor
    return result


def plain_sums(model, windows, chosen_experts):
    """Σ g ‖f(x)‖ and tokens of each expert, by hooks on layers alone, each expert run on all tokens."""
    sums = {}

    def hook(layer, module, args):
        tokens = args[0].flatten(0, 1)
        probabilities = (tokens @ module.gate.weight.T).softmax(-1)
        top, chosen = probabilities.topk(chosen_experts)
        total = sums.setdefault(layer, torch.zeros(2, len(module.experts), dtype=torch.float64))
        for number, expert in enumerate(module.experts):
            norms = expert(tokens).norm(dim=-1)
            for row in range(len(tokens)):
                for slot in range(chosen_experts):
                    if chosen[row, slot] == number:
                        total[:, number] += torch.stack([top[row, slot] * norms[row], torch.tensor(1.0)])

    layers = [(index, block.mlp) for index, block in enumerate(model.model.layers) if hasattr(block.mlp, "experts")]
    handles = [
        module.register_forward_pre_hook(lambda m, args, index=index: hook(index, m, args)) for index, module in layers
    ]
    with torch.no_grad():
        model(windows)
    for handle in handles:
        handle.remove()
    return sums
