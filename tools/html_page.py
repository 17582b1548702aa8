"""Pages in HTML, for the tools: self-contained files with pictures and plots inside them, in light and dark, wide and narrow.

Not a tool itself. The templates are in tools/html/, and all that they insert is escaped. Must not let a page load, send or run
anything: its content security policy forbids all but the pictures in it.
"""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_TEMPLATES = Path(__file__).parent / 'html'
_SIZE = (5.2, 2.9)  # inches; a phone shows it at three quarters
_COLOURS = {  # text and lines, the first curve, the second curve
    'light': ('#333a42', '#0b5cad', '#b3261e'),
    'dark': ('#c9d1d9', '#6cb6ff', '#ff8f87'),
}


@dataclass(frozen=True)
class Plot:
    """A plot as two data URIs, and what it shows in words."""

    light: str
    dark: str
    words: str


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fills in a template of tools/html/ and writes the page, completely or not at all."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix('.partial')
    partial.write_text(environment.get_template(template).render(**values), encoding='utf-8')
    partial.replace(path)


def picture(image: np.ndarray) -> str:
    """A data URI of an (H, W, 3) uint8 picture in cv2's order of colours."""
    return _uri('image/png', cv2.imencode('.png', image)[1].tobytes())


def plot(draw: Callable[[Axes, tuple[str, str]], None], words: str) -> Plot:
    """A plot for light and for dark pages.

    Args:
        draw: draws on the axes, in the two colours given.
        words: what the plot shows, for those who cannot see it.
    """
    drawn = {}
    for name, (text, *colours) in _COLOURS.items():
        edges = ('text.color', 'axes.edgecolor', 'axes.labelcolor', 'xtick.color', 'ytick.color')
        with matplotlib.rc_context({**dict.fromkeys(edges, text), 'svg.hashsalt': 'mmpose_dp', 'font.size': 10}):
            figure = Figure(figsize=_SIZE, layout='constrained')
            axes = figure.subplots()
            axes.spines[['top', 'right']].set_visible(False)
            draw(axes, (colours[0], colours[1]))
            file = io.BytesIO()
            figure.savefig(file, format='svg', transparent=True, metadata={'Date': None})
        drawn[name] = _uri('image/svg+xml', file.getvalue())
    return Plot(**drawn, words=words)


def _uri(kind: str, data: bytes) -> str:
    return f'data:{kind};base64,{base64.b64encode(data).decode()}'
