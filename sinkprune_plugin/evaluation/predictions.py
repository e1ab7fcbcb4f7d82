"""The former place of :mod:`sinkprune_plugin.lm_eval.predictions`."""

import sys

from sinkprune_plugin.lm_eval import predictions
from sinkprune_plugin.lm_eval.predictions import *  # noqa: F403

if __name__ == "__main__":
    sys.exit(predictions.main(sys.argv[1:]))
else:
    # One module under both names, so that everything in it is found and patched as before.
    sys.modules[__name__] = predictions
