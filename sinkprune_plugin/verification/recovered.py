"""A third model beside dense and pruned: the one that a recovery made of the pruned one."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sinkprune_plugin.embedded_pictures import data_url
from sinkprune_plugin.inspection.info import inspect_checkpoint
from sinkprune_plugin.recovery.loss_curve import CURVE_FOLDER, CURVE_PICTURE
from sinkprune_plugin.verification.perplexity import PairedPerplexity
from sinkprune_plugin.verification.samples import PairedSamples

__all__ = ["curve_picture", "recovered_section", "three_columns"]


def recovered_section(
    directory: Path,
    name: str,
    compare_quality: Callable[[], PairedPerplexity],
    compare_answers: Callable[[], PairedSamples],
) -> dict[str, Any]:
    """What the report says of the recovered model. It isn't timed: it runs the kernels of the pruned one.

    :param directory: checkpoint directory of the recovered model
    :param name: how the report calls it
    :param compare_quality: compares its losses with those of the dense model
    :param compare_answers: compares its answers with those of the dense model
    :return: JSON-serialisable
    """
    info = inspect_checkpoint(directory).to_json()
    quality = compare_quality()
    return {
        "name": name,
        "quality": asdict(quality) | {"increase_percent": quality.increase},
        "samples": asdict(compare_answers()),
        "total": info["total"],
        "file_bytes": info["file_bytes"],
    }


def three_columns(content: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Dense, pruned and recovered side by side.

    :param content: a report with a section ``recovered``
    :return: question, and the answer of each
    """
    recovered = content["recovered"]
    both = content["quality"], recovered["quality"]
    answers = content["samples"], recovered["samples"]
    totals = content["sparsity"]["dense_total"], content["sparsity"]["total"], recovered["total"]
    size = content["size"]
    sizes = size["dense"]["file_bytes"], size["pruned"]["file_bytes"], recovered["file_bytes"]
    rows = [
        ("ELBO perplexity", f"{both[0]['elbo_dense']:.2f}", *(f"{each['elbo_pruned']:.2f}" for each in both)),
        (
            "increase over dense, 95 %",
            "",
            *(
                f"{each['increase_percent']:+.1f} % ({100 * (each['ratio_low'] - 1):+.1f} to "
                f"{100 * (each['ratio_high'] - 1):+.1f})"
                for each in both
            ),
        ),
        ("masked-token perplexity", f"{both[0]['masked_dense']:.2f}", *(f"{q['masked_pruned']:.2f}" for q in both)),
        ("same tokens as dense", "100.0 %", *(f"{100 * each['agreement']:.1f} %" for each in answers)),
        ("zeros", *(f"{100 * each['sparsity']:.1f} %" for each in totals)),
        ("weight files", *(f"{each / 1e6:.2f} MB" for each in sizes)),
    ]
    return [(title, dense, pruned, after) for title, dense, pruned, after in rows]


def curve_picture(directory: Path) -> str | None:
    """The picture of the recovery's losses, to be embedded in the page.

    :param directory: checkpoint directory of the recovered model
    :return: a data URL; None where there is no picture
    """
    file = directory / CURVE_FOLDER / CURVE_PICTURE
    return data_url(file) if file.is_file() else None
