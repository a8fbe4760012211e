"""Section 5 of the guide: residual units, read from their traced programs."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Literal
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.backbones.resnet import RESNETS, block_specs
from deeplab_jax.models.layers import BatchNorm, ShapeRngs
from deeplab_jax.models.ops.convolution import XLA, use_implementation
from deeplab_jax.visualization import plots
from deeplab_jax.visualization.plots import GREY, INK, VERMILLION
from drawing.sheet import MARGIN

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
    """An operation of a unit, such as "3x3 stride 2", "batch norm" or "relu".

    Compared by identity, so that two operations with one name differ.
    """

    name: str


Path = tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Unit:
    """The operations of a residual unit.

    Attributes:
      shared: before the two paths separate.
      branch: of the path with more operations.
      shortcut: of the other path.
      after: after their sum.
    """

    shared: Path
    branch: Path
    shortcut: Path
    after: Path


def trace(name: str, overrides: dict[str, Any]) -> Unit:
    """Traces the first unit of block3 of a model."""
    model = architecture(name, num_classes=2, width=1 / 16, **overrides)
    spec = block_specs(model)[2][0]

    def make() -> nnx.Module:
        block = RESNETS[model.backbone].block(spec, model, norm=BatchNorm, rngs=ShapeRngs(0))
        use_implementation(block, XLA)
        block.eval()
        return block

    # Shapes are enough to trace it: no arrays are allocated.
    graph, state = nnx.split(nnx.eval_shape(make))
    image = jax.ShapeDtypeStruct((1, 8, 8, spec.in_features), jnp.float32)
    program = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, image).jaxpr
    paths: dict[Any, tuple[Path, ...]] = {program.invars[-1]: ((),)}
    _follow(program, paths)
    out: Any = program.outvars[0]
    return _joined(paths[out])


def _follow(program: Any, paths: dict[Any, tuple[Path, ...]]) -> None:
    """Adds to `paths` each variable's paths from the input: two after the sum, else one."""
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
                inside: paths[outside]
                for inside, outside in zip(inner.invars, equation.invars, strict=True)
                if not isinstance(outside, Literal) and outside in paths
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
    """Names the operation of a primitive; None for the other primitives of a batch norm."""
    if equation.primitive.name == "conv_general_dilated":
        side = equation.invars[1].aval.shape[0]
        stride, rate = (equation.params[k][0] for k in ("window_strides", "rhs_dilation"))
        options = {" stride": stride, " rate": rate}
        suffix = "".join(f"{name} {value}" for name, value in options.items() if value > 1)
        return f"{side}x{side}{suffix}"
    if equation.primitive.name == "sub":  # of the mean
        return "batch norm"
    assert equation.primitive.name in ("mul", "add", "convert_element_type"), equation
    return None


def _joined(ends: tuple[Path, ...]) -> Unit:
    """Splits two paths into their shared operations and their own."""
    shortcut, branch = sorted(ends, key=len)
    shared = tuple(step for step in branch if step in shortcut)
    after = shared[len(_common_start(branch, shortcut)) :]
    before = shared[: len(shared) - len(after)]
    own = [tuple(step for step in path if step not in shared) for path in (branch, shortcut)]
    return Unit(before, own[0], own[1], after)


def _common_start(first: Path, second: Path) -> Path:
    pairs = itertools.takewhile(lambda pair: pair[0] is pair[1], zip(first, second, strict=False))
    return tuple(step for step, _ in pairs)


_COLORS = {"batch norm": "#faf4be", "relu": "#fce0aa"}


def residual_units() -> Figure:
    """Residual units, and where stride and rate are in them."""
    figure, axes = plots.diagram(plots.WIDTH, 476)
    pitch = (plots.WIDTH - 2 * MARGIN) / len(UNITS)
    for column, ((title, subtitle), name, overrides) in enumerate(UNITS):
        left = MARGIN + column * pitch
        plots.text(axes, left, 22, title, size=10.5)
        plots.text(axes, left, 44, subtitle, size=9.5, color=GREY)
        _draw_unit(axes, left, 76, trace(name, overrides))
    return figure


_BOX, _STEP, _WIDE = 26, 37, 92  # height of a box, distance of boxes, and their width
_NARROW, _TALL = 62, 44  # width and height of a shortcut's boxes, with two lines


def _draw_unit(axes: Axes, left: float, top: float, unit: Unit) -> None:
    """The branch downwards, the shortcut on its right, their sum below."""
    x, side = left + _WIDE / 2, left + _WIDE + 8 + _NARROW / 2
    plots.arrow(axes, [(x, top - 16), (x, top)], head=False)
    split = top + _STEP * len(unit.shared) - (_STEP - _BOX) / 2
    total = top + _STEP * (len(unit.shared) + len(unit.branch)) + 10
    for row, step in enumerate(unit.shared + unit.branch):
        y = top + _STEP * row
        plots.arrow(axes, [(x, y + _BOX), (x, y + _STEP)], head=False)
        _draw_step(axes, x, y, (_WIDE, _BOX), step)
    plots.arrow(axes, [(x, split), (side, split), (side, total), (x + 11, total)])
    height = (_TALL + 12) * len(unit.shortcut) - 12
    for row, step in enumerate(unit.shortcut):
        y = (split + total - height) / 2 + row * (_TALL + 12)
        _draw_step(axes, side, y, (_NARROW, _TALL), step)
    plots.box(axes, x - 10, total - 10, 20, 20, "+", size=11)
    y = total + 10
    for step in unit.after:
        plots.arrow(axes, [(x, y), (x, y + 12)], head=False)
        _draw_step(axes, x, y + 12, (_WIDE, _BOX), step)
        y += 12 + _BOX
    plots.arrow(axes, [(x, y), (x, y + 22)])


def _draw_step(axes: Axes, x: float, top: float, size: tuple[int, int], step: Step) -> None:
    """A step in a box around `x`; those with a stride or a rate have a thick edge."""
    marked = "stride" in step.name or "rate" in step.name
    words = step.name if size[0] == _WIDE else step.name.replace(" ", "\n", 1)
    plots.box(
        axes,
        x - size[0] / 2,
        top,
        *size,
        words,
        fill=_COLORS.get(step.name, "#c8def0"),
        edge=VERMILLION if marked else INK,
        line=2.0 if marked else 0.8,
        size=9.5,
    )
