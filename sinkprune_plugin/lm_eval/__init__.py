"""lm-evaluation-harness on diffusion LMs: Monte-Carlo likelihoods and denoised answers."""
