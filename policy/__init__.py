"""The DeepSeek-V3-architecture policy: model, token log-probabilities, checkpoints and optimizers."""
