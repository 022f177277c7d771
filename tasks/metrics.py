"""Task metrics: functions of targets and predictions that return a dict of numbers.

Names mean the same in every task: `exact_match`, `pass_at_k` and `invalid_programs` are fractions
in [0, 1]; `bleu`, `f1` and `em` are percentages, as published.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import sacrebleu

from diffusion_t5x.data import programs
from diffusion_t5x.runtime.terminal import Progress

from . import code_execution


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
    """Computes the fraction of predictions that equal their target.

    Raises:
      ValueError: if there are no targets, or not as many predictions.
    """
    _check(targets, predictions)
    pairs = zip(targets, predictions, strict=True)
    return {"exact_match": float(np.mean([target == text for target, text in pairs]))}


def bleu(targets: Sequence[str], predictions: Sequence[str]) -> Mapping[str, float]:
    """Computes corpus BLEU by sacrebleu with its default settings, in percent.

    Prints sacrebleu's signature once, without which a BLEU cannot be compared.

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
    """Normalises as SQuAD does: lower case, no punctuation, no articles, single spaces."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(target: str, prediction: str, f1_of_nothing: float = 0.0) -> float:
    """Computes the harmonic mean of token precision and recall of normalised answers, in [0, 1].

    Args:
      target: A reference answer.
      prediction: An answer.
      f1_of_nothing: F1 of two answers of which normalisation leaves nothing, such as 'the' and
        '!': 0 in SQuAD v1.1's script, 1 in v2.0's.
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
    """Computes SQuAD's F1 and exact match, the best over the reference answers, in percent.

    'f1' and 'em' are those of the official script of v1.1, by which an answer of articles and
    punctuation alone has no F1; 'exact_match' compares the answers as they are.

    Args:
      targets: Reference answers of each example.
      predictions: One answer for each example.
      f1_of_nothing: See `token_f1`.

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


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of the answers that a question offers, all whole numbers; choices count from 0.

    Attributes:
      question: Which question, the same for all its choices.
      choice: Which of its choices this is.
      num_choices: How many it has.
      answer: The right one.
      tokens: Tokens of this choice, the end of text among them.
      bytes: Bytes of its text.
    """

    question: int
    choice: int
    num_choices: int
    answer: int
    tokens: int
    bytes: int


def rank_choices(targets: Sequence[Choice], scores: Sequence[float]) -> Mapping[str, float]:
    """Computes how often the likeliest choice of a question is its answer.

    'accuracy' compares log-likelihoods, 'accuracy_per_token' and 'accuracy_per_byte' divide them by
    the length of the choice. Of k choices that are equally likely, each counts as chosen 1 / k
    times. Questions of which a choice is missing are left out; 'questions' and
    'incomplete_questions' say how many there are. Choices may come in any order.

    Args:
      targets: The choices.
      scores: Their log-likelihoods in nats, or bounds.

    Raises:
      ValueError: if there is no whole question, not as many scores as choices, or one is NaN.
    """
    if len(targets) != len(scores):
        raise ValueError(f"{len(targets)} choices, but {len(scores)} scores.")
    if np.isnan(np.asarray(scores, np.float64)).any():
        raise ValueError("the score of a choice is NaN.")
    questions: dict[int, dict[int, tuple[Choice, float]]] = collections.defaultdict(dict)
    for target, score in zip(targets, scores, strict=True):
        questions[target.question][target.choice] = target, float(score)
    groups = [list(choices.values()) for choices in questions.values()]
    whole = [group for group in groups if len(group) == group[0][0].num_choices]
    if not whole:
        raise ValueError(f"none of {len(questions)} questions has all its choices.")
    sizes: dict[str, Callable[[Choice], int]] = {
        "accuracy": lambda choice: 1,
        "accuracy_per_token": lambda choice: choice.tokens,
        "accuracy_per_byte": lambda choice: choice.bytes,
    }
    found: dict[str, float] = {}
    for name, size in sizes.items():
        credits = []
        for question in whole:
            values = [(score / size(choice), choice) for choice, score in question]
            best = max(value for value, _ in values)
            chosen = [choice.choice == choice.answer for value, choice in values if value == best]
            credits.append(sum(chosen) / len(chosen))
        found[name] = float(np.mean(credits))
    counts = {"questions": len(whole), "incomplete_questions": len(questions) - len(whole)}
    return {**found, **counts}


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Computes the probability that one of `k` samples drawn without replacement passes.

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


class CodeMetric:
    """pass@k by running each program with its tests in a jail.

    Programs may be judged ahead of the call, while others are still being decoded
    (`diffusion_t5x.evaluation.candidate_chunks.JudgingMetric`).
    """

    def __init__(self, ks: Sequence[int] = (1, 10, 80)):
        """Creates the metric.

        Args:
          ks: Values of k; those above the number of samples are left out.
        """
        self._ks = ks
        # (program, its tests, the limits it ran under) -> why it did not pass, '' if it did.
        self._verdicts: dict[tuple[str, tuple[str, ...], str], str] = {}

    def __call__(
        self,
        targets: Sequence[Mapping[str, Any]],
        predictions: Sequence[str | Sequence[str]],
    ) -> Mapping[str, float]:
        """Computes pass@k, and the fraction of problems whose last sample is the reference.

        'invalid_programs' is the fraction of samples that are no Python at all, which says that
        texts are cut, have markup, or lost their indentation, rather than that they are wrong.

        Prints what ended the programs that do not pass.

        Args:
          targets: For each problem `{'tests': assertions, 'code': reference}`.
          predictions: For each problem one program, or several samples of it.

        Raises:
          ValueError: if there are no targets, or not as many predictions.
          SandboxError: if programs cannot be kept in on this machine, or tests lack a module.
        """
        _check(targets, predictions, several=True)
        judged = self.judge(targets, predictions)
        self._verdicts.clear()
        passed = judged["passed"]
        samples = _as_lists(predictions)
        same = [
            texts[-1].strip() == target["code"].strip()
            for target, texts in zip(targets, samples, strict=True)
        ]
        fewest = min(len(texts) for texts in samples)
        valid = {text: programs.is_program(text) for texts in samples for text in texts}
        invalid = [not valid[text] for texts in samples for text in texts]
        if any(invalid):
            print(f"{sum(invalid):,} of {len(invalid):,} candidates are no valid Python program")
        if failed := [_kind(why) for row in judged["why"] for why in row if why]:
            counts = ", ".join(
                f"{count:,} {kind}" for kind, count in collections.Counter(failed).most_common(8)
            )
            print(f"{len(failed):,} of {len(invalid):,} candidates do not pass: {counts}")
        first = {"exact_match": float(np.mean(same)), "invalid_programs": float(np.mean(invalid))}
        return first | {
            f"pass_at_{k}": float(np.mean([pass_at_k(len(row), sum(row), k) for row in passed]))
            for k in self._ks
            if k <= fewest
        }

    def check(self, targets: Sequence[Mapping[str, Any]]) -> None:
        """Refuses tests that cannot be run here.

        Raises:
          SandboxError: if programs cannot be kept in on this machine, or tests lack a module.
        """
        code_execution.check({test for target in targets for test in target["tests"]})

    def prepare(
        self, targets: Sequence[Mapping[str, Any]], known: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """Runs the reference solutions, and prints how many fail, which, and why.

        Args:
          targets: For each problem `{'tests': assertions, 'code': reference}`; no reference is ''.
          known: What this method returned for the same targets; it holds under the same limits.

        Returns:
          The 'limits', the number of 'references', and of each that fails 'number' and 'why'.

        Raises:
          SandboxError: if programs cannot be kept in on this machine, or tests lack a module.
        """
        if known is None or known["limits"] != _limits():
            numbers = [n for n, target in enumerate(targets) if target["code"].strip()]
            failing = _run_references(targets, numbers) if numbers else []
            known = {"limits": _limits(), "references": len(numbers), "failing": failing}
        total, failing = known["references"], known["failing"]
        which = "; ".join(
            f"problem {one['number']} ({_name(targets[one['number']]['code'])}{one['why'][:80]})"
            for one in failing
        )
        if failing:
            print(f"{len(failing):,} of {total:,} reference solutions do not pass: {which}")
        elif total:
            print(f"all {total:,} reference solutions pass")
        return known

    def judge(
        self,
        targets: Sequence[Mapping[str, Any]],
        predictions: Sequence[str | Sequence[str]],
        known: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Runs the programs that have no verdict yet, each text once.

        Args:
          targets: For each problem `{'tests': assertions, ...}`.
          predictions: For each problem one program or several.
          known: The value that this method returned for the same programs in an earlier process,
            whose verdicts hold if the limits are still the same.

        Returns:
          'passed', for each problem a bool per program, 'why' it did not, and the 'limits' they
          ran under.

        Raises:
          SandboxError: if programs cannot be kept in on this machine, or tests lack a module.
        """
        limits = _limits()
        keys = [
            [(program, tuple(target["tests"]), limits) for program in programs]
            for target, programs in zip(targets, _as_lists(predictions), strict=True)
        ]
        if known is not None and known["limits"] == limits:
            for row, whys in zip(keys, known["why"], strict=True):
                self._verdicts.update(zip(row, whys, strict=True))
        new = dict.fromkeys(key for row in keys for key in row if key not in self._verdicts)
        jobs = [(program, tests) for program, tests, _ in new]
        for key, verdict in zip(new, code_execution.judge_all(jobs), strict=True):
            self._verdicts[key] = verdict.why
        whys = [[self._verdicts[key] for key in row] for row in keys]
        passed = [[not why for why in row] for row in whys]
        return {"limits": limits, "passed": passed, "why": whys}


def _run_references(
    targets: Sequence[Mapping[str, Any]], numbers: Sequence[int]
) -> list[dict[str, Any]]:
    """Returns number and reason of the reference solutions that fail."""
    jobs = [(targets[number]["code"], targets[number]["tests"]) for number in numbers]
    with Progress(len(jobs), "running reference solutions", "programs") as progress:
        verdicts = code_execution.judge_all(jobs, on_verdict=progress.update)
    pairs = zip(numbers, verdicts, strict=True)
    return [{"number": number, "why": verdict.why} for number, verdict in pairs if not verdict]


def _limits() -> str:
    return json.dumps(dataclasses.asdict(code_execution.configure()), sort_keys=True)


def _kind(why: str) -> str:
    """Returns the name of the error, where a program raised one."""
    return why.partition(":")[0]


def _name(code: str) -> str:
    """Returns the name of a program's last function, for messages."""
    names = re.findall(r"^def (\w+)", code, re.MULTILINE)
    return f"{names[-1]}: " if names else ""


def _as_lists(predictions: Sequence[str | Sequence[str]]) -> list[list[str]]:
    """Returns for each problem a list of programs, where one alone may stand for itself."""
    return [[text] if isinstance(text, str) else list(text) for text in predictions]


def __getattr__(name: str) -> Any:
    if name == "code_passes":
        raise AttributeError("metrics.code_passes is now an object: metrics.CodeMetric(ks).")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
