"""Another number of ranks, EP size, ZeRO stage or dtype: the run converts by itself and goes on from the same state."""

import errno
import hashlib
import json
import pickle
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.checkpoint.zero_checkpoint import ZeROCheckpoint
from deepspeed.utils.tensor_fragment import fragment_address
from stub_engine import replace_file
from training_process import launch_ranks

from data.cli import UserError
from launch import manifest
from launch.checkpoint import publish
from launch.checkpoint.converter import give_moments
from launch.checkpoint.state import STATE
from launch.checkpoint.universal import _gather_unsharded, _is_whole, _rates, convert, link_or_copy, load
from launch.checkpoint.weights import CHUNK, MODEL_STATES, _assemble, check_master, master_weights, numbered, whole_momenta
from launch.cli import AgreedError
from launch.engine.settings import give_own_steps

QUICK = [  # (ranks, source, ZeRO stage, dtype, EP size); sources are of two ranks with EP 2
    (1, "zero2-bfloat16", 2, "bfloat16", 1),
    (2, "zero2-float32", 2, "float32", 1),
    (2, "zero1-bfloat16", 2, "bfloat16", 2),
    (2, "zero0-float32", 2, "float32", 2),
    (2, "zero2-float32", 0, "float32", 1),
    (4, "zero2-float32", 2, "float32", 4),
]
SLOW = [
    (1, "zero0-float32", 0, "float32", 1),
    (1, "zero3-bfloat16", 2, "bfloat16", 1),
    (2, "zero2-bfloat16", 1, "bfloat16", 2),
    (2, "zero2-float32", 2, "bfloat16", 2),
    (2, "zero2-bfloat16", 2, "float32", 1),
    (2, "zero3-float32", 2, "float32", 2),
    (2, "zero3-float32", 0, "float32", 1),
    (2, "zero3-bfloat16", 3, "bfloat16", 1),
    (2, "zero2-float32", 3, "float32", 2),
    (2, "zero0-float32", 3, "float32", 2),
    (4, "zero2-float32", 2, "float32", 2),
    (4, "zero1-bfloat16", 1, "bfloat16", 4),
]
MUON = [  # four ranks with EP 2: each expert's matrices lie on two of them, whole, and are stepped by halves
    (1, "zero2-bfloat16", 2, "bfloat16", 1),
    (2, "zero2-float32", 1, "float32", 1),
    (4, "zero2-float32", 2, "float32", 2),
]
MUON_SLOW = [
    (1, "zero2-float32", 2, "float32", 1),
    (2, "zero1-float32", 2, "float32", 2),
    (4, "zero1-float32", 2, "float32", 1),
    (4, "zero2-bfloat16", 2, "bfloat16", 4),
]


@pytest.mark.parametrize("fused", [True, False])
def test_every_state_counts_its_own_steps_where_the_kernel_reads_them(fused):
    """A fused kernel on a GPU (here: the meta device) reads the count there; the others read it on the host."""
    weights = [torch.nn.Parameter(torch.empty(3, device="meta")) for _ in range(3)]
    optimizer = torch.optim.AdamW(weights)
    optimizer.param_groups[0]["fused"] = fused
    shared = torch.tensor(5.0)
    for weight in weights:
        optimizer.state[weight] = {"step": shared, "exp_avg": torch.empty_like(weight)}
    give_own_steps(optimizer)
    steps = [optimizer.state[weight]["step"] for weight in weights]
    assert {step.device.type for step in steps} == {"meta" if fused else "cpu"}
    assert all(step.dtype == torch.float32 and step.shape == () for step in steps)
    assert len({id(step) for step in steps}) == 3
    if not fused:
        steps[0] += 1
        assert [float(step) for step in steps] == [6.0, 5.0, 5.0]


def test_an_optimizer_of_deepspeed_counts_with_an_int():
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)  # stands for DeepSpeedCPUAdam, which is no torch.optim.Adam either
    optimizer.state[weight] = {"step": torch.tensor(7.0)}
    give_own_steps(optimizer)
    assert optimizer.state[weight]["step"] == 7 and isinstance(optimizer.state[weight]["step"], int)


def test_masters_in_another_order_than_is_written_down_are_refused(nursery, tmp_path):
    """By a resume without the key, by a conversion, by an export: without a word each made other weights of them."""
    said = launch_ranks(nursery, 2, "out_of_order", folder=tmp_path)
    assert "step_2" in said.pop("as it was")
    assert "Load with the setting used to save" in said.pop("aligned")
    assert set(said) == {"without", "masters", "converted"}
    for sentence in said.values():
        assert "is not the weight that the model computed with" in sentence and "round_robin_gradients" in sentence


def test_tied_weights_convert_for_a_run_that_has_saved_nothing_yet(nursery, tmp_path):
    """The model's file has them by both names, the optimizer by one. The new run's `checkpoints/` is not there before."""
    for name, (was, is_now) in launch_ranks(nursery, 1, "tied", folder=tmp_path).items():
        assert is_now[1] == was[1] and "lm_head.weight" not in was[1], name
        assert is_now[0] == pytest.approx(was[0], rel=1e-6), name


def test_a_run_that_begins_with_a_conversion_has_a_folder_that_survives(run, tmp_path, synced, monkeypatch):
    """It has saved nothing yet. Up to where the disk is found too full."""
    (tmp_path / "new").mkdir()
    monkeypatch.setattr("launch.checkpoint.universal.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(UserError, match=r"converting .*step_3 needs"):
        convert(run / "checkpoints" / "step_3", tmp_path / "new" / "checkpoints" / "step_3.universal")
    assert synced == [tmp_path / "new"]


@pytest.mark.parametrize(("held", "times"), [(["exp_avg", "exp_avg_sq"], 2), (["exp_avg", "exp_avg_sq", "momentum_buffer"], 4)])
@pytest.mark.parametrize("fits", [True, False])
def test_a_conversion_needs_room_for_what_it_writes(run, tmp_path, monkeypatch, held, times, fits):
    """Of Muon's groups the converter first writes moments of zeros."""

    class BegunError(Exception):
        pass

    def begin(_):
        raise BegunError

    source = run / "checkpoints" / "step_3"
    body = json.loads((source / STATE).read_bytes())
    replace_file(source, STATE, manifest.to_json({**body, "optimizer": {**body["optimizer"], "state": held}}))
    size = sum(record["bytes"] for record in manifest.read_manifest(source)["files"].values())
    monkeypatch.setattr("launch.checkpoint.universal.shutil.disk_usage", lambda _: SimpleNamespace(free=times * size - (not fits)))
    monkeypatch.setattr("launch.checkpoint.universal.check_source", begin)
    with pytest.raises(BegunError) if fits else pytest.raises(UserError, match=r"converting .*step_3 needs"):
        convert(source, tmp_path / "step_3.universal")


@pytest.mark.parametrize(("stage", "compared"), [(1, True), (2, True), (3, False)])
def test_a_conversion_compares_masters_with_the_weights_that_lie_beside_them(run, tmp_path, monkeypatch, stage, compared):
    """Under ZeRO 3 the masters are all there is."""
    source, told = run / "checkpoints" / "step_3", []
    body = json.loads((source / STATE).read_bytes())
    replace_file(source, STATE, manifest.to_json({**body, "identity": {**body["identity"], "zero_stage": stage}}))

    def converter(_, target, on_phase):
        (target / "zero" / "w").mkdir(parents=True)
        torch.save({"param": torch.ones(2)}, target / "zero" / "w" / "fp32.pt")

    for name, stand_in in {
        "check_source": lambda _: None,
        "run_converter": converter,
        "_complete": lambda *_: None,
        "module_weights": lambda _: [("w", torch.zeros(2))],
    }.items():
        monkeypatch.setattr(f"launch.checkpoint.universal.{name}", stand_in)
    with pytest.raises(UserError, match="w in the optimizer's files is not the weight") if compared else nullcontext():
        convert(source, tmp_path / "step_3.universal", on_phase=told.append)
    assert told and set(told) == {"converting a checkpoint"}, "for the watchdog: of each file"
    assert (tmp_path / "step_3.universal").exists() != compared and not publish.leftovers(tmp_path)


def test_groups_keep_this_runs_settings_but_for_the_rate(tmp_path):
    """DeepSpeed takes all from the checkpoint, by position."""

    def load_checkpoint(*_, **__):
        for group in optimizer.param_groups:
            group.update(lr=5e-4, weight_decay=0.7)

    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "weight_decay": decay} for decay in (0.1, 0.0)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    optimizer._load_universal_checkpoint = None
    load(SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: 2, load_checkpoint=load_checkpoint), tmp_path)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(5e-4, 0.1), (5e-4, 0.0)]


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError(errno.EIO, "Input/output error", "fp32.pt"), OSError),
        (KeyError("param"), UserError),
        (pickle.UnpicklingError("builtins.eval"), UserError),
    ],
)
def test_ranks_agree_on_fragments_before_they_wait_for_each_other(tmp_path, error, seen):
    """DeepSpeed gathers the weights right after it has read them, where the others waited for the rank that could not."""

    class Optimizer(torch.optim.SGD):
        def _load_universal_checkpoint(self, *arguments):
            read.append(arguments)
            if error is not None:
                raise error

    def load_checkpoint(*_, **__):
        optimizer._load_universal_checkpoint("folder", True, False)
        read.append("gathered")

    def together(action):
        with pytest.raises(seen) as caught:
            action()
        raise AgreedError("rank 1 could not read it") from caught.value

    read, optimizer = [], Optimizer([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    engine = SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: 2, load_checkpoint=load_checkpoint)
    with pytest.raises(AgreedError, match="rank 1"):
        load(engine, tmp_path, together=together)
    assert read == [("folder", True, False)]
    error = None
    load(engine, tmp_path, together=lambda action: action())
    assert read[1:] == [("folder", True, False), "gathered"]


UNSHARDED = [
    (["a", "b"], ""),
    (["a"], "does not name the weights that the optimizer has"),
    (["a", "b", "b"], "does not name"),
    (["a", "c"], "does not name"),
]


@pytest.mark.parametrize(("names", "said"), UNSHARDED)
def test_the_order_of_zero_0_names_the_weights_that_are_there(tmp_path, monkeypatch, names, said):
    optimizer = {"state": {n: {key: torch.ones(2) for key in ("exp_avg", "exp_avg_sq")} for n in (0, 1)}}
    optimizer["param_groups"] = [{"params": [0]}, {"params": [1]}]
    torch.save({"optimizer": optimizer}, tmp_path / "expp_rank_0_mp_rank_00_optim_states.pt")
    torch.save({}, tmp_path / MODEL_STATES)
    weights = [("a", torch.zeros(2)), ("tied", torch.zeros(2)), ("b", torch.zeros(2))]
    monkeypatch.setattr("launch.checkpoint.universal.module_weights", lambda _: iter(weights))
    with pytest.raises(UserError, match=rf"state\.json: optimizer\.parameters {said}") if said else nullcontext():
        _gather_unsharded(tmp_path, tmp_path / "out", names, lambda: None)


def test_a_conversion_of_what_is_no_checkpoint_is_a_sentence(run, tmp_path, monkeypatch):
    """Of a state.json that lacks the order of ZeRO 0's weights it was a KeyError."""
    source = run / "checkpoints" / "step_3"
    body = json.loads((source / STATE).read_bytes())
    replace_file(source, STATE, manifest.to_json({**body, "identity": {**body["identity"], "zero_stage": 0}}))
    monkeypatch.setattr("launch.checkpoint.universal.check_source", lambda _: None)
    with pytest.raises(UserError, match=r"step_3 does not hold what a checkpoint holds.*KeyError: 'parameters'"):
        convert(source, tmp_path / "step_3.universal")
    assert not publish.leftovers(tmp_path)


def test_a_conversion_serves_only_the_checkpoint_that_it_was_made_from(tmp_path):
    """After a rollback a step is saved again, with other weights under the same name."""
    folder = tmp_path / "step_3.universal"
    (folder / "zero").mkdir(parents=True)
    assert not _is_whole(folder, "sum")
    torch.save({"param": torch.ones(3)}, folder / "zero" / "fp32.pt")
    manifest.write_manifest(folder, manifest.record_all(folder), made_from="sum")
    assert _is_whole(folder, "sum") and not _is_whole(folder, "another")
    data = bytearray((folder / "zero" / "fp32.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "zero" / "fp32.pt").write_bytes(data)
    assert not _is_whole(folder, "sum")


def test_a_file_is_copied_where_the_file_system_has_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("launch.checkpoint.universal.os.link", refuse)
    (tmp_path / "states.pt").write_bytes(b"states")
    link_or_copy(tmp_path / "states.pt", tmp_path / "others.pt")
    assert (tmp_path / "others.pt").read_bytes() == b"states"


def test_an_experts_slices_are_those_of_the_ranks_that_share_it():
    """Four ranks, EP 2: ranks 0 and 2 have halves of the first experts, 1 and 3 of the others; padding leaves one without any."""
    whole = torch.arange(4 * 3 * 2.0).view(4, 3, 2)
    first, second = (part.flatten() for part in whole.chunk(2))
    parts = [first[:7], second[:12], first[7:], None]
    assert torch.equal(_assemble("experts.w1", (2, 3, 2), parts, ep_size=2), whole)
    assert torch.equal(_assemble("norm", (24,), [first, second], ep_size=1), whole.flatten())
    with pytest.raises(ValueError, match=r"shards of \[7, 12\] numbers do not make 2 x \(2, 3, 2\)"):
        _assemble("experts.w1", (2, 3, 2), [first[:7], second, None, None], ep_size=2)


def test_files_are_in_the_order_of_their_numbers(tmp_path):
    """As strings 10 comes before 9, and experts and slices would be put together in another order."""
    names = [f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt" for layer in (2, 10) for expert in (0, 9, 10)]
    for name in reversed(names):
        (tmp_path / name).touch()
    assert [path.name for path in numbered(tmp_path, "layer_*_expert_*_model_states.pt")] == names


def save_momenta(folder: Path, *ranks: dict[str, list[float]]) -> None:
    """Muon's momenta of a checkpoint of EP 2, by rank: whole matrices of 2 x 2, end to end."""
    shapes = {"m.experts.w1": torch.Size([1, 2, 2]), "q_proj.weight": torch.Size([2, 2])}
    torch.save({"param_shapes": [shapes], "ds_autoep_layers": [{"ep_size": 2}]}, folder / "mp_rank_00_model_states.pt")
    for number, held in enumerate(ranks):
        mapping = {name: fragment_address(numel=2, start=2 * i) for i, name in enumerate(held)}
        momentum = torch.tensor([value for values in held.values() for value in values])
        state = {
            "single_partition_of_fp32_groups": [torch.zeros(4)],
            "param_slice_mappings": [mapping],
            "base_optimizer_state": {"state": {0: {"momentum_buffer": momentum}}},
        }
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{number}_mp_rank_00_optim_states.pt")


def test_muons_momentum_is_whole_or_refused(tmp_path):
    ones, twos, q = [1.0] * 4, [2.0] * 4, [5.0, 6.0, 7.0, 8.0]
    save_momenta(tmp_path, {"m.experts.w1": ones}, {"m.experts.w1": twos, "q_proj.weight": q}, {"q_proj.weight": q})
    found = {name: value.tolist() for name, value in whole_momenta(tmp_path)}
    assert found == {"m.experts.w1": [[[1, 1], [1, 1]], [[2, 2], [2, 2]]], "q_proj.weight": [[5, 6], [7, 8]]}
    save_momenta(tmp_path, {"m.experts.w1": ones}, {"q_proj.weight": q}, {"q_proj.weight": q})
    with pytest.raises(UserError, match=r"Muon's momentum of m\.experts\.w1 is on 1 of 2 EP ranks"):
        dict(whole_momenta(tmp_path))
    for wrong in (q[:-1], [*q, 9.0]):
        save_momenta(tmp_path, {"q_proj.weight": wrong})
        with pytest.raises(UserError, match=rf"Muon's momentum has {len(wrong)} elements, and its matrices have \[4\]"):
            dict(whole_momenta(tmp_path))


@pytest.mark.parametrize("padding", [0, 2])
def test_muons_stand_in_for_moments_is_stripped_to_the_master(padding):
    """Three ranks and matrices of a power of two: the last partition is padded."""
    adams = {key: torch.ones(6) for key in ("exp_avg", "exp_avg_sq")} | {"step": torch.tensor(3.0)}
    optimizer = {
        "single_partition_of_fp32_groups": [torch.ones(20), torch.ones(6)],
        "group_paddings": [padding, 0],
        "base_optimizer_state": {"state": {0: {"momentum_buffer": torch.ones(64)}, 1: adams}},
    }
    give_moments(optimizer)
    ZeROCheckpoint._strip_tensor_paddings(object.__new__(ZeROCheckpoint), {"optimizer_state_dict": optimizer})
    muons, kept = optimizer["base_optimizer_state"]["state"].values()
    assert set(muons) == set(kept) == {"exp_avg", "exp_avg_sq", "step"} and muons["step"] == 3.0
    assert muons["exp_avg"].equal(torch.zeros(20)) and muons["exp_avg_sq"].equal(torch.zeros(20))
    assert kept["exp_avg"].equal(torch.ones(6))


def test_muons_rates_are_those_of_its_file(tmp_path):
    """Of a checkpoint of the version before, whose own word was the first group's rate for all."""
    groups = [{"use_muon": use, "lr": rate} for use, rate in ((True, 0.005), (False, 0.0015), (False, 0.0015), (True, 0.005))]
    shard = {"optimizer_state_dict": {"base_optimizer_state": {"param_groups": groups}}}
    torch.save(shard, tmp_path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert _rates(tmp_path) == {True: 0.005, False: 0.0015}


def test_a_master_is_the_weight_but_for_rounding():
    master = torch.randn(CHUNK + 3, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check_master(master, master.to(dtype), Path("step_3"), "w")
    other = master.to(torch.bfloat16)
    other[-1] += 0.05
    for master_, weight in ((master, other), (master, master.roll(1)), (master[1:], other)):
        with pytest.raises(UserError, match="step_3: w in the optimizer's files is not the weight that the model computed with"):
            check_master(master_, weight, Path("step_3"), "w")
    small = 1e-4 * master[:1000]  # as a new run's last layers
    check_master(small, small.to(torch.bfloat16), Path("step_3"), "w")
    with pytest.raises(UserError, match="is not the weight that the model computed with"):
        check_master(small, small.roll(1), Path("step_3"), "w")
    master[-1] = float("nan")  # `check_finite` names it as that
    check_master(master, other, Path("step_3"), "w")


def convert_all(nursery, folder, cases, optimizer="AdamW"):
    kinds = sorted({(int(source[4]), source[6:]) for _, source, *_ in cases})
    sources = launch_ranks(nursery, 2, "make", folder=folder, kinds=kinds, ep=2, optimizer=optimizer)
    found = {}
    for ranks in sorted({case[0] for case in cases}):
        mine = [case[1:] for case in cases if case[0] == ranks]
        taken = launch_ranks(nursery, ranks, "take", folder=folder, cases=mine, optimizer=optimizer)
        found.update({(ranks, name): result for name, result in taken.items()})
    return sources, found


def check_all(sources, found, cases):
    assert len(found) == len(cases)
    for (ranks, name), result in found.items():
        source, _, target = name.partition("-to-")
        was = sources[source]
        # The fp32 masters and both moments of every parameter, every expert: to the bit. So are bias, counters and rate.
        assert result["state"] == was["state"], (ranks, name)
        assert any(value for layer in was["bias"] for value in layer)
        for key in ("bias", "counters", "position", "lr"):
            assert result[key] == was[key], (ranks, name, key)
        # Adam's bias correction goes by its own count of steps, one for every state.
        assert result["adam_steps"] == was["adam_steps"] == [3.0], (ranks, name)
        assert result["adam_steps_after_one"] == [4.0], (ranks, name)
        assert "converted from another layout" in result["message"]
        # The same masters, another order of summation or another rounding to bf16.
        same_dtype = source.split("-")[1] in target
        assert result["first_loss"] == pytest.approx(was["first_loss"], rel=1e-6 if same_dtype else 1e-4), (ranks, name)
        if "float32" in target and same_dtype and "zero0" not in name:  # DeepSpeed clips otherwise without ZeRO
            assert result["next_losses"] == pytest.approx(was["next_losses"], rel=1e-5), (ranks, name)
        assert result["converted"] == ["latest", "step_3", "step_3.universal"]
        assert result["after_save"] == ["best", "latest", "step_3", "step_4"], "the next save makes the conversion useless"
        # What an export reads of its own layout's files: every master put together from the ranks' slices, experts in order.
        masters = dict(master_weights(Path(result["folder"]) / "checkpoints" / "step_4"))
        hashes = {name: hashlib.sha256(w.detach().contiguous().numpy().tobytes()).hexdigest()[:16] for name, w in masters.items()}
        assert hashes == result["saved"] and len(hashes) > 20, (ranks, name)
        trained, resumed, conversions = result["second"]
        assert resumed == trained and conversions == [], "what was saved after a conversion resumes plainly, to the bit"
        assert result["rolled_back"] == trained, "an engine that started from a conversion loads a plain checkpoint"


@pytest.fixture(scope="module")
def quick(nursery, tmp_path_factory):
    return convert_all(nursery, tmp_path_factory.mktemp("runs"), QUICK)


def test_conversions_keep_the_state(quick):
    check_all(*quick, QUICK)


def test_muons_momentum_converts_too(nursery, tmp_path):
    sources, found = convert_all(nursery, tmp_path, MUON, optimizer="Muon")
    check_all(sources, found, MUON)
    for source in sources.values():
        matrices = {name for name, state in source["state"].items() if "momentum" in state}
        assert any(".experts.w1" in name for name in matrices) and any("q_proj" in name for name in matrices)
        assert "model.embed_tokens.weight" not in matrices and "exp_avg" in source["state"]["model.embed_tokens.weight"]


@pytest.mark.slow
def test_every_other_conversion_keeps_the_state(nursery, tmp_path):
    check_all(*convert_all(nursery, tmp_path, SLOW), SLOW)
    check_all(*convert_all(nursery, tmp_path / "muon", MUON_SLOW, optimizer="Muon"), MUON_SLOW)
