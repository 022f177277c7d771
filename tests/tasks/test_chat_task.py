"""The task `chat`: users' conversations, from JSON lines to tokens, metrics and refusals."""

import json
import re

import pyarrow
import pytest
import seqio
from pyarrow import parquet

import gin
from diffusion_t5x.data import lengths, vocabularies
from diffusion_t5x.data.chat_templates import ChatTemplate
from diffusion_t5x.data.datasets import DatasetConfig
from diffusion_t5x.data.embedded import file_cache
from diffusion_t5x.data.files import readers
from diffusion_t5x.data.files.conversations import Conversations

pytest.importorskip("tokenizers")
import chat_templates
import small_tokenizers

from tasks import chat

CHAT = [
    {"role": "user", "content": "The capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = [
    {"messages": CHAT},
    {"prompt": "def f(x):", "completion": "\n    return x", "id": 7},
    {"prompt": CHAT[:3], "completion": CHAT[3:]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": "Paris"}]}]},
    {"prompt": "", "completion": "once", "messages": None},
    {"messages": [*CHAT[:1], {**CHAT[1], "weight": 0}, *CHAT[2:]], "tools": []},
]
TARGETS = ["Paris.", "Yes.", "\n    return x", "Yes.", "Hello", "Paris", "once", "Yes."]


def _as(role, content, **more):
    return {"messages": [CHAT[0], {"role": role, "content": content, **more}]}


BAD = {
    '{"messages": [': "not JSON",
    "[1]": "expected a JSON object",
    '{"text": "a"}': "expected 'messages', 'conversations', or 'prompt' and 'completion'",
    json.dumps({"messages": CHAT[:1]}): "no turn of the assistant",
    json.dumps({"messages": "Hi"}): "'messages' is 'Hi', expected a list of messages",
    json.dumps({"messages": ["Hi"]}): r"messages\[0\] is 'Hi', expected an object",
    json.dumps(_as("bot", "x")): r"messages\[1\] has the role 'bot', expected one of",
    json.dumps(_as("assistant", "")): r"'messages\[1\].content' is empty",
    json.dumps(_as("assistant", None)): r"'messages\[1\].content' is NoneType",
    json.dumps(_as("assistant", [{"type": "image"}])): r"messages\[1\] has parts of another type",
    json.dumps(_as("assistant", "\ud83d")): "half of a surrogate pair",
    json.dumps(_as("assistant", "x", name="\ud83d")): "half of a surrogate pair",
    '{"prompt": "a", "completion": ""}': "'completion' is empty",
    '{"prompt": "a", "completion": 3}': "expected 'messages'",
    json.dumps({"messages": CHAT, "tools": "search"}): "'tools' is 'search', expected a list",
    json.dumps(_as("assistant", "x", weight=0)): "no turn of the assistant",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(file_cache.CACHE_VARIABLE, str(tmp_path / "cache"))


def _bind(tmp_path, lines, template=chat_templates.CHATML):
    """Binds a tokenizer and a file, and returns the vocabulary and the task as it is then."""
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = small_tokenizers.byte_level()
    directory = small_tokenizers.write(tmp_path / "model", tokenizer, template, eos="<|im_end|>")
    gin.bind_parameter("diffusion_t5x.data.vocabularies.get_vocabulary.name", str(directory))
    files = {"chat": {"train": str(tmp_path / "chats.jsonl")}}
    gin.bind_parameter("diffusion_t5x.data.files.local_files.LocalFiles.files", files)
    vocabulary = vocabularies.get_vocabulary()
    features = {
        "inputs": seqio.Feature(vocabulary, add_eos=False, required=False),
        "targets": seqio.Feature(vocabulary, add_eos=True),
    }
    return vocabulary, seqio.get_mixture_or_task(chat.CHAT).replace(output_features=features)


def _read(task, **lengths_):
    lengths_ = lengths_ or {"inputs": 512, "targets": 64}
    return list(task.get_dataset(lengths_, "train", shuffle=False).as_numpy_iterator())


def test_every_form_is_read_turn_by_turn_and_ends_once(tmp_path):
    vocabulary, task = _bind(tmp_path, [*map(json.dumps, GOOD), ""])
    examples = _read(task)
    assert [e["targets_pretokenized"].decode() for e in examples] == TARGETS
    for example, text in zip(examples, TARGETS, strict=True):
        assert example["targets"].tolist() == [*vocabulary.encode(text), vocabulary.eos_id]
    assert vocabulary._decode(examples[3]["inputs"]) == vocabulary._decode(examples[1]["inputs"])
    assert examples[6]["inputs"].tolist() == []
    assert examples[0]["inputs_pretokenized"].decode().endswith("<|im_start|>assistant\n")
    answers = [task.postprocess_fn("", example=e, is_target=True) for e in examples]
    guesses = [task.postprocess_fn(text, example={}, is_target=False) for text in TARGETS]
    scores = {k: v for metric in task.metric_fns for k, v in metric(answers, guesses).items()}
    assert scores["exact_match"] == 1
    assert "bleu" in scores


def test_malformed_records_are_left_out_by_file_and_line(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join([json.dumps(GOOD[0]), *BAD, json.dumps(GOOD[1])]))
    reader = Conversations(ChatTemplate(chat_templates.CHATML, "T"))
    first, *refused, last = readers.read(reader, (str(path),))
    assert (first["turns"], last["turns"]) == (["1", "3"], ["0"])
    for number, (refusal, reason) in enumerate(zip(refused, BAD.values(), strict=True), 2):
        assert str(refusal).startswith(f"{path}:{number}: ")
        assert re.search(reason, str(refusal)), refusal


def test_tables_of_conversations_are_read_as_lines_are(tmp_path):
    rows = [{"messages": CHAT}, {"messages": [SYSTEM, *CHAT[:2]]}]
    path = tmp_path / "chats.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    reader = Conversations(ChatTemplate(chat_templates.CHATML, "T"))
    found = list(readers.read(reader, (str(path),)))
    (tmp_path / "chats.json").write_text(json.dumps(rows))
    assert found == list(readers.read(reader, (str(tmp_path / "chats.json"),)))
    assert [one["turns"] for one in found] == [["1", "3"], ["2"]]


def test_what_the_template_refuses_is_refused_before_a_run(tmp_path, capsys):
    lines = [
        json.dumps(GOOD[0]),
        json.dumps({"messages": [{"role": "system", "content": "x"}, *CHAT]}),
    ]
    _, task = _bind(tmp_path, lines, chat_templates.GEMMA)
    assert len(_read(task)) == 2
    assert "chats.jsonl:2: the chat template of" in (output := capsys.readouterr().out)
    assert "refuses it: System role not supported" in output


def test_messages_without_a_template_are_refused_with_the_way_out(tmp_path):
    _, task = _bind(tmp_path, [json.dumps(GOOD[0])], template=None)
    with pytest.raises(ValueError, match=r"chats.jsonl:1: has messages, but .*ChatFormat.template"):
        _read(task)
    with pytest.raises(ValueError, match=r"the task 'chat' reads your files; set LOCAL_FILES"):
        gin.clear_config()
        _read(task)


def test_conversations_that_are_cut_are_counted(tmp_path, capsys):
    lines = [json.dumps({"messages": CHAT * n}) for n in (1, 9)]
    _, task = _bind(tmp_path, lines)
    limits = {"inputs": 150, "targets": 64}
    whole = [len(e["inputs"]) for e in _read(task, inputs=10_000, targets=64)]
    assert max(len(e["inputs"]) for e in _read(task, **limits)) <= 150
    cut = lengths.count_cut(task, limits, "train")
    assert set(cut) == {"inputs"}
    assert cut["inputs"].of_examples == 20
    assert cut["inputs"].examples == sum(size > 150 for size in whole) > 0
    lengths.say("chat", cut, DatasetConfig("chat", limits, "train", 1, shuffle=False))
    assert "examples have longer inputs than TASK_FEATURE_LENGTHS['inputs'] = 150" in (
        capsys.readouterr().out
    )
