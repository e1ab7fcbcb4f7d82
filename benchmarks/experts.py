"""Peak memory and time of AIMER on a checkpoint of a 16 B model's shape, streamed from its files.

The checkpoint is random, of LLaDA2.0-mini's widths and numbers of experts (256 experts of 512 channels, top 8, hidden
states of 2048) in the layout of LLaDA-MoE, with as many layers as asked for: 20 make 16 B parameters. `sinkprune prune`
then runs in a process of its own, whose peak resident memory is read at its end. The files are dropped from the page
cache first where the system can do that; otherwise the table says that they may have been in memory (cold: False).

    python benchmarks/experts.py --layers 20 --experts 0.5 --scratch DIR2
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from sinkprune_plugin.formats.files.safetensors_header import TensorSpec
from sinkprune_plugin.formats.files.shard_reader import INDEX_NAME
from sinkprune_plugin.formats.files.shard_writer import ShardWriter, shard_names, split_into_shards, tensor_bytes

WIDTH, CHANNELS, HEADS, VOCABULARY = 2048, 512, 16, 157184
NOISE = 64 << 20
RECIPE = "prune_stage: {{prune_modifiers: {{ExpertPruningModifier: {{experts: {experts}, score: aimer}}}}}}\n"


def shapes(layers: int, experts: int, *, fused: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors; ``fused``: two for all experts of a layer, as transformers 5 names them."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for index in range(layers):
        layer = f"model.layers.{index}"
        for name in ("q", "k", "v", "o"):
            found[f"{layer}.self_attn.{name}_proj.weight"] = (WIDTH, WIDTH)
        for name in ("q_norm", "k_norm"):
            found[f"{layer}.self_attn.{name}.weight"] = (WIDTH // HEADS,)
        found[f"{layer}.mlp.gate.weight"] = (experts, WIDTH)
        if fused:
            found[f"{layer}.mlp.experts.gate_up_proj"] = (experts, 2 * CHANNELS, WIDTH)
            found[f"{layer}.mlp.experts.down_proj"] = (experts, WIDTH, CHANNELS)
        for number in range(0 if fused else experts):
            expert = f"{layer}.mlp.experts.{number}"
            found[f"{expert}.gate_proj.weight"] = found[f"{expert}.up_proj.weight"] = (CHANNELS, WIDTH)
            found[f"{expert}.down_proj.weight"] = (WIDTH, CHANNELS)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{name}.weight"] = (WIDTH,)
    found["model.norm.weight"] = (WIDTH,)
    found["lm_head.weight"] = (VOCABULARY, WIDTH)
    return found


def write_checkpoint(folder: Path, layers: int, experts: int, chosen: int, *, fused: bool = False) -> int:
    """Write the checkpoint in bfloat16, in files of 5 GB.

    :return: its parameters
    """
    config = {
        "architectures": ["LLaDAMoEModelLM"],
        "model_type": "llada",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "expert_intermediate_size": CHANNELS,
        "dense_intermediate_size": 4 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "moe_layer_freq": [1] * layers,
        "mask_token_id": 156895,
        "dtype": "bfloat16",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    specs = {name: TensorSpec("BF16", shape) for name, shape in shapes(layers, experts, fused=fused).items()}
    numbers = split_into_shards([spec.nbytes for spec in specs.values()], 5_000_000_000)
    files = shard_names(numbers[-1] + 1)
    generator = torch.Generator().manual_seed(0)
    # Random numbers are slow to make: a piece of this is each tensor, scaled by a random number.
    noise = torch.randn(NOISE, generator=generator).bfloat16()
    weight_map: dict[str, str] = {}
    with tqdm(total=sum(spec.nbytes for spec in specs.values()), unit="B", unit_scale=True, desc="writing") as bar:
        for number, file in enumerate(files):
            mine = {name: spec for (name, spec), n in zip(specs.items(), numbers, strict=True) if n == number}
            weight_map |= dict.fromkeys(mine, file)
            with ShardWriter(folder / file, mine) as shard:
                for name, spec in mine.items():
                    pieces, left = [], spec.elements
                    while left:
                        size = min(left, 1 << 20)
                        start = int(torch.randint(len(noise) - size + 1, (1,), generator=generator))
                        pieces.append(tensor_bytes(noise[start : start + size]))
                        left -= size
                    shard.write(name, pieces)
                    bar.update(spec.nbytes)
    if len(files) > 1:
        total = sum(spec.nbytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index))
    return sum(spec.elements for spec in specs.values())


def drop_from_page_cache(folder: Path) -> bool:
    """Let the files be read from the disk again, where the system can do that."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.sync()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Write, prune, measure, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--num-experts", type=int, default=256)
    parser.add_argument("--chosen", type=int, default=8)
    parser.add_argument("--experts", type=float, default=0.5, help="share that is removed")
    parser.add_argument("--fused", action="store_true", help="all experts of a layer in one tensor for each projection")
    parser.add_argument(
        "--scratch", type=Path, required=True, help="directory for both checkpoints, emptied at the end"
    )
    options = parser.parse_args(arguments)
    if options.scratch.exists():
        parser.error(f"{options.scratch} exists; name a directory that doesn't")
    needed = (
        2
        * sum(torch.Size(shape).numel() for shape in shapes(options.layers, options.num_experts).values())
        * (2 - options.experts)
    )
    options.scratch.mkdir(parents=True)
    try:
        free = shutil.disk_usage(options.scratch).free
        if free < needed:
            parser.error(f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; take fewer --layers")
        source, target = options.scratch / "source", options.scratch / "target"
        parameters = write_checkpoint(source, options.layers, options.num_experts, options.chosen, fused=options.fused)
        recipe = options.scratch / "recipe.yaml"
        recipe.write_text(RECIPE.format(experts=options.experts))
        cold = drop_from_page_cache(source)
        command = [sys.executable, "-m", "sinkprune_plugin", "prune", str(source), "--recipe", str(recipe)]
        started = time.monotonic()
        done = subprocess.run([*command, "--output", str(target)], capture_output=True, text=True)
        seconds = time.monotonic() - started
        if done.returncode:
            raise SystemExit(done.stderr)
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = {
            "layers": options.layers,
            "experts": options.num_experts,
            "fused": options.fused,
            "removed": options.experts,
            "parameters": parameters,
            "read_gb": _size(source),
            "written_gb": _size(target),
            "cold": cold,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        }
        for line in done.stderr.splitlines():
            print(line)
        print(f"| {' | '.join(result)} |")
        print(f"| {' | '.join(map(str, result.values()))} |")
        print(json.dumps(result))
    finally:
        shutil.rmtree(options.scratch)


def _size(folder: Path) -> float:
    return round(sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9, 2)


if __name__ == "__main__":
    main()
