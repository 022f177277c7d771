"""The measurements of one accelerator, on the CPU and a network too small to be measured."""

import json

import pytest

from benchmarks import accelerator


@pytest.mark.slow
def test_every_figure_is_printed_and_follows_from_the_time_of_its_program(capsys):
    accelerator.main(["--sizes=tiny", "--sections=peaks,training,numerics"])
    first, *lines = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["device"], first["compiled_only"]) == ("cpu", False)
    assert not any("error" in line or "skipped" in line for line in lines)
    found = {line["what"]: line for line in lines}
    assert len(found) == len(lines)
    products = found["20 products of 128 x 128, bfloat16"]
    rate = 20 * 2 * 128**3 / products["milliseconds"] / 1e9  # TFLOP/s
    assert found["product"]["tera_flops_per_second"] == pytest.approx(rate)
    assert found["copy"]["tera_bytes_per_second"] > 0
    # Products of 2 layers of 4 x 64 x 64 + 3 x 64 x 128 and of 512 x 64, and of attention, for 2 x
    # 64 tokens, forwards once and backwards twice.
    flops = 3 * 2 * 64 * (2 * (2 * (4 * 64 * 64 + 3 * 64 * 128) + 512 * 64) + 4 * 2 * 64 * 64)
    for kernel in ("xla", "fused"):
        what = "loss and gradient, {}, {}, tiny, 2 x 64"
        ar = found[what.format("autoregressive", kernel)]
        done = ar["tera_flops_per_second"] * ar["milliseconds"] * 1e9
        assert done == pytest.approx(flops)
        share = ar["tera_flops_per_second"] / rate
        assert ar["share_of_product_rate"] == pytest.approx(share)
        diffusion = found[what.format("diffusion", kernel)]
        ratio = diffusion["milliseconds"] / ar["milliseconds"]
        over = found[what.format("diffusion", kernel) + ": over AR"]
        assert over["ratio"] == pytest.approx(ratio)
    # On the CPU itself there is no difference, but for the precision of products.
    assert found["logits, float32, tiny"]["largest_difference"] < 1e-4
    for what in ("AR, greedy", "ten steps x 2"):
        line = found[f"{what}, float32, tiny"]
        assert (line["equal_tokens"], line["tokens"]) == (1, 2 * 64)
        assert found[f"{what}, bfloat16, tiny"]["tokens"] == 2 * 64
