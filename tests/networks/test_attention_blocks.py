"""Into how many blocks of rows attention is split."""

from diffusion_t5x.networks import attention
from diffusion_t5x.networks.config import TransformerConfig

CONFIG = TransformerConfig(50, 8, 2, 1, 4, 16, attention_block_logits=1)


def test_one_query_is_attended_at_once_so_that_no_cache_is_copied():
    assert attention._num_chunks(8, CONFIG, 8, 1, 4096) == 1
    assert attention._num_chunks(8, CONFIG, 8, 2, 4096) == 8
