"""Section 5 of the guide: residual units, read from the programs that they are traced to."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Literal

from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.backbones.resnet import RESNETS, block_specs
from deeplab_jax.models.layers import BatchNorm, ShapeRngs
from deeplab_jax.models.ops.convolution import XLA, use_implementation
from deeplab_jax.visualization.canvas import GREY, INK, VERMILLION, Canvas, Color, Point
from drawing.sheet import (
    MARGIN,
    WIDTH,
    Picture,
    down_arrow,
)

# Title, architecture and its choices: the first unit of block3 in each.
UNITS: tuple[tuple[tuple[str, str], str, dict[str, Any]], ...] = (
    (("basic", "ResNet-18, 34"), "paper_resnet18", {}),
    (("bottleneck, v1.5", "the default"), "paper_resnet50", {}),
    (("bottleneck, v1", "stride_place conv1"), "paper_resnet50", {"stride_place": "conv1"}),
    (("pre-activation", "residual pre"), "paper_resnet50", {"residual": "pre"}),
    (("v1.5, stride removed", "output stride 8"), "paper_resnet50", {"output_stride": 8}),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """An operation of a unit, as "3x3 stride 2", "batch norm" or "relu"; equal to itself alone."""

    name: str


Path = tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Unit:
    """What a residual unit computes.

    Attributes:
      shared: before the paths divide.
      branch: of the path with most convolutions, behind it.
      shortcut: of the other one.
      after: behind their sum.
    """

    shared: Path
    branch: Path
    shortcut: Path
    after: Path


def trace(name: str, overrides: dict[str, Any]) -> Unit:
    """The first unit of block3 of a model, as its program tells."""
    model = architecture(name, num_classes=2, width=1 / 16, **overrides)
    spec = block_specs(model)[2][0]

    def make() -> nnx.Module:
        block = RESNETS[model.backbone].block(spec, model, norm=BatchNorm, rngs=ShapeRngs(0))
        use_implementation(block, XLA)
        block.eval()
        return block

    # Shapes are enough for a program: no array is made.
    graph, state = nnx.split(nnx.eval_shape(make))
    image = jax.ShapeDtypeStruct((1, 8, 8, spec.in_features), jnp.float32)
    program = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, image).jaxpr
    paths: dict[Any, tuple[Path, ...]] = {program.invars[-1]: ((),)}
    _follow(program, paths)
    out: Any = program.outvars[0]
    return _joined(paths[out])


def _follow(program: Any, paths: dict[Any, tuple[Path, ...]]) -> None:
    """Adds each variable's paths from the input: one, or two once both were added."""
    for equation in program.eqns:
        read = [v for v in equation.invars if not isinstance(v, Literal) and v in paths]
        if not read:
            continue
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        name = str(equation.params.get("name", ""))
        ends = tuple(path for variable in read for path in paths[variable])
        if equation.primitive.name == "add" and len(read) == 2:
            paths[equation.outvars[0]] = ends
            continue
        if inner is not None and name != "relu" and not _is_relu(inner):
            inner = getattr(inner, "jaxpr", inner)
            within = {
                theirs: paths[ours]
                for theirs, ours in zip(inner.invars, equation.invars, strict=True)
                if not isinstance(ours, Literal) and ours in paths
            }
            _follow(inner, within)
            paths[equation.outvars[0]] = within[inner.outvars[0]]
            continue
        step = "relu" if inner is not None else _step(equation)
        more = () if step is None else (Step(step),)
        paths[equation.outvars[0]] = tuple((*path, *more) for path in ends)


def _is_relu(inner: Any) -> bool:
    equations = getattr(inner, "jaxpr", inner).eqns
    return [e.primitive.name for e in equations] in (["max"], ["pjit"], ["jit"]) and all(
        e.primitive.name == "max" or e.params.get("name") == "relu" for e in equations
    )


def _step(equation: Any) -> str | None:
    """What a primitive on the way is; None: a part of a batch norm that was named already."""
    if equation.primitive.name == "conv_general_dilated":
        side = equation.invars[1].aval.shape[0]
        stride, rate = (equation.params[k][0] for k in ("window_strides", "rhs_dilation"))
        told = (f" stride {stride}" if stride > 1 else "") + (f" rate {rate}" if rate > 1 else "")
        return f"{side}x{side}{told}"
    if equation.primitive.name == "sub":  # of the mean
        return "batch norm"
    assert equation.primitive.name in ("mul", "add", "convert_element_type"), equation
    return None


def _joined(ends: tuple[Path, ...]) -> Unit:
    """Two paths as what they share at their ends, and what they do not."""
    shortcut, branch = sorted(ends, key=len)
    shared = tuple(step for step in branch if step in shortcut)
    after = shared[len(_common_start(branch, shortcut)) :]
    before = shared[: len(shared) - len(after)]
    own = [tuple(step for step in path if step not in shared) for path in (branch, shortcut)]
    return Unit(before, own[0], own[1], after)


def _common_start(first: Path, second: Path) -> Path:
    pairs = itertools.takewhile(lambda pair: pair[0] is pair[1], zip(first, second, strict=False))
    return tuple(step for step, _ in pairs)


_COLORS: dict[str, Color] = {"batch norm": (250, 244, 190), "relu": (252, 224, 170)}


def residual_units() -> Picture:
    """Residual units, and where stride and rate sit in them."""
    canvas = Canvas(WIDTH, 464)
    pitch = (WIDTH - 2 * MARGIN) / len(UNITS)
    for column, ((title, under), name, overrides) in enumerate(UNITS):
        left = MARGIN + column * pitch
        canvas.text(left, 24, title, size=15)
        canvas.text(left, 44, under, size=13, color=GREY)
        _unit(canvas, left, 74, trace(name, overrides))
    return canvas.picture()


_BOX, _STEP, _WIDE = 26, 37, 88  # height of a box, pitch of boxes, their width: pixels
_NARROW, _TALL = 60, 42  # width and height of a shortcut's boxes, in two lines


def _unit(canvas: Canvas, left: float, top: float, unit: Unit) -> None:
    """The branch downwards, the shortcut on its right, the sum below."""
    x, side = left + _WIDE / 2, left + _WIDE + 10 + _NARROW / 2
    canvas.line([(x, top - 14), (x, top)], GREY, 1.2)
    divide = top + _STEP * len(unit.shared) - (_STEP - _BOX) / 2
    total = top + _STEP * (len(unit.shared) + len(unit.branch)) + 10
    canvas.line([(x, divide), (side, divide), (side, total), (x + 10, total)], GREY, 1.2)
    for row, step in enumerate(unit.shared + unit.branch):
        _box(canvas, (x, top + _STEP * row), (_WIDE, _BOX), step)
        canvas.line([(x, top + _STEP * row + _BOX), (x, top + _STEP * (row + 1))], GREY, 1.2)
    height = (_TALL + 12) * len(unit.shortcut) - 12
    for row, step in enumerate(unit.shortcut):
        y = (divide + total - height) / 2 + row * (_TALL + 12)
        _box(canvas, (side, y), (_NARROW, _TALL), step)
    canvas.text(x, total, "+", size=24, anchor="mm")
    y = total + 12
    for step in unit.after:
        canvas.line([(x, y), (x, y + 10)], GREY, 1.2)
        _box(canvas, (x, y + 10), (_WIDE, _BOX), step)
        y += 10 + _BOX
    down_arrow(canvas, x, y, y + 22)


def _box(canvas: Canvas, place: Point, size: tuple[int, int], step: Step) -> None:
    """A step in a box, of which the middle of the upper side is given."""
    (x, y), (width, height) = place, size
    marked = "stride" in step.name or "rate" in step.name
    outline, thickness = (VERMILLION, 2.5) if marked else (INK, 1.0)
    fill = _COLORS.get(step.name, (200, 222, 240))
    right = x + width / 2
    canvas.box(x - width / 2, y, right, y + height, fill=fill, outline=outline, thickness=thickness)
    lines = [step.name] if width == _WIDE else step.name.split(" ", 1)
    for row, line in enumerate(lines):
        middle = y + height / 2 + 17 * (row - (len(lines) - 1) / 2)
        canvas.text(x, middle, line, size=13, anchor="mm")
