"""Transforms of private training. Must not hold logic."""

from .public_view import PublicView
from .view import View

__all__ = ['PublicView', 'View']
