"""Starting from a checkpoint of another data set: what fits is kept, joints are matched by name, the rest is told.

Must not touch a checkpoint that training resumes from.
"""

from collections.abc import Sequence

from torch import Tensor


def fit_joints(
    saved: dict[str, Tensor],
    wanted: dict[str, Tensor],
    saved_joints: Sequence[str],
    wanted_joints: Sequence[str],
) -> list[str]:
    """Makes ``saved`` fit a model with other joints, in place; returns a line for each tensor that did not fit as it was.

    A tensor with one row a joint (an output layer: COCO's has 17, MPII's 16) gets the model's own rows, with those of the
    joints that both know replaced. Any other tensor of another shape is left to be skipped.

    Args:
        saved: a checkpoint's state dict.
        wanted: the model's.
        saved_joints: names of the joints in the order of the checkpoint's rows; empty if not known.
        wanted_joints: names in the model's order.
    """
    both = [name for name in wanted_joints if name in saved_joints]
    lines = []
    for key, own in wanted.items():
        if key not in saved or saved[key].shape == own.shape:
            continue
        shapes = f'{key} is {tuple(saved[key].shape)} in the checkpoint and {tuple(own.shape)} in the model'
        rows = (len(saved[key]), len(own)) if saved[key].dim() and own.dim() else None
        if both and rows == (len(saved_joints), len(wanted_joints)) and saved[key].shape[1:] == own.shape[1:]:
            fitted = own.detach().clone()
            for name in both:
                fitted[wanted_joints.index(name)] = saved[key][saved_joints.index(name)].to(fitted)
            saved[key] = fitted
            new = [name for name in wanted_joints if name not in both]
            lines.append(f'{shapes}: kept for {len(both)} joints, new for {", ".join(new)}')
        else:
            lines.append(f'{shapes}: not kept')
    return lines
