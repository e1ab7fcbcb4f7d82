"""The catalogue of native models agrees with the classes that it names."""

import re
from pathlib import Path

import pytest

from sinkprune_plugin.diffusion import families
from sinkprune_plugin.diffusion.noisy_inputs import keeps_logits
from sinkprune_plugin.models.catalogue import NATIVE_MODELS

each_model = pytest.mark.parametrize("native", NATIVE_MODELS, ids=lambda native: native.model_type)


@each_model
def test_names_resolve_to_classes_that_belong_together(native):
    assert native.config_class().model_type == native.model_type
    assert native.model_class().config_class is native.config_class()
    tokenizer = native.tokenizer_class()
    assert tokenizer is None or hasattr(tokenizer, "encode")


@each_model
def test_what_transformers_writes_as_architecture_is_served(native):
    assert native.model_class().__name__ in native.architectures


@each_model
def test_logits_of_some_positions_can_be_had(native):
    assert keeps_logits(native.model_class())


def test_every_model_type_of_a_native_family_has_a_native_class_and_no_other_has():
    named = {native.family.name for native in NATIVE_MODELS}
    known = {(family.name, kind) for family in families() if family.name in named for kind in family.model_types}
    assert known == {(native.family.name, native.model_type) for native in NATIVE_MODELS}


def test_no_model_type_or_architecture_is_listed_twice():
    types = [native.model_type for native in NATIVE_MODELS]
    architectures = [name for native in NATIVE_MODELS for name in native.architectures]
    assert len(set(types)) == len(types)
    assert len(set(architectures)) == len(architectures)


@each_model
def test_the_readme_has_a_row_for_it_with_tests_that_exist(native):
    root = Path(__file__).parent.parent.parent
    rows = [line for line in (root / "README.md").read_text().splitlines() if line.startswith("|")]
    (row,) = [line for line in rows if line.split("|")[1].strip() == native.models]
    named = re.findall(r"`((?:test|integration)\w*\.py)`", row)
    assert named
    files = {path.name for folder in ("tests", "integration_tests") for path in (root / folder).rglob("test_*.py")}
    assert set(named) <= files
    # The page on adding a family says how it is corrupted.
    page = (root / "docs" / "adding-a-family.md").read_text()
    assert f"`{native.model_type}`" in page
