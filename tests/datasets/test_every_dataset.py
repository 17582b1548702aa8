"""Every top-down data set that MMPose has: its records are served, or refused with one sentence."""

import mmpose
import pytest
from mmengine.dataset import BaseDataset
from mmpose.datasets.dataset_wrappers import CombinedDataset
from mmpose.datasets.datasets.utils import parse_pose_metainfo
from mmpose.registry import DATASETS

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.privacy.errors import PrivacyError
from tests.support.datasets import PIPELINE, coco_style


def classes():
    mmpose.utils.register_all_modules()
    found = {name: cls for name, cls in DATASETS.module_dict.items() if cls.__module__.startswith('mmpose.')}
    return sorted(
        name
        for name, cls in found.items()
        if issubclass(cls, BaseDataset) and not issubclass(cls, CombinedDataset) and 'from_file' in (cls.METAINFO or {})
    )


@pytest.mark.parametrize('name', classes())
def test_it_is_served_or_refused_in_one_sentence(name, synthetic):
    if name == 'MpiiDataset':
        ann_file = 'annotations/mpii_train.json'
    else:
        ann_file = coco_style(synthetic, name, parse_pose_metainfo(DATASETS.get(name).METAINFO)['num_keypoints'])
    private = dict(
        type=name, data_root=str(synthetic), ann_file=ann_file, data_prefix=dict(img='images/'), pipeline=PIPELINE
    )
    try:
        dataset = PublicPrivateDataset(private=private, privacy_unit='image')
    except PrivacyError as error:
        assert str(error).startswith('train_dataloader.dataset.private') and '\n' not in str(error)
        return
    samples = [packed for i in range(len(dataset)) for packed in dataset[i]]
    assert dataset.num_records and samples and all(packed['inputs'].shape[1:] == (64, 64) for packed in samples)
