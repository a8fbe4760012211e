"""A trained network from a TFLite file segments real images.

`python -m benchmarks.trained` compares it with the original, image by image.
"""

import numpy as np
import pytest
from PIL import Image

import deeplab_jax
from deeplab_jax.data.labels import VOC
from deeplab_jax.evaluation.confusion import confusion_matrix, scores


@pytest.fixture
def trained(shared_data):
    path = shared_data.parent / "weights" / "deeplabv3_mnv2_pascal_quant.tflite"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    return path


def test_a_trained_network_scores_on_voc(trained, shared_data, tmp_path, capsys):
    done = deeplab_jax.convert(trained, tmp_path / "converted")
    assert (len(done.used), done.dropped) == (272, ())
    segmenter, direct = deeplab_jax.load(tmp_path / "converted"), deeplab_jax.load(trained)
    assert "Read as TensorFlow's research/deeplab" in capsys.readouterr().err
    assert segmenter.classes == VOC.names
    voc = shared_data / "voc_mini" / "VOCdevkit" / "VOC2012"
    names = (voc / "ImageSets" / "Segmentation" / "val.txt").read_text().split()[:8]
    matrix = np.zeros((21, 21), np.int64)
    for name in names:
        ids = segmenter.predict(voc / "JPEGImages" / f"{name}.jpg")
        label = np.asarray(Image.open(voc / "SegmentationClass" / f"{name}.png"))
        matrix += confusion_matrix(label, ids, 21)
    # The original has 0.938 on all 231 images.
    assert scores(matrix).pixel_accuracy > 0.9
    np.testing.assert_array_equal(direct.predict(voc / "JPEGImages" / f"{name}.jpg"), ids)
