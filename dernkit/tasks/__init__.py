"""Tasks of lm-eval over data that a package brings, so that no network is needed when they run."""
