"""Writes synthetic people with five joints in COCO's format, so that the project runs without data of yours.

python make_people.py --out data/five_joints
"""

import argparse
import json
from pathlib import Path

import cv2

from mmpose_dp.datasets.mpii_files import JOINTS
from mmpose_dp.datasets.synthetic import make_synthetic_mpii

# MPII's names of the joints of datasets/five_joints_dataset.py
FIVE = ('head', 'l_wrist', 'r_wrist', 'l_ankle', 'r_ankle')


def annotations(people: list[dict], pictures: Path) -> dict:
    """MPII's people in COCO's format. MPII counts pixels from 1, and gives a person's size in units of 200 pixels."""
    files = sorted({person['image'] for person in people})
    found = []
    for number, person in enumerate(people, 1):
        side = 200 * person['scale']
        corner = [x - 1 - side / 2 for x in person['center']]
        joints = [(*person['joints'][i], 2 * person['joints_vis'][i]) for i in map(JOINTS.index, FIVE)]
        keypoints = [value for x, y, seen in joints for value in (x - 1, y - 1, seen)]
        box = dict(bbox=[*corner, side, side], area=side * side, iscrowd=0, category_id=1)
        image = files.index(person['image']) + 1
        found.append(dict(box, id=number, image_id=image, keypoints=keypoints, num_keypoints=5))
    sizes = [cv2.imread(str(pictures / file)).shape for file in files]
    images = [dict(id=i, file_name=f, height=h, width=w) for i, (f, (h, w, _)) in enumerate(zip(files, sizes), 1)]
    return dict(images=images, annotations=found, categories=[dict(id=1, name='person')])


def main() -> None:
    """Makes the people, and writes train.json and val.json beside the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--train', type=int, default=1000, help='training people')
    parser.add_argument('--val', type=int, default=200, help='validation people')
    args = parser.parse_args()
    make_synthetic_mpii(args.out, num_train=args.train, num_val=args.val, image_size=96)
    for split in ('train', 'val'):
        people = json.loads((args.out / f'annotations/mpii_{split}.json').read_text())
        (args.out / f'{split}.json').write_text(json.dumps(annotations(people, args.out / 'images')))


if __name__ == '__main__':
    main()
