"""The gin files: heads are true, compositions whole, sizes as stated, macros reach what they set.

A run is a model file, an objective file and a run file, in this order.
"""

import dataclasses
import functools
import importlib.util
import itertools
import re

import jax
import pytest

import gin
from diffusion_t5x import gin_utils, models
from diffusion_t5x.data import datasets
from diffusion_t5x.decoding import stopping, updates
from diffusion_t5x.decoding.logits_rules import Suppress, TopK, TopP
from diffusion_t5x.experiments import __main__ as experiments
from diffusion_t5x.interop import hf_configs
from diffusion_t5x.networks.config import SCANNED_FROM, TransformerConfig
from diffusion_t5x.networks.low_rank import LowRank
from diffusion_t5x.objectives import StepUnrolledDenoising
from diffusion_t5x.runtime.train_state import INIT_SHAPES
from diffusion_t5x.training.loop import train
from gin import config_parser

ROOT = gin_utils.config_dir()
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.gin"))
OBJECTIVES = (
    "objectives/autoregressive.gin",
    "objectives/diffusion.gin",
    "objectives/diffusion_cached_prefix.gin",
    "objectives/uniform_bound.gin",
    "objectives/masked.gin",
    "objectives/mixed.gin",
    "objectives/diffusion_blocks.gin",
)
NOISE = ("noise/uniform.gin", "noise/mask.gin", "noise/mixed.gin")
FAST = "decoders/fast.gin"
RULES = {
    "decoders/confidence.gin": updates.ConfidenceUnmask(),
    "decoders/resample.gin": updates.ResampleAll(),
    "decoders/ancestral.gin": updates.Ancestral(),
    "decoders/remask.gin": updates.Remask(),
    "decoders/entropy_bound.gin": updates.EntropyBound(0.1),
    "decoders/argmax_unrolled.gin": updates.ArgmaxUnrolled(),
}
LOW_RANK = "models/low_rank.gin"
RUNS = tuple(f"runs/{name}.gin" for name in ("pretrain", "adapt", "finetune", "eval", "infer"))
LM_EVAL = "runs/lm_eval.gin"
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs the extra lm-eval"
)
SAMPLE = "runs/sample.gin"
EXPORT = "runs/export.gin"
SCALES = ("embedded", "paper")
# name -> (embed_dim, heads, layers, mlp_dim, head_dim); all but tiny are T5 1.1's, as published.
# xxl has the layers of T5 1.1 XXL's encoder and decoder, and four more.
SIZES = {
    "tiny": (96, 4, 3, 256, 24),
    "small": (512, 6, 8, 1024, 64),
    "base": (768, 12, 12, 2048, 64),
    "large": (1024, 16, 24, 2816, 64),
    "xl": (2048, 32, 24, 5120, 64),
    "xxl": (4096, 64, 52, 10240, 64),
}
MODELS = tuple(
    f"models/{folder}{size}.gin"
    for folder in ("", "encoder_decoder/")
    for size in SIZES
    if f"{folder}{size}" != "encoder_decoder/xxl"
)
# name -> (parameters, config.json), both as published.
FAMILIES = {
    "llama3_8b": (8_030_261_248, {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 128256, "hidden_act": "silu",
        "tie_word_embeddings": False,
    }),
    "qwen3_8b": (8_190_735_360, {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000, "vocab_size": 151936, "hidden_act": "silu",
        "tie_word_embeddings": False, "attention_bias": False, "use_sliding_window": False,
    }),
    "smollm2_135m": (134_515_008, {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5, "rope_theta": 100000, "vocab_size": 49152, "hidden_act": "silu",
        "tie_word_embeddings": True,
    }),
    "gemma2_2b": (2_614_341_888, {
        "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "head_dim": 256,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "vocab_size": 256000,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096,
    }),
}  # fmt: skip
FAMILY_FILES = tuple(f"models/families/{name}.gin" for name in FAMILIES)
STACKS = ("models/decoder_only.gin", "models/encoder_decoder.gin")
SIZE_FILES = tuple(f"models/sizes/{size}.gin" for size in SIZES)
DATA = ("MIXTURE_OR_TASK_NAME", "TASK_FEATURE_LENGTHS")
# The macros that a user must give to a file.
REQUIRED = {
    "objectives/diffusion_blocks.gin": {"BLOCK_LENGTH"},
    "runs/pretrain.gin": {*DATA, "MODEL_DIR"},
    "runs/adapt.gin": {*DATA, "MODEL_DIR", "INITIAL_CHECKPOINT_PATH"},
    "runs/finetune.gin": {*DATA, "MODEL_DIR", "INITIAL_CHECKPOINT_PATH"},
    "runs/eval.gin": {*DATA, "CHECKPOINT_PATH", "EVAL_OUTPUT_DIR"},
    "runs/infer.gin": {*DATA, "CHECKPOINT_PATH", "INFER_OUTPUT_DIR"},
    LM_EVAL: {"TASK_FEATURE_LENGTHS", "CHECKPOINT_PATH", "LM_EVAL_TASKS", "LM_EVAL_OUTPUT_DIR"},
    SAMPLE: {"TASK_FEATURE_LENGTHS", "CHECKPOINT_PATH", "INPUTS"},
}


def _required(*files):
    values = {"TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 8}, "BLOCK_LENGTH": 4}
    names = itertools.chain.from_iterable(REQUIRED.get(file, ()) for file in files)
    return [f"{name}={values.get(name, 'x')!r}" for name in names]


def _parse(model="models/tiny.gin", objective=OBJECTIVES[1], run=RUNS[0], *bindings):
    gin.clear_config()
    gin_utils.parse_config([model, objective, run], [*_required(objective, run), *bindings])


def test_no_file_is_without_its_test():
    known = {*MODELS, *FAMILY_FILES, *OBJECTIVES, *NOISE, FAST, *RULES, *RUNS, SAMPLE, EXPORT}
    known |= {LM_EVAL}
    known |= {*STACKS, *SIZE_FILES, LOW_RANK, "models/common.gin", "runs/common.gin"}
    known |= {"models/hugging_face.gin"}  # tests/interop/test_hf_models.py
    folders = ("models/", "objectives/", "noise/", "decoders/", "runs/")
    found = {name for name in FILES if name.startswith(folders)}
    assert found == known


def test_models_of_eight_layers_and_more_have_them_scanned():
    for model in (*MODELS[: len(SIZES)], *FAMILY_FILES):
        _parse(model)
        config = gin.get_configurable(TransformerConfig)()
        assert config.scan_layers == (config.num_layers >= SCANNED_FROM), model


@pytest.mark.parametrize("run", [*RUNS, SAMPLE])
def test_every_composition_parses(run):
    # Gin refuses unknown functions and parameters, and macros that are read but not set.
    first = MODELS[0], MODELS[-1]
    pairs = {*itertools.product(MODELS, OBJECTIVES[:2]), *itertools.product(first, OBJECTIVES)}
    for model, objective in sorted(pairs):
        _parse(model, objective, run)
        assert gin.query_parameter("models.Model.objective")


@pytest.mark.parametrize("loss", ["StepUnrolledDenoising", "BoundDenoising"])
@pytest.mark.parametrize("noise", ["Uniform", "Mask", "Mixed"])
def test_every_noise_goes_with_every_loss_and_the_decoder_has_the_same(noise, loss):
    objective = OBJECTIVES[1] if loss.startswith("Step") else "objectives/uniform_bound.gin"
    gin.clear_config()
    settings = ["SCHEDULE='cosine'", "ANTITHETIC=True", "NEXT_TOKEN_WEIGHT=0.5", "SHIFT=True"]
    files = [MODELS[0], objective, f"noise/{noise.lower()}.gin"]
    gin_utils.parse_config(files, ["DROPOUT_RATE=0.0", *settings])
    model = gin.get_configurable(models.Model)()
    assert type(model.objective).__name__ == loss
    assert (model.objective.next_token_weight, model.objective.shift) == (0.5, True)
    made = model.objective.corruption
    assert type(made).__name__ == f"{noise}Corruption"
    assert made == model.decoder.corruption
    assert (made.schedule, made.antithetic) == ("cosine", True)
    extra = noise != "Uniform"
    assert made.forbidden == ((768,) if extra else ())
    assert made.vocab_size == 768 + extra == 768 + model.module.config.extra_tokens


def test_noise_before_its_objective_is_refused():
    gin.clear_config()
    gin_utils.parse_config([MODELS[0], "noise/mask.gin", OBJECTIVES[1]], ["DROPOUT_RATE=0.0"])
    with pytest.raises(ValueError, match="noise/ comes after the objective file"):
        gin.get_configurable(models.Model)()


@pytest.mark.parametrize(
    ("files", "macro"),
    [((MODELS[0], RUNS[0]), "OBJECTIVE|DECODER|PACK"), ((OBJECTIVES[0], RUNS[0]), "MODEL|EOS_ID")],
)
def test_a_composition_that_lacks_a_file_is_refused_by_the_macro_it_would_set(files, macro):
    with pytest.raises(ValueError, match=f"%({macro}) is read, but nothing sets it"):
        gin_utils.parse_config(files, _required(RUNS[0]))


@pytest.mark.parametrize("run", [*RUNS, SAMPLE, pytest.param(LM_EVAL, marks=needs_lm_eval)])
@pytest.mark.parametrize("objective", [OBJECTIVES[0], OBJECTIVES[-1]])
def test_each_required_macro_is_asked_for(objective, run):
    required = _required(objective, run)
    for missing in required:
        gin.clear_config()
        given = [binding for binding in required if binding != missing]
        with pytest.raises(ValueError, match=f"^{missing.split('=')[0]}/.*REQUIRED"):
            gin_utils.parse_config([MODELS[0], objective, run], given)


def test_the_settings_of_a_scale_are_no_scale_themselves():
    assert experiments.names("scales") == ["embedded", "laptop", "noise", "paper", "recipes"]


# (experiment, scale); what needs a vocabulary of one's own is given the bytes.
@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("families", "laptop"),
        ("recipes", "recipes"),
        ("padding", "laptop"),
        *((table, scale) for table in ("table1", "table2", "table3") for scale in SCALES),
    ],
)
def test_every_command_of_an_experiment_parses(name, scale, tmp_path):
    flags = ["VOCABULARY_PATH='bytes'"] if scale == "paper" else []
    run = experiments.Run(name, scale, tmp_path)
    # Stages that differ in values alone parse alike.
    kinds = {(stage.files, tuple(stage.bindings)): stage for stage in run.stages}
    assert kinds
    for stage in kinds.values():
        gin.clear_config()
        assignments = [f"{key}={value!r}" for key, value in stage.bindings.items()]
        gin_utils.parse_config(stage.files, [*assignments, *flags])


@pytest.mark.parametrize("stack", STACKS)
def test_an_old_model_name_is_a_stack_and_a_size(stack):
    folder = "" if "decoder_only" in stack else "encoder_decoder/"
    _parse(f"models/{folder}base.gin")
    whole = gin.config_str()
    gin.clear_config()
    files = [stack, "models/sizes/base.gin", OBJECTIVES[1], RUNS[0]]
    gin_utils.parse_config(files, _required(OBJECTIVES[1], RUNS[0]))
    assert gin.config_str() == whole


class _Text(config_parser.ParserDelegate):
    """Reads references as text, so that values can be compared without importing anything."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        return f"@{scoped_configurable_name}{'()' if evaluate else ''}"

    def macro(self, macro_name):
        return f"%{macro_name}"


@functools.cache
def _statements(name):
    """The bindings that a gin file itself makes, and all those of the files it includes."""
    own, included = {}, {}
    parser = config_parser.ConfigParser((ROOT / name).read_text(encoding="utf-8"), _Text())
    for statement in parser:
        if isinstance(statement, config_parser.IncludeStatement):
            if not (ROOT / statement.filename).exists():  # one of T5X's
                continue
            theirs, beneath = _statements(statement.filename)
            included.update({**beneath, **theirs})
        elif isinstance(statement, config_parser.BindingStatement):
            key = f"{statement.scope}/{statement.selector}.{statement.arg_name}"
            assert key not in own, f"{name} binds {key} twice"
            own[key] = statement.value
    return own, included


def _head(name):
    """The three paragraphs at the head of a gin file: Provides, Requires, After."""
    comment = []
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    found = re.fullmatch(r".+? Provides: (.+) Requires: (.+) After: (.+)", " ".join(comment))
    assert found, f"{name} does not begin with Provides, Requires and After"
    return found.groups()


def _macros(text):
    return set(re.findall(r"\b[A-Z][A-Z0-9_]{3,}\b", text))


def _read(value):
    """The macros that a value refers to."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        return set().union(*map(_read, value))
    return {value[1:]} if isinstance(value, str) and value.startswith("%") else set()


def _set(bindings):
    """Macro -> value of the macros among bindings."""
    return {key[1:-1]: value for key, value in bindings.items() if key.endswith(".")}


@pytest.mark.parametrize("name", FILES)
def test_the_head_of_a_file_names_the_macros_that_it_provides_and_requires(name):
    provides, requires, _ = _head(name)
    own, included = _statements(name)
    known = _set({**included, **own})
    required = {macro for macro, value in known.items() if value == "%gin.REQUIRED"}
    read = _read([*included.values(), *own.values()]) - {"gin.REQUIRED"}
    assert _macros(provides) <= known.keys() - required
    assert _set(own).keys() - _set(included).keys() - required <= _macros(provides)
    if name.startswith("t5x/"):  # T5X's run files read and require the rest
        assert _macros(requires) >= required
    else:
        assert _macros(requires) == required | read - known.keys()


@pytest.mark.parametrize("name", FILES)
def test_no_file_repeats_a_binding_of_a_file_it_includes(name):
    own, included = _statements(name)
    assert own or included or name.startswith("t5x/")  # where T5X's run files bind the rest
    repeated = [key for key in own.keys() & included.keys() if own[key] == included[key]]
    assert not repeated


def test_the_check_for_repetitions_sees_what_is_overridden():
    own, included = _statements("runs/finetune.gin")
    key = "/optimizers.create_learning_rate_scheduler.base_learning_rate"
    assert (own[key], included[key]) == (0.001, 1.0)


PAPER = "VOCAB_SIZE=256_000"


def _stack(embed, heads, layers, mlp, head_dim, cross=False):
    """Parameters of a stack: queries, keys, values and outputs; a gated MLP; norms; distances."""
    attention = 4 * embed * heads * head_dim + embed
    layer = attention * (2 if cross else 1) + 3 * embed * mlp + embed
    return layers * layer + embed + heads * 32


def _count(name, *bindings):
    """Parameters of a model file; nothing is allocated."""
    fixed = "DROPOUT_RATE=0.0", "vocabularies.get_vocabulary.name='bytes'"
    gin.clear_config()
    gin_utils.parse_config([name, OBJECTIVES[1]], [*fixed, *bindings])
    model = gin.get_configurable(models.Model)()
    variables = jax.eval_shape(
        lambda rng: model.get_initial_variables(rng, INIT_SHAPES), jax.random.PRNGKey(0)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize(
    "name",
    [name if "base" in name else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_parameters_at_the_papers_vocabulary_are_as_the_formula_counts(name):
    counted = _count(name, PAPER)
    size = SIZES[name.rpartition("/")[2].removesuffix(".gin")]
    expected = 256_000 * size[0] + _stack(*size)
    if "encoder_decoder" in name:
        expected += _stack(*size, cross=True)
        if "tiny" not in name:
            expected += 256_000 * size[0]  # an output matrix of its own, as in T5 1.1
    print(f"{name}: {counted:,}")
    assert counted == expected


@pytest.mark.parametrize(
    ("size", "millions"), [("base", 281.56), ("large", 570.48), ("xl", 1682.02), ("xxl", 11081.78)]
)
def test_the_papers_decoder_only_sizes_and_eleven_billion(size, millions):
    # The paper says 280 M for Base and 1.7 B for XL; its 270 M for Large is less than its Base.
    assert _count(f"models/{size}.gin", PAPER) / 1e6 == pytest.approx(millions, abs=0.005)


def test_the_papers_590_million_are_an_encoder_decoder_base_with_an_output_matrix_of_its_own():
    assert _count("models/encoder_decoder/base.gin", PAPER) / 1e6 == pytest.approx(
        591.45, abs=0.005
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_shape_is_as_its_config_json_says_and_as_large_as_published(name):
    parameters, published = FAMILIES[name]
    assert _count(f"models/families/{name}.gin", "config.TransformerConfig.scan_layers=True") == (
        parameters
    )
    config = gin.get_configurable(TransformerConfig)()
    for setting, value in hf_configs.config_of(published).items():
        assert getattr(config, setting) == value, setting


@pytest.mark.parametrize("run", RUNS[:3])
def test_macros_of_training_reach_what_they_set(run):
    given = {
        "MIXTURE_OR_TASK_NAME": "a_task",
        "MIXTURE_OR_TASK_MODULE": "a_module",
        "TASK_FEATURE_LENGTHS": {"inputs": 7, "targets": 5},
        "BATCH_SIZE": 6,
        "USE_CACHED_TASKS": True,
        "DROPOUT_RATE": 0.25,
        "MODEL_DIR": "a/dir",
        "TRAIN_STEPS": 11,
        "TRAIN_STEPS_RELATIVE": 12,
        "EVAL_STEPS": 13,
        "EVAL_PERIOD": 14,
        "RANDOM_SEED": 15,
        "CHECKPOINT_PERIOD": 16,
        "VOCAB_SIZE": 400,
    }
    _parse("models/tiny.gin", OBJECTIVES[1], run, *(f"{k}={v!r}" for k, v in given.items()))
    for scope, split in (("train", "train"), ("train_eval", "validation")):
        with gin.config_scope(scope):
            cfg = gin.get_configurable(datasets.DatasetConfig)()
        assert (cfg.mixture_or_task_name, cfg.module) == ("a_task", "a_module")
        assert (cfg.task_feature_lengths, cfg.batch_size) == ({"inputs": 7, "targets": 5}, 6)
        assert (cfg.use_cached, cfg.split, cfg.shuffle) == (True, split, split == "train")
    config = gin.get_configurable(TransformerConfig)()
    assert (config.dropout_rate, config.vocab_size) == (0.25, 400)
    bound = gin.get_bindings(train, resolve_references=False)
    values = {
        name: gin.query_parameter(str(bound[name]))
        for name in (
            "model_dir", "total_steps", "relative_steps", "eval_steps", "eval_period", "random_seed"
        )
    }  # fmt: skip
    assert list(values.values()) == ["a/dir", 11, 12, 13, 14, 15]
    assert gin.get_bindings("checkpoints.SaveCheckpointConfig")["period"] == 16


@pytest.mark.parametrize("run", [*RUNS, SAMPLE])
def test_sampling_macros_reach_the_decoder_in_every_run(run):
    bindings = "vocabularies.get_vocabulary.name='bytes'", "NUM_SAMPLES=3", "TEMPERATURE=0.5"
    _parse("models/tiny.gin", OBJECTIVES[1], run, *bindings, "NUM_STEPS=7")
    decoder = gin.get_configurable(models.Model)().decoder
    assert (decoder.num_steps, decoder.num_samples, decoder.temperature) == (7, 3, 0.5)
    _parse("models/tiny.gin", OBJECTIVES[0], run, *bindings)
    decoder = gin.get_configurable(models.Model)().decoder
    assert (decoder.num_samples, decoder.temperature) == (3, 0.5)


def test_the_draws_of_a_score_are_one_setting():
    _parse("models/tiny.gin", OBJECTIVES[1], RUNS[0], "SCORE_DRAWS=64")
    assert gin.get_configurable(StepUnrolledDenoising)().score_draws == 64


def test_the_papers_settings_are_the_defaults():
    _parse("models/base.gin", OBJECTIVES[1], "runs/finetune.gin",
           "vocabularies.get_vocabulary.name='bytes'")  # fmt: skip
    model = gin.get_configurable(models.Model)()
    decoder, objective = model.decoder, model.objective
    assert (decoder.num_steps, decoder.num_samples, decoder.temperature) == (10, 8, 0.2)
    assert (objective.num_unrolls, objective.unroll_temperature) == (1, 0.0)
    assert (objective.reduction, objective.padding_weight) == ("sum", 1.0)
    assert decoder.corruption.vocab_size == model.module.config.vocab_size
    with gin.config_scope("train"):
        assert gin.get_configurable(datasets.DatasetConfig)().batch_size == 128
    rate = gin.get_bindings("optimizers.create_learning_rate_scheduler")
    assert (rate["factors"], rate["base_learning_rate"]) == ("constant", 0.001)


def _diffusion_model(*files):
    gin.clear_config()
    gin_utils.parse_config(["models/tiny.gin", *files], ["DROPOUT_RATE=0.0", *_required(*files)])
    return gin.get_configurable(models.Model)()


def test_macros_of_recipes_reach_every_denoising_objective_and_are_off_by_default():
    given = ("SHIFT=True", "OPENING_STEPS=7", "NEXT_TOKEN_WEIGHT=0.5")
    for objective in OBJECTIVES[1:]:
        for bindings, expected in (((), (False, 0, 0.0)), (given, (True, 7, 0.5))):
            bytes_ = "vocabularies.get_vocabulary.name='bytes'"
            _parse("models/tiny.gin", objective, RUNS[1], bytes_, *bindings)
            made = gin.get_configurable(models.Model)().objective
            assert (made.shift, made.opening_steps, made.next_token_weight) == expected


def test_macros_of_conditioning_and_guidance_reach_every_denoising_model_and_are_off_by_default():
    given = ("SELF_CONDITIONING=True", "PREFIX_DROP_RATE=0.1", "GUIDANCE_SCALE=2.0",
             "NEXT_TOKEN_WEIGHT=1.0", "NEXT_TOKEN_PREFIX=True")  # fmt: skip
    for objective in OBJECTIVES[1:]:
        off, on = (False, 0.0, 1.0, False, False), (True, 0.1, 2.0, True, False)
        for bindings, expected in (((), off), (given, on)):
            bytes_ = "vocabularies.get_vocabulary.name='bytes'"
            _parse("models/tiny.gin", objective, RUNS[1], bytes_, *bindings)
            made = gin.get_configurable(models.Model)()
            settings = (
                made.module.config.self_conditioning, made.objective.prefix_drop_rate,
                made.decoder.guidance_scale, made.objective.next_token_prefix,
                getattr(made.objective, "all_blocks", False),
            )  # fmt: skip
            assert settings == expected
    _parse("models/tiny.gin", "objectives/diffusion_blocks.gin", RUNS[1], bytes_, "ALL_BLOCKS=True")
    assert gin.get_configurable(models.Model)().objective.all_blocks


def test_only_the_cached_objectives_cache_the_prefix_and_hide_the_canvas_from_it():
    named = {"_cached_prefix": "cached_prefix", "_blocks": "causal_prefix"}
    for objective in OBJECTIVES[1:]:
        pattern = next(
            (p for end, p in named.items() if f"{end}.gin" in objective), "bidirectional"
        )
        model = _diffusion_model(objective)
        assert model.objective.attention_pattern == pattern
        assert model.decoder.prefix_cache == (pattern != "bidirectional")
        assert model.decoder.block_length == (4 if pattern == "causal_prefix" else 0)


def test_the_fast_decoder_keeps_what_the_objective_says_and_takes_fewer_passes():
    for objective in OBJECTIVES[1:]:
        paper, fast = (_diffusion_model(objective, *more).decoder for more in ((), (FAST,)))
        assert fast == dataclasses.replace(
            paper, halve_every=2, stop=stopping.Unchanged(), trim_multiple=8
        )
        assert fast != paper


def test_a_file_of_an_update_rule_follows_any_diffusion_objective():
    for name, rule in RULES.items():
        for objective in OBJECTIVES[1:]:
            files = ["models/tiny.gin", objective, name]
            bindings = ["DROPOUT_RATE=0.0", *_required(objective)]
            if name == "decoders/remask.gin" and "masked" not in objective:
                gin.clear_config()
                gin_utils.parse_config(files, bindings)
                with pytest.raises(ValueError, match="Corruption has uniform noise"):
                    gin.get_configurable(models.Model)()
                files.insert(2, NOISE[1])
            gin.clear_config()
            gin_utils.parse_config(files, bindings)
            decoder = gin.get_configurable(models.Model)().decoder
            assert decoder.update == rule
            steps, temperature = (
                gin.query_parameter(f"%{m}") for m in ("NUM_STEPS", "TEMPERATURE")
            )
            assert (decoder.num_steps, decoder.temperature) == (steps, temperature)
            if name == "decoders/entropy_bound.gin":
                assert (decoder.stop, steps) == (stopping.StableAndConfident(0.005), 48)
                assert (temperature, decoder.final_temperature) == (0.8, 0.4)


def test_macros_of_update_rules_reach_them():
    for name, given, rule in (
        ("confidence", ("MEASURE='margin'", "THRESHOLD=0.5", "PER_STEP=2"),
         updates.ConfidenceUnmask("margin", 0.5, 2)),
        ("argmax_unrolled", ("UNCERTAIN_SHARE=0.5",), updates.ArgmaxUnrolled(0.5)),
        ("remask", ("SIGMA='rescaled'", "REMASK_ETA=0.5", "BY_CONFIDENCE=True"),
         updates.Remask("rescaled", 0.5, True)),
    ):  # fmt: skip
        gin.clear_config()
        gin_utils.parse_config(
            [OBJECTIVES[1], f"decoders/{name}.gin"], ["VOCAB_SIZE=9", "EOS_ID=1", *given]
        )
        assert gin.get_configurable(type(rule))() == rule


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_macros_of_logits_rules_reach_the_decoder_and_are_none_by_default(objective):
    given = ("TOP_K=5", "TOP_P=0.9", "SUPPRESS=(1,)")
    for bindings, rules in (((), ()), (given, (Suppress((1,)), TopK(5), TopP(0.9)))):
        bytes_ = "vocabularies.get_vocabulary.name='bytes'"
        _parse("models/tiny.gin", objective, RUNS[1], bytes_, *bindings)
        assert gin.get_configurable(models.Model)().decoder.logits_rules == rules


def test_low_rank_adaptation_is_one_file_and_nothing_else_of_a_model():
    plain = _diffusion_model(OBJECTIVES[1])
    adapted = _diffusion_model(LOW_RANK, OBJECTIVES[1])
    low_rank = adapted.module.config.low_rank
    assert low_rank == LowRank()  # the file's values are the defaults
    assert adapted.module.config == dataclasses.replace(plain.module.config, low_rank=low_rank)
    bindings = (
        "LOW_RANK=3", "LOW_RANK_ALPHA=1.5", "LOW_RANK_PROJECTIONS='mlp/wo'", "DROPOUT_RATE=0.0",
        "LOW_RANK_ALSO_TRAINED=['token_embedder/embedding']",
    )  # fmt: skip
    gin.clear_config()
    gin_utils.parse_config([MODELS[0], LOW_RANK, OBJECTIVES[1]], bindings)
    config = gin.get_configurable(models.Model)().module.config
    assert config.low_rank == LowRank("mlp/wo", 3, 1.5, "token_embedder/embedding")


def test_ar2diff_changes_the_objective_file_and_nothing_of_the_network():
    gin_utils.parse_config([MODELS[0], OBJECTIVES[0], RUNS[1]], _required(RUNS[1]))
    before = gin.get_configurable(TransformerConfig)()
    gin.clear_config()
    gin_utils.parse_config([MODELS[0], OBJECTIVES[1], RUNS[1]], _required(RUNS[1]))
    assert gin.get_configurable(TransformerConfig)() == before


@pytest.mark.parametrize(
    ("run", "macro", "parameter"),
    [
        ("runs/adapt.gin", "INITIAL_CHECKPOINT_PATH", "checkpoints.RestoreCheckpointConfig.path"),
        ("runs/finetune.gin", "RANDOM_SEED", "trainer.train.random_seed"),
        ("runs/eval.gin", "CHECKPOINT_PATH", "checkpoints.RestoreCheckpointConfig.path"),
        ("runs/eval.gin", "EVAL_OUTPUT_DIR", "evaluation.evaluate.output_dir"),
        ("runs/eval.gin", "RANDOM_SEED", "evaluation.evaluate.random_seed"),
        ("runs/eval.gin", "EVALUATOR_NUM_EXAMPLES", "evaluation.InferenceEvaluator.num_examples"),
        ("runs/infer.gin", "CHECKPOINT_PATH", "checkpoints.RestoreCheckpointConfig.path"),
        ("runs/infer.gin", "INFER_OUTPUT_DIR", "inference.infer.output_dir"),
        ("runs/infer.gin", "BATCH_SIZE", "datasets.DatasetConfig.batch_size"),
        (SAMPLE, "CHECKPOINT_PATH", "checkpoints.RestoreCheckpointConfig.path"),
        (SAMPLE, "TASK_FEATURE_LENGTHS", "sampling.sample.task_feature_lengths"),
        ("runs/eval.gin", "LIKELIHOOD", "evaluation.InferenceEvaluator.likelihood"),
        pytest.param(
            LM_EVAL, "LM_EVAL_TASKS", "lm_eval_model.evaluate_tasks.tasks", marks=needs_lm_eval
        ),
    ],
)
def test_macros_of_the_other_runs_reach_what_they_set(run, macro, parameter):
    _parse("models/tiny.gin", OBJECTIVES[1], run)
    assert str(gin.query_parameter(parameter)) == f"%{macro}"


def test_a_later_file_and_a_binding_go_before_an_earlier_file(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "small_batches.gin").write_text("BATCH_SIZE = 2\nEVAL_STEPS = 3\n")
    gin_utils.parse_config(
        [MODELS[0], OBJECTIVES[1], RUNS[0], "mine/small_batches.gin"],
        [*_required(RUNS[0]), "EVAL_STEPS=4"],
        [str(tmp_path)],
    )
    assert gin.query_parameter("%BATCH_SIZE") == 2
    assert gin.query_parameter("%EVAL_STEPS") == 4


@pytest.mark.parametrize(
    ("assignment", "binding"),
    [
        ("MODEL_DIR='/tmp/run'", "MODEL_DIR = '/tmp/run'"),
        ("MODEL_DIR=/tmp/run", "MODEL_DIR = '/tmp/run'"),
        ("MODEL_DIR=gs://bucket/run", "MODEL_DIR = 'gs://bucket/run'"),
        ("MODEL_DIR=a=b", "MODEL_DIR = 'a=b'"),
        ("MODEL_DIR=", "MODEL_DIR = ''"),
        (" BATCH_SIZE = 32 ", "BATCH_SIZE = 32"),
        ("DROPOUT_RATE=1e-1", "DROPOUT_RATE = 1e-1"),
        ("TRAIN_STEPS=None", "TRAIN_STEPS = None"),
        ("TRAIN_STEPS=10_000", "TRAIN_STEPS = 10_000"),
        ("LENGTHS={'inputs': 3}", "LENGTHS = {'inputs': 3}"),
        ("OPTIMIZER=@optimizers.adamw()", "OPTIMIZER = @optimizers.adamw()"),
        ("a.b.c=%MACRO", "a.b.c = %MACRO"),
        ("a.b.c=[@one.two(), @three.four]", "a.b.c = [@one.two(), @three.four]"),
        # What only begins like a value is a text as a whole.
        ("INPUTS=3.30 Swiss francs", "INPUTS = '3.30 Swiss francs'"),
        ("INPUTS=5 minutes", "INPUTS = '5 minutes'"),
        ("INPUTS=None of it", "INPUTS = 'None of it'"),
        ("MODEL_DIR=2024-05-01", "MODEL_DIR = '2024-05-01'"),
        ("INPUTS=[1", "INPUTS = '[1'"),
        ("INPUTS=1\nBATCH_SIZE = 2", "INPUTS = '1\\nBATCH_SIZE = 2'"),
        ("INPUTS=It's", 'INPUTS = "It\'s"'),
    ],
)
def test_bindings_are_gins_where_gin_reads_them_and_text_elsewhere(assignment, binding):
    assert gin_utils.to_binding(assignment) == binding
    if "@" not in binding and "%" not in binding:
        name = assignment.partition("=")[0].strip()
        gin.parse_config(binding)
        assert gin.query_parameter(f"%{name}") == eval(binding.partition(" = ")[2])


@pytest.mark.parametrize("assignment", ["BATCH_SIZE", "=3", " = 3", ""])
def test_an_assignment_without_a_name_or_an_equals_sign_is_refused(assignment):
    with pytest.raises(ValueError, match="expected NAME=VALUE"):
        gin_utils.parse_config([], [assignment])


def test_a_macro_that_no_file_knows_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="reads 'TRAIN_STPES'; did you mean 'TRAIN_STEPS'"):
        _parse(MODELS[0], OBJECTIVES[0], RUNS[0], "TRAIN_STPES=5")
    # A macro that the paper's sampler alone reads would do nothing for another one.
    with pytest.raises(ValueError, match="'NUM_STEPS'; did you mean"):
        _parse(MODELS[0], OBJECTIVES[0], RUNS[0], "NUM_STEPS=5")


def test_a_macro_of_ones_own_may_be_set_where_a_binding_reads_it():
    _parse(MODELS[0], OBJECTIVES[0], RUNS[0], "trainer.train.log_period=%EVERY", "EVERY=5")
    assert gin.get_bindings("trainer.train", resolve_references=False)
    assert gin.query_parameter("%EVERY") == 5


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("trainer.trian.log_period=3", "trainer.trian"),
        ("trainer.train.log_perod=3", "parameter named 'log_perod'"),
        ("OPTIMIZER=@optimizers.adamwx()", "optimizers.adamwx"),
    ],
)
def test_an_unknown_function_or_parameter_is_refused_by_name(assignment, message):
    with pytest.raises((ValueError, AttributeError), match=message):
        _parse(MODELS[0], OBJECTIVES[0], RUNS[0], assignment)


def test_a_file_that_is_nowhere_is_refused_with_the_places_looked_in(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        gin_utils.parse_config(["models/tyni.gin"], [], [str(tmp_path)])
    for place in ("models/tyni.gin", str(tmp_path), str(ROOT)):
        assert place in str(error.value)


def test_a_directory_of_the_working_directory_does_not_hide_our_files(tmp_path, monkeypatch):
    # A run is often started where a directory `runs/` holds its results.
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    _parse()
    assert gin.query_parameter("%BATCH_SIZE") == 128


def test_the_written_configuration_can_be_read_again_and_is_the_same(tmp_path):
    _parse("models/base.gin", OBJECTIVES[1], RUNS[0], "NUM_STEPS=7")
    gin_utils.write_config(str(tmp_path / "run"))
    text = (tmp_path / "run" / "config.gin").read_text()
    gin.clear_config()
    gin_utils.parse_config([str(tmp_path / "run" / "config.gin")], ["BATCH_SIZE=4"])
    assert gin.query_parameter("%NUM_STEPS") == 7
    assert gin.query_parameter("%BATCH_SIZE") == 4
    assert gin.config_str() == text.replace("BATCH_SIZE = 128", "BATCH_SIZE = 4")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.gin"]


@pytest.mark.parametrize("room", ["checkpointing", "interop"])
def test_what_commands_load_after_the_configuration_is_locked_registers_nothing(room):
    for path in (gin_utils.config_dir().parent / "diffusion_t5x" / room).glob("*.py"):
        assert "gin.configurable" not in path.read_text(encoding="utf-8"), path
