"""The networks: token ids in, hidden states and logits out.

Reading order: `config`, `sharding` and `kv_cache`, `layers`, `rotary`, `attention` (with the
experimental kernel in `kernels/`), `stack`, `row_layout`, `network` (the base of both networks),
and then `decoder_only` and `encoder_decoder`.

In the package only `models` and gin files use this room; decoders and objectives see a network
through `interfaces` alone. Losses, sampling, gin and files never enter. All that it imports from
other rooms is the attention patterns of `objectives` and the errors of `names`.
"""
