"""Tests of what is read from compiled programs, against values counted by hand."""

import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from benchmarks.compiler import compiled_program
from benchmarks.compiler.compiled_program import Collective

# On 8 devices, x: float32 [16, 32] in 8 shares of rows, [2, 32] = 256 bytes each.
PROGRAM = """
import dataclasses, functools, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P
from benchmarks.compiler import compiled_program

mesh = jax.make_mesh((8,), ("data",))
x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=NamedSharding(mesh, P("data")))

def per_device(function, out=P("data")):
    return jax.shard_map(function, mesh=mesh, in_specs=P("data"), out_specs=out, check_vma=False)

def summed(x):
    return lax.scan(lambda c, _: (jnp.sin(lax.psum(c, "data")), None), x, None, length=5)[0]

def nested(x):
    def outer(c, _):
        inner = lax.fori_loop(2, 9, lambda i, c: jnp.sin(lax.ppermute(c, "data", [(0, 1)])), c)
        return lax.psum_scatter(jnp.tile(inner, (8, 1)), "data", tiled=True), None
    return lax.scan(outer, x, None, length=3)[0]

def branches(x):
    return lax.cond(x[0, 0] > 0, lambda x: lax.psum(x, "data"), lambda x: x, x)

def until(x):
    return lax.while_loop(lambda x: x[0, 0] < 3, lambda x: lax.psum(x + 1, "data"), x)

programs = {
    "summed": per_device(summed),
    "nested": per_device(nested),
    "gathered": per_device(lambda x: lax.all_gather(x, "data", tiled=True), P()),
    "exchanged": per_device(lambda x: lax.all_to_all(x, "data", 1, 1, tiled=True)),
    "branches": per_device(branches),
    "until": per_device(until),
}
found = {}
for name, program in programs.items():
    compiled = jax.jit(program).lower(x).compile()
    try:
        found[name] = [dataclasses.astuple(c) for c in compiled_program.collectives(compiled)]
    except compiled_program.UnknownTripCountError as error:
        found[name] = str(error)
        some = compiled_program.collectives(compiled, unknown_trips=4)
        found[name + " four times"] = [dataclasses.astuple(c) for c in some]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    """The collectives of each program, as eight simulated devices compile them."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("summed", [["all-reduce", 256, ["f32[2,32]"], 5]]),
        (
            "nested",
            [
                ["collective-permute", 256, ["f32[2,32]"], 21],
                ["reduce-scatter", 256, ["f32[2,32]"], 3],
            ],
        ),
        ("gathered", [["all-gather", 2048, ["f32[16,32]"], 1]]),
        ("branches", [["all-reduce", 256, ["f32[2,32]"], 1]]),
        ("until four times", [["all-reduce", 256, ["f32[2,32]"], 4]]),
    ],
)
def test_collectives_have_the_bytes_and_times_counted_by_hand(found, name, expected):
    assert sorted(found[name]) == expected


def test_the_pieces_of_an_exchange_add_up_to_its_array(found):
    [(kind, size, _, times)] = found["exchanged"]
    assert (kind, size, times) == ("all-to-all", 256, 1)


def test_a_loop_that_data_end_is_an_error_that_names_it(found):
    assert "while" in found["until"]
    assert "unknown_trips" in found["until"]


# As the TPU compiler writes it: no annotation of trip counts, constants carried through the loop
# (here the bound of the inner loop and its step), fused increments, asynchronous collectives.
TPU_TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=16

FileNames
1 "f.py"

%fused_add (p.1: s32[], p.2: s32[]) -> s32[] {
  %p.1 = s32[]{:T(128)} parameter(0)
  %p.2 = s32[]{:T(128)} parameter(1)
  ROOT %sum.1 = s32[]{:T(128)} add(%p.1, %p.2)
}

%gather_computation (p.3: bf16[4,8]) -> bf16[64,8] {
  %p.3 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.7 = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%p.3), dimensions={0}
}

%inner_condition (s.1: (s32[], f32[128,4], s32[], s32[])) -> pred[] {
  %s.1 = (s32[]{:T(128)}, f32[128,4]{1,0:T(8,128)}, s32[]{:T(128)}, /*index=3*/s32[]) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %n.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=3
  ROOT %gt.1 = pred[]{:T(512)} compare(%n.1, %i.1), direction=GT
}

%inner_body (s.2: (s32[], f32[128,4], s32[], s32[])) -> (s32[], f32[128,4], s32[], s32[]) {
  %s.2 = (s32[]{:T(128)}, f32[128,4]{1,0:T(8,128)}, s32[]{:T(128)}, s32[]) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%s.2), index=0
  %x.2 = f32[128,4]{1,0:T(8,128)} get-tuple-element(%s.2), index=1
  %k.2 = s32[]{:T(128)} get-tuple-element(%s.2), index=2
  %n.2 = s32[]{:T(128)} get-tuple-element(%s.2), index=3
  %next.2 = s32[]{:T(128)} fusion(%i.2, %k.2), kind=kLoop, calls=%fused_add
  %y.2 = f32[128,4]{1,0:T(8,128)} all-reduce(%x.2), to_apply=%add
  ROOT %t.2 = (s32[], f32[128,4]{1,0}, s32[], s32[]) tuple(%next.2, %y.2, %k.2, %n.2)
}

%outer_condition (s.3: (s32[], f32[128,4], s32[])) -> pred[] {
  %s.3 = (s32[]{:T(128)}, f32[128,4]{1,0:T(8,128)}, s32[]) parameter(0)
  %i.3 = s32[]{:T(128)} get-tuple-element(%s.3), index=0
  %n.3 = s32[]{:T(128)} constant(0)
  ROOT %ge.3 = pred[]{:T(512)} compare(%i.3, %n.3), direction=GE
}

%outer_body (s.4: (s32[], f32[128,4], s32[])) -> (s32[], f32[128,4], s32[]) {
  %s.4 = (s32[]{:T(128)}, f32[128,4]{1,0:T(8,128)}, s32[]) parameter(0)
  %i.4 = s32[]{:T(128)} get-tuple-element(%s.4), index=0
  %x.4 = f32[128,4]{1,0:T(8,128)} get-tuple-element(%s.4), index=1
  %n.4 = s32[]{:T(128)} get-tuple-element(%s.4), index=2
  %zero.4 = s32[]{:T(128)} constant(0)
  %two.4 = s32[]{:T(128)} constant(2)
  %down.4 = s32[]{:T(128)} constant(-1)
  %start.4 = (s32[], f32[128,4]{1,0}, s32[], s32[]) tuple(%zero.4, %x.4, %two.4, %n.4)
  %while.4 = (s32[], f32[128,4]{1,0}, s32[], s32[]) while(%start.4), condition=%inner_condition, \
body=%inner_body
  %y.4 = f32[128,4]{1,0:T(8,128)} get-tuple-element(%while.4), index=1
  %next.4 = s32[]{:T(128)} add(%i.4, %down.4)
  ROOT %t.4 = (s32[], f32[128,4]{1,0}, s32[]) tuple(%next.4, %y.4, %n.4)
}

ENTRY %main.1_spmd (x: f32[128,4], w: bf16[4,8]) -> f32[128,4] {
  %x = f32[128,4]{1,0:T(8,128)} parameter(0)
  %w = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(1)
  %async-start = ((bf16[4,8]{1,0}), bf16[64,8]{1,0}, u32[]) async-start(%w), \
calls=%gather_computation
  %start.5 = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%w), dimensions={0}
  %seven = s32[]{:T(128)} constant(7)
  %two = s32[]{:T(128)} constant(2)
  %copied = s32[]{:T(128)} copy(%seven)
  %t.5 = (s32[], f32[128,4]{1,0}, s32[]) tuple(%two, %x, %copied)
  %while.5 = (s32[], f32[128,4]{1,0}, s32[]) while(%t.5), condition=%outer_condition, \
body=%outer_body
  %async-done = bf16[64,8]{1,0} async-done(%async-start), calls=%gather_computation
  %done.5 = bf16[8,8]{1,0} all-gather-done(%start.5)
  ROOT %out = f32[128,4]{1,0:T(8,128)} get-tuple-element(%while.5), index=1
}
"""
# The outer loop counts 2, 1, 0: three times. The inner counts 0, 2, 4, 6 below 7: four times.
TPU_COLLECTIVES = (
    Collective("all-gather", 64 * 8 * 2, ("bf16[64,8]",), 1),
    Collective("all-gather", 8 * 8 * 2, ("bf16[8,8]",), 1),
    Collective("all-reduce", 128 * 4 * 4, ("f32[128,4]",), 12),
)


def test_loops_without_annotations_are_counted_from_what_they_compute():
    assert compiled_program.collectives(TPU_TEXT) == TPU_COLLECTIVES


def test_an_annotated_trip_count_is_taken():
    annotated = TPU_TEXT.replace(
        "body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"9"}}'
    )
    assert compiled_program.collectives(annotated)[-1].times == 27


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("%copied = s32[]{:T(128)} copy(%seven)", "%copied = s32[] negate(%seven)"),
        ("tuple(%next.2, %y.2, %k.2, %n.2)", "tuple(%next.2, %y.2, %i.2, %n.2)"),
        ("direction=GE", "direction=EQ"),
    ],
    ids=["bound computed", "step changes", "test of another kind"],
)
def test_no_loop_is_taken_to_run_once_because_it_is_not_understood(old, new):
    assert old in TPU_TEXT
    with pytest.raises(compiled_program.UnknownTripCountError, match=r"%while\.[45] "):
        compiled_program.collectives(TPU_TEXT.replace(old, new))


# One product outside the loop, of the sizes of the one inside, which runs five times.
LOOP_TEXT = """HloModule jit_g

%product (p.1: bf16[128,256], p.2: bf16[256,512]) -> bf16[128,512] {
  %p.1 = bf16[128,256]{1,0} parameter(0)
  %p.2 = bf16[256,512]{1,0} parameter(1)
  ROOT %c.1 = bf16[128,512]{1,0} convolution(%p.1, %p.2), dim_labels=bf_io->bf
}

%condition (s.1: (s32[], bf16[128,256], bf16[256,512])) -> pred[] {
  %s.1 = (s32[], bf16[128,256]{1,0}, bf16[256,512]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %five = s32[] constant(5)
  ROOT %lt.1 = pred[] compare(%i.1, %five), direction=LT
}

%body (s.2: (s32[], bf16[128,256], bf16[256,512])) -> (s32[], bf16[128,256], bf16[256,512]) {
  %s.2 = (s32[], bf16[128,256]{1,0}, bf16[256,512]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%s.2), index=0
  %x.2 = bf16[128,256]{1,0} get-tuple-element(%s.2), index=1
  %w.2 = bf16[256,512]{1,0} get-tuple-element(%s.2), index=2
  %one = s32[] constant(1)
  %next = s32[]{:T(128)S(1)} add(%i.2, %one)
  %y.2 = bf16[128,512]{1,0} fusion(%x.2, %w.2), kind=kOutput, calls=%product
  ROOT %t.2 = (s32[], bf16[128,256]{1,0}, bf16[256,512]{1,0}) tuple(%next, %x.2, %w.2)
}

ENTRY %main (x: bf16[128,256], w: bf16[256,512]) -> bf16[128,512] {
  %x = bf16[128,256]{1,0} parameter(0)
  %w = bf16[256,512]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[128,256]{1,0}, bf16[256,512]{1,0}) tuple(%zero, %x, %w)
  %loop = (s32[], bf16[128,256]{1,0}, bf16[256,512]{1,0}) while(%start), condition=%condition, \
body=%body
  %last = bf16[256,512]{1,0} get-tuple-element(%loop), index=2
  ROOT %y = bf16[128,512]{1,0} fusion(%x, %last), kind=kOutput, calls=%product
}
"""


def _compiled(text, kind):
    sharding = types.SimpleNamespace(device_set=[types.SimpleNamespace(device_kind=kind)])
    return types.SimpleNamespace(
        as_text=lambda: text, input_shardings=sharding, output_shardings=sharding
    )


@pytest.mark.parametrize("flops_rate", [1e9, 1e18])
def test_seconds_are_the_longer_of_products_and_memory_of_every_iteration(monkeypatch, flops_rate):
    bytes_rate = 1e9
    monkeypatch.setattr(compiled_program, "TPU_RATES", {"TPU v0": (flops_rate, bytes_rate)})
    flops = 2 * 128 * 256 * 512
    moved = 2 * (128 * 256 + 256 * 512 + 128 * 512)
    # The loop's counter lies in main memory too, of which additions read 4 bytes and their step
    # of 4; comparisons read 8 bytes and write 1, once more than the body runs.
    counter = 5 * (4 + 4) + 6 * (4 + 4 + 1)
    expected = 6 * max(flops / flops_rate, moved / bytes_rate) + counter / bytes_rate
    compiled = _compiled(LOOP_TEXT, "TPU v0")
    assert compiled_program.estimated_seconds(compiled) == pytest.approx(expected, rel=1e-12)
    assert compiled_program.estimated_seconds(_compiled(LOOP_TEXT, "TPU v9")) is None
    assert compiled_program.main_memory_bytes(LOOP_TEXT) == 6 * moved + counter


# Constants, tuples and the loop itself launch nothing; the condition and the entry are no turn.
def test_launches_of_a_turn_are_its_operations_and_those_of_loops_inside_in_full():
    assert compiled_program.launches(LOOP_TEXT) == [(5, 2)]  # the counter and the product
    # A turn of the outer loop: its counter, and four turns of a counter and an all-reduce.
    assert compiled_program.launches(TPU_TEXT) == [(3, 1 + 4 * 2)]


def test_launches_of_a_loop_that_data_end_are_those_of_any_turn():
    until = LOOP_TEXT.replace("constant(5)", "negate(%i.1)")
    assert compiled_program.launches(until) == [(None, 2)]
    inside = TPU_TEXT.replace("direction=GT", "direction=EQ")
    with pytest.raises(compiled_program.UnknownTripCountError, match=r"%while\.4 "):
        compiled_program.launches(inside)


def test_memory_adds_up_and_cpus_have_no_estimate_of_time():
    x = jnp.zeros((64, 128), jnp.float32)
    size = 64 * 128 * 4
    plain = jax.jit(lambda x: x + 1).lower(x).compile()
    donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    held = compiled_program.memory(plain)
    assert (held.arguments, held.outputs, held.aliased) == (size, size, 0)
    assert held.total == 2 * size + held.temporaries
    assert compiled_program.memory(donated).total == size + held.temporaries
    assert compiled_program.estimated_seconds(plain) is None


def test_text_that_is_no_hlo_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        compiled_program.collectives("module @jit_f {\n}\n")
