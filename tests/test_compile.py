"""A network that cannot be compiled: one line that says how to go on."""

import pytest
import torch

import diffalign
from diffalign.config import parse
from diffalign.errors import RunError
from diffalign.train import compiler_errors
from tests import worlds
from tests.test_train import config


@pytest.mark.slow
def test_a_network_that_cannot_be_compiled_says_how_to_train_without(tmp_path, monkeypatch):
    worlds.sd(tmp_path / "sd")
    worlds.parquet(tmp_path / "pairs.parquet", worlds.preference_rows(8))
    compiled = torch.nn.Module.compile

    def broken(graph, inputs):
        raise RuntimeError("No working C++ compiler found\nin /somewhere")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, **named: compiled(net, backend=broken, **named))
    with pytest.raises(
        RunError, match=r"could not be compiled: .*No working C\+\+ compiler found in .*; train\.compile=false trains"
    ) as caught:
        diffalign.train(config(tmp_path, tmp_path / "run", train={"steps": 1, "compile": True}))
    assert "\n" not in str(caught.value)
    torch.compiler.reset()


def test_errors_of_a_run_without_compiling_are_left_alone(tmp_path):
    assert compiler_errors(parse(config(tmp_path, tmp_path / "run"))) == ()
