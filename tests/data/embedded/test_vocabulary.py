"""The embedded SentencePiece model is reproducible and has seen training splits alone."""

from diffusion_t5x.data.embedded import file_cache, vocabulary


def test_training_on_the_same_text_gives_the_same_model(tmp_path, monkeypatch):
    few = [(files, 400) for files, _ in vocabulary.FAMILIES]
    monkeypatch.setattr(vocabulary, "FAMILIES", few)
    monkeypatch.setattr(vocabulary, "PIECES", 450)
    models = []
    for name in ("one", "two"):
        vocabulary.train(tmp_path / name)
        models.append((tmp_path / name).read_bytes())
    assert models[0] == models[1]
    # SentencePiece notes where its rules were, which would tell machines apart.
    assert str(tmp_path).encode() not in models[0]


def test_the_embedded_model_is_trained_on_training_splits_alone(monkeypatch):
    read = []

    def spy(path):
        read.append(path)
        return [{"text": "line"}]

    monkeypatch.setattr(file_cache, "read_jsonl", spy)
    vocabulary.training_lines()
    assert len(read) == 5
    assert all(path.endswith("-train.jsonl") for path in read)
