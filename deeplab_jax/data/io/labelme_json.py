"""LabelMe files: the shapes in an image, drawn to class ids as labelme draws them."""

from __future__ import annotations

import base64
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageDraw

from deeplab_jax.data.io import images, polygons
from deeplab_jax.data.io.polygons import ShapeError
from deeplab_jax.utils.errors import UserError, did_you_mean

# The least numbers of points. `rotation` and rectangles of four points are X-AnyLabeling's.
_MIN_POINTS = {
    "polygon": 3,
    "rectangle": 2,
    "oriented_rectangle": 4,
    "rotation": 4,
    "circle": 2,
    "line": 2,
    "linestrip": 2,
    "point": 1,
    "mask": 2,
}
# labelme's defaults, pixels.
_LINE_WIDTH = 10
_POINT_RADIUS = 5


def read(path: pathlib.Path) -> dict[str, Any]:
    """Reads a LabelMe file; its shapes have labels and points.

    Raises:
      UserError: the file cannot be read, or is not one of LabelMe's.
    """
    content = polygons.read_json(path, "LabelMe")
    problems: list[str] = []
    shapes = list(polygons.read_entries(content, "shapes", ("label", "points"), problems))
    if problems:
        raise UserError(f"{path}: {problems[0]}")
    for shape in shapes:
        shape["label"] = str(shape["label"]).strip()
    return content | {"shapes": shapes}


def draw(
    path: pathlib.Path, names: Sequence[str], ignore_label: int, remarks: list[tuple[str, str]]
) -> UInt8[np.ndarray, "h w"]:
    """Draws shapes as labelme's `utils.shapes_to_label` does: in their order, edges included.

    Shapes that are "not drawn" are added to `remarks`.

    Raises:
      UserError: the file cannot be read.
      ShapeError: a shape cannot be drawn, or its label is no class.
    """
    content = read(path)
    size = _read_size(path, content)
    picture = Image.new("L", size, polygons.class_id("background", names, ignore_label))
    for number, shape in enumerate(content["shapes"], start=1):
        label, kind = shape["label"], shape.get("shape_type") or "polygon"
        title = f"{path}: shape {number} ({label}, {kind})"
        class_id = polygons.class_id(label, names, ignore_label)
        if class_id < 0:
            raise ShapeError(
                f"{path}: shape {number} has the label {label!r}, which the file of classes does "
                f"not name{did_you_mean(label, names)}. Correct the label, or add a line "
                f"`{label}` to the file of classes."
            )
        with polygons.shape_errors(title):
            points = polygons.check_points(np.array(shape["points"], np.float64).ravel())
            if kind not in _MIN_POINTS:
                raise ValueError(f"known are the shapes {', '.join(_MIN_POINTS)}")
            if len(points) < _MIN_POINTS[kind]:
                expected = f"{len(points)} points, expected at least {_MIN_POINTS[kind]}"
                remarks.append(("not drawn", f"{title} has {expected}"))
                continue
            box = _draw_shape(picture, kind, points, class_id, shape.get("mask"))
        if (box.max(0) < 0).any() or (box.min(0) >= size).any():
            place = f"outside the image ({size[0]} x {size[1]})"
            remarks.append(("not drawn", f"{title} is {place}"))
    return np.asarray(picture)


def _draw_shape(
    picture: Image.Image, kind: str, points: Shaped[np.ndarray, "n 2"], value: int, mask: Any
) -> Shaped[np.ndarray, "n 2"]:
    """Draws a shape, and returns points that span it."""
    canvas = ImageDraw.Draw(picture)
    if kind == "mask":
        code = np.array(Image.open(io.BytesIO(base64.b64decode(mask)))).astype(bool)
        (left, top), (right, bottom) = points.astype(int).tolist()
        if code.shape != (bottom - top + 1, right - left + 1):
            raise ValueError(f"its mask is {list(code.shape)}, its points {points.tolist()}")
        picture.paste(value, (left, top), Image.fromarray(code))
        return points
    draw: Any = canvas.polygon
    if kind in ("circle", "point"):
        radius = math.dist(*points) if kind == "circle" else _POINT_RADIUS
        points, draw = points[0] + [[-radius], [radius]], canvas.ellipse
    elif kind == "rectangle":
        points, draw = np.stack([points.min(0), points.max(0)]), canvas.rectangle
    xy = [tuple(point) for point in points.tolist()]
    if kind in ("line", "linestrip"):
        canvas.line(xy, fill=value, width=_LINE_WIDTH)
    else:
        draw(xy, outline=value, fill=value)
    return points


def _read_size(path: pathlib.Path, content: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the width and height of the image; files of old versions hold only the image."""
    size = polygons.read_size(content.get("imageWidth"), content.get("imageHeight"))
    if size is not None:
        return size
    name = path.parent / str(content.get("imagePath") or "").replace("\\", "/")
    data = content.get("imageData")
    try:
        with images.open_image(io.BytesIO(base64.b64decode(data)) if data else name) as image:
            return image.size
    except Exception:  # no such file, or one that Pillow cannot open
        raise UserError(
            f"{path}: has no imageHeight, imageWidth and imageData, and there is no image {name}. "
            "Open it in labelme and save it again."
        ) from None
