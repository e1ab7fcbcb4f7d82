"""Loading through the auto classes: official config.json files, no prompt, and nothing from the checkpoint executed."""

import runpy
from pathlib import Path

import pytest
from official_checkpoints import TRACE, write_dream, write_dream_tokenizer, write_llada, write_llada_moe

import sinkprune_plugin.models as models

TINY = Path(__file__).parent.parent.parent / "sinkprune_plugin" / "assets" / "tiny-llada"
PAIRS = {
    "llada": (write_llada, "LLaDAModelLM"),
    "llada-moe": (write_llada_moe, "LLaDAMoEModelLM"),
    "Dream": (write_dream, "DreamModel"),
}


def test_registering_again_and_again_changes_nothing():
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for _ in range(2):
        models.register_configs()
        models.register_models()
        models.register_tokenizers()
        models.register_imported()
    for model_type, name in (("llada", "LLaDAModelLM"), ("mmada", "MMaDAModelLM"), ("Dream", "DreamModel")):
        config_class = CONFIG_MAPPING[model_type]
        assert config_class.__module__.startswith("sinkprune_plugin.")
        for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
            assert auto_class._model_mapping[config_class].__name__ == name


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("trust", [None, False, True])
def test_nothing_from_the_checkpoint_is_executed(kind, trust, tmp_path, monkeypatch):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    def no_prompt(*_):
        raise AssertionError("asked whether to run remote code")

    monkeypatch.setattr("builtins.input", no_prompt)
    write, name = PAIRS[kind]
    write(tmp_path)
    given = {} if trust is None else {"trust_remote_code": trust}
    config = AutoConfig.from_pretrained(tmp_path, **given)
    assert type(config).__module__.startswith("sinkprune_plugin.")
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
        assert type(auto_class.from_pretrained(tmp_path, **given)).__name__ == name
        assert type(auto_class.from_config(config, **given)).__name__ == name
    assert not (tmp_path / TRACE).exists()


def test_the_trace_would_be_seen_if_the_file_ran(tmp_path):
    # Guards the test above: the planted file does leave its trace when executed.
    write_llada(tmp_path)
    runpy.run_path(str(tmp_path / "modeling_llada.py"))
    assert (tmp_path / TRACE).exists()


def test_dream_tokenizer_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "a").mkdir()
    write_dream(tmp_path / "a")
    write_dream_tokenizer(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text((tmp_path / "a" / "config.json").read_text())
    again = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert again("ab a c<|mask|>").input_ids == tokenizer("ab a c<|mask|>").input_ids == [6, 7, 5, 4, 1]
    assert again.decode([6, 7]) == "ab a"


def test_llada_tokenizer_loads_through_the_auto_class():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (0, 1, 2)
    text = "The state of the union is strong."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
