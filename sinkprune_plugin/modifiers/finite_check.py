"""Whether statistics are finite, asked once after many inputs instead of after each."""

import torch

from sinkprune_plugin.errors import UsageError

__all__ = ["FiniteCheck"]


class FiniteCheck:
    """Records on the device whether each input was finite; the host asks once and learns which one wasn't.

    A check after each input would make the host wait for the device each time.
    """

    def __init__(self) -> None:
        self._flags: list[torch.Tensor] = []
        self._sources: list[tuple[str, str]] = []

    def note(self, values: torch.Tensor, leader: str, source: str) -> None:
        """Remember whether all values are finite.

        :param values: statistics of an input, any shape
        :param leader: name of the target that the input belongs to
        :param source: where the input comes from
        """
        self._flags.append(values.isfinite().all())
        self._sources.append((leader, source))

    def require(self) -> None:
        """Check everything noted since the last time.

        :raises UsageError: if values weren't finite; names the first
        """
        flags, sources = self._flags, self._sources
        self._flags, self._sources = [], []
        if not flags:
            return
        finite = torch.stack(flags).tolist()
        for good, (leader, source) in zip(finite, sources, strict=True):
            if not good:
                raise UsageError(
                    f"the input of {leader} in {source} has NaN or Inf; check the checkpoint or load it with dtype "
                    "float32"
                )
