"""Tests of the costs of HLO instructions, against values counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.compiler import hlo_costs
from diffusion_t5x.training import hlo

# As TPU programs have them: products of batches are convolutions over windows.
TEXT = """HloModule jit_f

%updated (p.1: f32[64,128], p.2: f32[1,128], p.3: s32[]) -> f32[64,128] {
  %p.1 = f32[64,128]{1,0} parameter(0)
  %p.2 = f32[1,128]{1,0} parameter(1)
  %p.3 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %u.1 = f32[64,128]{1,0} dynamic-update-slice(%p.1, %p.2, %p.3, %zero)
}

%sliced (q.1: f32[64,128], q.2: s32[]) -> f32[1,128] {
  %q.1 = f32[64,128]{1,0} parameter(0)
  %q.2 = s32[] parameter(1)
  %zero.2 = s32[] constant(0)
  %s.1 = f32[1,128]{1,0} dynamic-slice(%q.1, %q.2, %zero.2), dynamic_slice_sizes={1,128}
  ROOT %n.1 = f32[1,128]{1,0} negate(%s.1)
}

%flattened (m.0: f32[64,128]) -> f32[8192] {
  %m.0 = f32[64,128]{1,0} parameter(0)
  ROOT %m.1 = f32[8192]{0} bitcast(%m.0)
}

%nested (m.2: f32[64,128]) -> f32[8192] {
  %m.2 = f32[64,128]{1,0} parameter(0)
  %m.3 = f32[8192]{0} fusion(%m.2), kind=kLoop, calls=%flattened
  ROOT %m.4 = f32[8192]{0} negate(%m.3)
}

%largest (l.1: f32[64,128], l.2: s32[64,128]) -> (f32[64], s32[64]) {
  %l.1 = f32[64,128]{1,0} parameter(0)
  %l.2 = s32[64,128]{1,0} parameter(1)
  %l.3 = f32[] constant(-inf)
  %l.4 = s32[] constant(0)
  ROOT %l.5 = (f32[64]{0}, s32[64]{0}) reduce(%l.1, %l.2, %l.3, %l.4), dimensions={1}, to_apply=%max
}

ENTRY %main (a: f32[64,128], b: f32[1,128], i: s32[]) -> f32[1,128] {
  %a = f32[64,128]{1,0} parameter(0)
  %b = f32[1,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %x = bf16[8,64,1024]{2,1,0} parameter(3)
  %y = bf16[8,64,512]{2,1,0} parameter(4)
  %z = f32[64,128]{1,0:T(8,128)S(1)} parameter(5)
  %update = f32[64,128]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%updated
  %slice = f32[1,128]{1,0} fusion(%update, %i), kind=kLoop, calls=%sliced
  %flat = f32[8192]{0} fusion(%a), kind=kLoop, calls=%nested
  %which = s32[64,128]{1,0} parameter(6)
  %argmax = (f32[64]{0}, s32[64]{0}) fusion(%a, %which), kind=kLoop, calls=%largest
  %fast = f32[64,128]{1,0:T(8,128)S(1)} add(%z, %z)
  %prefetch = (f32[64,128]{1,0:S(1)}, f32[64,128]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %arrived = f32[64,128]{1,0:S(1)} copy-done(%prefetch)
  %batched = bf16[8,1024,512]{2,1,0} convolution(%x, %y), \
window={size=8 stride=7 lhs_dilate=8}, dim_labels=0fb_0io->0bf
  %kernel = bf16[8,64,512]{2,1,0} custom-call(%x, %y), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"TUw=","cost_estimate":{"flops":"77",\
"transcendentals":"5","bytes_accessed":"999","remote_bytes_transferred":"0"}}}
  %silent = f32[1,128]{1,0} custom-call(%b), custom_call_target="Sharding"
  ROOT %sum = f32[1,128]{1,0} add(%slice, %b)
}
"""


@pytest.fixture(scope="module")
def entry():
    program = hlo.Program(TEXT, None)
    return program, {instruction.name: instruction for instruction, _ in program.executions()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("update", 4 * 128 * 2 + 4),  # the row is read and written, and its index read
        ("slice", 4 * 128 * 2 + 4),
        ("flat", 4 * (2 * 64 * 128)),
        ("argmax", 4 * (2 * 64 * 128 + 2 * 64)),
        ("fast", 0),
        ("prefetch", 4 * 64 * 128),  # what leaves main memory
        ("arrived", 0),
        ("sum", 4 * 128 * 3),
        ("batched", 2 * (8 * 64 * 1024 + 8 * 64 * 512 + 8 * 1024 * 512)),
        ("kernel", 999),  # what it says of itself
        ("silent", 4 * 128 * 2),
        ("a", 0),
    ],
)
def test_memory_counts_what_moves_to_and_from_main_memory(entry, name, expected):
    program, instructions = entry
    assert hlo_costs.memory_bytes(program, instructions[name]) == expected


def test_a_product_of_batches_counts_no_dilation(entry):
    program, instructions = entry
    assert hlo_costs.flops(program, instructions["batched"]) == 2 * 8 * 1024 * 512 * 64
    assert hlo_costs.flops(program, instructions["sum"]) == 0


def test_a_kernel_counts_the_operations_that_it_says(entry):
    program, instructions = entry
    assert hlo_costs.flops(program, instructions["kernel"]) == 77
    assert hlo_costs.flops(program, instructions["silent"]) == 0


def test_flops_of_products_are_those_of_xla():
    def products(a, b, c):
        return jnp.einsum("bij,bjk->bik", a, b) @ c

    shapes = [(4, 16, 32), (4, 32, 8), (8, 24)]
    compiled = jax.jit(products).lower(*(jax.ShapeDtypeStruct(s, "float32") for s in shapes))
    compiled = compiled.compile()
    program = hlo.Program(compiled.as_text(), None)
    counted = sum(hlo_costs.flops(program, i) * times for i, times in program.executions())
    assert counted == 2 * 4 * 16 * 32 * 8 + 2 * 4 * 16 * 8 * 24
    assert counted == compiled.cost_analysis()["flops"]
