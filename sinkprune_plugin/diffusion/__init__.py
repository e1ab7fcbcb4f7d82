"""What makes a model a diffusion LM: families, corruption, timesteps and likelihood."""

from sinkprune_plugin.diffusion.corruption import (
    Corruption,
    corrupt,
    corruptible_positions,
    mask_probability,
    sample_generator,
)
from sinkprune_plugin.diffusion.estimates import Likelihood, PerplexityEstimate, RowScores, estimate_likelihood
from sinkprune_plugin.diffusion.families import (
    DiffusionFamily,
    DiffusionSpec,
    block_length_of,
    families,
    find_family,
    register_family,
    resolve_diffusion,
)
from sinkprune_plugin.diffusion.likelihood import (
    LikelihoodOptions,
    elbo_perplexity,
    masked_token_perplexity,
    measure_likelihood,
    perplexity_on,
    score_windows,
)
from sinkprune_plugin.diffusion.noisy_inputs import (
    NoisyInputs,
    check_block_window,
    check_blocks,
    clean_inputs,
    context_tokens,
    noisy_inputs,
    predict_noisy,
)
from sinkprune_plugin.diffusion.schedule import timestep_grid, timestep_weight
from sinkprune_plugin.diffusion.training_loss import (
    TopPredictions,
    divergence,
    elbo_weights,
    negative_log_likelihood,
    predictions,
    top_predictions,
)

__all__ = [
    "Corruption",
    "DiffusionFamily",
    "DiffusionSpec",
    "Likelihood",
    "LikelihoodOptions",
    "NoisyInputs",
    "PerplexityEstimate",
    "RowScores",
    "TopPredictions",
    "block_length_of",
    "check_block_window",
    "check_blocks",
    "clean_inputs",
    "context_tokens",
    "corrupt",
    "corruptible_positions",
    "divergence",
    "elbo_perplexity",
    "elbo_weights",
    "estimate_likelihood",
    "families",
    "find_family",
    "mask_probability",
    "masked_token_perplexity",
    "measure_likelihood",
    "negative_log_likelihood",
    "noisy_inputs",
    "perplexity_on",
    "predict_noisy",
    "predictions",
    "register_family",
    "resolve_diffusion",
    "sample_generator",
    "score_windows",
    "timestep_grid",
    "timestep_weight",
    "top_predictions",
]
