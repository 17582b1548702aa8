"""Checks of the model, before training, at every private step and before every checkpoint. Must not change what a step gives."""
