"""Attacks on a training and on its public views. Must not influence what is released."""
