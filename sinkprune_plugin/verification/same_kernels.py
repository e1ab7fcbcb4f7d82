"""Why a pruned model can't be faster, where the checkpoints already tell."""

from sinkprune_plugin.formats.codecs.format_names import CheckpointFormat
from sinkprune_plugin.inspection.info import CheckpointInfo
from sinkprune_plugin.inspection.structure import DENSE, UNSTRUCTURED, common_structure

__all__ = ["why_not_faster"]

_TWO_OF_FOUR = "2:4"


def why_not_faster(dense: CheckpointInfo, pruned: CheckpointInfo, backend: str, *, on_gpu: bool) -> str | None:
    """Tell whether both models run the same matrix products, and why.

    :param dense: what is in the dense checkpoint
    :param pruned: what is in the pruned one
    :param backend: ``transformers`` or ``vllm``
    :param on_gpu: whether they run on a GPU
    :return: one clause; None if the pruned model has smaller weights, another precision, or may run 2:4 kernels
    """
    kinds = [
        ({name: (layer.shape, layer.dtype) for name, layer in info.layers.items()}, info.storage.quantization)
        for info in (dense, pruned)
    ]
    if kinds[0] != kinds[1] or pruned.storage.quantization is not None:
        return None
    structure = common_structure([layer.count for layer in pruned.linears])
    if structure == DENSE:
        return "both run the same dense kernels: no weight is smaller and few are zero"
    if pruned.storage.format is not CheckpointFormat.SPARSE_24_BITMASK:
        if structure == _TWO_OF_FOUR:
            return "2:4 zeros that are stored dense run dense kernels; see sinkprune convert --to sparse-24-bitmask"
        return f"{'unstructured' if structure == UNSTRUCTURED else structure} zeros run dense kernels here"
    if backend == "transformers":
        return "transformers runs 2:4 zeros with dense kernels; vLLM on a GPU has others (--backend vllm)"
    return None if on_gpu else "2:4 kernels need a GPU; dense kernels run here"
