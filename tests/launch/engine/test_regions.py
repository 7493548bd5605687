"""Compiled regions under DeepSpeed: the same training to the bit, one graph for all layers, refusals in a sentence."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nursery import Nursery

from data.cli import UserError
from launch.engine import regions
from launch.engine.keys import check_keys
from launch.engine.refused import check_compile
from launch.engine.regions import compile_hint, compile_regions
from launch.engine.strategy import CHECKPOINTING_MODES, CONFIG_FOLDER, Strategy, check_kinds, read_config, resolve_config
from model import MoEGPTConfig, MoEGPTForCausalLM
from model.modeling import Block

PATH = Path("some.json")


@pytest.fixture(scope="module")
def trained(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("regions")
    ranks = nursery.start(2, "tests/launch/engine/regions_worker.py", folder / "out.json", log=folder / "log")
    assert ranks.wait(240) == [0, 0], ranks.text()[-4000:]
    result: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return result


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_two_ranks_train_the_same_to_the_bit(trained: dict[str, Any], mode: str) -> None:
    found = trained[mode]
    assert found["compiled"] == found["eager"]
    assert found["eager"][0] != found["eager"][2]  # the weights moved in between
    assert found["eager"][3][1] == 2  # an evaluation, which is not compiled
    # one for all layers; where blocks are recomputed, one without gradients and one with them
    assert found["graphs"] == (2 if mode == "full" else 1) and found["breaks"] == {}


def resolved(**changes: Any) -> dict[str, Any]:
    config = {**read_config(CONFIG_FOLDER / "ep8_zero2.json"), **changes}
    return resolve_config(config, PATH, world_size=8, num_experts=8, max_steps=10)


def test_the_section_is_known_and_read() -> None:
    config = resolved(compile={"autoep_non_moe": True})
    check_keys(config, PATH)
    check_compile(config, PATH, documents=False)
    assert Strategy.of(config).compiles and not Strategy.of(resolved()).compiles
    with pytest.raises(UserError, match=r'unknown key "compile.autoep_non_mo"'):
        check_keys(resolved(compile={"autoep_non_mo": True}), PATH)
    with pytest.raises(UserError, match=r"compile.autoep_non_moe must be true or false"):
        check_kinds(PATH, {"compile": {"autoep_non_moe": 1}})


def test_selective_of_compiled_regions_is_warned_of() -> None:
    said = {
        (on, mode): compile_hint(Strategy.of(resolved(compile={"autoep_non_moe": on}, activation_checkpointing={"mode": mode})))
        for on in (True, False)
        for mode in CHECKPOINTING_MODES
    }
    assert "only the experts' half" in str(said.pop((True, "selective"))) and set(said.values()) == {None}


@pytest.mark.parametrize(
    ("attention", "traceable"), [("flash", True), ("flash", False), ("sdpa", False), ("eager", False)], ids=str
)
def test_a_kernel_that_cannot_be_traced_is_refused(attention: str, traceable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn 4 on a B200, which dynamo would end in at the first step."""
    model = MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", num_hidden_layers=1, attn_implementation=attention)).bfloat16()
    kernel, asked = SimpleNamespace(name="flash-attn 4", traceable=traceable), list[tuple[Any, ...]]()
    monkeypatch.setattr(regions, "pick_kernel", lambda *of: asked.append(of) or kernel)
    refused = pytest.raises(UserError, match=r"autoep_non_moe cannot trace flash-attn 4, .* --no-compile leaves it out")
    with nullcontext() if traceable or attention != "flash" else refused:
        assert len(compile_regions(model)) == 1
    wanted = (torch.device("cpu"), torch.bfloat16, model.config.head_dim)
    assert asked == [wanted] * (attention == "flash")


def test_a_region_that_is_not_one_graph_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a slow run."""

    def in_two(_: Block, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x

    monkeypatch.setattr(Block, "attend", in_two)
    (block,) = compile_regions(MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", num_hidden_layers=1)).train(), "eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        block.attend(torch.ones(1))


REFUSED = {
    "deepcompile": ({"compile": {"deepcompile": True}}, False, "AutoEP's layers cannot be traced"),
    "ZeRO 3": ({"compile": {"autoep_non_moe": True}, "zero_optimization": {"stage": 3}}, False, "needs whole weights"),
    "documents": ({"compile": {"autoep_non_moe": True}}, True, "--document_mask exclude each other"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_refused(name: str) -> None:
    changes, documents, sentence = REFUSED[name]
    with pytest.raises(UserError, match=sentence):
        check_compile(resolved(**changes), PATH, documents=documents)
    check_compile(resolved(compile={"autoep_non_moe": False}), PATH, documents=documents)
