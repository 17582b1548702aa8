"""Synthetic people in the MPII format, so that everything runs without downloading anything. Must not hold logic."""

from .mpii_format import make_synthetic_mpii

__all__ = ['make_synthetic_mpii']
