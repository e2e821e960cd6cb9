"""Training a model: one loop for new models and for checkpoints."""
