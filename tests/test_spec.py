"""The groups of a configuration and the run that holds one of each."""

import dataclasses

import pytest

from opd_jax import spec


def run(**changed):
    """A run of defaults; its checks belong to ``config.resolve``."""
    groups = {name: cls() for name, cls in spec.GROUPS.items()}
    return spec.RunConfig(seed=0, **(groups | changed))


def test_every_group_is_a_field_of_the_run():
    names = {f.name for f in dataclasses.fields(spec.RunConfig)}
    assert names == {"seed", "profile", "init_from", "init_keep", "prediction", *spec.GROUPS}


@pytest.mark.parametrize("name", spec.GROUPS)
def test_every_field_has_a_default_and_cannot_be_set(name):
    group = spec.GROUPS[name]()
    for field in dataclasses.fields(group):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group, field.name, None)


def test_runs_hash_by_value():
    assert hash(run()) == hash(run())
    assert run() != run(data=spec.DataSpec(epochs=1))


def test_the_stored_dtype_is_the_callers_where_the_spec_leaves_it_open():
    assert spec.ModelSpec().stored_dtype("bfloat16") == "bfloat16"
    assert spec.ModelSpec(param_dtype="float32").stored_dtype("bfloat16") == "float32"


@pytest.mark.parametrize(("text", "steps"), [("", None), ("3", (3, 3)), ("2:5", (2, 5))])
def test_profiled_steps(text, steps):
    assert run(profile=text, train=spec.TrainSpec(steps=5)).profiled == steps


@pytest.mark.parametrize("text", ["0", "6", "3:2", "3:", "a:b", "2:6"])
def test_a_profile_of_steps_that_do_not_come_is_refused(text):
    with pytest.raises(spec.ConfigError, match=r"profile is .*steps from 1 to train.steps \(5\)"):
        _ = run(profile=text, train=spec.TrainSpec(steps=5)).profiled
