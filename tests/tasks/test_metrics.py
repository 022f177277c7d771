"""Metrics against hand-computed values, enumeration and the libraries that define them."""

import itertools
import math

import numpy as np
import pytest
import sacrebleu
import seqio

from tasks import code_execution, metrics


def test_exact_match_is_a_fraction():
    assert metrics.exact_match(["a", "b", "c", "d"], ["a", "B", "c", " d"]) == {"exact_match": 0.5}


def test_bleu_of_hand_computed_counts():
    # Precisions 5/6, 4/5, 3/4, 2/3 and equal lengths: BLEU is their geometric mean.
    target, prediction = "the cat sat on the mat", "the cat sat on the hat"
    expected = 100 * math.prod((5 / 6, 4 / 5, 3 / 4, 2 / 3)) ** 0.25
    assert metrics.bleu([target], [prediction])["bleu"] == pytest.approx(expected, abs=1e-6)


def test_bleu_punishes_brevity_as_defined():
    # Every precision is 1; the penalty is exp(1 - 6 / 5).
    value = metrics.bleu(["the cat sat on the mat"], ["the cat sat on the"])["bleu"]
    assert value == pytest.approx(100 * math.exp(1 - 6 / 5), abs=1e-6)


def test_bleu_is_sacrebleus_of_the_corpus_and_not_a_mean_over_sentences():
    targets = ["dans 5 minutes, ou plus", "23 août 2011 à 10:15:00", "3,30 francs suisses au plus"]
    predictions = ["dans 5 minutes ou plus", "23 août 2011 à 10:16:00", "3,30 francs"]
    value = metrics.bleu(targets, predictions)["bleu"]
    assert value == pytest.approx(sacrebleu.BLEU().corpus_score(predictions, [targets]).score)
    sentences = [
        metrics.bleu([target], [text])["bleu"]
        for target, text in zip(targets, predictions, strict=True)
    ]
    assert value != pytest.approx(np.mean(sentences), abs=0.1)
    assert metrics.bleu(targets, targets)["bleu"] == pytest.approx(100)


@pytest.mark.parametrize(
    "text,expected",
    [
        ("The  Cat's\thouse.", "cats house"),
        ("an apple a day", "apple day"),
        ("theatre, Anna", "theatre anna"),
        ("a-b (c)", "ab c"),
        ("A", ""),
        ("  ", ""),
        ("CAFÉ", "café"),
    ],
)
def test_squad_normalisation(text, expected):
    assert metrics.normalize_answer(text) == expected


@pytest.mark.parametrize(
    "target,prediction,expected",
    [
        ("the first return value", "First return value!", 1.0),
        ("x y z", "y z w v", 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)),
        ("x x y", "x", 0.5),  # precision 1, recall 1/3
        ("x", "x x x", 0.5),  # a token counts as often as the target has it
        ("x", "y", 0.0),
        ("x", "", 0.0),
        ("the", "a", 0.0),  # both are nothing once normalised, which SQuAD v1.1 gives no F1
        ("", "", 0.0),
    ],
)
def test_token_f1_by_hand(target, prediction, expected):
    assert metrics.token_f1(target, prediction) == pytest.approx(expected)
    assert metrics.token_f1(prediction, target) == pytest.approx(expected)


def test_answers_of_which_nothing_is_left_count_as_is_set():
    assert metrics.token_f1("the", "!", f1_of_nothing=1.0) == 1.0  # as SQuAD v2.0
    assert metrics.token_f1("the", "x", f1_of_nothing=1.0) == 0.0
    scores = metrics.squad([["the", "()"]], ["a"])
    assert scores == {"f1": 0.0, "em": 100.0, "exact_match": 0.0}
    assert metrics.squad([["the"]], ["a"], f1_of_nothing=1.0)["f1"] == 100.0


@pytest.mark.parametrize(
    "answers,prediction,f1,em",
    [
        (["Saint Bernadette Soubirous"], "saint bernadette soubirous.", 1, 1),
        (["the Grotto"], "A grotto, the", 1, 1),
        (["1,000"], "1000", 1, 1),  # punctuation goes without leaving a space
        (["mid-1990s"], "mid 1990s", 0, 0),
        (["Beyonc\u00e9"], "beyonc\u00c9", 1, 1),
        (["Beyonc\u00e9"], "Beyonce", 0, 0),
        (["\u201cyes\u201d"], "yes", 0, 0),  # only ASCII punctuation is any
        (["a b"], "ab", 0, 0),
        (["Ana and the others"], "ana and others", 1, 1),
        (["10th century", "in the 10th century"], "the 10th", 2 / 3, 0),
        (["x", "x y z"], "x y", 0.8, 0),
        (["x"], "", 0, 0),
        (["under score_s"], "under\u00a0scores", 1, 1),
    ],
)
def test_squad_by_hand_as_its_official_script_says(answers, prediction, f1, em):
    scores = metrics.squad([answers], [prediction])
    assert scores["f1"] == pytest.approx(100 * f1)
    assert scores["em"] == pytest.approx(100 * em)


def test_bleu_says_its_signature_once(capsys):
    metrics._announce.cache_clear()
    for _ in range(2):
        metrics.bleu(["a b c d"], ["a b c d"])
    version = f"version:{sacrebleu.__version__}"
    out = capsys.readouterr().out
    assert (
        out
        == f"BLEU by sacrebleu, signature nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|{version}\n"
    )


def test_squad_takes_the_best_reference_and_reports_percent():
    scores = metrics.squad(
        [["x y", "The Answer"], ["x y"], ["None"]], ["answer", "y", "something else"]
    )
    assert scores["f1"] == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)
    assert scores["em"] == pytest.approx(100 / 3)
    assert scores["exact_match"] == 0.0
    assert metrics.squad([["x", "y"]], ["y"]) == {"f1": 100.0, "em": 100.0, "exact_match": 1.0}


def test_pass_at_k_is_the_exact_chance():
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            exact = 1 - math.comb(n - c, k) / math.comb(n, k)
            assert metrics.pass_at_k(n, c, k) == pytest.approx(exact, abs=1e-12)


def test_pass_at_k_is_what_enumeration_of_draws_gives_and_large_counts_do_not_overflow():
    draws = list(itertools.combinations([True, True, False, False, False], 3))
    assert metrics.pass_at_k(5, 2, 3) == pytest.approx(np.mean([any(draw) for draw in draws]))
    exact = 1 - math.comb(2000 - 3, 100) / math.comb(2000, 100)
    assert metrics.pass_at_k(2000, 3, 100) == pytest.approx(exact)


@pytest.mark.parametrize("n,c,k", [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4), (0, 0, 1)])
def test_impossible_draws_are_refused(n, c, k):
    with pytest.raises(ValueError, match=f"n = {n}, c = {c}, k = {k}"):
        metrics.pass_at_k(n, c, k)


def test_code_is_judged_by_running_it():
    code = "def double(x):\n    return 2 * x"
    other = "def double(x):\n    return x + x"
    wrong = "def double(x):\n    return x ** 2"
    target = {"tests": ["assert double(2) == 4", "assert double(3) == 6"], "code": code}
    assert metrics.CodeMetric()([target] * 4, [code, other, wrong, "def"]) == {
        "exact_match": 0.25,
        "pass_at_1": 0.5,
        "invalid_programs": 0.25,
    }


def test_several_samples_give_pass_at_several_k():
    target = {"tests": ["assert x == 1"], "code": "x = 1"}
    samples = [["x = 2", "x = 1"], ["x = 2", "x = 3"]]
    scores = metrics.CodeMetric((1, 2, 3))([target] * 2, samples)
    # One of two samples passes for the first problem; the best one comes last.
    expected = {"exact_match": 0.5, "pass_at_1": 0.25, "pass_at_2": 0.5, "invalid_programs": 0}
    assert scores == expected


@pytest.mark.parametrize(
    "metric", [metrics.exact_match, metrics.bleu, metrics.squad, metrics.CodeMetric()]
)
def test_lengths_that_differ_and_nothing_at_all_are_refused(metric):
    with pytest.raises(ValueError, match="2 targets, but 1 predictions"):
        metric(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no targets"):
        metric([], [])


@pytest.mark.parametrize("metric", [metrics.exact_match, metrics.bleu, metrics.squad])
def test_a_metric_of_one_text_refuses_several(metric):
    with pytest.raises(ValueError, match=r"2 predictions of an example.*NUM_DECODES = 1"):
        metric(["a"], [["a", "b"]])


def test_programs_judged_ahead_are_not_run_again_and_equal_ones_once(monkeypatch):
    ran, metric = [], metrics.CodeMetric()
    original = code_execution.judge_all
    monkeypatch.setattr(
        code_execution, "judge_all", lambda jobs: ran.extend(p for p, _ in jobs) or original(jobs)
    )
    targets = [{"tests": ["assert x == 1"], "code": ""}, {"tests": ["assert x == 2"], "code": ""}]
    some = [["x = 1", "x = 2"], ["x = 1", "x = 1"]]
    first = metric.judge(targets, some)
    assert first["passed"] == [[True, False], [False, False]]
    assert first["why"] == [["", "AssertionError"], ["AssertionError"] * 2]
    assert sorted(ran) == ["x = 1", "x = 1", "x = 2"]  # the same text under other assertions
    scores = metric(targets, [[*some[0], "x = 3"], [*some[1], "x = 2"]])
    assert sorted(ran[3:]) == ["x = 2", "x = 3"]
    assert scores["pass_at_1"] == pytest.approx(1 / 3)
    assert "pass_at_10" not in scores
    # In a later process what was judged is taken back, unless limits have changed since.
    ran.clear()
    metric.judge(targets, some, first)
    assert metric(targets, some)["pass_at_1"] == 0.25
    assert ran == []
    other = {**first, "limits": first["limits"].replace("5", "6")}
    metric.judge(targets, some, other)
    metric(targets, some)
    assert len(ran) == 3


def test_pass_at_1_10_and_80_are_reported_for_as_many_samples():
    target = {"tests": ["assert x == 1"], "code": "x = 1"}
    samples = ["x = 1"] * 20 + ["x = 2"] * 60
    scores = metrics.CodeMetric()([target], [samples])
    at_10 = 1 - math.comb(60, 10) / math.comb(80, 10)
    assert scores == pytest.approx(
        {
            "exact_match": 0,
            "pass_at_1": 0.25,
            "pass_at_10": at_10,
            "pass_at_80": 1,
            "invalid_programs": 0,
        }
    )


def test_candidates_that_are_no_programs_are_counted(capsys):
    target = {"tests": ["assert x == 1"], "code": "x = 1"}
    samples = [["x = 1", "x = ", "return 1", "x = 2"], ["", "```", " x = 1", "x = '\\d'"]]
    scores = metrics.CodeMetric((1,))([target] * 2, samples)
    assert scores["invalid_programs"] == 5 / 8
    assert scores["pass_at_1"] == 1 / 8
    assert capsys.readouterr().out == (
        "5 of 8 candidates are no valid Python program\n"
        "7 of 8 candidates do not pass: 3 SyntaxError, 2 AssertionError, 1 NameError, "
        "1 IndentationError\n"
    )


def test_reference_solutions_run_once_and_which_fail_is_said(capsys):
    right = {"tests": ["assert f() == 1"], "code": "def f():\n    return 1"}
    wrong = {"tests": ["assert g() == 1"], "code": "def g():\n    return 2"}
    none = {"tests": ["assert g() == 1"], "code": ""}
    metric = metrics.CodeMetric()
    metric.check([right, wrong, none])
    found = metric.prepare([right, none, wrong])
    line = "1 of 2 reference solutions do not pass: problem 2 (g: AssertionError)\n"
    assert capsys.readouterr().out == line
    known = {**found, "references": 7}  # not run again
    assert metric.prepare([right, none, wrong], known) == known
    assert capsys.readouterr().out == line.replace("of 2", "of 7")
    assert metric.prepare([right, none, wrong], {**known, "limits": "{}"}) == found
    assert metric.prepare([right], None)["failing"] == []
    assert capsys.readouterr().out.endswith("\nall 1 reference solutions pass\n")


def test_tests_that_need_a_module_are_refused_before_anything_is_decoded():
    target = {"tests": ["import no_such_module\nassert True"], "code": "x = 1"}
    with pytest.raises(code_execution.SandboxError, match=r"import no_such_module.*modules="):
        metrics.CodeMetric().check([target])


def test_the_code_tasks_metrics_judge_ahead_and_the_old_name_gives_the_new_one():
    import tasks  # noqa: F401
    from diffusion_t5x.evaluation.candidate_chunks import JudgingMetric

    for name in ("embedded_code", "mbpp", "human_eval"):
        [metric] = seqio.TaskRegistry.get(name).predict_metric_fns
        assert isinstance(metric, JudgingMetric)
    assert not isinstance(metrics.exact_match, JudgingMetric)
    with pytest.raises(AttributeError, match="CodeMetric"):
        metrics.code_passes  # noqa: B018
