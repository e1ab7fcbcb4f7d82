"""The former place of :mod:`sinkprune_plugin.lm_eval`."""

import warnings

warnings.warn(
    "sinkprune_plugin.evaluation is now sinkprune_plugin.lm_eval; this name goes with version 0.3",
    DeprecationWarning,
    stacklevel=2,
)
