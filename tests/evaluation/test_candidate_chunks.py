"""Candidates in chunks: none drawn twice, judged meanwhile, the same after a kill."""

import threading
import types

import numpy as np
import pytest

from diffusion_t5x.evaluation import candidate_chunks
from diffusion_t5x.evaluation.candidate_chunks import ChunkFiles, chunk_sizes


def _chunk(number, size):
    """Candidates of two examples that tell where they come from."""
    tokens = 100 * number + np.arange(size, dtype=np.int32)[:, None] + np.zeros((1, 4), np.int32)
    scores = -0.1 * tokens[:, 0].astype(np.float32)
    return {7: (tokens, scores), 3: (tokens + 50, scores / 3)}, {"seconds": 0.5, "passes": 3.0}


def _judges(judge):
    metric = types.SimpleNamespace(judge=judge)
    predictions = lambda outputs: [rows[:, 0].tolist() for rows, _ in outputs.values()]  # noqa: E731
    return types.SimpleNamespace(metrics=[metric], targets=["t"], predictions=predictions)


NOBODY = types.SimpleNamespace(metrics=[])


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
    assert chunk_sizes(*settings) == sizes
    outputs, costs = candidate_chunks.draw(_chunk, sizes, NOBODY, None)
    tokens, scores = outputs[7]
    expected = [100 * number + i for number, size in enumerate(sizes) for i in range(size)]
    assert tokens[:, 0].tolist() == expected
    assert scores.shape == (settings[0],)
    assert costs == {"seconds": 0.5 * len(sizes), "passes": 3.0 * len(sizes)}


@pytest.mark.parametrize("settings", [(0, 1), (1, 0), (-1, 8)])
def test_no_candidates_are_refused(settings):
    with pytest.raises(ValueError, match=r"NUM_DECODES = .*, DECODES_PER_CHUNK = "):
        chunk_sizes(*settings)


@pytest.mark.parametrize("killed_at", range(4))
def test_a_killed_run_resumes_after_its_last_chunk_and_gives_the_same(tmp_path, killed_at):
    sizes = chunk_sizes(7, 2)
    whole, _ = candidate_chunks.draw(_chunk, sizes, NOBODY, None)
    drawn, judged, remembered = [], [], []

    def judge(targets, predictions, known):
        if known is None:
            judged.append(predictions)
            return {"first": predictions[0]}
        remembered.append(predictions)
        assert known["first"] == predictions[0]
        return known

    def dying(number, size):
        if number == killed_at:
            raise KeyboardInterrupt
        drawn.append(number)
        return _chunk(number, size)

    def living(number, size):
        drawn.append(number)
        return _chunk(number, size)

    files = ChunkFiles(tmp_path / "chunks", "key")
    with pytest.raises(KeyboardInterrupt):
        candidate_chunks.draw(dying, sizes, _judges(judge), files)
    before = list(judged)
    outputs, costs = candidate_chunks.draw(living, sizes, _judges(judge), files)
    assert drawn == [0, 1, 2, 3]
    assert costs == {"seconds": 2.0, "passes": 12.0}
    _equal(outputs, whole)
    assert remembered == before
    assert judged == [[[100 * n + i for i in range(s)], [100 * n + i + 50 for i in range(s)]]
                      for n, s in enumerate(sizes)]  # fmt: skip


def test_a_damaged_chunk_and_those_of_other_settings_are_drawn_again(tmp_path, capsys):
    drawn = []

    def chunk(number, size):
        drawn.append(number)
        return _chunk(number, size)

    sizes, files = [1, 1, 1], ChunkFiles(tmp_path, "key")
    whole, _ = candidate_chunks.draw(chunk, sizes, NOBODY, files)
    path = tmp_path / "chunk-00001.json"
    path.write_text(path.read_text()[:-5])
    outputs, _ = candidate_chunks.draw(chunk, sizes, NOBODY, files)
    assert drawn == [0, 1, 2, 1]
    assert f"{path} is damaged" in capsys.readouterr().out
    _equal(outputs, whole)
    candidate_chunks.draw(chunk, sizes, NOBODY, ChunkFiles(tmp_path, "other"))
    assert drawn == [0, 1, 2, 1, 0, 1, 2]


def test_a_chunk_is_judged_while_the_next_is_drawn():
    next_is_drawn, is_judged = threading.Event(), threading.Event()

    def judge(targets, predictions, known):
        assert next_is_drawn.wait(10)
        is_judged.set()

    def chunk(number, size):
        if number == 1:
            next_is_drawn.set()
            assert is_judged.wait(10)
        return _chunk(number, size)

    candidate_chunks.draw(chunk, [1, 1], _judges(judge), None)
    assert is_judged.is_set()


def test_a_judge_that_fails_ends_the_run_before_all_is_drawn():
    failed, drawn = threading.Event(), []

    def judge(targets, predictions, known):
        failed.set()
        raise RuntimeError("no sandbox")

    def chunk(number, size):
        drawn.append(number)
        if number:
            failed.wait(10)
        return _chunk(number, size)

    with pytest.raises(RuntimeError, match="no sandbox"):
        candidate_chunks.draw(chunk, [1] * 50, _judges(judge), None)
    assert len(drawn) < 50


def test_candidates_that_are_all_alike_are_spoken_of(capsys):
    same = lambda number, size: _chunk(0, 1)  # noqa: E731
    candidate_chunks.draw(same, [1, 1, 1], NOBODY, None)
    assert "all 3 candidates of every example are alike" in capsys.readouterr().out
    candidate_chunks.draw(_chunk, [1, 1, 1], NOBODY, None)
    assert capsys.readouterr().out == ""
