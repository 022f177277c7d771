"""Candidates in chunks: none drawn twice, judged meanwhile, the same if it was killed."""

import threading
import types

import numpy as np
import pytest

from diffusion_t5x.evaluation import candidate_chunks
from diffusion_t5x.evaluation.candidate_chunks import ChunkConfig


def _chunk(number, size):
    """Candidates of two examples that tell where they come from."""
    tokens = 100 * number + np.arange(size, dtype=np.int32)[:, None] + np.zeros((1, 4), np.int32)
    scores = -0.1 * tokens[:, 0].astype(np.float32)
    return {7: (tokens, scores), 3: (tokens + 50, scores / 3)}, 0.5


def _judges(judge, remember=None):
    def metric_fn():
        """Only its attributes matter."""

    metric_fn.judge, metric_fn.remember = judge, remember
    predictions = lambda outputs: [rows[:, 0].tolist() for rows, _ in outputs.values()]  # noqa: E731
    return types.SimpleNamespace(metric_fns=[metric_fn], targets=["t"], predictions=predictions)


NOBODY = types.SimpleNamespace(metric_fns=[])


def _equal(ours, theirs):
    assert list(ours) == list(theirs)
    for index in theirs:
        for one, other in zip(ours[index], theirs[index], strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "settings,sizes", [((80, 8), [8] * 10), ((5, 2), [2, 2, 1]), ((1, 8), [1]), ((3, 3), [3])]
)
def test_chunks_are_as_many_candidates_as_were_asked_for(settings, sizes):
    assert ChunkConfig(*settings).sizes() == sizes
    outputs, seconds = candidate_chunks.draw(_chunk, ChunkConfig(*settings), NOBODY, None)
    tokens, scores = outputs[7]
    expected = [100 * number + i for number, size in enumerate(sizes) for i in range(size)]
    assert tokens[:, 0].tolist() == expected
    assert scores.shape == (settings[0],)
    assert seconds == 0.5 * len(sizes)


@pytest.mark.parametrize("settings", [(0, 1), (1, 0), (-1, 8)])
def test_no_candidates_are_refused(settings):
    with pytest.raises(ValueError, match=r"NUM_DECODES = .*, DECODES_PER_CHUNK = "):
        ChunkConfig(*settings)


@pytest.mark.parametrize("killed_at", range(4))
def test_a_killed_run_goes_on_behind_its_last_chunk_and_gives_the_same(tmp_path, killed_at):
    cfg = ChunkConfig(7, 2)
    whole, _ = candidate_chunks.draw(_chunk, cfg, NOBODY, None)
    drawn, judged, remembered = [], [], []

    def judge(targets, predictions):
        judged.append(predictions)
        return {"first": predictions[0]}

    def remember(targets, predictions, told):
        remembered.append(predictions)
        assert told == {"first": predictions[0]}

    def dying(number, size):
        if number == killed_at:
            raise KeyboardInterrupt
        drawn.append(number)
        return _chunk(number, size)

    def living(number, size):
        drawn.append(number)
        return _chunk(number, size)

    directory = tmp_path / "chunks"
    with pytest.raises(KeyboardInterrupt):
        candidate_chunks.draw(dying, cfg, _judges(judge, remember), directory)
    before = list(judged)
    outputs, seconds = candidate_chunks.draw(living, cfg, _judges(judge, remember), directory)
    assert drawn == [0, 1, 2, 3]
    assert seconds == 2.0
    _equal(outputs, whole)
    assert remembered == before
    assert judged == [[[100 * n + i for i in range(s)], [100 * n + i + 50 for i in range(s)]]
                      for n, s in enumerate(cfg.sizes())]  # fmt: skip
    candidate_chunks.forget(directory)
    assert not directory.exists()


def test_a_chunk_is_judged_while_the_next_is_drawn():
    next_is_drawn, is_judged = threading.Event(), threading.Event()

    def judge(targets, predictions):
        assert next_is_drawn.wait(10)
        is_judged.set()

    def chunk(number, size):
        if number == 1:
            next_is_drawn.set()
            assert is_judged.wait(10)
        return _chunk(number, size)

    candidate_chunks.draw(chunk, ChunkConfig(2, 1), _judges(judge), None)
    assert is_judged.is_set()


def test_a_judge_that_fails_ends_the_run_before_all_is_drawn():
    failed, drawn = threading.Event(), []

    def judge(targets, predictions):
        failed.set()
        raise RuntimeError("no sandbox")

    def chunk(number, size):
        drawn.append(number)
        if number:
            failed.wait(10)
        return _chunk(number, size)

    with pytest.raises(RuntimeError, match="no sandbox"):
        candidate_chunks.draw(chunk, ChunkConfig(50, 1), _judges(judge), None)
    assert len(drawn) < 50


def test_candidates_that_are_all_alike_are_spoken_of(capsys):
    same = lambda number, size: _chunk(0, 1)  # noqa: E731
    candidate_chunks.draw(same, ChunkConfig(3, 1), NOBODY, None)
    assert "all 3 candidates of every example are alike" in capsys.readouterr().out
    candidate_chunks.draw(_chunk, ChunkConfig(3, 1), NOBODY, None)
    assert capsys.readouterr().out == ""
