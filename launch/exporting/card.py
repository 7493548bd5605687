"""The model card of an exported folder: what the run's own files say, and nothing that they do not."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import read_json, small_file
from data.redact import redact
from launch.checkpoint.folder import run_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: A run of a million steps logs some 500 MB at most.
METRICS_BYTES = 1 << 30
TITLE = "# A Mixture-of-Experts code model"
INTENDED = """Completing and filling in source code, for people who read what it writes. It is a base model: it continues
text and has not been taught to follow instructions, to refuse, or to be safe in a conversation."""
LIMITS = """What it writes may be wrong, insecure, or close to a document that it was trained on, whose license then
holds; run it in a sandbox and review it as a stranger's patch. It knows nothing after its data was collected."""


def model_card(model: PreTrainedModel, checkpoint: Path) -> str:
    """Markdown with the front matter that the hub reads. `checkpoint`: runs/R/checkpoints/step_N."""
    run = redact(_read(run_of(checkpoint) / "config.json"))  # a run of an older version may not have
    state = _read(checkpoint / "state.json")
    config = model.config
    total = sum(p.numel() for p in model.parameters())
    sections = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [code, moe, {config.model_type}]\n---",
        TITLE,
        f"{total:,} parameters, {config.num_hidden_layers} layers, {config.n_routed_experts} experts of which a token uses "
        f"{config.num_experts_per_tok}, context {config.max_position_embeddings:,} tokens.",
        "## Training\n\n" + "\n".join(f"- {line}" for line in training_lines(run, state, logged_losses(checkpoint, state))),
        "## Data\n\n" + "\n".join(f"- {line}" for line in data_lines(run)),
        f"## Intended use\n\n{INTENDED}",
        f"## Limits\n\n{LIMITS}",
        f"## Loading\n\n{loading(config.model_type)}",
    ]
    return "\n\n".join(sections) + "\n"


def training_lines(run: dict[str, Any], state: dict[str, Any], losses: list[float]) -> list[str]:
    lines = [f"{state.get('step', 0):,} steps, {state.get('tokens', 0):,} tokens"]
    if state.get("best_loss") is not None:
        lines.append(f"best validation loss {state['best_loss']:.4f} nats a token")
    if losses:
        lines.append(f"training loss at the last logged step {losses[-1]:.4f}")
    if versions := _object(run, "versions"):
        lines.append("made with " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    if run.get("git_commit"):
        lines.append(f"code at commit {run['git_commit']}")
    if command := _list(run, "command"):
        lines.append(f"command: `{shlex.join(str(word) for word in redact(command))}`")
    return lines


def logged_losses(checkpoint: Path, state: dict[str, Any]) -> list[float]:
    """The training losses up to the checkpoint's step."""
    try:
        lines = small_file(run_of(checkpoint) / "metrics.jsonl", METRICS_BYTES).splitlines()
    except OSError:
        return []
    return [loss for line in lines if (loss := _loss(line, state.get("step", 0))) is not None]


def _loss(line: bytes, last: int) -> float | None:
    """The training loss in a row up to step `last`; None where it has none, or is half a line."""
    try:
        row = json.loads(line)
        return float(row["loss"]) if row.get("step", 0) <= last else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def data_lines(run: dict[str, Any]) -> list[str]:
    """Where the shards' folders are still there, their manifests say how many documents, under which licenses."""
    sources = _object(run, "sources")
    names, tokens = _list(sources, "sources"), _list(sources, "tokens")
    lines = [f"{name}: {_number(count)} tokens" for name, count in zip(names, tokens, strict=False)] or ["not recorded"]
    if sources.get("fingerprint"):
        lines.append(f"fingerprint {sources['fingerprint']}")
    for folder, manifest in shard_manifests(run):
        arguments = _object(manifest, "arguments")
        kept = ", ".join(map(str, _list(arguments, "licenses"))) or "any, or unknown"
        count = sum(_object(_object(manifest, "splits"), split).get("documents", 0) for split in _object(manifest, "splits"))
        lines.append(
            f"{folder}: {count:,} documents, licenses kept: {kept}, fill-in-the-middle rate {arguments.get('fim_rate', 0)}"
        )
    return lines


def shard_manifests(run: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(folder, manifest) of the run's data, where it still lies where it was trained from."""
    found = []
    for source in _list(_object(run, "arguments"), "data"):
        for folder in (str(source), str(source).rpartition(":")[0]):  # DIR or DIR:WEIGHT
            manifest = _read(Path(folder) / "manifest.json") if folder else {}
            if manifest:
                found.append((folder, manifest))
                break
    return found


def fim_rate(checkpoint: Path) -> float | None:
    """The highest share of documents that the run saw cut for filling in; None where its shards are gone."""
    manifests = shard_manifests(_read(run_of(checkpoint) / "config.json"))
    rates = [float(_object(manifest, "arguments").get("fim_rate") or 0.0) for _, manifest in manifests]
    return max(rates) if rates else None


def loading(model_type: str) -> str:
    trust = ", trust_remote_code=True" if model_type == "moe_gpt" else ""  # AutoTokenizer reads config.json too, and would ask
    return f'''    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("this folder", dtype="auto"{trust})
    tokenizer = AutoTokenizer.from_pretrained("this folder"{trust})
    prompt = tokenizer("def fibonacci(n):", return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))'''


def _object(holder: dict[str, Any], name: str) -> dict[str, Any]:
    """Empty where it is missing or something else: what a person edited never stops an export."""
    value = holder.get(name)
    return value if isinstance(value, dict) else {}


def _list(holder: dict[str, Any], name: str) -> list[Any]:
    value = holder.get(name)
    return value if isinstance(value, list) else []


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is none: a card never stops an export."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
