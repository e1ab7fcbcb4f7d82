"""Sparse checkpoints: size of a weight, speed compared with compressed-tensors 0.14.0, memory of a conversion.

- *size*: bytes of all parts of a 4096 × 12288 bfloat16 weight over its dense bytes, for 2:4 and for random zeros.
- *speed*: compressing and decompressing that weight on one core, ours and compressed-tensors' own code in turn in one
  process, several rounds after one to warm up. The ratios are medians of the ratios round by round. That the parts are
  the same bits is checked outside the timing. compressed-tensors 0.14.0, the last release that could, is installed
  without its dependencies into a directory of its own.
- *share of the copy bandwidth*: the dense weight and its parts, once each, over the time taken, against the bytes read
  and written by a copy of the weight. The first copy goes to memory in use, the second to memory that the system hasn't
  handed out yet, to which both formats write too.
- *memory*: largest resident memory of a process that converts a checkpoint of 4 GB in files of 1 GB, torch included;
  Linux only.
- *digests*: the SHA-256 of all files that a conversion wrote, once more. It is a part of the conversion to a sparse
  format and of reading the result.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sinkprune_plugin.formats import convert_checkpoint
from sinkprune_plugin.formats.codecs import bitmask, bitmask24
from sinkprune_plugin.formats.files.digests import file_digest
from sinkprune_plugin.formats.files.safetensors_header import TensorSpec
from sinkprune_plugin.formats.files.shard_writer import ShardWriter, shard_names, tensor_bytes
from sinkprune_plugin.formats.files.stored_weights import CODECS

ROWS, COLUMNS = 4096, 12288
OLD_RELEASE = "0.14.0"
ROUTES = [("dense", "sparse-24-bitmask"), ("sparse-24-bitmask", "sparse-bitmask"), ("sparse-bitmask", "dense")]


def pruned_weight(kind: str) -> torch.Tensor:
    """(4096, 12288) bfloat16, 2:4 by magnitude or with a share of random zeros."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator).bfloat16()
    if kind == "2:4":
        groups = weight.view(-1, 4)
        groups.scatter_(1, groups.float().abs().topk(2, largest=False).indices, 0)
    else:
        weight[torch.rand(ROWS, COLUMNS, generator=generator) < float(kind)] = 0
    return weight


def sizes() -> dict[str, dict[str, float]]:
    """Ratio to the dense size, and the limit it must keep."""
    rows = {}
    for kind, codec, limit in (
        ("2:4", bitmask24, 0.5626),
        ("0.5", bitmask, 0.5626 + 4 / COLUMNS),
        ("0.75", bitmask, 0.3126 + 4 / COLUMNS),
    ):
        weight = pruned_weight(kind)
        stored = sum(part.nbytes for part in codec.compress(weight).values())
        rows[kind] = {"ratio": round(stored / weight.nbytes, 6), "limit": round(limit, 6)}
    return rows


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def speed(rounds: int) -> dict[str, Any]:
    """Both implementations in turn; runs where compressed-tensors 0.14.0 comes first on the path."""
    import compressed_tensors
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.config import SparsityCompressionConfig

    if compressed_tensors.__version__ != OLD_RELEASE:
        raise SystemExit(f"compressed-tensors {compressed_tensors.__version__} is in the way of {OLD_RELEASE}")
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for sparse_format, codec in CODECS.items():
        weight = pruned_weight("2:4" if codec is bitmask24 else "0.5")
        structure = "2:4" if codec is bitmask24 else "unstructured"
        config = SparsityCompressionConfig.load_from_registry(sparse_format, sparsity_structure=structure)
        old = BaseCompressor.load_from_registry(sparse_format, config=config)
        theirs = {name.rpartition(".")[2]: part for name, part in old.compress_weight("w", weight).items()}
        parts = codec.compress(weight)
        same = parts.keys() == theirs.keys() and all(torch.equal(parts[part], theirs[part]) for part in parts)
        if not same or not torch.equal(codec.decompress(parts), weight):
            raise SystemExit(f"{sparse_format}: the parts differ from those of compressed-tensors")
        warm = torch.empty_like(weight)
        runs: dict[str, Callable[[], Any]] = {
            "copy": partial(warm.copy_, weight),
            "copy to new memory": weight.clone,
            "compress": partial(codec.compress, weight),
            "decompress": partial(codec.decompress, parts),
            "old compress": partial(old.compress_weight, "w", weight),
            "old decompress": partial(old.decompress_weight, theirs),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds + 1):
            for name, run in runs.items():
                seconds[name].append(timed(run)[0])
        seconds = {name: values[1:] for name, values in seconds.items()}
        moved = weight.nbytes + sum(part.nbytes for part in parts.values())
        result[sparse_format] = {
            direction: {
                "seconds": statistics.median(seconds[direction]),
                "old_seconds": statistics.median(seconds[f"old {direction}"]),
                "times_faster": ratio(seconds[f"old {direction}"], seconds[direction]),
                "share_of_copy_bandwidth": ratio(seconds["copy"], seconds[direction]) * moved / (2 * weight.nbytes),
                "share_of_new_memory_bandwidth": ratio(seconds["copy to new memory"], seconds[direction])
                * moved
                / (2 * weight.nbytes),
            }
            for direction in ("compress", "decompress")
        }
        result["copy_gb_per_s"] = 2 * weight.nbytes / statistics.median(seconds["copy"]) / 1e9
        result["new_memory_gb_per_s"] = 2 * weight.nbytes / statistics.median(seconds["copy to new memory"]) / 1e9
    return result


def ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def write_synthetic(directory: Path, gigabytes: int) -> None:
    """A checkpoint of 2:4 weights, each file 1 GB; the same numbers in every weight."""
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    weight = pruned_weight("2:4")
    per_file = 10**9 // weight.nbytes + 1
    weight_map: dict[str, str] = {}
    for number, file in enumerate(shard_names(gigabytes)):
        names = [f"model.layers.{number * per_file + index}.mlp.up_proj.weight" for index in range(per_file)]
        weight_map |= dict.fromkeys(names, file)
        with ShardWriter(directory / file, dict.fromkeys(names, TensorSpec("BF16", (ROWS, COLUMNS)))) as shard:
            for name in names:
                shard.write(name, [tensor_bytes(weight)])
    if gigabytes > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def convert(source: Path, target: Path, to: str) -> dict[str, float]:
    """One conversion, with this process' largest resident memory, and the digests of what it wrote."""
    seconds, written = timed(lambda: convert_checkpoint(source, target, to))
    # getrusage has the same number, but starts from the peak of the process that started this one.
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    digest_seconds, _ = timed(lambda: [file_digest(file) for file in sorted(target.glob("*.safetensors"))])
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "dense_bytes": written.dense_bytes,
        "stored_bytes": written.stored_bytes,
        "digest_seconds": digest_seconds,
    }


def in_process(*arguments: object, path: str = "") -> Any:
    """Run a part of this script in a separate process.

    :return: what its last line of output says
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, str(Path(__file__).parents[1])]))
    command = [sys.executable, __file__, *map(str, arguments)]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def memory(scratch: Path, gigabytes: int) -> dict[str, dict[str, float]]:
    """Convert a large checkpoint between the formats, each conversion in a separate process."""
    write_synthetic(scratch / "dense", gigabytes)
    rows = {}
    for source, to in ROUTES:
        target = scratch / (to if to != "dense" else "dense again")
        rows[f"{source} to {to}"] = in_process("--convert", scratch / source, target, to)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each run (default 7)")
    parser.add_argument("--gigabytes", type=int, default=4, help="size of the checkpoint to convert (default 4)")
    parser.add_argument("--scratch", type=Path, help="directory for about three times as much (default: temporary)")
    parser.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--speed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        source, target, to = options.convert
        print(json.dumps(convert(Path(source), Path(target), to)))
        return
    if options.speed:
        print(json.dumps(speed(options.rounds)))
        return

    # Wide enough for the tables where there is no terminal.
    console = Console(width=None if sys.stdout.isatty() else 120)
    ratios = sizes()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        old = Path(folder, "compressed-tensors")
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(old)]
        subprocess.run([*install, f"compressed-tensors=={OLD_RELEASE}"], check=True)
        speeds = in_process("--speed", "--rounds", options.rounds, path=str(old))
        conversions = memory(Path(folder), options.gigabytes)

    table = Table(title="size of a 4096 × 12288 bfloat16 weight", title_justify="left")
    for heading in ("zeros", "of dense", "limit"):
        table.add_column(heading, justify="right")
    for kind, row in ratios.items():
        table.add_row(kind, f"{row['ratio']:.4f}", f"{row['limit']:.4f}")
    console.print(table)

    table = Table(title="the same weight on one core", title_justify="left")
    for heading in ("format", "", "ms", f"{OLD_RELEASE}, ms", "× faster", "of copy", "of copy to new memory"):
        table.add_column(heading, justify="left" if heading in ("format", "") else "right")
    for sparse_format in CODECS:
        for direction, row in speeds[sparse_format].items():
            table.add_row(
                sparse_format,
                direction,
                f"{1e3 * row['seconds']:.0f}",
                f"{1e3 * row['old_seconds']:.0f}",
                f"{row['times_faster']:.1f}",
                f"{row['share_of_copy_bandwidth']:.1%}",
                f"{row['share_of_new_memory_bandwidth']:.1%}",
            )
    console.print(table)
    console.print(
        f"copy {speeds['copy_gb_per_s']:.1f} GB/s, copy to new memory {speeds['new_memory_gb_per_s']:.1f} GB/s, "
        "read and written"
    )

    table = Table(title=f"converting {options.gigabytes} GB in files of 1 GB, one core", title_justify="left")
    for heading in ("conversion", "peak, MB", "seconds", "GB/s", "digests, s", "GB/s"):
        table.add_column(heading, justify="left" if heading == "conversion" else "right")
    for route, row in conversions.items():
        rate = row["dense_bytes"] / row["seconds"] / 1e9
        digest_rate = row["stored_bytes"] / row["digest_seconds"] / 1e9
        cells = (f"{row['peak_bytes'] / 1e6:.0f}", f"{row['seconds']:.1f}", f"{rate:.2f}")
        table.add_row(route, *cells, f"{row['digest_seconds']:.1f}", f"{digest_rate:.2f}")
    console.print(table)

    result = {
        "benchmark": "checkpoint",
        "size": ratios,
        "speed": speeds,
        "convert": conversions,
        "peak_bytes": max(row["peak_bytes"] for row in conversions.values()),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
