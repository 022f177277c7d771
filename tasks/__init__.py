"""The task registry: importing this module registers the embedded tasks with SeqIO.

| name | what |
|---|---|
| `embedded_translation_en_fr` | CLDR dates, amounts, units, names; BLEU and exact match |
| `embedded_qa` | questions about signatures of the standard library; F1 and EM |
| `embedded_code` | small functions with assertions; pass@1 |
| `embedded_all` | the three, for evaluating them at once |
| `embedded_pretrain_prefix_lm` | prose 80 %, source 20 %, as prefix LM |
| `embedded_pretrain_span_corruption` | the same as T5's span corruption |

It is imported after gin was parsed, so that `vocabularies.get_vocabulary` is the configured one.
"""

from tasks import code, pretraining, question_answering, translation
from tasks.translation import register_translation

__all__ = ["code", "pretraining", "question_answering", "register_translation", "translation"]
