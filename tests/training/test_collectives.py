"""What is read of collectives in compiled programs, against values counted by hand."""

import re

import pytest

from diffusion_t5x.training import collectives

ADD = "%add (a: f32[], b: f32[]) -> f32[] {\n  ROOT %c = f32[] add(%a, %b)\n}\n"
LOOP = (
    ADD
    + """
%condition (s.1: (s32[], f32[8,4], s32[])) -> pred[] {
  %s.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, /*index=2*/s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %n.1 = s32[] constant(12)
  ROOT %lt = pred[] compare(%i.1, %n.1), direction=LT
}
%body (s.2: (s32[], f32[8,4], s32[])) -> (s32[], f32[8,4], s32[]) {
  %s.2 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, /*index=2*/s32[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%s.2), index=0
  %copied = s32[]{:S(6)} copy(%i.2)
  %x.2 = f32[8,4] get-tuple-element(%s.2), index=1
  %k.2 = s32[] get-tuple-element(%s.2), index=2
  %start = ((f32[16,4]{1,0}), f32[8,4]{1,0}) reduce-scatter-start(%x.2), to_apply=%add
  %done = f32[8,4]{1,0} reduce-scatter-done(%start)
  %y.2 = f32[8,4] all-reduce(%done), to_apply=%add
  %next = s32[] add(%copied, %k.2)
  ROOT %t.2 = (s32[], f32[8,4], s32[]) tuple(%next, %y.2, %k.2)
}
%gather (p: bf16[4,8]) -> bf16[64,8] {
  %p = bf16[4,8] parameter(0)
  ROOT %g = bf16[64,8] all-gather(%p), dimensions={0}
}
ENTRY %main (x: f32[8,4], w: bf16[4,8]) -> f32[8,4] {
  %x = f32[8,4] parameter(0)
  %w = bf16[4,8] parameter(1)
  %zero = s32[] constant(0)
  %two = s32[] constant(2)
  %async-start = ((bf16[4,8]), bf16[64,8], u32[]) async-start(%w), calls=%gather
  %t = (s32[], f32[8,4], s32[]) tuple(%zero, %x, %two)
  %while = (s32[], f32[8,4], s32[]) while(%t), condition=%condition, body=%body
  %async-done = bf16[64,8] async-done(%async-start), calls=%gather
  %pair = (f32[2], pred[3]) all-to-all(%x, %x)
  ROOT %out = f32[8,4] get-tuple-element(%while), index=1
}
"""
)


def _expected(turns):
    once = {"all-gather": 64 * 8 * 2, "all-to-all": 2 * 4 + 3}
    return once | {"all-reduce": 8 * 4 * 4 * turns, "reduce-scatter": 8 * 4 * 4 * turns}


def test_loops_are_counted_by_their_counters_and_asynchronous_collectives_once():
    # 0, 2, ... below 12, by a step that the loop carries along.
    assert collectives.sent(LOOP) == collectives.Sent(_expected(6))


def test_an_annotated_trip_count_is_taken():
    annotated = LOOP.replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}'
    )
    assert collectives.sent(annotated) == collectives.Sent(_expected(9))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("direction=LT", "direction=EQ"),
        ("%zero = s32[] constant(0)", "%zero = s32[] negate(%two)"),
        ("tuple(%next, %y.2, %k.2)", "tuple(%next, %y.2, %i.2)"),
        ("add(%copied, %k.2)", "add(%k.2, %k.2)"),
        ("constant(12)", "negate(%i.1)"),
    ],
    ids=["test of another kind", "start computed", "step changes", "no counter", "bound computed"],
)
def test_a_loop_that_is_not_understood_gives_a_lower_bound_that_is_called_one(old, new):
    assert old in LOOP
    found = collectives.sent(LOOP.replace(old, new))
    assert found == collectives.Sent(_expected(1), at_least=True)
    assert str(found).startswith("collectives, GiB: at least all-reduce ")


def test_a_line_names_reductions_gathers_and_the_sum_of_others():
    results = {
        "all-reduce": 2**31,
        "all-gather": 2**30,
        "all-to-all": 2**29,
        "reduce-scatter": 2**29,
    }
    text = str(collectives.Sent(results))
    assert re.findall(r"[\d.]+", text) == ["2.000", "1.000", "1.000"]
    assert str(collectives.Sent({})).endswith("all-reduce 0.000, all-gather 0.000, others 0.000")
