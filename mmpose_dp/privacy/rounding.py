"""What floating-point rounding adds to the sensitivity, and the room that is kept for it.

One record more or less changes the shapes of the forwards and the order of the sums, and with them the last bits of the other
records' clipped gradients: the clipped sum moves by a little more than the one record's own vector. So records are clipped to
slightly less than C, and the noise is that of C. Must not be smaller than what was measured (docs/guarantee.md, "Rounding").
"""

ROUNDING_MARGIN = 1e-3  # of C

_MEASURED = {
    'float32 on a CPU': 'at most 8e-6 C for one record more and 8e-4 C between the most different shapes of a forward',
    'bfloat16 on a CPU': 'at most 8e-6 C',
}


def clipping_norm(max_grad_norm: float) -> float:
    """What records are clipped to, so that with the rounding of the others the sum moves by at most ``max_grad_norm``."""
    return max_grad_norm * (1 - ROUNDING_MARGIN)


def rounding_in_words(arithmetic: str) -> str:
    """What a statement says of rounding.

    Args:
        arithmetic: the numbers of the forward and where they are computed, such as 'float32 on a CPU'.
    """
    kept = f'forwards in {arithmetic}; records are clipped to {1 - ROUNDING_MARGIN:g} of max_grad_norm'
    measured = _MEASURED.get(arithmetic)
    if measured is None:
        return f'{kept}, and how far one record moves the rounding of the others was not measured for this arithmetic'
    return (
        f'{kept}, which leaves room for what one record changes in the rounding of the others ({measured}, measured with 64 '
        'records of three models, not proven)'
    )
