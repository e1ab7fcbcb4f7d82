"""What pruning a model of real size will take on a GPU: memory, bytes moved, operations, and time at stated rates.

Nothing is run: the network is built without memory, its Linears and their shared inputs are found as the modifier finds
them, and everything that a run does is counted. The rates are assumptions about a card, printed with the result; the
time is a bound from operations and bytes, not a measurement.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

import sinkprune_plugin  # noqa: F401  (registers the model classes)
from sinkprune_plugin.modifiers.input_observer import InputObserver
from sinkprune_plugin.modifiers.passes import CalibrationPass
from sinkprune_plugin.modifiers.run_estimate import RunEstimate
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.modifiers.targets import PruningTarget, resolve_targets
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier

# Shapes of published checkpoints, from their config.json.
PUBLISHED: dict[str, dict[str, Any]] = {
    "LLaDA-8B": {
        "model_type": "llada",
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "mlp_hidden_size": 12288,
        "vocab_size": 126464,
        "embedding_size": 126464,
        "max_sequence_length": 4096,
    },
}
MODIFIERS = {"sparsegpt": SinkAwareSparseGPTModifier, "wanda": SinkAwareWandaModifier}


@dataclass(frozen=True)
class Card:
    """A GPU in rates that a well-shaped workload reaches, about 40 % of the data sheet.

    :param memory: bytes
    :param half: operations per second of bfloat16 products
    :param tf32: the same of TF32 products
    :param single: the same of float32 factorisations and updates
    :param bus: bytes per second between pinned main memory and the card
    :param launches: kernels per second in a loop over columns
    """

    memory: float
    half: float
    tf32: float
    single: float
    bus: float
    launches: float = 1.5e5


CARDS = {
    "80GB": Card(memory=80e9, half=400e12, tf32=200e12, single=20e12, bus=40e9),
    "24GB": Card(memory=24e9, half=65e12, tf32=33e12, single=20e12, bus=20e9),
}


def build(source: str) -> torch.nn.Module:
    """The network on the meta device, in bfloat16."""
    if source in PUBLISHED:
        shape = dict(PUBLISHED[source])
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    elif (Path(source) / "config.json").is_file():
        config = AutoConfig.from_pretrained(source)
    else:
        raise SystemExit(f"{source} is no directory with a config.json, nor one of {', '.join(PUBLISHED)}")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def distinct_inputs(model: torch.nn.Module, targets: list[PruningTarget]) -> dict[str, list[PruningTarget]]:
    """Leader → the targets of one block that share its input, found with a forward pass on the meta device."""
    observer = InputObserver(targets, lambda *_: None)
    handles = observer.attach(lambda module, hook, kind, **kw: getattr(module, f"register_{kind}_hook")(hook, **kw))
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    with torch.no_grad(), observer.watching(0, CalibrationPass({}, torch.ones(1, 8))):
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    groups: dict[str, list[PruningTarget]] = {}
    for target in targets:
        groups.setdefault(observer.leaders[target.name], []).append(target)
    return groups


def count(model: torch.nn.Module, method: str, estimate: RunEstimate, tokens: int) -> dict[str, float]:
    """Operations, bytes and kernel launches of a run.

    :param model: the network
    :param method: ``sparsegpt`` or ``wanda``
    :param estimate: what the modifier says
    :param tokens: tokens of a window
    :return: numbers by name
    """
    targets, blocks = resolve_targets(model, ["Linear"], [])
    groups = distinct_inputs(model, targets)
    width = model.get_input_embeddings().embedding_dim  # type: ignore[operator]
    linears = sum(t.module.in_features * t.module.out_features for t in targets)
    forward = 2 * linears + len(blocks) * 4 * tokens * width
    runs = sum(sweep.tokens * sweep.runs_per_block for sweep in estimate.sweeps)
    columns = [group[0].module.in_features for group in groups.values()]
    statistics_tokens = estimate.sweeps[-1].tokens
    of_block = sum(p.numel() * p.element_size() for p in blocks[0].parameters())
    whole = sum(p.numel() * p.element_size() for p in blocks.parameters())
    embedding = model.get_input_embeddings().weight.numel() * 2  # type: ignore[operator]
    hessians = 4 * sum(c * c for c in columns) // len(blocks)
    widest = max(columns)
    result: dict[str, float] = {
        "forward operations": forward * runs,
        # The scores once more, and their exponentials.
        "attention mass operations": len(blocks) * 2 * tokens * width * estimate.sweeps[0].tokens,
        "hidden states in main memory": estimate.hidden_bytes,
        # In and out for every run of a block.
        "hidden states moved": estimate.hidden_bytes
        * len(blocks)
        * sum(2 * s.runs_per_block - (s.runs_per_block > 1) for s in estimate.sweeps),
        "weights moved": len(estimate.sweeps) * (whole + embedding) + whole,
        "block weights on the card": of_block,
    }
    if method == "sparsegpt":
        result |= {
            "Hessian operations": sum(2 * c * c for c in columns) * statistics_tokens,
            "factorisation operations": sum(4 / 3 * c**3 for c in columns),
            "column updates": sum(t.module.out_features * t.module.in_features**2 for t in targets),
            "kernels of the column loop": sum(6 * t.module.in_features for t in targets),
            "Hessians on the card": hessians,
            # The Hessian's factor and its inverse, in addition to the weight in float32.
            "solver on the card": 3 * 4 * widest * widest + 8 * width * widest,
        }
    # Inputs, gate and up in bfloat16, attention in and out, float32 rows of a Hessian or of squares.
    result["activations on the card"] = tokens * (8 * width * 2 + 3 * widest * 2 + 2 * widest * 4)
    return result


def seconds(counted: dict[str, float], card: Card, *, offloaded: bool) -> dict[str, float]:
    """Time of each kind of work at the card's rates."""
    return {
        "forward passes": (counted["forward operations"] + counted["attention mass operations"]) / card.half,
        "Hessians": counted.get("Hessian operations", 0.0) / card.tf32,
        "solver": (counted.get("factorisation operations", 0.0) + counted.get("column updates", 0.0)) / card.single
        + counted.get("kernels of the column loop", 0.0) / card.launches,
        "bus (parallel to the forward passes)": (
            counted["hidden states moved"] + (counted["weights moved"] if offloaded else 0.0)
        )
        / card.bus,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", metavar="MODEL", required=True, help="LLaDA-8B, or a directory with a config.json")
    parser.add_argument("--method", choices=MODIFIERS, default="sparsegpt", help="default sparsegpt")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows (default 128)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a window (default 2048)")
    options = parser.parse_args()

    model = build(options.dry_run)
    modifier = MODIFIERS[options.method](sparsity=0.5)
    estimate = modifier.estimate(model, options.samples, options.samples * options.tokens)
    counted = count(model, options.method, estimate, options.tokens)
    on_card = {name: value for name, value in counted.items() if name.endswith("on the card")}
    whole = sum(p.numel() * p.element_size() for p in model.parameters())

    console = Console(width=110)
    console.print(
        f"{options.dry_run}, {options.method}, {options.samples} windows of {options.tokens} tokens: {estimate}"
    )
    table = Table(title="counted")
    table.add_column("what")
    table.add_column("number", justify="right")
    for name, value in counted.items():
        unit = "operations" in name or "updates" in name or "kernels" in name
        table.add_row(name, f"{value:.2e}" if unit else f"{value / 1e9:,.2f} GB")
    console.print(table)

    table = Table(title="time and memory at stated rates (not measured)")
    table.add_column("card")
    for name in CARDS:
        table.add_column(name, justify="right")
    times = {name: seconds(counted, card, offloaded=True) for name, card in CARDS.items()}
    for row in next(iter(times.values())):
        table.add_row(row, *(f"{times[name][row]:,.0f} s" for name in CARDS))
    totals = {
        name: max(t["forward passes"] + t["Hessians"], t["bus (parallel to the forward passes)"]) + t["solver"]
        for name, t in times.items()
    }
    table.add_row("whole run, offloaded", *(f"{totals[name] / 60:,.0f} min" for name in CARDS))
    need = sum(on_card.values())
    table.add_row("memory of the card, offloaded", *(_fits(need, card) for card in CARDS.values()))
    table.add_row("memory of the card, model on it", *(_fits(need + whole, card) for card in CARDS.values()))
    console.print(table)
    for name, card in CARDS.items():
        console.print(
            f"{name}: bfloat16 {card.half / 1e12:.0f}, TF32 {card.tf32 / 1e12:.0f}, float32 {card.single / 1e12:.0f} "
            f"TFLOP/s, bus {card.bus / 1e9:.0f} GB/s, {card.launches:.0f} kernels/s"
        )
    print(json.dumps({"benchmark": "scale", "model": options.dry_run, "method": options.method, **counted}))


def _fits(need: float, card: Card) -> str:
    return f"{need / 1e9:.1f} GB, {'fits' if need < 0.92 * card.memory else 'too much'}"


if __name__ == "__main__":
    main()
