"""Profiles: every field of every configuration refuses values of a wrong type or out of range, and
the names that are listed are those of the registries.
"""

import math
from dataclasses import MISSING, fields, is_dataclass, replace
from importlib import import_module

import pytest

from tocsr.core import config
from tocsr.core.config import PROFILES, Profile, ProfileError, get_profile
from tocsr.core.validation import Checked, OneOf

# strings that name a file, a folder or a model: any text may be one
FREE_TEXT = {
    "AutoencoderConfig.shape",
    "AutoencoderConfig.teacher",
    "CompressConfig.fingerprint",
    "CompressConfig.model",
    "DataConfig.source",
    "DataConfig.validation",
    "Profile.name",
    "UNetConfig.checkpoint",
    "UNetConfig.context",
}
# values that no field takes
NEVER = (object(), b"bytes", 1 + 2j, {1, 2}, math.nan, math.inf, -math.inf, print, int)


def parts() -> list:
    "A profile and its configurations."
    p = get_profile("cpu")
    inner = [getattr(p, f.name) for f in fields(p)]
    return [p, *(x for x in inner if is_dataclass(x))]


def fields_of_all() -> list[tuple]:
    "(configuration, field, value) of every field that is not itself a configuration."
    found = [(part, f.name, getattr(part, f.name)) for part in parts() for f in fields(part)]
    return [(part, name, value) for part, name, value in found if not is_dataclass(value)]


FIELDS = fields_of_all()
every_field = pytest.mark.parametrize(
    "part, name, value", FIELDS, ids=[f"{type(p).__name__}.{n}" for p, n, _ in FIELDS]
)


def wrong_type(value) -> list:
    "Values of another type than `value`."
    if isinstance(value, bool):
        return [1, 0, "yes", None]
    if isinstance(value, int):
        return ["3", 2.5, True, [1], (1,)]
    if isinstance(value, float):
        return ["0.5", True, [0.5], (0.5,)]
    if isinstance(value, str):
        return [3, True, ["a"], ("a",)]
    if isinstance(value, tuple):
        simple = value and not isinstance(value[0], tuple)
        nested = [(w,) for w in wrong_type(value[0])] if simple else []
        return ["text", 3, list(value) or ["R"], (value,), *nested]
    if isinstance(value, dict):
        return [[], "text", {1: 1.0}, dict(feature="3"), dict(feature=math.nan)]
    return [True, {}, [1.0]]  # an optional value that is None


def out_of_range(value) -> list:
    "Values of the type of `value` that no configuration allows."
    if isinstance(value, bool):
        return []
    if isinstance(value, (int, float)):
        return [type(value)(n) for n in (-1, -(10**9), -(2**70))]
    if isinstance(value, str):
        return ["no such name", value.upper() + "x", ""]
    if isinstance(value, tuple):
        return [(*value, bad) for v in value[:1] for bad in out_of_range(v)]
    if isinstance(value, dict):
        return [{"no such name": 1.0}, dict(feature=-1.0)]
    return []


def refused(part, name, value) -> str:
    "The message with which a value is refused."
    with pytest.raises(ProfileError) as e:
        replace(part, **{name: value})
    text = str(e.value)
    assert f"{type(part).__name__}.{name} is " in text and "; allowed: " in text
    assert "\n" not in text
    return text


@every_field
def test_a_wrong_type_is_refused(part, name, value):
    for wrong in (*NEVER, *wrong_type(value)):
        refused(part, name, wrong)


@every_field
def test_a_value_out_of_range_is_refused(part, name, value):
    "A new field fails here until its annotation says which values it allows (Count, OneOf, ...)."
    where = f"{type(part).__name__}.{name}"
    if where in FREE_TEXT:
        replace(part, **{name: "any text"})
        return
    for wrong in out_of_range(value):
        refused(part, name, wrong)


SHARES = [(p, n, v) for p, n, v in FIELDS if "share" in n or n == "ema"]


@pytest.mark.parametrize("part, name, value", SHARES, ids=[n for _, n, _ in SHARES])
def test_shares_and_decays_are_at_most_one(part, name, value):
    assert replace(part, **{name: 0.5})
    for wrong in (1.5, 20.0, 1 + 1e-9):
        refused(part, name, wrong)


def test_every_configuration_is_checked():
    assert all(isinstance(part, Checked) for part in parts())
    assert all(
        f.default is not MISSING or f.default_factory is not MISSING
        for part in parts()[1:]
        for f in fields(part)
    )


@pytest.mark.parametrize("name", PROFILES)
def test_the_profiles_are_allowed(name):
    p = get_profile(name)
    assert get_profile(name, seed=2**32 - 1).seed == 2**32 - 1
    assert replace(p) == p


def rules(kind) -> list[OneOf]:
    "The rules `OneOf` inside an annotation."
    found = [m for m in getattr(kind, "__metadata__", ()) if isinstance(m, OneOf)]
    return found + [r for k in getattr(kind, "__args__", ()) for r in rules(k)]


@pytest.mark.parametrize(
    "part, name", [(p, f) for p in parts() for f in fields(p)], ids=lambda x: getattr(x, "name", "")
)
def test_listed_names_are_those_of_the_registry(part, name):
    for rule in rules(name.type):
        if not rule.registry:
            continue
        module, attribute = rule.registry.split(":")
        registry = getattr(import_module(f"tocsr.{module}"), attribute)
        registered = {rule.prefix + n for n in registry}
        listed = {n for n in rule.names if n.startswith(rule.prefix)}
        own = {"without_refiner", "without_tileable"}  # parts of a student, no losses
        assert listed - own <= registered, "a name without an entry in the registry"


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(mixed_precision="nonsense"), ("mixed_precision", "nonsense", "bf16")),
        (dict(device="abacus"), ("device", "abacus", "cuda")),
        (dict(mixed_precision="fp16", device="cpu"), ("fp16", "cpu", "bf16")),
        (dict(teacher=3), ("Profile.teacher is 3", "TeacherConfig")),
        (dict(teacher=dict(base_steps=-5)), ("base_steps is -5", "at least 0")),
        (dict(teacher=dict(base_steps=2.5)), ("base_steps is 2.5", "whole number")),
        (dict(adapt=dict(degradation="blur")), ("degradation is 'blur'", "realesrgan")),
        (dict(search=dict(method="bayes")), ("method is 'bayes'", "nsga2")),
        (dict(search=dict(eps=(1.0, 0.5))), ("eps is (1.0, 0.5)", "ascending")),
        (dict(onestep=dict(losses=dict(style=1.0))), ("losses", "style", "adversarial")),
        (dict(onestep=dict(ablation=("without_style",))), ("ablation", "without_feature")),
        (dict(eval=dict(metrics=("psnr-y",))), ("metrics", "psnr-y", "psnry")),
        (dict(eval=dict(metrics=())), ("metrics is ()", "not empty")),
        (dict(unet=dict(heads=(1, 2))), ("heads has 2", "4 levels")),
        (dict(unet=dict(groups=3)), ("groups is 3", "divisor")),
        (dict(data=dict(patch=100)), ("patch is 100", "multiple of 8")),
        (dict(data=dict(val_share=1.5)), ("val_share is 1.5", "at most 1")),
    ],
)
def test_the_message_names_field_value_and_what_is_allowed(change, words):
    with pytest.raises(ProfileError) as e:
        get_profile("cpu", **change)
    assert all(w in str(e.value) for w in words), e.value


def test_a_list_stands_for_a_tuple():
    p = get_profile("cpu", search=dict(eps=[0.1, 0.2]), surrogates=dict(names=["R"]))
    assert p.search.eps == (0.1, 0.2) and p.surrogates.names == ("R",) and hash(p)


def test_names_registered_later_are_allowed(monkeypatch):
    from tocsr.data import degradations

    dummy = degradations.Degradation("fog", lambda *a: None, consistency_factor=1)
    monkeypatch.setitem(degradations.DEGRADATIONS, "fog", dummy)
    assert get_profile("cpu", adapt=dict(degradation="fog")).adapt.degradation == "fog"


def test_fp16_on_a_machine_without_a_gpu_is_refused_before_training(monkeypatch):
    import torch

    from tocsr.core import store

    p = get_profile("smoke", mixed_precision="fp16")
    monkeypatch.setattr(store, "pick_device", lambda name: torch.device("cpu"))
    with pytest.raises(ProfileError, match="fp16"):
        store.stage_key("autoencoder", p)
    monkeypatch.setattr(store, "pick_device", lambda name: torch.device("cuda"))
    assert store.stage_key("autoencoder", p)


def test_no_profile_is_made_without_its_checks():
    assert Profile.__post_init__ is Checked.__post_init__
    assert config.ProfileError is ProfileError
