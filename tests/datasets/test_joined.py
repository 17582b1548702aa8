"""The lines of docs/private_config.md that join annotation files, which private training takes in place of CombinedDataset."""

import json
import re

import numpy as np
from mmpose.datasets.datasets import CocoDataset

from tests.support.paths import REPO


def written(folder, names, points):
    folder.mkdir(parents=True)
    image = dict(id=7, file_name='one.jpg', width=9, height=9)
    person = dict(
        id=1, image_id=7, category_id=5, keypoints=points, num_keypoints=1, bbox=[1, 1, 7, 7], area=49, iscrowd=0
    )
    content = dict(images=[image], annotations=[person], categories=[dict(id=5, name='person', keypoints=names)])
    (folder / 'train.json').write_text(json.dumps(content))


def test_files_with_other_joints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / 'data/set_a', ['right_hand', 'foot', 'head'], [1, 2, 2, 3, 4, 2, 5, 6, 1])
    written(tmp_path / 'data/set_b', ['head', 'left_hand', 'right_hand'], [1, 1, 2, 2, 2, 2, 3, 3, 2])
    text = (REPO / 'docs/private_config.md').read_text().partition('## Several data sets')[2]
    exec(re.search(r'```python\n(.*?)```', text, re.DOTALL)[1], {})
    joints = {i: dict(name=name, id=i, color=[0, 0, 0], type='upper', swap='') for i, name in enumerate('abc')}
    info = dict(dataset_name='joined', paper_info={}, keypoint_info=joints, skeleton_info={})
    info.update(joint_weights=[1.0] * 3, sigmas=[0.1] * 3)
    data = CocoDataset('joined.json', data_root='data/', data_prefix=dict(img=''), metainfo=info)
    assert [data[i]['img_path'] for i in range(2)] == ['data/set_a/one.jpg', 'data/set_b/one.jpg']
    np.testing.assert_array_equal(data[0]['keypoints'][0], [[5, 6], [0, 0], [1, 2]])
    np.testing.assert_array_equal(data[0]['keypoints_visible'][0], [1, 0, 1])
    np.testing.assert_array_equal(data[1]['keypoints'][0], [[1, 1], [2, 2], [3, 3]])
