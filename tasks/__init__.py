"""The task registry; importing this module registers the tasks with SeqIO.

| name | task |
|---|---|
| `wmt14_en_fr`, `wmt14_fr_en` | WMT14; BLEU |
| `squad_v1_1` | SQuAD v1.1; F1 and EM over all reference answers |
| `mbpp` | programs from descriptions and assertions; pass@1, 10, 80 |
| `human_eval` | completion of functions; pass@1, 10, 100 |
| `pretrain_prefix_lm` | mC4 80 %, The Stack's Python 20 %, as prefix LM |
| `pretrain_span_corruption` | the same as T5's span corruption |
| `mc4_prefix_lm`, `mc4_span_corruption` | mC4 alone, and `mc4_en_prefix_lm` etc. |
| `the_stack_prefix_lm`, `the_stack_span_corruption` | The Stack's Python alone |
| `chat` | your conversations and completions; BLEU and exact match |
| `multiple_choice` | your questions, their choices ranked by likelihood; accuracy |
| `embedded_translation_en_fr` | CLDR dates, amounts, units, names; BLEU and exact match |
| `embedded_qa` | questions about signatures of the standard library; F1 and EM |
| `embedded_code` | small functions with assertions; pass@1 |
| `embedded_all` | these three tasks in one mixture |
| `embedded_infilling_line`, `embedded_infilling_span` | a line, a span of such a function; pass@1 |
| `embedded_pretrain_prefix_lm` | prose 80 %, source 20 %, as prefix LM |
| `embedded_pretrain_span_corruption` | the same as T5's span corruption |

In a checkout the package is the folder `tasks/`, and `tasks` is another name of it.

Nothing is read or downloaded until a task is read; the embedded tasks need no download.
`docs/tasks.md` names the sources of the others, and how to read local files instead.

Import it after gin is parsed, so that `vocabularies.get_vocabulary` is the configured one.
"""

import sys

import seqio
from diffusion_t5x.tasks import (
    chat,
    code,
    infilling,
    multiple_choice,
    pretraining,
    question_answering,
    translation,
)
from diffusion_t5x.tasks.translation import register_translation

if "embedded_all" not in seqio.MixtureRegistry.names():
    seqio.MixtureRegistry.add(
        "embedded_all",
        [translation.EMBEDDED, question_answering.EMBEDDED, code.EMBEDDED],
        default_rate=1.0,
    )

__all__ = [
    "chat",
    "code",
    "infilling",
    "multiple_choice",
    "pretraining",
    "question_answering",
    "register_translation",
    "translation",
]

# In a checkout this file may have been imported as `tasks`, which is to be the same module.
sys.modules[__name__] = sys.modules["diffusion_t5x.tasks"]
