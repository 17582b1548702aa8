"""Transforms of private training. Must not hold logic."""

from .public_view import PublicView

__all__ = ['PublicView']
