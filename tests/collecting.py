"""All gradients of a batch at once, for comparing engines."""

from mmpose_dp.gradients.blocks import RowGradients


def row_gradients_of(engine, losses):
    """What the engine hands over for the (rows,) losses, collected."""
    gradients = RowGradients(engine.params)
    engine.backward(losses, gradients)
    return gradients
