"""Examples that are stored as pairs of an image file and a mask file."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from deeplab_jax.data.dataset import Example, Pair
from deeplab_jax.data.io import images, masks

_NUM_SAMPLES = 4


class FileSource:
    """Reads an example's files when the example is indexed. Pickles.

    Args:
      pairs: the files.
      read_label: returns the class ids in a mask file, uint8 `[height, width]`. Must pickle.
      num_channels: number of channels of the images.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        read_label: Callable[[pathlib.Path], np.ndarray],
        num_channels: int = 3,
    ) -> None:
        # Strings pickle in a fraction of the time that paths take.
        self._files = tuple((pair.name, str(pair.image), str(pair.mask)) for pair in pairs)
        self._read_label = read_label
        self._num_channels = num_channels

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} examples")
        name, *paths = self._files[index]
        image_path, mask_path = map(pathlib.Path, paths)
        image = images.read_image(image_path, self._num_channels)
        label = self._read_label(mask_path)
        masks.check_size(image_path, image.shape[:2], mask_path, label.shape)
        return {"image": image, "label": label, "name": name}

    def check_samples(self) -> None:
        """Reads a few evenly spaced examples, so that a wrong setting shows at startup.

        Raises:
          UserError: a file is damaged, or contradicts the settings.
        """
        for index in sorted({int(i) for i in np.linspace(0, len(self) - 1, _NUM_SAMPLES)}):
            self[index]
