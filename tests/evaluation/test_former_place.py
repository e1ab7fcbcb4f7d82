"""The former place of lm_eval/ still works, with a line that says so."""

import sys

import pytest


def test_the_former_name_warns_and_finds_the_same_module():
    sys.modules.pop("sinkprune_plugin.evaluation", None)
    with pytest.warns(DeprecationWarning, match="is now sinkprune_plugin.lm_eval"):
        from sinkprune_plugin.evaluation.predictions import write_predictions

    from sinkprune_plugin.lm_eval import predictions

    assert write_predictions is predictions.write_predictions
