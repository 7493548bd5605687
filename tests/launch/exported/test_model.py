"""Reading an exported folder, or a stock one: damage is named, weights arrive bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import Glm4MoeForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from data.cli import UserError
from launch import manifest
from launch.exported import files
from launch.exported.files import check_weights, weights_hash
from launch.exported.model import check_arithmetic, load_exported, load_model, load_tokenizer
from launch.exporting.formats import build, exported_config
from launch.run.initial_weights import load_weights
from model import MoEGPTConfig, MoEGPTForCausalLM


def trained(**overrides: Any) -> MoEGPTForCausalLM:
    fields = {"vocab_size": 97, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "n_routed_experts": 12}
    model = MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", **{**fields, **overrides})).eval()
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias.normal_(std=0.1)
    return model


def written(folder: Path, model: MoEGPTForCausalLM, format: str, dtype: str = "float32", shard: str = "5GB") -> PreTrainedModel:
    made = build(exported_config(model.config, format), model.state_dict().items(), dtype)
    made.save_pretrained(folder, max_shard_size=shard)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, "w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    manifest.write_manifest(folder, manifest.record_all(folder), kind="export", step=1)
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", ["moe_gpt", "glm4_moe"])
def test_the_training_model_is_what_is_loaded(format: str, dtype: str, tmp_path: Path) -> None:
    """With its kernels, for a stock Glm4Moe folder as well; the weights to the bit."""
    model = trained(attention_sinks=format == "moe_gpt")
    made = written(tmp_path / "hf", model, format, dtype)
    read, tokenizer = load_exported(tmp_path / "hf", device="cpu", attn_implementation="flash")
    assert isinstance(read, MoEGPTForCausalLM) and read.config._attn_implementation == "flash" and not read.training
    assert len(tokenizer) == 97 and read.dtype == getattr(torch, dtype)
    theirs = made.state_dict()
    assert theirs.keys() == read.state_dict().keys()
    assert all(torch.equal(value, theirs[name]) for name, value in read.state_dict().items())
    ids = torch.randint(0, 97, (2, 20))
    if dtype == "float32":
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_an_export_from_before_still_loads(tmp_path: Path) -> None:
    """Those carried the training model's own files and its own names of fields."""
    model = trained()
    MoEGPTConfig.register_for_auto_class()
    MoEGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    try:
        model.save_pretrained(tmp_path)
    finally:
        MoEGPTConfig._auto_class = MoEGPTForCausalLM._auto_class = None
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, "w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert "qk_norm" in fields and fields["auto_map"]["AutoModelForCausalLM"] == "modeling.MoEGPTForCausalLM"
    read, _ = load_exported(tmp_path, device="cpu")
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_folder_does_not_decide_how_text_is_made(tmp_path: Path) -> None:
    """Beams would give more rows than were asked for, a cache of its own name is refused beside ours, the rest changes tokens."""
    written(tmp_path, trained(), "moe_gpt")
    path = tmp_path / "generation_config.json"
    theirs = {
        "num_beams": 4,
        "cache_implementation": "static",
        "min_new_tokens": 50,
        "suppress_tokens": [5],
        "eos_token_id": [3, 4],
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **theirs}))
    model, _ = load_exported(tmp_path, device="cpu")
    kept = model.generation_config.to_diff_dict()
    assert kept["eos_token_id"] == [3, 4] and not (set(theirs) - {"eos_token_id"}) & set(kept)


@pytest.mark.parametrize("damage", ["flipped", "short", "gone", "header", "tokenizer"])
def test_a_damaged_file_is_refused_by_its_name(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    written(folder, trained(), "moe_gpt", shard="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    path = folder / "tokenizer.json" if damage == "tokenizer" else shards[1]
    content = bytearray(path.read_bytes())
    if damage == "short":
        path.write_bytes(content[:-7])
    elif damage == "gone":
        path.unlink()
    else:
        content[3 if damage == "header" else len(content) // 2] ^= 4
        path.write_bytes(content)
    with pytest.raises(UserError, match=path.name):
        load_exported(folder, device="cpu")
    if damage in ("short", "header"):  # a folder of somebody else has no manifest
        (folder / manifest.MANIFEST).unlink()
        with pytest.raises(UserError, match=f"{path.name} is damaged"):
            load_exported(folder, device="cpu")


RECORD = {"bytes": 1, "xxh3_128": "0"}
TABLES: list[Any] = [None, [], [["model.safetensors", RECORD]], {"model.safetensors": 5}, {"model.safetensors": {}}]
TABLES += [{"model.safetensors": {**RECORD, "bytes": "1"}}, {"model.safetensors": {"bytes": 1}}]
TABLES += [{"../other/model.safetensors": RECORD}, {"/model.safetensors": RECORD}, {"x\0.safetensors": RECORD}]


@pytest.mark.parametrize("files", TABLES, ids=str)
def test_a_manifest_without_records_of_files_inside_is_a_sentence(files: Any, tmp_path: Path) -> None:
    """Somebody else's, which would have files outside of the folder read; with a right sum."""
    body = {"format": 1, "kind": "export", "files": files}
    body["checksum"] = manifest._checksum(body)
    (tmp_path / manifest.MANIFEST).write_bytes(manifest.to_json(body))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        check_weights(tmp_path)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        weights_hash(tmp_path)


@pytest.mark.parametrize("body", ['{"schemaVersion": 2, "layers": []}', '{"kind": "model", "files": {}}'])
def test_another_programs_manifest_records_nothing(body: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    without = weights_hash(tmp_path)
    (tmp_path / manifest.MANIFEST).write_text(body)
    assert weights_hash(tmp_path) == without


@pytest.mark.parametrize(
    ("of", "says"),
    [("damage", r"damaged: its own checksum is wrong; export it again"), ("newer", r"has format 2, made by a newer")],
)
def test_an_exports_manifest_is_held_to_its_checksum_and_format(
    of: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped digit of a record was taken for damaged weights, whose names may be what has flipped."""
    if of == "newer":
        monkeypatch.setattr(manifest, "MANIFEST_FORMAT", 2)
    manifest.write_manifest(tmp_path, {}, kind="export", step=1)
    monkeypatch.undo()
    if of == "damage":
        path = tmp_path / manifest.MANIFEST
        path.write_text(path.read_text().replace('"step": 1', '"step": 3'))
    with pytest.raises(UserError, match=says):
        weights_hash(tmp_path)


def test_what_a_user_may_edit_is_not_checked(tmp_path: Path) -> None:
    written(tmp_path, trained(), "moe_gpt")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "generation_config.json").write_text("{}")
    check_weights(tmp_path)
    load_exported(tmp_path, device="cpu")


def test_weights_are_read_once_for_their_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the manifest, which the loading has compared with the files, or from them: the same, and another for other weights."""
    hashed: list[str] = []
    hash_file = files.hash_file
    monkeypatch.setattr(files, "hash_file", lambda path, kind: hashed.append(path.name) or hash_file(path, kind))
    written(tmp_path / "hf", trained(), "moe_gpt", shard="200KB")
    check_weights(tmp_path / "hf")
    names = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(names) > 1 and sorted(hashed) == [*names, "tokenizer.json"]
    hashed.clear()
    recorded = weights_hash(tmp_path / "hf")
    assert hashed == []
    (tmp_path / "hf" / manifest.MANIFEST).unlink()
    assert weights_hash(tmp_path / "hf") == recorded and hashed == names
    written(tmp_path / "hf", trained(), "moe_gpt", shard="200KB")
    assert weights_hash(tmp_path / "hf") != recorded


def test_a_missing_weight_is_not_made_up(tmp_path: Path) -> None:
    """transformers would start it at random, with a warning."""
    written(tmp_path, trained(attention_sinks=False), "moe_gpt")
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "attention_sinks": True}))
    with pytest.raises(UserError, match=r"self_attn\.sinks is missing"):
        load_exported(tmp_path, device="cpu")


@pytest.mark.parametrize(
    "name", ["norm.weight", "layers.1.mlp.experts.5.up_proj.weight", "layers.0.mlp.gate.e_score_correction_bias"]
)
def test_a_missing_weight_of_a_stock_folder_is_not_made_up_either(name: str, tmp_path: Path) -> None:
    """Of somebody else's, without a manifest: what its file lacks was drawn at random, and every command went on with it."""
    config = MoEGPTConfig.preset("tiny", vocab_size=97, hidden_size=64, num_hidden_layers=2, attention_sinks=False)
    Glm4MoeForCausalLM(exported_config(config, "glm4_moe")).save_pretrained(tmp_path)  # type: ignore[arg-type]
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    del tensors[f"model.{name}"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not hold"):
        load_model(tmp_path, config)


def test_nor_of_one_that_is_no_model_of_ours(tmp_path: Path) -> None:
    config = MoEGPTConfig.preset("tiny", vocab_size=97, hidden_size=64, num_hidden_layers=2, attention_sinks=False)
    other = exported_config(config, "glm4_moe")
    other.attention_bias = True
    Glm4MoeForCausalLM(other).save_pretrained(tmp_path)  # type: ignore[arg-type]
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, "w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    assert isinstance(load_exported(tmp_path, device="cpu")[0], Glm4MoeForCausalLM)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"does not hold its model: model\.layers\.1\.self_attn\.q_proj\.weight is missing"):
        load_exported(tmp_path, device="cpu")


@pytest.mark.parametrize("is_ours", [True, False])
@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_folder_does_not_choose_the_code_that_computes_it(field: str, is_ours: bool, tmp_path: Path) -> None:
    """A name such as owner/repo is one of the hub's kernels, which transformers would fetch and import."""
    config = MoEGPTConfig.preset("tiny", vocab_size=97, hidden_size=64, num_hidden_layers=1, attention_sinks=False)
    stock = exported_config(config, "glm4_moe")
    stock.attention_bias = not is_ours  # type: ignore[attr-defined]
    Glm4MoeForCausalLM(stock).save_pretrained(tmp_path)  # type: ignore[arg-type]
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, "w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: "owner/repo"}))
    for asked, taken in (("sdpa", "sdpa"), ("eager", "eager"), ("flash", "flash" if is_ours else "sdpa")):
        model, _ = load_exported(tmp_path, device="cpu", attn_implementation=asked)
        assert isinstance(model, MoEGPTForCausalLM) is is_ours and model.config._attn_implementation == taken


@pytest.mark.parametrize("format", ["moe_gpt", "glm4_moe"])
def test_training_begins_from_a_folder_to_the_bit(format: str, tmp_path: Path) -> None:
    """Export, begin from it, export again: the same bytes of weights, from a stock folder as well."""
    model = trained(attention_sinks=format == "moe_gpt")
    written(tmp_path / "one", model, format)
    begun = MoEGPTForCausalLM(model.config)
    load_weights(begun, tmp_path / "one")
    assert all(torch.equal(value, begun.state_dict()[name]) for name, value in model.state_dict().items())
    written(tmp_path / "two", begun, format)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_a_stock_folder_made_by_transformers_alone(tmp_path: Path) -> None:
    config = MoEGPTConfig.preset("tiny", vocab_size=97, hidden_size=64, num_hidden_layers=2, attention_sinks=False)
    theirs = Glm4MoeForCausalLM(exported_config(config, "glm4_moe")).eval()  # type: ignore[arg-type]
    theirs.save_pretrained(tmp_path)
    model = MoEGPTForCausalLM(config).eval()
    load_weights(model, tmp_path)
    ids = torch.randint(0, 97, (2, 20))
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor is 1.0 there and 2.5 in this run"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok is 2 there"),
        ({"attention_sinks": True}, "attention_sinks is False there and True in this run"),
    ],
)
def test_another_arithmetic_is_refused(fields: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    """The weights would fit, and mean something else."""
    model = trained(attention_sinks=False)
    written(tmp_path, model, "glm4_moe")
    wanted = MoEGPTConfig(**{**model.config.to_dict(), **fields})
    with pytest.raises(UserError, match=sentence):
        check_arithmetic(tmp_path, wanted)


def test_a_longer_context_may_begin_from_a_shorter_one(tmp_path: Path) -> None:
    model = trained()
    written(tmp_path, model, "moe_gpt")
    check_arithmetic(tmp_path, model.config.with_rope_factor(8))


def test_other_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_exported(tmp_path, device="cpu")
    written(tmp_path / "hf", trained(), "moe_gpt")
    for text, sentence in (("{", "config.json"), ('{"model_type": "brontosaurus"}', "brontosaurus")):
        (tmp_path / "hf/config.json").write_text(text)
        with pytest.raises(UserError, match=sentence):
            load_exported(tmp_path / "hf", device="cpu")
    shutil.rmtree(tmp_path / "hf")


DEEP = "[" * 100_000
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12874544\n"


@pytest.mark.parametrize("recorded", [True, False], ids=["our export", "somebody's folder"])
def test_a_clone_without_git_lfs_is_named(recorded: bool, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    written(folder, trained(), "moe_gpt")
    if not recorded:
        (folder / manifest.MANIFEST).unlink()
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        held = (folder / name).read_bytes()
        (folder / name).write_bytes(LFS)
        with pytest.raises(UserError, match=rf"{name} is a git-LFS pointer: fetch the file itself with git lfs pull"):
            load_exported(folder, device="cpu")
        (folder / name).write_bytes(held)
    load_exported(folder, device="cpu")


INDICES = [b"", b"[]", b"{}", b'{"weight_map": 3}', b'{"weight_map": {}}', b'{"weight_map": {"a": [1]}}', b"\xff", DEEP.encode()]
INDICES += [b'{"weight_map": {"a": "../b"}}', b'{"weight_map": {"a": 3, "b": "c"}}']


@pytest.mark.parametrize("format", ["moe_gpt", "glm4_moe"])
def test_a_stock_folder_that_was_not_copied_whole_is_a_sentence(format: str, tmp_path: Path) -> None:
    written(tmp_path, trained(attention_sinks=format == "moe_gpt"), format, shard="300KB")
    (tmp_path / manifest.MANIFEST).unlink()
    index, second = tmp_path / "model.safetensors.index.json", sorted(tmp_path.glob("*.safetensors"))[1]
    load_exported(tmp_path, device="cpu")
    held = index.read_bytes()
    for content in INDICES:
        index.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
            load_exported(tmp_path, device="cpu")
    index.write_bytes(held)
    second.unlink()
    with pytest.raises(UserError, match=rf"{second.name} is missing, 1 of \d shards"):
        load_exported(tmp_path, device="cpu")
    index.unlink()
    with pytest.raises(UserError, match="has no weights"):
        load_exported(tmp_path, device="cpu")


def test_a_generation_config_that_is_no_object_is_named(tmp_path: Path) -> None:
    written(tmp_path, trained(), "moe_gpt")
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"generation_config\.json is not a JSON object"):
        load_exported(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["adapter_config.json", "generation_config.json", "pytorch_model.bin"])
def test_what_else_transformers_reads_from_a_folder_is_a_sentence_where_it_fails(name: str, tmp_path: Path) -> None:
    """Of an adapter that is none, a setting that cannot be, weights that would run a program."""
    folder = tmp_path / "hf"
    written(folder, trained(), "moe_gpt")
    content = {"adapter_config.json": b"<html>", "generation_config.json": b'{"cache_implementation": "evil"}'}.get(name)
    if content is None:
        for path in (folder / "model.safetensors", folder / "manifest.json"):
            path.unlink()
        content = b"\x80\x02cposix\nsystem\nX\x05\x00\x00\x00false\x85R."
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match="does not hold the model"):
        load_exported(folder, device="cpu")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"<html>", b"[]", b"\xff", b'{"model": {}}', DEEP.encode()], ids=lambda b: str(b[:8])
)
def test_a_stock_folders_broken_tokenizer_is_a_sentence(content: bytes, name: str, tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, "w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    try:
        load_tokenizer(tmp_path)
    except UserError as error:
        assert name in str(error)
    else:
        assert name == "tokenizer_config.json" and content.startswith(b'{"')


def test_a_stock_configuration_is_a_model_to_train(tmp_path: Path) -> None:
    """`--model stock/config.json --init_from stock/`; what this model cannot be is refused with the file's name."""
    from launch.model_config import load_model_config

    config = MoEGPTConfig.preset("tiny", attention_sinks=False, routed_scaling_factor=2.5)
    stock = exported_config(config, "glm4_moe")
    stock.save_pretrained(tmp_path)
    read = load_model_config(str(tmp_path / "config.json"))
    assert not read.attention_sinks and read.routed_scaling_factor == 2.5 and read.rope_parameters == config.rope_parameters
    stock.attention_bias = True  # type: ignore[attr-defined]
    stock.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config\.json: attention_bias"):
        load_model_config(str(tmp_path / "config.json"))


SIZES: list[dict[str, Any]] = [
    *({"vocab_size": 1 << 40}, {"vocab_size": 1 << 62}, {"hidden_size": "x"}, {"num_labels": 10**9}),
    *({"num_hidden_layers": 10**7}, {"num_hidden_layers": 9_999}, {"num_hidden_layers": 1}),
    *({"dtype": 5}, {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
]
CONFIGS: list[Any] = [DEEP, '{"x":' + DEEP, "[]", *SIZES]


@pytest.mark.parametrize("fields", CONFIGS, ids=lambda fields: str(fields)[:24])
def test_a_configuration_without_sense_is_a_sentence(fields: Any, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    written(folder, trained(), "moe_gpt")
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(fields if isinstance(fields, str) else json.dumps(held | fields))
    with pytest.raises(ValueError, match=r"config\.json"):
        load_exported(folder, device="cpu")
