"""Decoding texts from the command line, and what is shown of it."""

import numpy as np
import pytest
import toy

from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig
from diffusion_t5x.data.detokenize import detokenize
from diffusion_t5x.evaluation.sampling import parse_template, sample, show_step
from diffusion_t5x.runtime.partitioning import PjitPartitioner


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run whose one checkpoint is good enough to be sampled from."""
    directory = tmp_path_factory.mktemp("run")
    toy.run(directory, 1, toy.model("autoregressive"))
    return directory


def _sample(run_dir, inputs, objective="autoregressive", **kwargs):
    return sample(
        model=toy.model(objective),
        restore_checkpoint_cfg=RestoreCheckpointConfig(str(run_dir)),
        partitioner=PjitPartitioner(),
        inputs=inputs,
        task_feature_lengths=toy.LENGTHS,
        **kwargs,
    )


def _tokens(text):
    return np.array(toy.VOCABULARY.encode(text))


def _ascii(text):
    return [char for char in text if " " <= char <= "~"]


def test_a_canvas_is_shown_token_by_token_with_marks_for_what_has_no_sign():
    eos = toy.VOCABULARY.eos_id
    canvas = np.concatenate([_tokens("a b"), [eos, 0, 0], _tokens("c"), [eos]])
    assert show_step(canvas, toy.VOCABULARY) == "a b|__c|"
    # Ids past the bytes are sentinels, or rows of an embedding that was rounded up.
    assert show_step(np.array([260, 263, *_tokens("x")]), toy.VOCABULARY) == "··x"
    assert show_step(np.array([264, *_tokens("x"), 263]), toy.VOCABULARY, (264,)) == "□x·"


@pytest.mark.parametrize("control", ["\t", "\r", "\x08", "\x0b", "\x0c", "\x1b", "\x1c", "\x7f"])
def test_no_token_of_a_canvas_moves_the_cursor(control):
    assert show_step(_tokens(f"a{control}b"), toy.VOCABULARY) == "a·b"
    assert show_step(_tokens("a\nb"), toy.VOCABULARY) == "a⏎b"


def test_texts_of_other_vocabularies_keep_their_spaces():
    class Words:
        eos_id = 1

        def decode(self, ids):
            return {2: "3\u202f000\u00a0", 3: "€", 4: "\u2028", 5: ""}[ids[0]]

    assert show_step(np.array([2, 3, 4, 5, 1, 0]), Words()) == "3\u202f000\u00a0€··|_"


def test_the_last_canvas_shown_is_the_text_returned(run_dir, capsys):
    [output] = _sample(run_dir, "abc", "diffusion", show_trajectory=True)
    lines = capsys.readouterr().out.split("\n")
    shown = [line for line in lines if line.startswith("  step ")]
    assert [int(line.split(":")[0].removeprefix("  step")) for line in shown] == [0, 1, 2]
    last = shown[-1].partition(": ")[2]
    ended = last.partition("|")[0].partition("_")[0]
    # Bytes that are no character of their own are dots in the one and may be lost in the other.
    assert _ascii(ended) == _ascii(output)
    assert shown[0].partition(": ")[2] != last


@pytest.mark.slow
def test_one_text_may_come_without_a_tuple(run_dir, capsys):
    assert _sample(run_dir, "ab") == _sample(run_dir, ("ab",))
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert first.startswith("ab  ->  ")


def test_a_text_is_decoded_alike_whatever_its_neighbours(run_dir):
    together = _sample(run_dir, ["ab", "cdefgh", "x"])
    assert together == [_sample(run_dir, text)[0] for text in ("ab", "cdefgh", "x")]


@pytest.mark.slow
def test_the_seed_decides_what_is_drawn(run_dir):
    outputs = [_sample(run_dir, "ab", "diffusion", random_seed=seed) for seed in (3, 3, 4)]
    assert outputs[0] == outputs[1] != outputs[2]


def test_the_text_is_that_of_the_models_own_decoding(run_dir):
    import jax

    from diffusion_t5x.checkpointing.checkpoints import list_checkpoints
    from diffusion_t5x.checkpointing.reading import restore_params
    from diffusion_t5x.runtime.train_state import INIT_SHAPES, abstract_params

    model = toy.model("autoregressive")
    abstract = abstract_params(model, PjitPartitioner(), INIT_SHAPES, {})
    params = restore_params(list_checkpoints(str(run_dir))[0][1], abstract)
    prefix = np.array([[*_tokens("abc"), 0, 0, 0]])
    empty = np.zeros((1, toy.LENGTHS["targets"]), np.int32)
    batch = {"encoder_input_tokens": prefix, "decoder_input_tokens": empty}
    tokens = jax.jit(model.predict_batch)(params, batch)
    assert _sample(run_dir, "abc") == [detokenize(np.asarray(tokens[0]), toy.VOCABULARY)]


def test_a_dry_run_reads_the_checkpoint_and_decodes_nothing(run_dir, tmp_path, capsys):
    assert _sample(run_dir, "ab", dry_run=True) == []
    assert capsys.readouterr().out == ""
    with pytest.raises(FileNotFoundError):
        _sample(tmp_path, "ab", dry_run=True)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "at least one text"),
        ("", None),
        (2024, r"INPUTS = 2024; expected a text.*--gin.INPUTS=\"'2024'\""),
        (("ab", 3.5), r"INPUTS = \('ab', 3.5\); expected"),
        (None, "INPUTS = None; expected"),
        ("seven b", "'seven b' has 7 tokens; at most 6 fit"),
    ],
)
def test_what_cannot_be_decoded_is_refused_and_said_why(run_dir, inputs, message):
    if message is None:  # an empty text is a text
        assert len(_sample(run_dir, inputs)) == 1
        return
    with pytest.raises(ValueError, match=message):
        _sample(run_dir, inputs)


def test_a_decoder_without_a_canvas_has_none_to_show(run_dir):
    with pytest.raises(ValueError, match="trajectory"):
        _sample(run_dir, "ab", show_trajectory=True)


def test_a_template_is_tokens_around_holes():
    eos = toy.VOCABULARY.eos_id
    tokens, fixed = parse_template("ab<2>c", toy.VOCABULARY, 8)
    np.testing.assert_array_equal(tokens, [*_tokens("ab"), 0, 0, *_tokens("c"), eos, 0, 0])
    np.testing.assert_array_equal(fixed, [1, 1, 0, 0, 1, 1, 1, 1])
    tokens, fixed = parse_template(r"\<2><1>b<*>", toy.VOCABULARY, 8)
    np.testing.assert_array_equal(tokens, [*_tokens("<2>"), 0, *_tokens("b"), 0, 0, 0])
    np.testing.assert_array_equal(fixed, [1, 1, 1, 0, 1, 0, 0, 0])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("abc", "'abc' has no hole; expected one, such as <8>"),
        (r"a\<8>", "has no hole"),
        ("a<0>b", "<0> is no hole"),
        ("a<*>b", r"<\*> reaches to the end"),
        ("<*><2>", r"<\*> reaches to the end"),
        ("ab<3>c", "has 7 tokens with its holes and its end; at most 6 fit"),
        ("<99999999999>", "at most 6 fit"),
        ("abcdef<*>", "at most 6 fit"),
        (("a<1>", "b<1>"), r"a tuple of as many as there are INPUTS, 1"),
        (7, "FIXED = 7; expected a text with holes"),
    ],
)
def test_a_text_whose_holes_cannot_be_filled_is_refused(run_dir, template, message):
    with pytest.raises(ValueError, match=message):
        _sample(run_dir, "ab", "diffusion", fixed=template)


def test_holes_are_filled_and_what_is_around_them_stays(run_dir):
    outputs = _sample(run_dir, ("ab", "cd"), "diffusion", fixed=("x<2>z", "q<*>"))
    assert outputs[0].startswith("x")
    assert outputs[0].endswith("z")
    assert outputs[1].startswith("q")
    with pytest.raises(ValueError, match=r"FIXED.*AutoregressiveDecoder"):
        _sample(run_dir, "ab", fixed="x<2>z")
