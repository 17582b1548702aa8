"""Attacks on a training and on its public views. Must not be used to choose what is released."""
