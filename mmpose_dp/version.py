"""The version, read by setup.py as text. Must not import anything."""

__version__ = '0.1.0'
