"""Training from answers that were decoded in slots, or from a cache that grew in pieces."""

import numpy as np
import pytest
import tiny_run

tiny, one_device = tiny_run.tiny, tiny_run.one_device
SHORT = {"train__steps": 2, "eval__every": 0, "checkpoint__best": ""}


@pytest.fixture(scope="module")
def in_step(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("step") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        assert tiny_run.train(tiny, workdir, **SHORT) == 0
    return tiny_run.curve(workdir)


@pytest.mark.parametrize("keys", [{"rollout__slots": 3}, {"rollout__segments": 2}], ids=str)
def test_a_run_learns_what_it_learns_from_rows_in_step(tiny, in_step, tmp_path, one_device, keys):
    assert tiny_run.train(tiny, tmp_path / "run", **SHORT, **keys) == 0
    found = tiny_run.curve(tmp_path / "run")
    assert len(found) == len(in_step)
    for line, expected in zip(found, in_step, strict=True):
        assert line.keys() == expected.keys()
        numbers = {name for name, value in expected.items() if isinstance(value, int | float)}
        for name in numbers:
            np.testing.assert_allclose(
                line[name], expected[name], rtol=1e-3, atol=1e-6, err_msg=name
            )
        assert {"loss", "kl_nats", "mean_length"} <= numbers


def test_slots_that_devices_cannot_share_end_the_command(tiny, tmp_path, capsys):
    keys = {"rollout__slots": 3, "train__prompts": 8}  # on eight devices
    assert tiny_run.train(tiny, tmp_path / "run", **keys) == 1
    words = "rollout.slots is 3: expected a multiple of the 8 batch shards"
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    keys = {"rollout__slots": 8, "rollout__segments": 2}
    assert tiny_run.train(tiny, tmp_path / "run", **keys) == 1
    assert "rollout.segments is 2: expected from 1 to 8, and 1 with" in capsys.readouterr().err
