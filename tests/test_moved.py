"""What users imported or named before modules moved works, or its error names the new place."""

import importlib
import pathlib
import re
import runpy

import pytest

import diffusion_t5x
from diffusion_t5x import gin_utils, moved, names

# The modules of the package while it was flat.
_MODULES = """
    blocks bound_network candidates checkpoint_fit checkpoint_integrity checkpoint_items
    checkpoint_reading checkpoints commands compiled_program conversion convert corruption data
    data.cache data.data_layout data.datasets data.detokenize data.embedded_code
    data.embedded_python data.embedded_translation data.feature_converters data.file_readers
    data.language_mixture data.local_files data.preprocessors data.shard_seeds data.sources
    data.text_readers data.tfds_source data.vocabularies decoding decoding.active_set
    decoding.autoregressive decoding.blocks decoding.denoising decoding.diffusion
    decoding.growth decoding.readout decoding.rerank decoding.stopping decoding.updates
    decoding_speed disk_space drawing dry_run early_stopping eval evaluation exit_codes
    experiment_graph experiments gin_utils hlo hlo_costs infer inference interop interop.arrays
    interop.t5x_checkpoints interop.t5x_networks interop.t5x_restore launch launch_local losses
    metric_logs models networks networks.attention networks.cache networks.config
    networks.data_parts networks.decoder_only networks.devices networks.encoder_decoder
    networks.flash_attention networks.layers networks.layout networks.patterns nonfinite
    objectives optimizers partitioning predictor preemption progress report run_record sample
    sampling speed speed_experiment starting_point tables topologies train train_state
    train_step trainer watchdog
"""
OLD = _MODULES.split()


PACKAGE = pathlib.Path(diffusion_t5x.__file__).parent


@pytest.mark.parametrize("name", OLD)
def test_an_old_module_imports_or_its_error_names_one_that_does(name):
    try:
        module = importlib.import_module(f"diffusion_t5x.{name}")
    except ImportError as error:
        new = re.search(r"is now (\S+); change|is gone; (\S+) replaces", str(error))
        assert new, error
        importlib.import_module(new[1] or new[2])
    else:
        assert PACKAGE in pathlib.Path(module.__file__).parents


def test_no_old_name_hides_a_module_that_is_there():
    for name in (*moved.MODULES, *moved.REPLACED):
        path = PACKAGE / name.replace(".", "/")
        assert not path.is_dir() and not path.with_suffix(".py").exists(), name


def test_a_command_that_is_gone_says_what_replaces_it():
    with pytest.raises(ImportError, match=r"benchmarks\.figure3 replaces it"):
        runpy.run_module("diffusion_t5x.speed", run_name="__main__")


def test_a_gin_file_with_an_old_import_is_refused_by_the_new_name(tmp_path):
    (tmp_path / "mine.gin").write_text(
        "from __gin__ import dynamic_registration\nfrom diffusion_t5x import checkpoints\n"
    )
    message = r"checkpoints is now diffusion_t5x\.checkpointing\.checkpoints(.|\n)*mine\.gin"
    with pytest.raises(ImportError, match=message):
        gin_utils.parse_config([str(tmp_path / "mine.gin")], [])


@pytest.mark.parametrize(("old", "new"), moved.GIN_FILES.items())
def test_a_gin_file_is_at_its_old_or_its_new_name(old, new):
    found = [(gin_utils.config_dir() / name).is_file() for name in (old, new)]
    assert found.count(True) == (1 if new.endswith(".gin") else 0)


def test_an_old_gin_file_is_refused_by_its_new_name_typed_or_included(tmp_path, monkeypatch):
    old, new = "settings/gpu.gin", "hardware/gpu.gin"
    monkeypatch.setitem(moved.GIN_FILES, old, new)
    with pytest.raises(FileNotFoundError, match=f"--gin_file={old} .* it is now {new}"):
        gin_utils.parse_config([old], [])
    (tmp_path / "mine.gin").write_text(f"include {old!r}\n")
    with pytest.raises(FileNotFoundError, match=f"{old}: it is now {new}"):
        gin_utils.parse_config([str(tmp_path / "mine.gin")], [])


@pytest.mark.parametrize(("old", "new"), moved.GIN_NAMES.items())
def test_an_old_gin_name_is_refused_by_its_new_one(old, new):
    with pytest.raises(ValueError, match=f"{old} is now {new}"):
        gin_utils.parse_config([], [f"{old}.num_microbatches=2"])


@pytest.mark.parametrize(("setting", "old"), moved.VALUES)
def test_an_old_value_of_a_setting_is_refused_by_what_replaces_it(setting, old):
    with pytest.raises(ValueError, match=f"{setting} '{old}' is gone; .* replaces it"):
        names.check_known(old, ["table1"], setting)
