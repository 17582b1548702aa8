"""Warns of pictures that are no pictures: empty files, DICOM, HEIC, pages that a server sent in their place.

Their records teach nothing and cost as much privacy. Must not decode a picture, which would take minutes.
"""

from collections.abc import Set

import cv2

from mmpose_dp.messages import warn_in_terminal

_MOST = 10_000  # files that are looked at; of more, as many, evenly spaced


def warn_of_unreadable(paths: Set[str], key: str) -> None:
    """Warns of files that begin as nothing that OpenCV reads.

    Args:
        paths: of the pictures, all of which are there.
        key: the config key of the data set.
    """
    looked = sorted(paths)[:: 1 + len(paths) // _MOST]
    unread = [path for path in looked if not cv2.haveImageReader(path)]
    if unread:
        warn_in_terminal(
            f'{key}: {len(unread)} of {len(looked)} picture files are empty or no pictures that OpenCV reads, for example '
            f'{unread[0]}. Their records teach nothing and cost as much privacy: save them as PNG or JPEG, or take them out of the '
            'annotations'
        )
