"""Collectives of hand-written programs, and of a compiled one with known bytes."""

import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deeplab_jax.plan.collectives import Collective, find_collectives


def program(*lines, others=""):
    """A module with instructions in its entry, and other computations."""
    entry = "\n".join(f"  {line}" for line in lines)
    main = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{entry}\n}}"
    return f"HloModule m\n{textwrap.dedent(others)}\n{main}\n"


def only(*lines, devices=8, slices=1, others=""):
    """The only kind of collective in a program."""
    ((found,), _) = find_collectives(program(*lines, others=others), devices, slices)
    return found


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2),
        ("replica_groups={{0,4,1,5}}", 4),
        ("replica_groups={}", 8),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", 4),
        ("replica_groups=mesh['a'=4,'b'=2,'c'=1] {'a','b','c'}", 8),
    ],
)
def test_sizes_of_groups(groups, size):
    found = only(f"%r = f32[8]{{0}} all-reduce(%p), channel_id=1, {groups}, to_apply=%add")
    assert found == Collective("all-reduce", size, 1, 32)


@pytest.mark.parametrize(
    ("line", "kind", "size", "moved"),
    [
        # Layouts, memory spaces and the comments of long tuples are no shapes.
        (
            "%r = (bf16[3,5]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[]{:T(128)S(6)}) "
            "all-reduce(%a, %b), replica_groups={{0,1}}, to_apply=%add",
            *("all-reduce", 2, 3 * 5 * 2 + 4),
        ),
        ("%s = u8[16] all-reduce-start(%p), replica_groups={{0,1}}", "all-reduce", 2, 16),
        ("%g = f32[16] all-gather(%p), replica_groups={{0,1,2,3}}", "all-gather", 4, 64),
        (
            "%g = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), replica_groups={{0,1,2,3}}",
            *("all-gather", 4, 64),
        ),
        ("%x = f32[4] reduce-scatter(%p), replica_groups={{0,1,2,3}}", "reduce-scatter", 4, 64),
        ("%t = s32[6] all-to-all(%p), replica_groups={{0,1}}", "all-to-all", 2, 24),
        (
            "%c = (bf16[7]{0:T(128)}, bf16[7]{0}, u32[]{:S(2)}, u32[]{:S(2)}) "
            "collective-permute-start(%p), source_target_pairs={{0,1},{1,2},{2,3}}",
            *("collective-permute", 2, 14),
        ),
        ("ROOT %r = pred[9] all-reduce(%p), replica_groups={{0,1}}", "all-reduce", 2, 9),
        ("%r = s4[9] all-reduce(%p), replica_groups={{0,1}}", "all-reduce", 2, 5),
        ("%r = f8e4m3fn[9] all-reduce(%p), replica_groups={{0,1}}", "all-reduce", 2, 9),
    ],
)
def test_bytes(line, kind, size, moved):
    assert only(line) == Collective(kind, size, 1, moved)


def test_ends_operands_and_names_are_not_counted():
    found, _ = find_collectives(
        program(
            "%s = f32[8] all-reduce-start(%p), replica_groups={{0,1}}",
            "%d = f32[8] all-reduce-done(%s)",
            '%g = f32[8] get-tuple-element(%all-reduce.1), metadata={op_name=" all-reduce(x)"}',
            "%f = f32[8] fusion(%all-gather.3), kind=kLoop, calls=%absent",
        ),
        8,
    )
    assert found == (Collective("all-reduce", 2, 1, 32),)


LOOP = """
    %condition (c: (s32[], f32[8])) -> pred[] {
      %bound = s32[]{:T(128)} constant(5)
      %i = s32[] get-tuple-element(%c), index=0
      ROOT %lt = pred[] compare(%i, %bound), direction=DIRECTION
    }
    %body (c: (s32[], f32[8])) -> (s32[], f32[8]) {
      %r = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
      ROOT %t = (s32[], f32[8]) tuple(%i, %r)
    }
"""
WHILE = "%w = (s32[], f32[8]{0}) while(%p), condition=%condition, body=%body"


def test_a_loop_counts_each_iteration():
    assert only(WHILE, others=LOOP.replace("DIRECTION", "LT")).count == 5
    known = WHILE + ', backend_config={"known_trip_count":{"n":"7"}}'
    found = only(known, others=LOOP.replace("DIRECTION", "LT"))
    assert (found.count, found.bytes) == (7, 7 * 32)


def test_loops_within_loops_multiply():
    outer = LOOP.replace("DIRECTION", "LT").replace("%condition", "%outer_condition")
    outer = outer.replace("%body", "%outer_body").replace("constant(5)", "constant(3)")
    outer = outer.replace(
        "%r = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add", WHILE
    )
    entry = WHILE.replace("%condition", "%outer_condition").replace("%body", "%outer_body")
    assert only(entry, others=LOOP.replace("DIRECTION", "LT") + outer).count == 15


def test_a_loop_of_unknown_length_counts_once_and_is_reported():
    (found,), unknown = find_collectives(program(WHILE, others=LOOP.replace("DIRECTION", "NE")), 8)
    assert (found.count, unknown) == (1, 1)


def test_called_computations_count_each_call_and_pieces_of_one_operation_once():
    piece = """
        %NAME (x: f32[8]) -> f32[8] {
          %g = f32[8] all-gather(%x), channel_id=3, replica_groups={{0,1}}
        }
    """
    plain = piece.replace("channel_id=3, ", "")
    calls = [f"%c{i} = f32[8] fusion(%p), kind=kCustom, calls=%part{i}" for i in range(3)]
    pieces = "".join(piece.replace("NAME", f"part{i}") for i in range(3))
    assert only(*calls, others=pieces).count == 1
    apart = "".join(plain.replace("NAME", f"part{i}") for i in range(3))
    assert only(*calls, others=apart).count == 3
    twice = [line.replace("part1", "part0").replace("part2", "part0") for line in calls]
    assert only(*twice, others=plain.replace("NAME", "part0")).count == 3


def test_a_fusion_that_scatters_what_it_reduces_is_a_reduce_scatter():
    fused = """
        %all-reduce-scatter.4 (x: f32[8]) -> f32[4] {
          %r = f32[8] all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
          ROOT %s = f32[4] dynamic-slice(%r, %i), dynamic_slice_sizes={4}
        }
    """
    call = "%f = f32[4] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.4"
    assert only(call, others=fused) == Collective("reduce-scatter", 2, 1, 32)


def test_between_slices():
    send = (
        "%send = (bf16[6]{0}, u32[], token[]) send(%p, %after), channel_id=5, "
        "is_host_transfer=true, frontend_attributes={"
        '_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    found = only(send, slices=3)
    assert found == Collective("all-reduce", 3, 1, 12, between_slices=True)
    assert found.sent_bytes == pytest.approx(2 * 2 / 3 * 12)
    other = program("%s = (f32[6], u32[], token[]) send(%p, %a)")
    assert find_collectives(other, 8) == ((), 0)


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-reduce", 2 * 3 / 4 * 100),
        ("all-gather", 3 / 4 * 100),
        ("reduce-scatter", 3 / 4 * 100),
        ("all-to-all", 3 / 4 * 100),
        ("collective-permute", 100),
    ],
)
def test_sent_bytes(kind, sent):
    assert Collective(kind, 4, 1, 100).sent_bytes == sent


def test_the_program_that_xla_makes_of_a_gradient():
    """Rows over 4 devices, a loop of 3 on the weights over 2: all bytes follow from the shapes."""
    mesh = Mesh(
        jax.make_mesh((4, 2), ("rows", "inner")).devices,
        ("rows", "inner"),
        axis_types=(AxisType.Auto,) * 2,
    )

    def loss(weights, x):
        def layer(x, weight):
            return jnp.tanh(x @ weight), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0] ** 2)

    def array(shape, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    lowered = jax.jit(
        jax.grad(loss), out_shardings=NamedSharding(mesh, PartitionSpec(None, "inner"))
    ).lower(array((3, 16, 16), None, "inner"), array((8, 16), "rows"))
    found, unknown = find_collectives(lowered.compile().as_text(), 8)
    totals = {(one.kind, one.group_size): (one.count, one.bytes) for one in found}
    # Gradients of the weights: 3 x 8 x 16 numbers a device, summed over the rows' devices.
    assert totals["all-reduce", 4][1] == 3 * 8 * 16 * 4
    assert unknown == 0
    # Forward: activations, 2 x 16 a device and layer, summed over the inner axis.
    assert totals["all-reduce", 2] == (3, 3 * 2 * 16 * 4)
