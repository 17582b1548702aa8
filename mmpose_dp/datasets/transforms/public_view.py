"""The public view phi(x): what Feature DP publishes of a record, and nothing more.

Feature DP protects what this transform removes, so a view must be a fixed function of one record's image and annotation, and
must actually remove what it claims. Must not be random, must not use other records, and must not leave a region visible because
an annotation is missing.
"""

from collections.abc import Mapping

import cv2
import numpy as np
from mmpose.registry import TRANSFORMS

from mmpose_dp.privacy.errors import ConfigError, DataError

from .view import View
from .view_axes import SPACING, ViewAxis, both_ways

MODES = ('blur', 'blur_full_resolution', 'pixelate', 'face', 'person')
REGION_MODES = ('face', 'person')
GREY = 127  # a constant, since a mean colour would reveal something of what it hides
REFERENCE = 256  # sizes are in pixels of a crop of this height, as in the paper
_SIGMAS = {'blur': 6.0, 'blur_full_resolution': 10.0}
_REACH = 1.6  # RandomBBoxTransform at its widest shows less than this many box sizes around the centre


@TRANSFORMS.register_module()
class PublicView(View):
    """Replaces the image with the record's public view.

    It belongs right after GetBBoxCenterScale and before every random transform: each record then has one public view, and
    augmenting that reveals nothing more. (Many blurred crops of one image would: together they hold more detail than one.) Sizes
    are given for a crop of 256 pixels and scaled to the largest box in the image. PublicPrivateDataset inserts the transform
    by itself. Pictures of floats are rounded to 8 bits first, since a view that is not quantised can be inverted.

    Modes:
        'blur': Gaussian blur, kept at one sample per three ``sigma``, rounded to 8 bits and interpolated to the picture's size.
            docs/guarantee.md says what can be recovered from it; ``tools/audit_view.py`` examines a config's own pictures.
        'blur_full_resolution': a Gaussian blur with every pixel kept (arXiv 2504.10190: kernel 25, sigma 10). Its truncated
            kernel is nearly a box filter, and a deconvolution recovers most of the picture, faces too.
        'pixelate': means over squares of ``block`` pixels.
        'face': heads are hidden by a grey disc around the neck and head-top joints; if one is missing, the person's box is.
        'person': squares around the people are hidden, as wide as the longer side of their padded boxes.

    The region modes hide every annotated person of the picture, all in the same way, since one record's view must not show what
    another record's view hides. PublicPrivateDataset passes them as ``people``, also those whom MMPose makes no samples of (crowds,
    people without joints). People without annotation are not hidden.

    Outside the square around the person that augmentation can reach, every mode is grey.

    Blurs and pixelation are those of the whole picture, of which a record shows its window. Their scale is that of ``view_box``
    (pixels), which PublicPrivateDataset sets to the largest box in the picture, so that all its people have one view. Without it,
    as outside that data set, it is the scale of the record's own box.

    Args:
        mode: one of the above.
        sigma: that of the blurs, in pixels of a 256-pixel crop; 6 by default, 10 at full resolution.
        kernel_size: that of 'blur_full_resolution', likewise; 25 by default.
        block: side of a square of the pixelation, likewise.
        head_keypoints: indices of upper neck and head top; MPII's by default. Joints without 'neck' or 'head' in their names
            are refused.

    Raises ConfigError for an unknown mode, for sizes out of range and for a setting that has no meaning in the mode.
    """

    def __init__(
        self,
        mode: str = 'blur',
        kernel_size: int | None = None,
        sigma: float | None = None,
        block: int = 16,
        head_keypoints: tuple[int, int] = (8, 9),
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f'public_view.mode={mode!r} is unknown; write one of {MODES}')
        if mode == 'blur' and kernel_size is not None:
            raise ConfigError(
                f"public_view.kernel_size={kernel_size} has no meaning under mode='blur', which takes sigma only; for the blur "
                "that keeps every pixel, and can be inverted, write mode='blur_full_resolution'"
            )
        if not isinstance(head_keypoints, (list, tuple)) or len(head_keypoints) != 2 or len({*head_keypoints}) < 2:
            raise ConfigError(
                f'public_view.head_keypoints={head_keypoints!r} must be the numbers of two joints, neck and head top: from one, '
                "the size of a head does not follow, and faces could stay visible. Without two, write mode='person'"
            )
        self.mode = mode
        self.follows_box = mode not in REGION_MODES
        self.kernel_size = 25 if kernel_size is None else kernel_size
        self.sigma = _SIGMAS.get(mode, 1.0) if sigma is None else sigma
        if self.kernel_size < 3 or not 0 < self.sigma < float('inf') or block < 2:
            raise ConfigError('public_view: kernel_size must be at least 3, sigma above 0 and block at least 2')
        self.block = block
        self.head_keypoints = tuple(head_keypoints)

    @property
    def description(self) -> str:
        """What the view keeps, for the privacy statement."""
        size = f'in pixels of a {REFERENCE}-pixel crop'
        return {
            'blur': f'Gaussian blur, sigma {self.sigma:g}, one 8-bit sample per {SPACING * self.sigma:g} pixels, {size}, '
            'with cubic interpolation between the samples',
            'blur_full_resolution': f'Gaussian blur at full resolution, kernel {self.kernel_size}, sigma {self.sigma:g} {size}, '
            'which a deconvolution largely undoes: faces come back',
            'pixelate': f'pixelation, blocks of {self.block} {size}, at fixed places of the picture',
            'face': f'everything but the heads (joints {self.head_keypoints[0]}, {self.head_keypoints[1]}) of annotated people, or '
            'the squares around them where a head is not annotated',
            'person': 'everything but the squares around annotated people',
        }[self.mode]

    def check_joints(self, names: Mapping[int, str]) -> None:
        """Raises ConfigError if mode 'face' would hide something other than heads; ``names`` are a data set's joints."""
        found = [names.get(joint, 'no joint') for joint in self.head_keypoints]
        if self.mode == 'face' and not all('neck' in name.lower() or 'head' in name.lower() for name in found):
            raise ConfigError(
                f'public_view.head_keypoints={self.head_keypoints} are {" and ".join(found)} in this data set, so faces could stay '
                "visible: write the numbers of neck and head top, or mode='person'. The metainfo must name these joints "
                "so: each name with 'neck' or 'head' in it"
            )

    def transform(self, results: dict) -> dict:
        """Reads img (H, W, 3), uint8 or floats from 0 to 255, bbox_center and bbox_scale (1, 2), keypoints (1, K, 2),
        keypoints_visible (1, K), and people and view_box if present; replaces img and keeps its type. Raises DataError after a
        random transform and for pictures of other types."""
        if 'flip' in results or 'bbox_rotation' in results or 'transformed_keypoints' in results:
            raise DataError('PublicView must be right after GetBBoxCenterScale, before every random transform')
        if 'bbox_scale' not in results:
            raise DataError('PublicView needs bbox_center and bbox_scale: put it after GetBBoxCenterScale')
        image, center = eight_bits(results['img']), results['bbox_center'][0]
        box = float(max(results['bbox_scale'][0]))
        rows, columns = window(center, box, image.shape)
        view = np.full_like(image, GREY)
        if rows.stop > rows.start and columns.stop > columns.start:
            if self.mode in REGION_MODES:
                view[rows, columns] = self._hide(
                    image[rows, columns], center, box, results, (columns.start, rows.start)
                )
            else:
                view[rows, columns] = self._blurred(image, rows, columns, results.get('view_box', box))
        results['img'] = view.astype(results['img'].dtype, copy=False)
        return results

    def axis(self, size: int, shown: slice, box: float) -> ViewAxis:
        """The view of the pixels ``shown`` along an axis of ``size`` pixels, for a padded box of ``box`` pixels. Not defined for
        the region modes."""
        factor, start, stop = box / REFERENCE, shown.start, shown.stop
        if self.mode == 'blur':
            return ViewAxis.sampled_blur(size, start, stop, max(self.sigma * factor, 1.0))
        if self.mode == 'pixelate':
            return ViewAxis.pixelation(size, start, stop, max(self.block * factor, 2))
        return ViewAxis.full_blur(size, start, stop, *self._full_resolution(factor))

    def _full_resolution(self, factor: float) -> tuple[int, float]:
        return 2 * max(round(self.kernel_size * factor) // 2, 1) + 1, max(self.sigma * factor, 0.5)

    def _blurred(self, image: np.ndarray, rows: slice, columns: slice, box: float) -> np.ndarray:
        """The window of the picture's view that ``rows`` and ``columns`` show."""
        if self.mode == 'blur_full_resolution':
            size, sigma = self._full_resolution(box / REFERENCE)
            top, left = (max(part.start - size // 2, 0) for part in (rows, columns))
            read = image[top : rows.stop + size // 2, left : columns.stop + size // 2]
            blurred = cv2.GaussianBlur(read, (size, size), sigma).reshape(read.shape)  # cv2 drops an axis of length 1
            return blurred[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        down, across = self.axis(image.shape[0], rows, box), self.axis(image.shape[1], columns, box)
        samples = np.rint(both_ways(np.atleast_3d(image)[down.read, across.read], down.keep, across.keep))
        shown = np.rint(both_ways(samples, down.show, across.show)).clip(0, 255).astype(np.uint8)
        return shown.reshape(*shown.shape[:2], *image.shape[2:])

    def _hide(
        self, window: np.ndarray, center: np.ndarray, box: float, results: dict, offset: tuple[int, int]
    ) -> np.ndarray:
        hidden = window.copy()
        center = center - offset
        own = dict(results, box=np.concatenate([center - box / 2, center + box / 2]))
        others = [dict(p, box=p['padded_box'] - np.tile(offset, 2)) for p in results.get('people', [])]
        for person in (own, *others):
            self._hide_person(hidden, person, np.asarray(offset))
        return hidden

    def _hide_person(self, window: np.ndarray, person: dict, offset: np.ndarray) -> None:
        """Paints one person's region grey; the whole box if the head is not annotated."""
        if self.mode == 'person' or not self._knows_head(person):  # mode 'person' does not need head joints
            x0, y0 = np.maximum(np.floor(person['box'][:2]), 0).astype(int)
            x1, y1 = np.maximum(np.ceil(person['box'][2:]), 0).astype(int)
            window[y0:y1, x0:x1] = GREY
            return
        neck, head = person['keypoints'][0][list(self.head_keypoints)] - offset
        radius = max(float(np.linalg.norm(head - neck)), 0.08 * float(person['box'][2] - person['box'][0]))
        middle = tuple(int(v) for v in (neck + head) / 2)
        cv2.circle(window, middle, int(np.ceil(radius)), (GREY,) * 3, thickness=-1)

    def _knows_head(self, person: dict) -> bool:
        ends = list(self.head_keypoints)
        joints, visible = person['keypoints'][0][ends], person['keypoints_visible'][0][ends]
        return bool(((visible > 0) & (joints > 0).all(1)).all())

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.description})'


def window(center: np.ndarray, box: float, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """The rows and columns of the picture that augmentation can reach."""
    left, top = np.maximum(np.floor(center - _REACH / 2 * 1.5 * box), 0).astype(int)
    right, bottom = np.minimum(np.ceil(center + _REACH / 2 * 1.5 * box), shape[1::-1]).astype(int)
    return slice(int(top), int(bottom)), slice(int(left), int(right))


def eight_bits(image: np.ndarray) -> np.ndarray:
    """The picture as uint8. Raises DataError if it is neither uint8 nor floats from 0 to 255."""
    if image.dtype == np.uint8:
        return image
    if np.issubdtype(image.dtype, np.floating) and image.size and image.min() >= 0 and image.max() <= 255:
        return np.rint(image).astype(np.uint8)
    raise DataError(
        f'PublicView takes pictures of 8 bits (uint8, or floats from 0 to 255), but this one has type {image.dtype}: with finer '
        'values the view could be inverted. Convert the pictures, or remove what changes their values before GetBBoxCenterScale'
    )
