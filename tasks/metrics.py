"""Task metrics; each takes targets and predictions and returns a dict of numbers.

Names mean the same in every task: `exact_match` and `pass_at_k` are fractions in [0, 1]; `bleu`,
`f1` and `em` are percentages, as published.
"""

from __future__ import annotations

import collections
import functools
import re
import string
from collections.abc import Mapping, Sequence

import numpy as np
import sacrebleu

from tasks import verdicts


def _check(targets: Sequence, predictions: Sequence, several: bool = False) -> None:
    if len(targets) != len(predictions):
        raise ValueError(f"{len(targets)} targets, but {len(predictions)} predictions.")
    if not targets:
        raise ValueError("there is nothing to measure: no targets.")
    if not several and not isinstance(predictions[0], str):
        raise ValueError(
            f"{len(predictions[0])} predictions of an example, but this metric measures one; "
            "expected NUM_DECODES = 1 and return_all_decodes = False."
        )


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> Mapping[str, float]:
    """The fraction of predictions that equal their target.

    Raises:
      ValueError: if there are no targets, or not as many predictions.
    """
    _check(targets, predictions)
    pairs = zip(targets, predictions, strict=True)
    return {"exact_match": float(np.mean([target == text for target, text in pairs]))}


def bleu(targets: Sequence[str], predictions: Sequence[str]) -> Mapping[str, float]:
    """Corpus BLEU by sacrebleu with its default settings, in percent.

    sacrebleu's signature, without which a BLEU cannot be compared, is printed once.

    Raises:
      ValueError: if there are no targets, or not as many predictions.
    """
    _check(targets, predictions)
    metric = sacrebleu.BLEU()
    score = metric.corpus_score(list(predictions), [list(targets)]).score
    _announce(f"BLEU by sacrebleu, signature {metric.get_signature()}")
    return {"bleu": score}


@functools.cache
def _announce(line: str) -> None:
    print(line, flush=True)


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(target: str, prediction: str, f1_of_nothing: float = 0.0) -> float:
    """Harmonic mean of precision and recall over the tokens of normalised answers, in [0, 1].

    Args:
      target: a reference answer.
      prediction: an answer.
      f1_of_nothing: for two answers of which normalisation leaves nothing, such as 'the' and '!':
        0 by SQuAD v1.1's script, 1 by v2.0's.
    """
    wanted, given = normalize_answer(target).split(), normalize_answer(prediction).split()
    if not wanted and not given:
        return f1_of_nothing
    shared = sum((collections.Counter(wanted) & collections.Counter(given)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(given), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def squad(
    targets: Sequence[Sequence[str]], predictions: Sequence[str], f1_of_nothing: float = 0.0
) -> Mapping[str, float]:
    """SQuAD's F1 and exact match, the best over the reference answers, in percent.

    'f1' and 'em' are those of the official script of v1.1, by which an answer that is nothing but
    articles and punctuation has no F1; 'exact_match' compares the answers as they are.

    Args:
      targets: reference answers of each example.
      predictions: one answer each.
      f1_of_nothing: see `token_f1`.

    Raises:
      ValueError: if there are no targets, or not as many predictions.
    """
    _check(targets, predictions)
    pairs = list(zip(targets, predictions, strict=True))
    f1 = [
        max(token_f1(answer, text, f1_of_nothing) for answer in answers) for answers, text in pairs
    ]
    em = [
        max(normalize_answer(answer) == normalize_answer(text) for answer in answers)
        for answers, text in pairs
    ]
    exact = [text in answers for answers, text in pairs]
    return {
        "f1": 100 * float(np.mean(f1)),
        "em": 100 * float(np.mean(em)),
        "exact_match": float(np.mean(exact)),
    }


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that one of `k` samples drawn without replacement passes.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374).

    Raises:
      ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
        raise ValueError(f"n = {num_samples}, c = {num_correct}, k = {k}: no such draw.")
    if num_samples - num_correct < k:
        return 1.0
    failing = np.arange(num_samples - num_correct + 1, num_samples + 1)
    return float(1.0 - np.prod(1.0 - k / failing))


def code_passes(
    targets: Sequence[Mapping[str, Sequence[str]]],
    predictions: Sequence[str | Sequence[str]],
    ks: Sequence[int] = (1, 10, 80),
) -> Mapping[str, float]:
    """pass@k by running each program with its assertions in the sandbox.

    Args:
      targets: per problem `{'tests': assertions, 'code': reference}`.
      predictions: per problem one program, or several samples of it.
      ks: values of k; those above the number of samples are left out.

    Raises:
      ValueError: if there are no targets, or not as many predictions.
      SandboxError: if programs cannot be kept in on this machine.
    """
    _check(targets, predictions, several=True)
    samples = verdicts.as_lists(predictions)
    passed = verdicts.judge(targets, samples)["passed"]
    verdicts.forget()
    same = [
        texts[-1].strip() == target["code"].strip()
        for target, texts in zip(targets, samples, strict=True)
    ]
    fewest = min(len(texts) for texts in samples)
    return {"exact_match": float(np.mean(same))} | {
        f"pass_at_{k}": float(np.mean([pass_at_k(len(row), sum(row), k) for row in passed]))
        for k in ks
        if k <= fewest
    }


# Candidates are run while others are still being decoded.
code_passes.judge = verdicts.judge
code_passes.remember = verdicts.remember
