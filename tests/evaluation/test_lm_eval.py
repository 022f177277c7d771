"""Tasks of lm-eval made of local files, against likelihoods that are computed directly."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from diffusion_t5x.runtime.partitioning import PjitPartitioner

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from diffusion_t5x.evaluation import lm_eval_model

LENGTHS = {"inputs": 24, "targets": 20}
QUESTIONS = [
    {"question": "ab", "choices": [" x", " yz"], "answer": 1},
    {"question": "a longer question", "choices": [" no", " yes, of course"], "answer": 0},
]
TEXTS = ["short", "one that is longer than a target of twenty tokens, and than 24 more"]


@functools.cache
def _model(objective="autoregressive"):
    model = toy.model(objective)
    shapes = {"encoder_input_tokens": (2, 24), "decoder_input_tokens": (2, 20)}
    params = jax.jit(lambda: model.get_initial_variables(jax.random.PRNGKey(3), shapes)["params"])()
    # Far from uniform, so that mistakes show.
    return model, jax.tree.map(lambda x: 3 * x, params)


def _language_model(objective="autoregressive", batch_size=2):
    model, params = _model(objective)
    return lm_eval_model.LanguageModel(model, params, PjitPartitioner(), LENGTHS, batch_size)


@functools.cache
def _logits_fn():
    model, _ = _model()

    @jax.jit
    def logits(params, prefix, tokens):
        batch = {"encoder_input_tokens": prefix, "decoder_input_tokens": tokens}
        network = model.bind(params, batch)
        return network.logits(network.forward(tokens, None))

    return logits


def _log_probs(tokens, empty=False):
    """Log-probabilities of each of the tokens and of the next, in one AR pass: [n + 1, vocab].

    The first has none unless there is no prefix at all.
    """
    prefix, rest = ([], tokens) if empty else (tokens[:1], tokens[1:])
    rows = [[*prefix, 0][:1]], [[*rest, *[0] * (64 - len(rest))]]
    logits = _logits_fn()(_model()[1], *map(jnp.asarray, rows))[0]
    logits = np.asarray(logits, np.float64)[: len(rest) + 1]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log_probs if empty else np.pad(log_probs, [(1, 0), (0, 0)])


def _exact(before, tokens):
    """The log-likelihood of tokens, and whether each is the argmax."""
    log_probs = _log_probs([*before, *tokens], empty=not before)[len(before) : -1]
    greedy = (log_probs.argmax(-1) == tokens).all()
    return log_probs[np.arange(len(tokens)), tokens].sum(), bool(greedy)


def _greedy_text(context, count):
    tokens = list(toy.VOCABULARY.encode(context))
    for _ in range(count):
        following = int(_log_probs(tokens)[-1].argmax())
        if following == toy.VOCABULARY.eos_id:
            break
        tokens.append(following)
    return toy.VOCABULARY.decode(tokens[len(toy.VOCABULARY.encode(context)) :])


def _requests(*args):
    return [types.SimpleNamespace(args=one) for one in args]


def _write_tasks(directory):
    """Writes three tasks, one of each kind of request, and returns what they read."""
    for name, records in (("questions", QUESTIONS), ("texts", [{"text": t} for t in TEXTS])):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (directory / f"{name}.jsonl").write_text(lines)
    common = "dataset_path: json\ntest_split: test\n"

    def task(name, file, body):
        data = f"dataset_kwargs:\n  data_files:\n    test: {directory / file}\n"
        (directory / f"{name}.yaml").write_text(f"task: {name}\n{common}{data}{body}")

    task("toy_choice", "questions.jsonl", (
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "target_delimiter: ''\ndoc_to_target: answer\nmetric_list:\n  - metric: acc\n"
    ))  # fmt: skip
    task("toy_rolling", "texts.jsonl", (
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: byte_perplexity\n"
    ))  # fmt: skip
    task("toy_generate", "questions.jsonl", (
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: 'x'\n"
        "generation_kwargs:\n  until: ['\\n']\n  max_gen_toks: 6\n"
        "metric_list:\n  - metric: exact_match\n"
    ))  # fmt: skip


@pytest.mark.slow  # lm-eval and its data sets take longest to load
def test_tasks_of_local_files_have_the_results_of_direct_likelihoods(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lm_eval_model, "select_checkpoints", lambda cfg: [(1, "checkpoint_1")])
    monkeypatch.setattr(lm_eval_model, "restorer", lambda *args: lambda path: _model()[1])
    _write_tasks(tmp_path)
    lm_eval_model.evaluate_tasks(
        model=_model()[0],
        restore_checkpoint_cfg=None,
        partitioner=PjitPartitioner(),
        task_feature_lengths=LENGTHS,
        batch_size=3,
        tasks=("toy_choice", "toy_rolling", "toy_generate"),
        output_dir=str(tmp_path / "out"),
        include_path=str(tmp_path),
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    encode = toy.VOCABULARY.encode
    right = []
    for question in QUESTIONS:
        prefix = encode(question["question"])
        scores = [_exact(prefix, encode(choice))[0] for choice in question["choices"]]
        right.append(np.argmax(scores) == question["answer"])
    assert results["toy_choice"]["acc,none"] == np.mean(right)
    assert "toy_choice" in capsys.readouterr().out

    def samples(task):
        lines = (tmp_path / "out" / f"samples-{task}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    for sample, question in zip(samples("toy_choice"), QUESTIONS, strict=True):
        for (found, _), choice in zip(sample["filtered_resps"], question["choices"], strict=True):
            expected = _exact(encode(question["question"]), encode(choice))[0]
            assert float(found) == pytest.approx(expected, rel=1e-4)
    nats = -_rolling(TEXTS[0]) - _rolling(TEXTS[1])
    expected = np.exp(nats / sum(len(text.encode()) for text in TEXTS))
    assert results["toy_rolling"]["byte_perplexity,none"] == pytest.approx(expected, rel=1e-4)
    for sample, question in zip(samples("toy_generate"), QUESTIONS, strict=True):
        assert sample["resps"][0][0] == _greedy_text(question["question"], 6).split("\n")[0]


def _rolling(text):
    """Every token given at most the 24 before its piece of 20, and those of the piece."""
    tokens, total = toy.VOCABULARY.encode(text), 0.0
    for start in range(0, len(tokens), 20):
        total += _exact(tokens[max(0, start - 24) : start], tokens[start : start + 20])[0]
    return total


def test_greedy_continuations_are_known_and_long_contexts_lose_their_beginning(capsys):
    found = _language_model()
    encode = toy.VOCABULARY.encode
    context = "a context of more than 24 tokens"
    written = [int(_log_probs(encode(context)[-24:])[-1].argmax())]
    request = (("", ""), list(encode(context)), written)
    [(score, greedy), (_, other)] = found._loglikelihood_tokens(
        [request, (("", ""), list(encode(context)), [written[0] ^ 1])]
    )
    assert score == pytest.approx(_exact(encode(context)[-24:], written)[0], rel=1e-4)
    assert greedy and not other
    assert "2 of 2 contexts have more than TASK_FEATURE_LENGTHS['inputs'] = 24" in (
        capsys.readouterr().out
    )


def test_texts_stop_where_the_task_says_and_what_cannot_be_obeyed_is_said(capsys):
    text = _greedy_text("ab", 20)
    stop = text[3]
    model = _language_model()
    settings = {"until": [stop], "max_gen_toks": 999, "min_p": 0.1}
    assert model.generate_until(_requests(("ab", settings))) == [text.split(stop)[0]]
    said = capsys.readouterr().out
    assert "max_gen_toks = 999, but TASK_FEATURE_LENGTHS['targets'] = 20" in said
    assert "min_p = 0.1 is left out: AutoregressiveDecoder has none" in said


@pytest.mark.slow
def test_a_diffusion_model_is_asked_for_its_bound_and_its_own_greedy_text():
    model = _language_model("diffusion")
    [written] = model.generate_until(
        _requests(("ab", {"until": [], "max_gen_toks": 4, "do_sample": True, "temperature": 1.0}))
    )
    assert isinstance(written, str)
    [(score, greedy)] = model.loglikelihood(_requests(("ab", " x")))
    [rolled] = model.loglikelihood_rolling(_requests(("short",)))
    assert score < 0 and rolled < 0 and not greedy


def test_an_unknown_task_is_refused_with_the_nearest(tmp_path, monkeypatch):
    manager = lm_eval_model.TaskManager  # without lm-eval's thousands of tasks
    monkeypatch.setattr(
        lm_eval_model, "TaskManager", lambda **kw: manager(**{**kw, "include_defaults": False})
    )
    _write_tasks(tmp_path)
    with pytest.raises(ValueError, match=r"LM_EVAL_TASKS.*did you mean 'toy_choice'"):
        lm_eval_model._find_tasks(["toy_choise"], str(tmp_path))
